"""Descriptors of the emulator: numbers for maps, programs, links and what else is opened.

They are numbers from `FIRST_DESCRIPTOR` on, so that one taken for a real file descriptor is nothing. An object lives as
long as a descriptor, a pin or another object holds it.
"""

from __future__ import annotations

import errno
import itertools
from typing import TypeAlias

from kbpf.emulator import cgroups, links
from kbpf.emulator.btf import Btf
from kbpf.emulator.clock import run_due
from kbpf.emulator.maps.base import Map, refused
from kbpf.emulator.maps.file import MapFile
from kbpf.emulator.maps.perf import PerfBuffer, PerfCounter
from kbpf.emulator.program import PROGRAMS, Program
from kbpf.emulator.statistics import Switch

FIRST_DESCRIPTOR = 1 << 20

Handle: TypeAlias = "MapFile | Program | PerfBuffer | PerfCounter | links.Link | cgroups.Group | Btf | Switch"

#: What counts its descriptors.
_COUNTING = (MapFile, links.Link, Switch)


class DescriptorTable:
    """What is open."""

    def __init__(self) -> None:
        self._handles: dict[int, Handle] = {}
        self._numbers = itertools.count(FIRST_DESCRIPTOR)

    def close(self, fd: int) -> None:
        handle = self._handle(fd)
        try:
            run_due()
        finally:
            del self._handles[fd]
            if isinstance(handle, _COUNTING):
                handle.closed()

    def duplicate(self, fd: int) -> int:
        return self._open(self._handle(fd))

    def is_open(self, fd: int) -> bool:
        """Whether this is a descriptor of the emulator's."""
        return fd in self._handles

    def program(self, fd: int) -> Program:
        """The program behind a descriptor; EBADF or EINVAL."""
        found = self._handle(fd)
        if not isinstance(found, Program):
            raise refused(errno.EINVAL)
        return found

    def program_by_id(self, id: int) -> Program:
        """The program with an id; ENOENT."""
        found = PROGRAMS.get(id)
        if found is None:
            raise refused(errno.ENOENT)
        return found

    def link(self, fd: int) -> links.Link:
        """The link behind a descriptor; EBADF or EINVAL."""
        found = self._handle(fd)
        if not isinstance(found, links.Link):
            raise refused(errno.EINVAL)
        return found

    def map_file(self, fd: int) -> MapFile:
        """The map behind a descriptor; EBADF or EINVAL."""
        found = self._handle(fd)
        if not isinstance(found, MapFile):
            raise refused(errno.EINVAL)
        return found

    def map(self, fd: int) -> Map:
        return self.map_file(fd).map

    def perf_event_of(self, fd: int) -> PerfBuffer | PerfCounter:
        """The buffer or counter behind a descriptor; EBADF or EINVAL."""
        found = self._handle(fd)
        if not isinstance(found, PerfBuffer | PerfCounter):
            raise refused(errno.EINVAL)
        return found

    def _handle(self, fd: int) -> Handle:
        handle = self._handles.get(fd)
        if handle is None:
            raise refused(errno.EBADF)
        return handle

    def _open(self, handle: Handle) -> int:
        fd = next(self._numbers)
        self._handles[fd] = handle
        if isinstance(handle, _COUNTING):
            handle.opened()
        return fd
