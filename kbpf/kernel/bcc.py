"""The real bcc: compile its dialect of C, and take what it made.

bcc belongs to the distribution: its Python half lies in the system's site-packages, outside any virtual
environment, and PyPI's `bcc` is another project. That one package is imported from where it is. Compiling takes
seconds, and for that time the process has another working directory and its standard error is caught; a lock keeps
two compilations apart.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from kbpf import types
from kbpf.errors import MissingDependencyError, ObjectError
from kbpf.isa import ebpf
from kbpf.kernel.backend import kernel_backend
from kbpf.kernel.headers import find_headers
from kbpf.kernel.packages import install_command
from kbpf.specs import ProgramSpec

# Where distributions put Python packages, for the system's Python of whatever version.
_PLACES = (
    "/usr/lib/python3/dist-packages",
    "/usr/local/lib/python3*/dist-packages",
    "/usr/lib/python3*/site-packages",
    "/usr/lib64/python3*/site-packages",
    "/usr/local/lib/python3*/site-packages",
)

_lock = threading.Lock()


class CompiledMap(NamedTuple):
    """A map's descriptor, and the types of its key and value as far as they can be said."""

    fd: int
    key_type: types.Type | None
    value_type: types.Type | None


class Compiled(NamedTuple):
    """Descriptors of the caller's own: bcc has let go of everything."""

    programs: dict[str, int]
    maps: dict[str, CompiledMap]


def find_bcc() -> Path | None:
    """The folder of the distribution's bcc package; None where it is not installed."""
    for place in _PLACES:
        for path in sorted(Path("/").glob(place[1:] + "/bcc"), reverse=True):
            # PyPI's package of that name has no such file.
            if (path / "libbcc.py").is_file():
                return path
    return None


def compile_bcc(text: str, program_types: Mapping[str, str], cflags: Sequence[str] = ()) -> Compiled:
    """Compile and load every function and table of a C program in bcc's dialect.

    A function is loaded as the type that `program_types` gives it by name, else as ``socket_filter``. Raises
    `ObjectError` with the compiler's messages, `MissingDependencyError` without bcc or kernel headers, `LoadRefused`
    with the verifier's log, and `OSError`. Nothing stays open after an error.
    """
    bcc = import_bcc()
    lib = bcc.libbcc.lib
    with _lock:
        headers = find_headers()
        if headers is None:
            raise MissingDependencyError(f"bcc needs the kernel's headers: {install_command('headers')}")
        flags = [flag.encode() for flag in (*headers.flags, *cflags)]
        array = (ctypes.c_char_p * len(flags))(*flags)
        with _environment(headers.source), _standard_error() as messages:
            module = lib.bpf_module_create_c_from_string(text.encode(), 0, array, len(flags), True, None)
    if not module:
        raise ObjectError(f"bcc could not compile this:\n{messages()}".rstrip(":\n"))
    try:
        return _take(bcc, ctypes.c_void_p(module), program_types)
    finally:
        lib.bpf_module_destroy(module)


def _take(bcc: ModuleType, module: ctypes.c_void_p, program_types: Mapping[str, str]) -> Compiled:
    """Own copies of the tables' descriptors, and the functions, loaded."""
    lib, backend = bcc.libbcc.lib, kernel_backend()
    taken = Compiled({}, {})
    functions = [lib.bpf_function_name(module, index).decode() for index in range(lib.bpf_num_functions(module))]
    unknown = set(program_types) - set(functions)
    if unknown:
        raise ValueError(f"the source has no function {', '.join(sorted(unknown))}")
    try:
        for index in range(lib.bpf_num_tables(module)):
            name: bytes = lib.bpf_table_name(module, index)
            fd = backend.duplicate(lib.bpf_table_fd(module, name))
            taken.maps[name.decode()] = CompiledMap(fd, None, None)
            info = backend.map_info(fd)
            taken.maps[name.decode()] = CompiledMap(
                fd,
                _table_type(bcc, lib.bpf_table_key_desc(module, name), info.key_size),
                _table_type(bcc, lib.bpf_table_leaf_desc(module, name), info.value_size),
            )
        license = (lib.bpf_module_license(module) or b"").decode()
        for function in functions:
            start = lib.bpf_function_start(module, function.encode())
            code = ctypes.string_at(start, lib.bpf_function_size(module, function.encode()))
            spec = ProgramSpec(
                type=program_types.get(function, "socket_filter"),
                instructions=ebpf.decode(code),
                license=license,
                name=function,
            )
            taken.programs[function] = backend.program_load(spec, ())
    except BaseException:
        for fd in (*taken.programs.values(), *(map.fd for map in taken.maps.values())):
            backend.close(fd)
        raise
    return taken


@cache
def import_bcc() -> ModuleType:
    """Import that one package from where it is; its folder does not go onto the path."""
    place = find_bcc()
    if place is None:
        raise MissingDependencyError(f"bcc is not installed: {install_command('bcc')}")
    loaded = sys.modules.get("bcc")
    if loaded is not None and Path(loaded.__file__ or "").parent == place:
        bcc = loaded
    else:
        spec = importlib.util.spec_from_file_location(
            "bcc", place / "__init__.py", submodule_search_locations=[str(place)]
        )
        assert spec is not None and spec.loader is not None
        bcc = importlib.util.module_from_spec(spec)
        sys.modules["bcc"] = bcc
        try:
            spec.loader.exec_module(bcc)
        except OSError as error:
            del sys.modules["bcc"]
            raise MissingDependencyError(
                f"bcc's library cannot be loaded ({error}): {install_command('bcc')}"
            ) from error
    lib = bcc.libbcc.lib
    # bcc's own declarations leave these out.
    lib.bpf_num_tables.argtypes, lib.bpf_num_tables.restype = [ctypes.c_void_p], ctypes.c_size_t
    lib.bpf_table_name.argtypes, lib.bpf_table_name.restype = [ctypes.c_void_p, ctypes.c_size_t], ctypes.c_char_p
    return bcc


@contextlib.contextmanager
def _environment(source: Path | None) -> Iterator[None]:
    """bcc takes the folder of the headers from the environment."""
    if source is None:
        yield
        return
    os.environ["BCC_KERNEL_SOURCE"] = str(source)
    try:
        yield
    finally:
        del os.environ["BCC_KERNEL_SOURCE"]


@contextlib.contextmanager
def _standard_error() -> Iterator[Any]:
    """Catch what libbcc writes to descriptor 2; gives a function that returns it afterwards."""
    caught = b""
    memory, own = os.memfd_create("bcc-messages"), os.dup(2)
    os.dup2(memory, 2)
    try:
        yield lambda: caught.decode(errors="replace")
    finally:
        os.dup2(own, 2)
        os.close(own)
        caught = os.pread(memory, os.fstat(memory).st_size, 0)
        os.close(memory)


def _table_type(bcc: ModuleType, description: bytes | None, size: int) -> types.Type | None:
    """The type that bcc describes in JSON; None where there is none, or it is not as large as the map says."""
    try:
        decoded = bcc.BPF._decode_table_type(json.loads(description or b""))
    except (ValueError, KeyError):
        return None
    return _from_ctypes(decoded) if ctypes.sizeof(decoded) == size else None


def _from_ctypes(kind: Any) -> types.Type:
    """bcc makes ctypes of its descriptions; kbpf's types say the same without the alignment rules."""
    size = ctypes.sizeof(kind)
    if issubclass(kind, ctypes.Array):
        return types.Array(element=_from_ctypes(kind._type_), count=kind._length_)
    if issubclass(kind, (ctypes.Structure, ctypes.Union)):
        members = tuple(_member(kind, *field) for field in kind._fields_)
        # bcc names its fillers so.
        members = tuple(member for member in members if not member.name.startswith("__pad_"))
        return types.Struct(name=kind.__name__, size=size, members=members, union=issubclass(kind, ctypes.Union))
    if kind in (ctypes.c_float, ctypes.c_double):
        return types.Float(name=kind.__name__[2:], size=size)
    # The code of a simple type is a small letter where it is signed, as in the struct module.
    code = kind._type_
    return types.Int(
        name=kind.__name__[2:], size=size, signed=code.islower() and code != "c", boolean=code == "?", char=code == "c"
    )


def _member(kind: Any, name: str, type: Any, bits: int = 0) -> types.Member:
    place = getattr(kind, name)
    # ctypes gives a bit field's place within its word in the low half of `size`.
    bit_offset = 8 * place.offset + (place.size & 0xFFFF if bits else 0)
    shown = "" if name in getattr(kind, "_anonymous_", ()) else name
    return types.Member(name=shown, type=_from_ctypes(type), bit_offset=bit_offset, bit_size=bits)
