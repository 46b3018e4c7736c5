"""The maps and programs of one object file, loaded together."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from types import MappingProxyType, TracebackType
from typing import Any

from kbpf.backend import Backend, Engine
from kbpf.errors import BpfError
from kbpf.runtime.backends import select
from kbpf.runtime.failures import doing
from kbpf.runtime.maps.base import BpfMap, Shape, as_created
from kbpf.runtime.program import Program, load_program
from kbpf.specs import CollectionSpec, MapSpec
from kbpf.uapi.constants import BPF_F_NUMA_NODE, BPF_F_RDONLY_PROG

#: Where maps that an object pins by name are pinned (libbpf's LIBBPF_PIN_BY_NAME).
PIN_FOLDER = "/sys/fs/bpf"


class Collection:
    """Programs and maps by name; a context manager that closes them all.

    Each map has the class of its type: see `kbpf.runtime.maps`.
    """

    def __init__(self, programs: Mapping[str, Program], maps: Mapping[str, BpfMap], backend: str) -> None:
        self.programs: Mapping[str, Program] = MappingProxyType(dict(programs))
        self.maps: Mapping[str, Any] = MappingProxyType(dict(maps))
        #: ``"kernel"`` or ``"emulator"``.
        self.backend = backend

    @classmethod
    def from_spec(cls, spec: CollectionSpec, backend: str | None = None, engine: Engine = "auto") -> Collection:
        """Make the maps, then load the programs; see `load`. Nothing stays open or pinned after an error.

        `engine` is what runs emulated programs; see `load_program`.
        """
        types = {program.type for program in spec.programs.values()}
        chosen = _select(backend, types)
        maps: dict[str, BpfMap] = {}
        programs: dict[str, Program] = {}
        pinned: list[str] = []
        try:
            for name, map in spec.maps.items():
                maps[name] = _make_map(chosen, map, pinned)
            for name, program in spec.programs.items():
                used = [maps[_key_of(spec, needed)] for needed in program.maps]
                programs[name] = load_program(program, used, backend=chosen.name, engine=engine)
        except BaseException:
            for resource in (*programs.values(), *maps.values()):
                resource.close()
            for path in pinned:
                chosen.unpin(path)
            raise
        return cls(programs, maps, chosen.name)

    def close(self) -> None:
        """Close all programs and maps; what is attached stays attached."""
        for resource in (*self.programs.values(), *self.maps.values()):
            resource.close()

    def __enter__(self) -> Collection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Collection of programs {list(self.programs)} and maps {list(self.maps)}, {self.backend}>"


def load(
    source: str | os.PathLike[str] | bytes | CollectionSpec, backend: str | None = None, engine: Engine = "auto"
) -> Collection:
    """Load an object file: its maps and all its programs.

    `source` is a path, the bytes of an ELF object, or a spec read before. Maps are keyed by their names in the
    object (``.rodata``, ``.bss`` and the like by section), programs by their functions' names. `engine` is what runs
    emulated programs; see `load_program`.

    Raises `ObjectError` for a file that is not a proper BPF object, `VerifierError` for a program that is refused,
    `PermissionDeniedError`, `BpfError` (EINVAL for a pinned map that is another than the object's); nothing stays open
    or pinned then.
    """
    if not isinstance(source, CollectionSpec):
        from kbpf.elf import read_object

        source = read_object(source)
    return Collection.from_spec(source, backend, engine)


def _select(backend: str | None, types: set[str]) -> Backend:
    """One backend for the whole: ``auto`` takes the kernel only if it may load every type there."""
    for type in sorted(types):
        chosen = select(backend, program_type=type)
        if chosen.name == "emulator":
            return chosen
    return select(backend)


def _make_map(chosen: Backend, spec: MapSpec, pinned: list[str]) -> BpfMap:
    if spec.pinning == "none":
        return BpfMap._create(spec, chosen)
    path = f"{PIN_FOLDER}/{spec.name}"
    try:
        pinned_before = chosen.open_pinned(path)
    except OSError as error:
        if error.errno != errno.ENOENT:
            with doing(chosen, f"open the pinned map {path}", operation="obj_get"):
                raise
    else:
        return _reuse(chosen, spec, path, pinned_before)
    made = BpfMap._create(spec, chosen)
    try:
        made.pin(path)
    except BaseException:
        made.close()
        raise
    pinned.append(path)
    return made


def _reuse(chosen: Backend, spec: MapSpec, path: str, fd: int) -> BpfMap:
    """The map that is pinned there, if it is the one that the object declares: programs count on its sizes."""
    found = BpfMap.from_fd(chosen, fd, spec.key_type, spec.value_type)
    there, wanted = _described(found.shape), _described(as_created(spec, chosen))
    if there == wanted:
        return found
    found.close()
    hints = (f"it is {there}", f"the object declares {wanted}", "remove the pin, or give the object's map another name")
    raise BpfError(errno.EINVAL, f"use the pinned map {path}", hints)


def _described(map: Shape | MapSpec) -> str:
    # Linux sets these itself: one on device maps, the other where a node is given.
    flags = map.flags & ~BPF_F_NUMA_NODE
    if map.type in ("devmap", "devmap_hash"):
        flags &= ~BPF_F_RDONLY_PROG
    return f"{map.type} of {map.key_size}/{map.value_size} bytes, {map.max_entries} entries, flags {flags:#x}"


def _key_of(spec: CollectionSpec, needed: MapSpec) -> str:
    for name, map in spec.maps.items():
        if map == needed:
            return name
    raise ValueError(f"a program uses a map {needed.name!r} that the collection does not have")
