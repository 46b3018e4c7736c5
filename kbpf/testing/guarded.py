"""Run native code on copies of its buffers that end where memory does: one byte beyond is a crash.

Buffers are Python's, which puts them where it likes. Here native code gets copies instead, each at the end of a page
with pages before and behind that nobody may touch; what Python and native code change is copied over whenever one asks
the other for something. Slow, and for one thread.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from kbpf.emulator.jit import callbacks, program, session
from kbpf.emulator.jit.buffers import host_address
from kbpf.emulator.memory import Buffer

_PROT_NONE = 0
_mprotect = ctypes.CDLL(None, use_errno=True).mprotect
_mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class _Copy:
    """A copy of a buffer, all of it, between pages that may not be touched."""

    def __init__(self, whole: Buffer) -> None:
        self.whole = whole
        size = len(whole)
        room = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._pages = mmap.mmap(-1, room + 2 * mmap.PAGESIZE)
        self._held = (ctypes.c_char * len(self._pages)).from_buffer(self._pages)
        start = ctypes.addressof(self._held)
        for page in (start, start + mmap.PAGESIZE + room):
            if _mprotect(page, mmap.PAGESIZE, _PROT_NONE):
                raise OSError(ctypes.get_errno(), "mprotect")
        end = mmap.PAGESIZE + room
        self.address = start + end - size
        self._bytes = memoryview(self._pages)[end - size : end]
        self._seen = bytes(whole)
        self._bytes[:] = self._seen

    def fetch(self) -> None:
        """Native code may have written into it."""
        if self._bytes != self._seen:
            if isinstance(self.whole, bytes):
                raise AssertionError("native code has written where only bytes to read are")
            self._seen = bytes(self._bytes)
            self.whole[:] = self._seen

    def send(self) -> None:
        """Python may have written into the buffer."""
        now = bytes(self.whole)
        if now != self._seen:
            self._seen = now
            self._bytes[:] = now


class _Guard:
    def __init__(self) -> None:
        self._copies: dict[int, _Copy] = {}

    def host_address(self, buffer: Buffer) -> tuple[int, object]:
        """Instead of `kbpf.emulator.jit.buffers.host_address`."""
        real, held = host_address(buffer)
        if held is None:
            return real, held
        whole: Any = buffer.obj if isinstance(buffer, memoryview) else buffer
        if id(whole) not in self._copies:
            self._copies[id(whole)] = _Copy(whole)
        copy = self._copies[id(whole)]
        return copy.address + real - host_address(whole)[0], held

    def fetch(self) -> None:
        for copy in self._copies.values():
            copy.fetch()

    def send(self) -> None:
        for copy in self._copies.values():
            copy.send()

    def in_python(self, action: Callable[..., Any]) -> Callable[..., Any]:
        """What native code calls."""

        def wrapped(*given: Any) -> Any:
            self.fetch()
            try:
                return action(*given)
            finally:
                self.send()

        return wrapped

    def in_native(self, action: Callable[..., Any]) -> Callable[..., Any]:
        """What calls native code."""

        def wrapped(*given: Any) -> Any:
            self.send()
            try:
                return action(*given)
            finally:
                self.fetch()

        return wrapped


@contextmanager
def guarded() -> Iterator[None]:
    """Programs that native code is made for meanwhile are run so."""
    guard = _Guard()
    with ExitStack() as stack:
        for module in (session, program):
            stack.enter_context(mock.patch.object(module, "host_address", guard.host_address))
        stack.enter_context(mock.patch.object(callbacks, "_guarded", guard.in_python(callbacks._guarded)))
        real = program._FUNCTION
        stack.enter_context(mock.patch.object(program, "_FUNCTION", lambda address: guard.in_native(real(address))))
        yield
