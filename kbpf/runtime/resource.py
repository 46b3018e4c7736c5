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


class Resource:
    """A descriptor of a backend, owned."""

    #: What messages call it: ``map "flows"``.
    label: str

    def __init__(self, backend: Backend, fd: int, label: str) -> None:
        self._backend = backend
        self._fd: int | None = fd
        self._pid = os.getpid()
        self.label = label

    @property
    def backend(self) -> str:
        """``"kernel"`` or ``"emulator"``."""
        return self._backend.name

    @property
    def closed(self) -> bool:
        return self._fd is None

    def fileno(self) -> int:
        """The descriptor: the kernel's, or the emulator's own. Raises `BpfError` (EBADF) after `close`."""
        if self._fd is None:
            raise BpfError(errno.EBADF, f"use {self.label} after it was closed")
        return self._fd

    def close(self) -> None:
        """Give the descriptor back. Closing twice is fine; `BpfError` (EBADF) where something else has closed it."""
        fd, self._fd = self._fd, None
        if fd is None:
            return
        try:
            self._backend.close(fd)
        except OSError as error:
            hint = f"descriptor {fd} was closed by something else"
            raise BpfError(error.errno or 0, f"close {self.label}", (hint,)) from None

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
        if getattr(self, "_fd", None) is not None and self._pid == os.getpid():
            try:
                warnings.warn(f"{self.label} was dropped open", ResourceWarning, stacklevel=2, source=self)
            finally:
                self.close()
