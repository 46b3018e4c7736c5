"""What readers and writers of event buffers share: how they are closed under whoever uses or waits for them.

Memory that programs share must not be unmapped while a thread looks at it. So `close` only says that it is over and
wakes whoever waits; who is inside last lets go.
"""

from __future__ import annotations

import errno
import os
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar
from weakref import WeakSet

from kbpf.backend import Backend
from kbpf.errors import BpfError

Self = TypeVar("Self", bound="Waiting")

#: Seconds of one sleep at most: the longest that all systems take.
LONGEST = 3600.0


class Waiting:
    """Owns buffers, and a waiter for them. What it opened before a fork is closed in the child."""

    def __init__(self, backend: Backend, label: str) -> None:
        self._backend = backend
        self.label = label
        self._pid = os.getpid()
        self._over = False
        self._freed = False
        self._inside = 0
        # A signal handler that closes may have interrupted whoever is at this very lock.
        self._gate = threading.RLock()
        self._turn = threading.Lock()
        self._waiter = backend.event_waiter()
        _OPEN.add(self)

    @property
    def backend(self) -> str:
        """``"kernel"`` or ``"emulator"``."""
        return self._backend.name

    @property
    def closed(self) -> bool:
        return self._over

    def close(self) -> None:
        """Let go of the buffers, and wake whoever waits for them, who finds them closed.

        Any thread may call it, and signal handlers. Records that were not read are lost. Closing twice is fine.
        """
        if not self._over:
            self._over = True
            with self._gate:
                if not self._freed:
                    self._waiter.wake()
        with self._gate:
            if not self._inside:
                self._free_once()

    def _free_once(self) -> None:
        if not self._freed:
            self._freed = True
            _OPEN.discard(self)
            self._free()
            self._waiter.close()

    def _free(self) -> None:
        raise NotImplementedError

    def _check_open(self) -> None:
        if self._over:
            raise self._closed_error()

    def _closed_error(self) -> BpfError:
        hints = () if self._pid == os.getpid() else ("it was opened before the fork: open another in the child",)
        return BpfError(errno.EBADF, f"use {self.label} after it was closed", hints)

    @contextmanager
    def _using(self) -> Iterator[None]:
        """Keep the memory mapped meanwhile. Raises `BpfError` (EBADF) where it is closed."""
        self._enter()
        try:
            self._check_open()
            yield
        finally:
            self._leave()

    def _enter(self) -> None:
        with self._gate:
            self._inside += 1

    def _leave(self) -> None:
        with self._gate:
            self._inside -= 1
            if self._over and not self._inside:
                self._free_once()

    @contextmanager
    def _turn_by(self, deadline: float | None) -> Iterator[bool]:
        """One thread at a time; False where it was not this one's turn before the deadline."""
        left = -1.0 if deadline is None else min(max(deadline - time.monotonic(), 0.0), threading.TIMEOUT_MAX)
        got = self._turn.acquire(timeout=left)
        try:
            yield got
        finally:
            if got:
                self._turn.release()

    def _sleep(self, deadline: float | None, most: float | None) -> bool:
        """Until something happens, or for `most` seconds; False where the deadline is there already."""
        left = LONGEST if most is None else min(most, LONGEST)
        if deadline is not None:
            until = deadline - time.monotonic()
            if until <= 0:
                return False
            left = min(left, until)
        self._waiter.wait(left)
        return True

    def _forked(self) -> None:
        """In a child: the positions and the descriptors are the parent's."""
        self._gate, self._turn = threading.RLock(), threading.Lock()
        self._over = self._freed = True
        self._abandon()

    def _abandon(self) -> None:
        """Close this process's descriptors, and change nothing else."""
        raise NotImplementedError

    def __reduce__(self) -> str:
        raise TypeError(f"{self.label} cannot be copied or pickled: it owns mapped memory")

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_freed", True):
            return
        try:
            warnings.warn(f"{self.label} was dropped open", ResourceWarning, stacklevel=2, source=self)
        finally:
            self._over = True
            self._free_once()


def deadline_of(timeout: float | None) -> float | None:
    """When `timeout` seconds are over, by the monotonic clock; None for never."""
    return None if timeout is None else time.monotonic() + max(timeout, 0.0)


_OPEN: WeakSet[Waiting] = WeakSet()


def _after_fork() -> None:
    for waiting in list(_OPEN):
        waiting._forked()
    _OPEN.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
