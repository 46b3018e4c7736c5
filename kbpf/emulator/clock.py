"""Time in the emulated machine: what is due when, and a clock that a test moves by hand.

What is due happens when the user looks (reads a map, waits on a socket: `run_due`), or when a `ManualClock` is moved
past it. Nothing runs behind the user's back, so the same test always sees the same order.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable

from kbpf.emulator.environment import environment

#: Events that are kept without looking for cancelled ones.
_FEW = 1024
#: The longest that a wait goes without looking at the clock, in seconds.
_LOOK = 3600.0


class Event:
    """Something that is to happen at a time of `environment.clock`, unless it is cancelled."""

    __slots__ = ("action", "pending", "when")

    def __init__(self, when: int, action: Callable[[], object]) -> None:
        self.when = when
        self.action = action
        self.pending = True

    def cancel(self) -> bool:
        """Whether it was still to come."""
        was, self.pending = self.pending, False
        return was


class Timeline:
    """Events in the order of their times, those of the same time in the order in which they were made."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._events: list[tuple[int, int, Event]] = []
        self._serials = itertools.count()
        #: How many events there may be before those that are cancelled are thrown out.
        self._most = _FEW

    def at(self, when: int, action: Callable[[], object]) -> Event:
        """Have `action` done at `when`, in nanoseconds of `environment.clock`."""
        event = Event(when, action)
        with self._lock:
            if len(self._events) > self._most:
                self._events = [entry for entry in self._events if entry[2].pending]
                heapq.heapify(self._events)
                self._most = max(_FEW, 2 * len(self._events))
            heapq.heappush(self._events, (when, next(self._serials), event))
        return event

    def next_due(self) -> int | None:
        """When the next event is due; None if none is."""
        with self._lock:
            while self._events and not self._events[0][2].pending:
                heapq.heappop(self._events)
            return self._events[0][0] if self._events else None

    def take_due(self, now: int) -> Event | None:
        """Take out the first event that is due by `now`."""
        with self._lock:
            due = self.next_due()
            if due is None or due > now:
                return None
            event = heapq.heappop(self._events)[2]
            event.pending = False
            return event

    def clear(self) -> None:
        """Forget everything that is to come."""
        with self._lock:
            for _, _, event in self._events:
                event.pending = False
            self._events.clear()


#: The one of the emulated machine.
timeline = Timeline()


def run_due() -> None:
    """Do all that is due by now, in order; what that makes due later than now stays."""
    now = environment.clock()
    while (event := timeline.take_due(now)) is not None:
        event.action()


def until_due(left: float | None) -> float | None:
    """How many seconds to wait for others at a time, with `left` to go: no longer than until the next event is due."""
    due = timeline.next_due()
    if due is None:
        return left
    event = min(max((due - environment.clock()) / 1e9, 0.001), _LOOK)
    return event if left is None else min(left, event)


def wall_time() -> int:
    """Nanoseconds since 1970, or what a `ManualClock` says where one is set: the times that frames carry."""
    clock = environment.clock
    return clock() if isinstance(clock, ManualClock) else time.time_ns()


class ManualClock:
    """A CLOCK_MONOTONIC that stands still: ``environment.clock = clock = ManualClock()``; ``clock.advance(10**9)``."""

    def __init__(self, now: int = 0) -> None:
        self._now = now

    def __call__(self) -> int:
        return self._now

    def advance(self, nanoseconds: int) -> None:
        """Let time pass: each event on the way finds the clock at its own time. `ValueError` for a step back."""
        if nanoseconds < 0:
            raise ValueError("a monotonic clock does not go back")
        end = self._now + nanoseconds
        while (event := timeline.take_due(end)) is not None:
            self._now = max(self._now, event.when)
            event.action()
        self._now = end
