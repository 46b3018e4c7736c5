"""Perf event array: the buffers that programs write to through it, and the counters that they read.

User space opens a buffer for each processor and puts its descriptor into the array under the processor's number.
The memory is as mmap(2) of such an event gives it (kernel/events/ring_buffer.c): a page whose ``data_head`` and
``data_tail`` are the positions, and the data, records as perf_event_open(2) has them. Counters are stand-ins: what
they count, the test says.
"""

from __future__ import annotations

import errno
import itertools
import struct
import sys
from collections.abc import Callable
from mmap import PAGESIZE
from typing import NamedTuple

from kbpf.emulator.environment import environment
from kbpf.emulator.maps.base import page_buffer, refused
from kbpf.emulator.maps.circle import Circle
from kbpf.emulator.maps.descriptors import DescriptorArray, number
from kbpf.emulator.memory import M64
from kbpf.errors import ENOTSUPP
from kbpf.uapi import constants as uapi

# struct perf_event_mmap_page
_HEAD, _TAIL, _OFFSET = 1024, 1032, 1040
_WORD = struct.Struct("=Q")
#: Type, misc and size: struct perf_event_header.
_HEADER = struct.Struct("=IHH")
_LOST, _SAMPLE = 2, 9
#: PERF_RECORD_MISC_KERNEL: the sample was taken in the kernel.
_IN_KERNEL = 1


class PerfReading(NamedTuple):
    """``struct bpf_perf_event_value``: what was counted, and nanoseconds that the event was enabled and running."""

    counter: int
    enabled: int
    running: int


class PerfCounter:
    """An event that counts, of a processor, or of the process whichever it is on."""

    def __init__(self, read: Callable[[], PerfReading], cpu: int | None) -> None:
        self.read = read
        self.cpu = cpu
        self.id = next(_ids)

    def memory(self, offset: int, size: int, writable: bool) -> memoryview:
        raise refused(errno.ENODEV)

    def output(self, data: bytes) -> None:
        raise refused(errno.EINVAL)


class PerfBuffer:
    """What perf_event_open(2) gives for PERF_COUNT_SW_BPF_OUTPUT on one processor, with `pages` of data."""

    def __init__(self, cpu: int, pages: int, wakeup: int) -> None:
        if pages < 1 or pages & pages - 1:
            raise refused(errno.EINVAL)
        self.cpu = cpu
        self.id = next(_ids)
        size = pages * PAGESIZE
        self._memory = page_buffer(PAGESIZE + size)
        _WORD.pack_into(self._memory, _OFFSET, PAGESIZE)
        _WORD.pack_into(self._memory, _OFFSET + 8, size)
        self._data = Circle(self._memory, PAGESIZE, size)
        self._opened = environment.clock()
        #: Samples that found no room since the last that did.
        self._lost = 0
        #: Who is told of each `wakeup`th sample.
        self.listeners: list[Callable[[], object]] = []
        self._wakeup = wakeup
        self._untold = 0

    def read(self) -> PerfReading:
        """Such an event counts nothing."""
        time = environment.clock() - self._opened
        return PerfReading(0, time, time)

    def memory(self, offset: int, size: int, writable: bool) -> memoryview:
        """mmap(2): all of it at once."""
        if offset or size != len(self._memory):
            raise refused(errno.EINVAL)
        view = memoryview(self._memory)
        return view if writable else view.toreadonly()

    def output(self, data: bytes) -> None:
        """Write a sample of raw data; ENOSPC where there is no room, and then a record of the loss.

        The data with its size is rounded up to 8 bytes, by what lies there already.
        """
        padding = -(len(data) + 4) % 8
        size = len(data) + padding
        record = _HEADER.pack(_SAMPLE, _IN_KERNEL, _HEADER.size + 4 + size) + size.to_bytes(4, sys.byteorder) + data
        if self._lost:
            record = _HEADER.pack(_LOST, 0, 24) + _WORD.pack(self.id) + _WORD.pack(self._lost) + record
        head, tail = (_WORD.unpack_from(self._memory, at)[0] for at in (_HEAD, _TAIL))
        if (tail - head - 1) % self._data.size < len(record) + padding:
            self._lost += 1
            raise refused(errno.ENOSPC)
        self._lost = 0
        self._data.write(head, record)
        _WORD.pack_into(self._memory, _HEAD, head + len(record) + padding & M64)
        self._untold += 1
        if self._untold >= self._wakeup:
            self._untold -= self._wakeup
            for listener in tuple(self.listeners):
                listener()


_ids = itertools.count(1)


class PerfEventArray(DescriptorArray):
    """Buffers and counters, by processor as a rule. What was put in through a descriptor goes when that is closed."""

    type = "perf_event_array"
    creation_flags = DescriptorArray.creation_flags | uapi.BPF_F_PRESERVE_ELEMS

    def allocate(self) -> None:
        super().allocate()
        self._put_by: dict[int, object] = {}

    def resolve(self, descriptor: int) -> PerfBuffer | PerfCounter:
        try:
            return self.descriptors.perf_event_of(descriptor)
        except OSError:
            raise refused(errno.EBADF) from None

    def put_through(self, file: object, key: bytes) -> None:
        self._put_by[number(key)] = file

    def remove(self, key: bytes) -> None:
        super().remove(key)
        del self._put_by[number(key)]

    def read(self, key: bytes) -> bytes:
        raise refused(ENOTSUPP)

    def output(self, flags: int, data: bytes) -> None:
        """bpf_perf_event_output: `flags` has the index, or BPF_F_CURRENT_CPU."""
        event = self._event(flags & uapi.BPF_F_INDEX_MASK)
        if isinstance(event, PerfBuffer) and event.cpu != environment.cpu:
            raise refused(errno.EOPNOTSUPP)
        event.output(data)

    def counted(self, flags: int) -> PerfReading:
        """bpf_perf_event_read: `flags` is the index, or BPF_F_CURRENT_CPU."""
        if flags & ~uapi.BPF_F_INDEX_MASK:
            raise refused(errno.EINVAL)
        event = self._event(flags)
        if event.cpu not in (None, environment.cpu):
            raise refused(errno.EINVAL)
        return event.read()

    def _event(self, index: int) -> PerfBuffer | PerfCounter:
        if index == uapi.BPF_F_CURRENT_CPU:
            index = environment.cpu
        if index >= self.max_entries:
            raise refused(errno.E2BIG)
        event: PerfBuffer | PerfCounter | None = self.held(index)
        if event is None:
            raise refused(errno.ENOENT)
        return event

    def closed(self, file: object) -> None:
        if not self.flags & uapi.BPF_F_PRESERVE_ELEMS:
            for index in [index for index, by in self._put_by.items() if by is file]:
                del self._held[index], self._put_by[index]
