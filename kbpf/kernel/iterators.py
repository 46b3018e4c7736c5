"""Iterators (Linux 5.8): programs of type ``tracing`` that write text about each of the kernel's things of a kind.

Needs CAP_PERFMON and CAP_BPF, and CAP_SYS_ADMIN to make the link.
"""

from __future__ import annotations

import os
import struct

from kbpf.kernel import syscall
from kbpf.kernel.attrs import command
from kbpf.uapi.constants import BPF_CGROUP_ITER_DESCENDANTS_PRE
from kbpf.uapi.enums import ATTACH_TYPES


class IteratorCommands:
    """The iterators' part of the backend."""

    def iterator_link(
        self, program: int, *, map: int | None = None, cgroup: int | None = None, pid: int = 0, tid: int = 0
    ) -> int:
        values: dict[str, int | bytes] = {"prog_fd": program, "attach_type": ATTACH_TYPES["trace_iter"]}
        # union bpf_iter_link_info: it is refused where the kernel does not know all of it and more than that is not 0.
        if map is not None:
            over = struct.pack("=I", map)
        elif cgroup is not None:
            over = struct.pack("=IIQ", BPF_CGROUP_ITER_DESCENDANTS_PRE, cgroup, 0)
        elif pid or tid:
            over = struct.pack("=III", tid, pid, 0)
        else:
            return command("link_create", **values)
        memory = syscall.Buffer(over)
        return command("link_create", **values, iter_info=memory.address, iter_info_len=memory.size)

    def iterator_open(self, link: int) -> int:
        return command("iter_create", link_fd=link)

    def read(self, fd: int, size: int) -> bytes:
        return os.read(fd, size)
