"""Ring buffers: records from programs to user space, and the other way round (kernel/bpf/ringbuf.c).

The memory is laid out as Linux lays out what mmap(2) gives of it: a page with the consumer's position, a page with
the producer's, and the data. User space of both backends reads it alike. (Linux maps the data twice, one after the
other, so that no record is cut; here a record may go on at the start.)

A record is an 8-byte header, its length in the low 30 bits of the first word, and the data rounded up to 8 bytes.
A program works on a copy while it holds a record, so that it can reach nothing beside it. Programs of other threads,
and user space, may be at the same ring at the same time.
"""

from __future__ import annotations

import errno
import struct
import sys
import threading
import weakref
from collections.abc import Callable
from mmap import PAGESIZE

from kbpf.emulator.maps.base import Map, page_buffer, refused
from kbpf.emulator.maps.circle import Circle
from kbpf.emulator.memory import M64, Region
from kbpf.uapi import constants as uapi

_WAKEUPS = uapi.BPF_RB_NO_WAKEUP | uapi.BPF_RB_FORCE_WAKEUP
_POSITION = struct.Struct("=Q")
#: Length and flags; the page in which the record lies, from the start of the kernel's structure on.
_HEADER = struct.Struct("=II")
#: Pages before the data in the kernel's structure: its own and the two with positions.
_PAGES_BEFORE = 3
_CONSUMER, _PRODUCER, _DATA = 0, PAGESIZE, 2 * PAGESIZE
#: RINGBUF_MAX_RECORD_SZ: two bits of the length are flags.
_LONGEST = 0xFFFFFFFF // 4


class Ring(Map):
    """The memory that both kinds have. `max_entries` is the size of the data in bytes: a power of two of pages."""

    creation_flags = uapi.BPF_F_NUMA_NODE
    mappable = True

    def check_creation(self) -> None:
        super().check_creation()
        size = self.max_entries
        if self.key_size or self.value_size or not size or size & size - 1 or size % PAGESIZE:
            raise refused(errno.EINVAL)

    def allocate(self) -> None:
        self._memory = page_buffer(_DATA + self.max_entries)
        self.data = Circle(self._memory, _DATA, self.max_entries)
        #: Who is told when the other side has done something.
        self.listeners: list[Callable[[], object]] = []

    def notify(self) -> None:
        """What Linux does with those who poll(2)."""
        for listener in tuple(self.listeners):
            listener()

    @property
    def consumed(self) -> int:
        """The consumer's position: bytes read since the start."""
        return int(_POSITION.unpack_from(self._memory, _CONSUMER)[0])

    @consumed.setter
    def consumed(self, position: int) -> None:
        _POSITION.pack_into(self._memory, _CONSUMER, position & M64)

    @property
    def produced(self) -> int:
        """The producer's position: bytes written since the start."""
        return int(_POSITION.unpack_from(self._memory, _PRODUCER)[0])

    @produced.setter
    def produced(self, position: int) -> None:
        _POSITION.pack_into(self._memory, _PRODUCER, position & M64)

    def memory(self, offset: int, size: int, writable: bool) -> memoryview:
        if writable and not self.may_map_writable(offset, size):
            raise refused(errno.EPERM)
        if offset % PAGESIZE or size <= 0 or offset + size > _DATA + 2 * self.max_entries:
            raise refused(errno.EINVAL)
        if offset + size > _DATA + self.max_entries:
            raise OSError(errno.EOPNOTSUPP, "the emulator maps the data of a ring only once")
        view = memoryview(self._memory)[offset : offset + size]
        return view if writable else view.toreadonly()

    def may_map_writable(self, offset: int, size: int) -> bool:
        raise NotImplementedError


class Record:
    """A record that a program has reserved."""

    __slots__ = ("__weakref__", "position", "region", "ring", "size")

    def __init__(self, ring: RingBuffer, position: int, size: int) -> None:
        self.ring = ring
        self.position = position
        self.size = size
        buffer = bytearray(ring.data.read(position + uapi.BPF_RINGBUF_HDR_SZ, size))
        self.region = Region(buffer, owner=weakref.ref(self))

    def drop(self) -> None:
        self.ring.commit(self, discard=True)


class RingBuffer(Ring):
    """From programs to user space: reserved, filled, then submitted or discarded."""

    type = "ringbuf"

    def allocate(self) -> None:
        super().allocate()
        #: Where the oldest record lies that may not be committed.
        self._pending = 0
        self._reserved: dict[int, Record] = {}
        self._lock = threading.RLock()

    def may_map_writable(self, offset: int, size: int) -> bool:
        return offset == _CONSUMER and size == PAGESIZE

    def reserve(self, size: int) -> Record | None:
        """A record of `size` bytes with what lay there before; None where there is no room."""
        length = _footprint(size)
        if size > _LONGEST or length > self.max_entries:
            return None
        with self._lock:
            return self._reserve(size, length)

    def _reserve(self, size: int, length: int) -> Record | None:
        self._pass_committed()
        start = self.produced
        end = start + length
        if max(end - self.consumed & M64, end - self._pending) >= self.max_entries:
            return None
        page = _PAGES_BEFORE + (start & self.max_entries - 1) // PAGESIZE
        self.data.write(start, _HEADER.pack(size | uapi.BPF_RINGBUF_BUSY_BIT, page))
        self.produced = end
        record = self._reserved[start] = Record(self, start, size)
        return record

    def commit(self, record: Record, discard: bool = False, flags: int = 0) -> None:
        """Give a record to user space, which skips it if it was discarded, and wake who waits for this very one.

        BPF_RB_FORCE_WAKEUP wakes always, BPF_RB_NO_WAKEUP never; other flags mean nothing.
        """
        buffer = record.region.buffer
        assert isinstance(buffer, bytearray)
        self.data.write(record.position + uapi.BPF_RINGBUF_HDR_SZ, buffer)
        length = record.size | (uapi.BPF_RINGBUF_DISCARD_BIT if discard else 0)
        self.data.write(record.position, length.to_bytes(4, sys.byteorder))
        del self._reserved[record.position]
        awaited = (self.consumed ^ record.position) & self.max_entries - 1 == 0
        if flags & uapi.BPF_RB_FORCE_WAKEUP or (awaited and not flags & uapi.BPF_RB_NO_WAKEUP):
            self.notify()

    def output(self, data: bytes, flags: int) -> None:
        """Reserve, fill and submit in one."""
        if flags & ~_WAKEUPS:
            raise refused(errno.EINVAL)
        record = self.reserve(len(data))
        if record is None:
            raise refused(errno.EAGAIN)
        record.region.buffer = bytearray(data)
        self.commit(record, flags=flags)

    def query(self, what: int) -> int:
        """BPF_RB_*: sizes and positions; 0 for what there is not."""
        answers = {
            uapi.BPF_RB_AVAIL_DATA: self.produced - self.consumed,
            uapi.BPF_RB_RING_SIZE: self.max_entries,
            uapi.BPF_RB_CONS_POS: self.consumed,
            uapi.BPF_RB_PROD_POS: self.produced,
        }
        return answers.get(what, 0)

    def _pass_committed(self) -> None:
        while self._pending < self.produced and self._pending not in self._reserved:
            length, _ = _HEADER.unpack(self.data.read(self._pending, _HEADER.size))
            self._pending += _footprint(length & ~uapi.BPF_RINGBUF_DISCARD_BIT)


class UserRingBuffer(Ring):
    """From user space to programs, Linux 6.1: user space fills, bpf_user_ringbuf_drain reads."""

    type = "user_ringbuf"

    def may_map_writable(self, offset: int, size: int) -> bool:
        return offset != _CONSUMER

    def peek_record(self) -> tuple[int, int]:
        """Position and length of the next record.

        Raises ENODATA where there is none or it is not ready, EAGAIN for one that was discarded and is skipped, and
        EINVAL or E2BIG for one that cannot be.
        """
        produced, consumed = self.produced, self.consumed
        if produced % 8:
            raise refused(errno.EINVAL)
        if consumed >= produced:
            raise refused(errno.ENODATA)
        header, _ = _HEADER.unpack(self.data.read(consumed, _HEADER.size))
        length = header & ~(uapi.BPF_RINGBUF_BUSY_BIT | uapi.BPF_RINGBUF_DISCARD_BIT)
        if _footprint(length) > produced - consumed:
            raise refused(errno.EINVAL)
        if _footprint(length) > self.max_entries:
            raise refused(errno.E2BIG)
        if header & uapi.BPF_RINGBUF_DISCARD_BIT:
            self.release(length)
            raise refused(errno.EAGAIN)
        if header & uapi.BPF_RINGBUF_BUSY_BIT:
            raise refused(errno.ENODATA)
        return consumed + uapi.BPF_RINGBUF_HDR_SZ, length

    def release(self, length: int) -> None:
        """Go past a record."""
        self.consumed += _footprint(length)


def _footprint(size: int) -> int:
    """Bytes that a record takes with its header."""
    return size + uapi.BPF_RINGBUF_HDR_SZ + 7 & ~7
