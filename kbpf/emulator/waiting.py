"""Waiting for ring buffers and perf buffers, which have no descriptor that the system's own calls could wait for.

A program that writes a record, in whatever thread it runs, tells those who wait. While nobody runs a program,
time passes: what is due by `environment.clock` happens when a reader looks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Protocol

from kbpf.emulator import network
from kbpf.emulator.clock import until_due

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop


class Buffer(Protocol):
    """What tells that something has been done to it."""

    listeners: list[Callable[[], object]]


class Waiter:
    """`kbpf.backend.EventWaiter` in the emulator."""

    def __init__(self, buffer_of: Callable[[int], Buffer]) -> None:
        self._buffer_of = buffer_of
        self._buffers: list[Buffer] = []
        # Open while there is news. Programs also run in signal handlers: a condition could be held when one comes, and
        # the queue that is made for that may wait for ever where a signal comes at its deadline.
        self._news = threading.Lock()
        self._news.acquire()
        self._woken = False
        self._subscribed: list[Callable[[], object]] = []

    def add(self, fd: int, writing: bool = False) -> None:
        buffer = self._buffer_of(fd)
        buffer.listeners.append(self._tell)
        self._buffers.append(buffer)

    def look(self) -> float | None:
        network.settle()
        return until_due(None)

    def wait(self, seconds: float) -> None:
        if not self._woken:
            self._news.acquire(timeout=seconds)

    def wake(self) -> None:
        self._woken = True
        self._tell()

    def _tell(self) -> None:
        with suppress(RuntimeError):
            self._news.release()
        for callback in tuple(self._subscribed):
            # A loop that is closed wants to hear nothing.
            with suppress(RuntimeError):
                callback()

    def subscribe(self, loop: AbstractEventLoop, callback: Callable[[], object]) -> Callable[[], object]:
        told = partial(loop.call_soon_threadsafe, callback)
        self._subscribed.append(told)
        return partial(self._subscribed.remove, told)

    def close(self) -> None:
        for buffer in self._buffers:
            buffer.listeners.remove(self._tell)
        self._buffers.clear()
