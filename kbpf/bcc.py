"""Programs in bcc's dialect of C, compiled by the real bcc and run by the kernel.

Needs the distribution's bcc (not PyPI's package of that name), kernel headers, and the permissions to load
what the source holds. The dialect is another language than the C that `kbpf.load` takes compiled.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence

from kbpf.errors import NotSupportedError, PermissionDeniedError
from kbpf.runtime.backends import chosen, get_backend
from kbpf.runtime.collection import Collection
from kbpf.runtime.failures import doing
from kbpf.runtime.maps.base import BpfMap
from kbpf.runtime.program import Program

_DOING = "load a program in bcc's dialect"


def load(text: str, *, program_types: Mapping[str, str] | None = None, cflags: Sequence[str] = ()) -> Collection:
    """Compile C source in bcc's dialect, and load its tables and all its functions.

    Functions are socket filters, unless `program_types` gives another type by name (``{"ingress": "sched_cls"}``).
    `cflags` go to the compiler. Tables become maps whose keys and values have the types of the source. Nothing is
    attached, whatever the functions' names say. The license is ``GPL`` if the source does not say another.

    Raises `ObjectError` with the compiler's messages, `VerifierError`, `PermissionDeniedError`,
    `MissingDependencyError` naming the command that installs bcc or the headers, and `NotSupportedError` where the
    emulator was asked for by name: bcc works with the kernel only.
    """
    from kbpf.kernel.bcc import compile_bcc
    from kbpf.kernel.probes import may_use_bpf

    if chosen() == "emulator":
        raise NotSupportedError(errno.EOPNOTSUPP, _DOING, ("bcc makes its maps in the kernel; the emulator has none",))
    backend = get_backend("kernel")
    if not may_use_bpf():
        reasons = backend.explain_denied("map_create", errno.EPERM, map_type="array")
        raise PermissionDeniedError(errno.EPERM, _DOING, reasons)
    types = sorted({"socket_filter", *(program_types or {}).values()} - {"socket_filter"})
    with doing(backend, _DOING, operation="prog_load", program_type=types[0] if types else "socket_filter"):
        compiled = compile_bcc(text, program_types or {}, cflags)
    maps: dict[str, BpfMap] = {}
    programs: dict[str, Program] = {}
    open_fds = {*compiled.programs.values(), *(map.fd for map in compiled.maps.values())}
    try:
        for name, map in compiled.maps.items():
            open_fds.discard(map.fd)  # From here on it is the Map's, or closed by its failure.
            maps[name] = BpfMap.from_fd(backend, map.fd, map.key_type, map.value_type, name)
        by_id = {map.id: map for map in maps.values()}
        for name, fd in compiled.programs.items():
            used = [by_id[id] for id in backend.program_info(fd).map_ids if id in by_id]
            open_fds.discard(fd)
            programs[name] = Program.from_fd(backend, fd, maps=used)
    except BaseException:
        for resource in (*programs.values(), *maps.values()):
            resource.close()
        for fd in open_fds:
            backend.close(fd)
        raise
    return Collection(programs, maps, backend.name)
