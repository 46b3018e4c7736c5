"""Events that programs send to user space: ring buffers (Linux 5.8) and perf event arrays (4.4), on either backend.

    with obj.maps["events"].events("IQ16s") as events:
        for pid, time, comm in events:
            ...

A reader copies what is there, many records at a time, and gives them out one by one or all at once. Nothing of the
user's runs while it does. Records of one ring buffer come in the order in which programs reserved them, those of a perf
event array in the order of each processor.

Any number of threads may read, and each record goes to one of them. A signal handler may close a reader, and may not
read from it. After a fork the reader is the parent's: in the child it is closed.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from mmap import PAGESIZE
from typing import TYPE_CHECKING, Any

from kbpf.backend import Backend
from kbpf.errors import BpfError
from kbpf.runtime.buffers import Buffer, PerfBuffer, RingBuffer
from kbpf.runtime.failures import doing
from kbpf.runtime.records import Run
from kbpf.runtime.waiting import Waiting, deadline_of

if TYPE_CHECKING:
    import numpy

    from kbpf.runtime.maps.base import BpfMap

#: Bytes that are taken from a buffer at a time.
_SOME = 1 << 18
#: Events that are made at a time where they are given out one by one: too few for the interpreter to look for garbage
#: among them (700 new objects make it do so), and they stay in the processor's cache.
_AT_ONCE = 256
#: Seconds until a record that a program is still writing is looked at again: it may be committed without a wakeup.
_BUSY = 0.01
#: The data of a perf buffer, where nothing is said.
_PERF_SIZE = 64 * 4096


class Events(Waiting):
    """Reads the events of one map, or of several with `add`.

    Iterating gives one event after the other and waits for more, until it is closed; so does ``async for``, in one
    event loop at a time.
    """

    def __init__(self, backend: Backend) -> None:
        """Use `Map.events`."""
        super().__init__(backend, "a reader of events")
        self._buffers: list[Buffer] = []
        #: Descriptors of arrays, which must not be closed before their buffers are out of them.
        self._arrays: list[int] = []
        self._runs: deque[tuple[Buffer, Run]] = deque()
        self._ready: deque[Any] = deque()
        self._error: Exception | None = None
        self._arrivals: set[asyncio.Future[None]] = set()
        self._unsubscribe: Any = None

    def add(
        self,
        map: BpfMap,
        type: Any = None,
        *,
        size: int = _PERF_SIZE,
        wakeup: int = 1,
        cpus: Sequence[int] | None = None,
    ) -> None:
        """Read this map too: a ring buffer or a perf event array of the same backend.

        Which map an event is of, its type must say: records of all maps come out of the one reader. See `Map.events`.
        """
        if map.backend != self.backend:
            raise ValueError(f"{map.label} is the {map.backend}'s, the reader the {self.backend}'s")
        if map.type not in ("ringbuf", "perf_event_array"):
            raise TypeError(f"{map.label} is of type {map.type}: events come from ringbuf and perf_event_array")
        wrong = [cpu for cpu in cpus or () if not 0 <= cpu < map.shape.max_entries]
        if wrong:
            raise ValueError(
                f"{map.label} has elements for {map.shape.max_entries} processors, and none for {wrong[0]}"
            )
        if not 0 <= wakeup < 1 << 32:
            raise ValueError(f"readers cannot be woken at each {wakeup}th sample")
        spec = map.value_type if type is None else type
        operation = "mmap" if map.type == "ringbuf" else "perf_event_open"
        with self._using(), doing(self._backend, f"read the events of {map.label}", operation=operation):
            fd = self._backend.duplicate(map.fileno())
            if map.type == "ringbuf":
                ring = RingBuffer(self._backend, fd, map.shape.max_entries, spec, self._waiter)
                self._buffers.append(ring)
                return
            self._arrays.append(fd)
            pages = max(-(-size // PAGESIZE), 1)
            pages = 1 << (pages - 1).bit_length()
            online = self._backend.online_cpus()
            for cpu in [cpu for cpu in online if cpu < map.shape.max_entries] if cpus is None else cpus:
                self._buffers.append(PerfBuffer(self._backend, fd, cpu, pages, wakeup, spec, self._waiter))

    @property
    def lost(self) -> int:
        """Samples of perf event arrays that found no room, as far as buffers have told until now.

        A buffer tells when the next sample finds room. Nobody counts what finds no room in a ring buffer: the program
        is told, by NULL or -EAGAIN, and may count it in a map.
        """
        return sum(buffer.lost for buffer in self._buffers)

    def read(self, timeout: float | None = None) -> Any:
        """The next event; waits `timeout` seconds for it, without one for ever.

        Raises `TimeoutError`, `BpfError` (EBADF) when it is or gets closed, `ValueError` for a record that is shorter
        than its type, and what a function given as type raises; the next call goes on after such a record.
        """
        deadline = deadline_of(timeout)
        while True:
            try:
                return self._ready.popleft()
            except IndexError:
                pass
            if not self._refill(deadline):
                raise TimeoutError(f"no event came in {timeout} seconds")

    def read_all(self, timeout: float | None = 0.0) -> list[Any]:
        """All events that are there now. Where there are none, waits up to `timeout` seconds for the first.

        Raises what `read` does, but for `TimeoutError`: the list is empty then.
        """
        found: list[Any] = []

        def collect() -> bool:
            try:
                while self._decode():
                    pass
            except Exception as error:
                self._error = error
            # Others may be at it too: they take without waiting for their turn.
            with suppress(IndexError):
                while True:
                    found.append(self._ready.popleft())
            if self._error is not None and not found:
                self._decode()
            return bool(found)

        self._collect(timeout, collect)
        return found

    def read_array(self, timeout: float | None = 0.0, dtype: Any = None) -> numpy.ndarray[Any, Any]:
        """All events that are there now as one array of numpy; where there are none, like `read_all`.

        `dtype` is numpy's, by default what the type says: the members of a struct or dataclass by name, the fields of a
        format as ``f0``, ``f1`` and so on. Events that `read` or iteration has taken already are theirs.

        Raises `TypeError` where nothing says a layout, or maps differ in it, `ValueError` for a record that is shorter;
        the next call goes on behind it. `MissingDependencyError` without numpy.
        """
        from kbpf.runtime.arrays import dtype_for, join

        layouts = {dtype_for(buffer.spec if dtype is None else dtype) for buffer in self._buffers}
        if len(layouts) != 1:
            raise TypeError("the maps' events are not of one layout: say the dtype")
        layout = layouts.pop()
        runs: list[Run] = []

        def collect() -> bool:
            self._take_runs(layout.itemsize, runs)
            return bool(runs)

        self._collect(timeout, collect)
        return join(runs, layout)

    def _take_runs(self, size: int, runs: list[Run]) -> None:
        """Append those whose records have `size` bytes at least, as far as they are in front."""
        while self._runs:
            buffer, run = self._runs[0]
            if run.size < size:
                if not runs:
                    self._runs.popleft()
                    rest = run.after(1)
                    if rest is not None:
                        self._runs.appendleft((buffer, rest))
                    raise ValueError(f"a record of {run.size} bytes where the type has {size}")
                return
            self._runs.popleft()
            runs.append(run)

    def during(self, seconds: float) -> Iterator[Any]:
        """The events that come within so many seconds from the first step on, or until it is closed."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            try:
                event = self.read(left)
            except TimeoutError:
                return
            except BpfError:
                if self._over:
                    return
                raise
            yield event

    def __iter__(self) -> Iterator[Any]:
        pop = self._ready.popleft
        while True:
            try:
                event = pop()
            except IndexError:
                try:
                    self._refill(None)
                except BpfError:
                    if self._over:
                        return
                    raise
                pop = self._ready.popleft
                continue
            yield event

    # What is taken from buffers, and waits to be given out.

    def _refill(self, deadline: float | None) -> bool:
        """Have events ready, waiting for them; False where none came in time."""
        with self._using(), self._turn_by(deadline) as got:
            if not got:
                return False
            while not (self._ready or self._decode(_AT_ONCE)):
                self._check_open()
                taken, again = self._look()
                # What was discarded is no event, and may have hidden a wakeup.
                if not self._runs and not self._sleep(deadline, 0.0 if taken else again):
                    return False
            return True

    def _collect(self, timeout: float | None, collect: Callable[[], bool]) -> None:
        """Take all that is there, some at a time; waits for `collect` to find the first of it."""
        deadline = deadline_of(timeout)
        with self._using(), self._turn_by(deadline) as got:
            # No more than buffers hold: programs that are as fast as the reader must not keep it for ever.
            left = sum(buffer.size for buffer in self._buffers)
            while got and left > 0:
                taken, again = self._look()
                left -= taken
                if collect():
                    deadline = 0.0
                if not taken and not self._sleep(deadline, again):
                    return
                self._check_open()

    def _look(self) -> tuple[int, float | None]:
        """Take some of what is there. How many bytes it was, and when to look again without being woken."""
        again = self._waiter.look()
        taken = 0
        for buffer in self._buffers:
            runs: list[Run] = []
            taken += buffer.take(_SOME, runs)
            self._runs.extend((buffer, run) for run in runs)
            if buffer.busy:
                again = _BUSY if again is None else min(again, _BUSY)
        return taken, again

    def _decode(self, most: int | None = None) -> bool:
        """Make events of the next run that was taken, or of `most` records of it; whether there are any."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        while self._runs:
            buffer, run = self._runs.popleft()
            if most is not None and len(run.data) > most * run.stride:
                run, *rest = run.pieces(most)
                self._runs.extendleft((buffer, piece) for piece in reversed(rest))
            made: list[Any] = []
            try:
                buffer.decode(run, made)
            except Exception as error:
                behind = run.after(len(made) + 1)
                if behind is not None:
                    self._runs.appendleft((buffer, behind))
                if not made:
                    raise
                # The events before it come first.
                self._error = error
            self._ready.extend(made)
            return True
        return False

    # In asyncio.

    def __aiter__(self) -> Events:
        return self

    async def __anext__(self) -> Any:
        while True:
            try:
                return self._ready.popleft()
            except IndexError:
                pass
            try:
                if self._refill(0.0):
                    continue
            except BpfError:
                if self._over:
                    raise StopAsyncIteration from None
                raise
            await self._arrival()

    async def _arrival(self) -> None:
        """Until something may have come, or it is closed."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._enter()
        try:
            if self._over:
                return
            if not self._arrivals:
                self._unsubscribe = self._waiter.subscribe(loop, self._arrived)
            self._arrivals.add(future)
            # What came before the loop knew.
            with self._turn_by(0.0) as got:
                if not got:
                    again: float | None = _BUSY
                else:
                    taken, again = self._look()
                    if taken:
                        return
            # Another thread may be reading, and leave events that it does not want.
            await asyncio.wait([future], timeout=again)
        finally:
            self._arrivals.discard(future)
            future.cancel()
            if not self._arrivals and self._unsubscribe is not None:
                unsubscribe, self._unsubscribe = self._unsubscribe, None
                unsubscribe()
            self._leave()

    def _arrived(self) -> None:
        for future in self._arrivals:
            if not future.done():
                future.set_result(None)

    # The end.

    def close(self) -> None:
        super().close()
        self._ready.clear()

    def _free(self) -> None:
        for buffer in self._buffers:
            buffer.free()
        for fd in self._arrays:
            self._backend.close(fd)

    def _abandon(self) -> None:
        self._ready.clear()
        self._runs.clear()
        for buffer in self._buffers:
            buffer.abandon()
        for fd in self._arrays:
            self._backend.close(fd)
        self._waiter.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else self.backend
        return f"<Events of {len(self._buffers)} buffers, {state}>"
