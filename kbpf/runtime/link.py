"""A filter on a socket, as long as it is there."""

from __future__ import annotations

import errno
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kbpf.backend import Backend
from kbpf.errors import BpfError
from kbpf.isa import cbpf
from kbpf.runtime.failures import doing
from kbpf.runtime.filter import Filter
from kbpf.runtime.program import Program

if TYPE_CHECKING:
    from kbpf.specs import Layout


class Link:
    """What `kbpf.attach` gives: the socket, and the filter in its one slot.

    Keeps the socket object, not its number. Leaving ``with`` detaches, and never raises for a lock or a closed
    socket. A link that is merely dropped leaves the filter where it is, as setsockopt(2) does.
    """

    def __init__(self, backend: Backend, socket: Any, attached: Filter | Program) -> None:
        self._backend = backend
        #: The filtered socket: the one that was given, or in the emulator what stands in its place.
        self.socket = socket
        #: The filter or program in the slot.
        self.attached: Filter | Program | None = attached
        self._layout: Layout = backend.socket_layout(socket)

    @property
    def backend(self) -> str:
        """``"kernel"`` or ``"emulator"``."""
        return self._backend.name

    def detach(self) -> bool:
        """SO_DETACH_FILTER, if the filter there is still this link's; False if it was gone or somebody else's.

        A classic filter is read back and compared first; an eBPF program cannot be seen, so where this link put
        one, whatever program is there is taken off. Raises `PermissionDeniedError` when the filter is locked,
        `BpfError` (EBADF) when the socket was closed.
        """
        if self.attached is None:
            return False
        with doing(self._backend, "detach the socket's filter", operation="SO_DETACH_FILTER", socket=self.socket):
            if not self._is_ours():
                self.attached = None
                return False
            try:
                self._backend.socket_detach(self.socket)
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise
                self.attached = None
                return False
        self.attached = None
        return True

    def replace(self, new: str | Filter | Program, drain: bool | None = None) -> None:
        """Put another filter in the slot, with no moment between them without one.

        Takes what `kbpf.attach` takes. If it is refused, the old filter stays.
        """
        from kbpf.runtime.attach import put

        self.attached = put(self._backend, self.socket, new, drain, self.attached)

    def lock(self) -> None:
        """SO_LOCK_FILTER (Linux 3.9): nobody can change or detach the filter any more, this process included."""
        with doing(self._backend, "lock the socket's filter", operation="SO_LOCK_FILTER", socket=self.socket):
            self._backend.socket_lock(self.socket)

    def read_back(self) -> Filter | None:
        """The classic filter that is in the slot now (SO_GET_FILTER, Linux 3.8), None if there is none.

        Raises `PermissionDeniedError` (EACCES) where an eBPF program is: it cannot be read back.
        """
        with doing(self._backend, "read the socket's filter back", operation="SO_GET_FILTER", socket=self.socket):
            raw = self._backend.socket_get_filter(self.socket)
        if isinstance(self.attached, Filter) and raw == cbpf.encode(self.attached.instructions):
            return self.attached
        return Filter(cbpf.decode(raw), layout=self._layout) if raw else None

    def _is_ours(self) -> bool:
        try:
            raw = self._backend.socket_get_filter(self.socket)
        except OSError as error:
            if error.errno == errno.EACCES:
                return isinstance(self.attached, Program)
            raise
        return isinstance(self.attached, Filter) and raw == cbpf.encode(self.attached.instructions)

    def __enter__(self) -> Link:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.detach()
        except BpfError as failure:
            # A locked filter stays by intent, and a closed socket took its filter with it.
            if failure.errno not in (errno.EPERM, errno.EBADF, errno.ENOTSOCK):
                raise

    def __repr__(self) -> str:
        what = "detached" if self.attached is None else repr(self.attached)
        return f"<Link {what} on {self.socket!r}, {self.backend}>"
