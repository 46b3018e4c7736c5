"""One owner for each descriptor.

Everything a user holds that has a descriptor is a `Resource`: closed once, usable in
``with``, and warning when it is dropped open. The kernel's bpf descriptors are
close-on-exec from birth; a forked child shares them, as it does files.
"""

from __future__ import annotations

import errno
import os
import warnings
from types import TracebackType
from typing import TypeVar

from kbpf.backend import Backend
from kbpf.errors import BpfError

Self = TypeVar("Self", bound="Resource")


class Descriptor:
    """A descriptor, and who is just using it: ``with descriptor as number``.

    `close` gives the number back when the last of them is done. Before that it could become another map's, and the
    kernel would write values of that one's size where a thread has room for its own. There is no lock: elements of
    lists come and go in one piece, and whoever enters does so before he looks whether it is over.
    """

    __slots__ = ("_backend", "_label", "_owned", "_pid", "inside", "number")

    def __init__(self, backend: Backend, number: int | None, label: str) -> None:
        self._backend, self._label, self._pid = backend, label, os.getpid()
        #: None when it is closed.
        self.number = number
        #: An element for each use.
        self.inside: list[None] = []
        self._owned = [] if number is None else [number]

    def __enter__(self) -> int:
        self.inside.append(None)
        number = self.number
        if number is None:
            self.__exit__()
            raise self.closed_error()
        return number

    def __exit__(self, *_: object) -> None:
        self.inside.pop()
        if self.number is None:
            self.give_back()

    def closed_error(self) -> BpfError:
        return BpfError(errno.EBADF, f"use {self._label} after it was closed")

    def close(self) -> None:
        """No further use; raises `BpfError` where something else has closed the number."""
        self.number = None
        if self._pid != os.getpid():
            # Threads that were inside when this process was forked are not there.
            self.inside.clear()
        self.give_back()

    def give_back(self) -> None:
        """Close it if nobody is inside, and nobody has done so; where something else has, `BpfError`."""
        if self.inside:
            return
        try:
            number = self._owned.pop()
        except IndexError:
            return
        try:
            self._backend.close(number)
        except OSError as error:
            hint = f"descriptor {number} was closed by something else"
            raise BpfError(error.errno or 0, f"close {self._label}", (hint,)) from None


class Resource:
    """A descriptor of a backend, owned."""

    #: What messages call it: ``map "flows"``.
    label: str

    def __init__(self, backend: Backend, fd: int, label: str) -> None:
        self._backend = backend
        self._descriptor = Descriptor(backend, fd, label)
        self._pid = os.getpid()
        self.label = label

    @property
    def backend(self) -> str:
        """``"kernel"`` or ``"emulator"``."""
        return self._backend.name

    @property
    def closed(self) -> bool:
        return self._descriptor.number is None

    def fileno(self) -> int:
        """The descriptor: the kernel's, or the emulator's own. Raises `BpfError` (EBADF) after `close`."""
        number = self._descriptor.number
        if number is None:
            raise self._descriptor.closed_error()
        return number

    def close(self) -> None:
        """Give the descriptor back. Closing twice is fine; `BpfError` (EBADF) where something else has closed it.

        Any thread may call it: what others are just doing with a map comes to its end first.
        """
        self._descriptor.close()

    def __reduce__(self) -> str:
        # Two owners would both close it, the second one whatever has the number by then.
        raise TypeError(f"{self.label} cannot be copied or pickled: it owns a descriptor")

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # A forked child inherits the object but is not its owner: only the parent is warned.
        descriptor = getattr(self, "_descriptor", None)
        if descriptor is not None and descriptor.number is not None and self._pid == os.getpid():
            try:
                warnings.warn(f"{self.label} was dropped open", ResourceWarning, stacklevel=2, source=self)
            finally:
                self.close()
