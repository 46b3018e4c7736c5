"""Records from user space to programs: ring buffers of user space (Linux 6.1), read by bpf_user_ringbuf_drain.

with obj.maps["commands"].writer("II") as commands:
    commands.write((1, 500), timeout=1.0)
"""

from __future__ import annotations

import errno
import struct
from mmap import PAGESIZE
from typing import TYPE_CHECKING, Any

from kbpf.errors import BpfError, MapFullError
from kbpf.runtime.buffers import map_data, no_barrier, release
from kbpf.runtime.failures import doing
from kbpf.runtime.formats import codec_for
from kbpf.runtime.records import HEADER
from kbpf.runtime.waiting import Waiting, deadline_of

if TYPE_CHECKING:
    from kbpf.runtime.maps.base import BpfMap

#: Length and flags, and a word that is the kernel's in other ring buffers.
_HEADER = struct.Struct("=II")


class EventWriter(Waiting):
    """Writes the records of one map. Any number of threads may; no other process and no other writer at the same time.

    A record is there for programs as soon as it is written, and stays until one has drained it.
    """

    def __init__(self, map: BpfMap, type: Any = None) -> None:
        """Use `Map.writer`."""
        if map.type != "user_ringbuf":
            raise TypeError(f"{map.label} is of type {map.type}: user space writes to user_ringbuf")
        super().__init__(map._backend, f"a writer of {map.label}")
        spec = map.value_type if type is None else type
        self._encode = _bytes if spec is None else codec_for(spec).encode
        self._size = map.shape.max_entries
        self._views: list[memoryview] = []
        self._fd: int | None = None
        try:
            with doing(self._backend, f"write to {map.label}", operation="mmap"):
                self._barrier = self._backend.memory_barrier() or no_barrier
                self._fd = self._backend.duplicate(map.fileno())
                consumer = self._backend.map_memory(self._fd, PAGESIZE)
                self._views.append(consumer)
                rest = map_data(self._backend, self._fd, self._size, True)
                self._views.append(rest)
                producer, self._data = rest[:PAGESIZE], rest[PAGESIZE:]
                self._consumed, self._produced = consumer.cast("Q"), producer.cast("Q")
                self._views += [producer, self._data, self._consumed, self._produced]
                self._waiter.add(self._fd, writing=True)
        except BaseException:
            self.close()
            raise

    def write(self, record: Any, timeout: float | None = 0.0) -> None:
        """Write one record; where there is no room, wait up to `timeout` seconds for it (None: for ever).

        Raises `MapFullError` when there is none by then, `BpfError` (E2BIG) for a record that never has room, EBADF
        when it is or gets closed.
        """
        data = self._encode(record)
        length = len(data) + HEADER + 7 & ~7
        if length > self._size:
            hint = f"with its header it takes {length} bytes, and the buffer has {self._size}"
            raise BpfError(errno.E2BIG, f"write a record by {self.label}", (hint,))
        whole = (_HEADER.pack(len(data), 0) + data).ljust(length, b"\0")
        deadline = deadline_of(timeout)
        with self._using(), self._turn_by(deadline) as got:
            while not (got and self._put(whole)):
                again = self._waiter.look()
                # From here on the waiter hears of room.
                if got and self._put(whole):
                    return
                if not got or not self._sleep(deadline, again):
                    hint = "programs have not drained it"
                    raise MapFullError(errno.ENOSPC, f"write a record by {self.label}", (hint,))
                self._check_open()

    def _put(self, whole: bytes) -> bool:
        """Write a record where there is room, and then move the position behind it."""
        position = self._produced[0]
        if self._size - (position - self._consumed[0]) < len(whole):
            return False
        self._barrier()
        at = position & self._size - 1
        first = whole[: len(self._data) - at]
        self._data[at : at + len(first)] = first
        self._data[: len(whole) - len(first)] = whole[len(first) :]
        self._barrier()
        self._produced[0] = position + len(whole)
        return True

    @property
    def pending(self) -> int:
        """Bytes of records, with their headers, that no program has drained yet."""
        with self._using():
            self._waiter.look()
            return int(self._produced[0] - self._consumed[0])

    def _free(self) -> None:
        release(self._views)
        if self._fd is not None:
            self._backend.close(self._fd)

    def _abandon(self) -> None:
        self._free()
        self._waiter.close()

    def __repr__(self) -> str:
        return f"<EventWriter, {'closed' if self.closed else self.backend}>"


def _bytes(record: Any) -> bytes:
    try:
        return bytes(memoryview(record))
    except TypeError:
        raise TypeError(f"{record!r} is no bytes: say what records are (Map.writer's type)") from None
