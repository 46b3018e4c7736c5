"""The two kinds of memory that programs write records to, read (kernel/bpf/ringbuf.c, kernel/events/ring_buffer.c).

Records are copied out, many at a time, and their room is given back at once. Only one thread at a time reads a
buffer. Where a position or a header is read, a barrier keeps what is read after it from being older; positions are
written after all that was read before. A position is an aligned word, which CPython reads and writes in one piece.
"""

from __future__ import annotations

import errno
import struct
import sys
from contextlib import suppress
from mmap import PAGESIZE
from typing import Any, Protocol

from kbpf.backend import Backend, EventWaiter
from kbpf.runtime.records import HEADER, Decoder, Run, decoder, same_from
from kbpf.uapi.constants import BPF_RINGBUF_BUSY_BIT, BPF_RINGBUF_DISCARD_BIT


class Buffer(Protocol):
    """What `kbpf.runtime.events` reads."""

    #: What the user said of its records, and what that makes of them.
    spec: Any
    decode: Decoder
    #: The next record is reserved, and not committed yet.
    busy: bool
    #: Records that found no room, as far as anybody counts them.
    lost: int

    @property
    def size(self) -> int:
        """Bytes of data that it has room for."""
        ...

    def take(self, most: int, into: list[Run]) -> int:
        """Append copies of what is there, of about `most` bytes; returns how many bytes were given back."""
        ...

    def free(self) -> None:
        """Give back the memory and what belongs to it."""
        ...

    def abandon(self) -> None:
        """The same for a child of the process that opened it."""
        ...


def no_barrier() -> None:
    """Where memory is in order."""


class RingBuffer:
    """A map of type ringbuf. `fd` becomes its own."""

    def __init__(self, backend: Backend, fd: int, size: int, spec: Any, waiter: EventWaiter) -> None:
        self.busy = False
        self.lost = 0
        self._backend, self._fd = backend, fd
        self._views: list[memoryview] = []
        try:
            self.spec, self.decode = spec, decoder(spec)
            self._barrier = backend.memory_barrier() or no_barrier
            consumer = self._map(PAGESIZE, 0, True)
            rest = map_data(backend, fd, size, False)
            self._views.append(rest)
            self._consumed, self._produced = self._cast(consumer), self._cast(rest[:PAGESIZE])
            self._data = rest[PAGESIZE:]
            self._words = self._data.cast("I")
            self._views += [self._data, self._words]
            waiter.add(fd)
        except BaseException:
            self.free()
            raise
        self._mask = size - 1

    def _map(self, size: int, offset: int, writable: bool) -> memoryview:
        view = self._backend.map_memory(self._fd, size, offset, writable)
        self._views.append(view)
        return view

    def _cast(self, view: memoryview) -> memoryview:
        words = view.cast("Q")
        self._views += [view, words]
        return words

    @property
    def size(self) -> int:
        return self._mask + 1

    def take(self, most: int, into: list[Run]) -> int:
        words = self._words
        start = position = self._consumed[0]
        end = self._produced[0]
        self._barrier()
        self.busy = False
        while position < end and position - start < most:
            at = position & self._mask
            header = words[at >> 2]
            if header & BPF_RINGBUF_BUSY_BIT:
                self.busy = True
                break
            size = header & ~BPF_RINGBUF_DISCARD_BIT
            stride = size + HEADER + 7 & ~7
            room = min(end - position, len(self._data) - at, most) // stride
            count = same_from(words, at >> 2, stride >> 2, room) if room > 1 else 1
            if not header & BPF_RINGBUF_DISCARD_BIT:
                self._barrier()
                into.append(Run(self._copy(at, count * stride), size, stride))
            position += count * stride
        if position != start:
            self._barrier()
            self._consumed[0] = position
        return position - start

    def _copy(self, at: int, size: int) -> bytes:
        # The kernel maps the data twice: there no record goes on at the start.
        over = at + size - len(self._data)
        return bytes(self._data[at : at + size]) + (bytes(self._data[:over]) if over > 0 else b"")

    def free(self) -> None:
        release(self._views)
        self._backend.close(self._fd)

    abandon = free


def map_data(backend: Backend, fd: int, size: int, writable: bool) -> memoryview:
    """The producer's page and the data of a ring, twice where the backend does that."""
    try:
        return backend.map_memory(fd, PAGESIZE + 2 * size, PAGESIZE, writable)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
    return backend.map_memory(fd, PAGESIZE + size, PAGESIZE, writable)


def release(views: list[memoryview]) -> None:
    """Unmap."""
    while views:
        # In a child, one may have been in the hands of a thread that is not there.
        with suppress(BufferError):
            views.pop().release()


#: struct perf_event_mmap_page: where data_head and data_tail are, in words.
_HEAD, _TAIL = 128, 129
_LOST, _SAMPLE = 2, 9
_KIND = struct.Struct("=IHH")
#: Bytes that the header of a sample is longer than those of runs.
_MOVED = 4
_WORD = 8
#: Their sizes have 16 bits.
_LONGEST_RECORD = 1 << 16


class PerfBuffer:
    """A processor's buffer in a map of type perf_event_array. The map's descriptor is the reader's."""

    busy = False

    def __init__(
        self, backend: Backend, map: int, cpu: int, pages: int, wakeup: int, spec: Any, waiter: EventWaiter
    ) -> None:
        self.spec, self.decode = spec, decoder(spec)
        self.lost = 0
        self._backend, self._map = backend, map
        self._views: list[memoryview] = []
        self._key: bytes | None = None
        self._barrier = backend.memory_barrier() or no_barrier
        self._fd = backend.perf_buffer(cpu, pages, wakeup)
        try:
            whole = backend.map_memory(self._fd, (1 + pages) * PAGESIZE, 0, True)
            self._views.append(whole)
            page, self._data = whole[:PAGESIZE], whole[PAGESIZE:]
            self._page = page.cast("Q")
            self._views += [page, self._data, self._page]
            key = cpu.to_bytes(4, sys.byteorder)
            backend.map_update(map, key, self._fd.to_bytes(4, sys.byteorder))
            self._key = key
            waiter.add(self._fd)
        except BaseException:
            self.free()
            raise

    @property
    def size(self) -> int:
        return len(self._data)

    def take(self, most: int, into: list[Run]) -> int:
        tail, head = self._page[_TAIL], self._page[_HEAD]
        if tail == head:
            return 0
        self._barrier()
        size = min(head - tail, max(most, _LONGEST_RECORD))
        # And as much of what follows as runs are moved by.
        taken = self._split(self._copy(tail, size + _MOVED), size, into)
        self._barrier()
        self._page[_TAIL] = tail + taken
        return taken

    def _copy(self, position: int, size: int) -> bytes:
        at = position & len(self._data) - 1
        first = bytes(self._data[at : at + size])
        return first if len(first) == size else first + bytes(self._data[: size - len(first)])

    def _split(self, data: bytes, size: int, into: list[Run]) -> int:
        """Returns how many of `size` bytes are those of whole records.

        Samples are 12 bytes of header and size, and the data, which with the size is rounded up to 8 bytes.
        """
        whole, at = memoryview(data), 0
        words = whole[:size].cast("Q")
        while at < size:
            kind, _, stride = _KIND.unpack_from(data, at)
            if at + stride > size:
                break
            count = same_from(words, at // _WORD, stride // _WORD, (size - at) // stride)
            end = at + count * stride
            if kind == _SAMPLE:
                into.append(Run(whole[at + _MOVED : end + _MOVED], stride - HEADER - _MOVED, stride))
            elif kind == _LOST:
                self.lost += sum(words[at // _WORD + 2 : end // _WORD : stride // _WORD])
            at = end
        return at

    def free(self) -> None:
        if self._key is not None:
            # The array holds the event for as long as it is open.
            with suppress(OSError):
                self._backend.map_delete(self._map, self._key)
        self.abandon()

    def abandon(self) -> None:
        release(self._views)
        self._backend.close(self._fd)
