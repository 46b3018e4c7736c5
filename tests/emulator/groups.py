"""Two control groups, one in the other, and their programs: the emulator's, or real ones with this process inside."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hooks import CGROUPS
from sides import Side

from kbpf.emulator.cgroups import add_cgroup, remove_cgroup


class Nested:
    """Descriptors of both groups; sockets that are made meanwhile are in the inner one."""

    def __init__(self, side: Side, outer: str, inner: str) -> None:
        self.side = side
        self.outer, self.inner = (side.backend.cgroup_open(path) for path in (outer, inner))

    def attach(self, program: int, attach_type: str, *, inner: bool = True, flags: int = 0) -> int:
        return self.side.backend.link_create(program, self.inner if inner else self.outer, attach_type, flags)

    def close(self) -> None:
        for group in (self.outer, self.inner):
            self.side.backend.close(group)


@contextmanager
def real_groups(side: Side) -> Iterator[Nested]:
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    before = next(line.split(":", 2)[2] for line in lines if line.startswith("0::"))
    outer = CGROUPS / f"kbpf-test-{os.getpid()}"
    inner = outer / "inner"
    inner.mkdir(parents=True)
    try:
        (inner / "cgroup.procs").write_text(str(os.getpid()))
        groups = Nested(side, str(outer), str(inner))
        try:
            yield groups
        finally:
            groups.close()
            (CGROUPS / before.lstrip("/") / "cgroup.procs").write_text(str(os.getpid()))
    finally:
        inner.rmdir()
        outer.rmdir()


@contextmanager
def emulated_groups(side: Side) -> Iterator[Nested]:
    outer, inner = (add_cgroup(path) for path in ("/sys/fs/cgroup/outer", "/sys/fs/cgroup/outer/inner"))
    try:
        with inner.entered():
            groups = Nested(side, outer.path, inner.path)
            try:
                yield groups
            finally:
                groups.close()
    finally:
        remove_cgroup(inner.path)
        remove_cgroup(outer.path)
