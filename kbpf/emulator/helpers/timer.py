"""Timers in map values (Linux 5.15): bpf_timer_init, _set_callback, _start and _cancel (kernel/bpf/helpers.c).

What is due runs when the user looks or the clock is moved (`kbpf.emulator.clock`), on the processor that the timer was
started on; a fault of a callback is raised there. A timer keeps its program, and goes with its value or when user
space no longer holds the map.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import NoReturn

from kbpf.emulator.clock import Event, timeline
from kbpf.emulator.environment import environment
from kbpf.emulator.helpers.maps import map_at
from kbpf.emulator.interpreter import Code, HelperFunction, Loaded, Run
from kbpf.emulator.maps.base import Map, field_at
from kbpf.emulator.memory import Region
from kbpf.errors import EmulationFault
from kbpf.uapi import constants as uapi

#: Clocks that a timer may go by, as in timerfd_create(2): CLOCK_REALTIME, CLOCK_MONOTONIC, CLOCK_BOOTTIME.
_CLOCKS: dict[int, Callable[[], int]] = {
    0: lambda: environment.real_clock(),
    1: lambda: environment.clock(),
    7: lambda: environment.clock() + environment.suspended,
}
#: KTIME_MAX: what would come later does not come.
_NEVER = (1 << 63) - 1
_FLAGS = uapi.BPF_F_TIMER_ABS | uapi.BPF_F_TIMER_CPU_PIN


class Timer:
    """What bpf_timer_init puts into a value."""

    needs_user = True

    def __init__(self, map: Map, value: int, clock: int) -> None:
        self.map = map
        self.value = value
        self.clock = _CLOCKS[clock]
        #: What it runs: a program's code and where the function starts. The program stays as long as it is here.
        self.program: Loaded | None = None
        self.code: Code | None = None
        self.function = 0
        self.event: Event | None = None

    def start(self, nanoseconds: int, absolute: bool) -> None:
        now = self.clock()
        expires = nanoseconds if absolute else now + nanoseconds
        if max(nanoseconds, expires) > _NEVER:
            expires = _NEVER
        self.stop()
        cpu = environment.cpu
        self.event = timeline.at(environment.clock() + expires - now, lambda: self.fire(cpu))

    def stop(self) -> bool:
        """Whether it was still to come."""
        return self.event is not None and self.event.cancel()

    def free(self) -> None:
        self.stop()
        self.program = self.code = None

    def fire(self, cpu: int) -> None:
        """Call ``callback(map, key, value)``."""
        code, program = self.code, self.program
        if code is None or program is None:
            return
        key = Region(self.map.key_at(self.value), writable=False)
        run = Run(_Callback(self, program), code, None, b"")
        # What its own callback frees is gone.
        del program
        run.state[1:6] = self.map.handle.address, key.address, self.value, 0, 0
        before, environment.cpu = environment.cpu, cpu
        try:
            if run.execute(self.function):
                raise EmulationFault("a timer's callback returns other than 0", self.function)
        finally:
            environment.cpu = before


class _Callback:
    """What runs when a timer is due: there is no packet. A `kbpf.emulator.interpreter.Subject`."""

    def __init__(self, timer: Timer, program: Loaded) -> None:
        self.timer = timer
        self.budget = program.budget
        # The program may go while its callback runs, but not what it points to.
        self._maps = program.maps

    def packet(self, data: bytes, length: int) -> NoReturn:
        raise EmulationFault("a timer's callback has no packet")

    def context(self, packet: object) -> NoReturn:
        raise EmulationFault("a timer's callback has no context")


def _timer_at(address: int) -> Timer | None:
    map, _ = field_at(address, "bpf_timer")
    found = map.kept.get(address)
    return found if isinstance(found, Timer) else None


def timer_init(run: Run, timer: int, map: int, clock: int, *_: int) -> int:
    found, value = field_at(timer, "bpf_timer")
    if map_at(run, map) is not found:
        raise EmulationFault("this timer is not of that map", address=timer)
    if clock not in _CLOCKS:
        return -errno.EINVAL
    if timer in found.kept:
        return -errno.EBUSY
    if not found.users:
        # Programs and maps would keep each other.
        return -errno.EPERM
    found.kept[timer] = Timer(found, value, clock)
    return 0


def timer_set_callback(run: Run, timer: int, function: int, *_: int) -> int:
    found = _timer_at(timer)
    if function not in run.code.functions:
        raise EmulationFault(f"no function starts at instruction {function}")
    if found is None:
        return -errno.EINVAL
    program = run.code.program()
    if program is None:
        return -errno.ENOENT
    found.program, found.code, found.function = program, run.code, function
    return 0


def timer_start(run: Run, timer: int, nanoseconds: int, flags: int, *_: int) -> int:
    found = _timer_at(timer)
    if flags & ~_FLAGS or found is None or found.code is None:
        return -errno.EINVAL
    found.start(nanoseconds, bool(flags & uapi.BPF_F_TIMER_ABS))
    return 0


def timer_cancel(run: Run, timer: int, *_: int) -> int:
    """1 if it was to come. It has no callback then."""
    found = _timer_at(timer)
    if found is None:
        return -errno.EINVAL
    if isinstance(run.subject, _Callback) and run.subject.timer is found:
        return -errno.EDEADLK
    pending = found.stop()
    found.free()
    return int(pending)


HELPERS: dict[str, HelperFunction] = {
    "timer_init": timer_init,
    "timer_set_callback": timer_set_callback,
    "timer_start": timer_start,
    "timer_cancel": timer_cancel,
}
