"""What ring buffers and perf buffers need beside their maps: events for output, waiting, and the order of memory.

Ring buffers since Linux 5.8, those of user space 6.1, perf buffers 4.4. A perf buffer needs CAP_PERFMON, or
kernel.perf_event_paranoid of 0 at most.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kbpf.backend import EventWaiter
from kbpf.kernel import syscall

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

#: struct perf_event_attr until its wakeup_events: type, size, config, period, what is sampled and read, flags.
_ATTR = struct.Struct("=IIQQQQQI")
_ATTR_SIZE = 112
_PERF_TYPE_SOFTWARE, _PERF_COUNT_SW_BPF_OUTPUT, _PERF_SAMPLE_RAW = 1, 10, 1 << 10
_PERF_EVENT_IOC_ENABLE = 0x2400
_ONLINE = "/sys/devices/system/cpu/online"
#: epoll_wait(2) counts milliseconds in an int.
_LONGEST = 1e6


def cpu_numbers(path: str) -> list[int]:
    """The numbers in a file of /sys such as ``0-3,8``."""
    numbers: list[int] = []
    for part in Path(path).read_text().strip().split(","):
        first, _, last = part.partition("-")
        numbers.extend(range(int(first), int(last or first) + 1))
    return numbers


class EventCommands:
    """The buffers' part of the backend."""

    def online_cpus(self) -> list[int]:
        return cpu_numbers(_ONLINE)

    def perf_buffer(self, cpu: int, pages: int = 8, wakeup: int = 1) -> int:
        """How many `pages` there are is decided where the event is mapped. Linux 4.4."""
        attr = _ATTR.pack(
            _PERF_TYPE_SOFTWARE, _ATTR_SIZE, _PERF_COUNT_SW_BPF_OUTPUT, 1, _PERF_SAMPLE_RAW, 0, 0, wakeup
        ).ljust(_ATTR_SIZE, b"\0")
        fd = syscall.perf_event_open(attr, cpu)
        try:
            fcntl.ioctl(fd, _PERF_EVENT_IOC_ENABLE, 0)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def memory_barrier(self) -> Callable[[], object] | None:
        if struct.calcsize("P") != 8:
            raise OSError(errno.EOPNOTSUPP, "a 32-bit process cannot read positions of 64 bits in one piece")
        return syscall.memory_barrier()

    def event_waiter(self) -> EventWaiter:
        return Waiter()


class Waiter:
    """epoll(7). A buffer is reported when the kernel wakes its readers, not as long as it has data.

    That is so because a record that a program has reserved and not yet committed counts as data, and would let nobody
    sleep. The kernel wakes whoever waits where its reader had read up to the record that is committed; for that it
    looks at the reader's position after it has written the record's header, and a reader, the other way round, writes
    its position, passes a barrier, and looks at the header.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._woken = -1
        try:
            self._woken = os.eventfd(0)
            self._epoll.register(self._woken, select.EPOLLIN)
            self._barrier = syscall.full_barrier()
        except BaseException:
            self.close()
            raise

    def add(self, fd: int, writing: bool = False) -> None:
        self._epoll.register(fd, (select.EPOLLOUT if writing else select.EPOLLIN) | select.EPOLLET)

    def look(self) -> None:
        self._barrier()

    def wait(self, seconds: float) -> None:
        self._epoll.poll(min(seconds, _LONGEST))

    def wake(self) -> None:
        os.eventfd_write(self._woken, 1)

    def subscribe(self, loop: AbstractEventLoop, callback: Callable[[], object]) -> Callable[[], object]:
        number = self._epoll.fileno()
        loop.add_reader(number, self._report, callback)
        return lambda: loop.remove_reader(number)

    def _report(self, callback: Callable[[], object]) -> None:
        # What is not taken from here would be reported again and again.
        self._epoll.poll(0)
        callback()

    def close(self) -> None:
        self._epoll.close()
        if self._woken >= 0:
            os.close(self._woken)
            self._woken = -1
