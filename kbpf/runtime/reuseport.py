"""Attach what chooses among the sockets that share a port: SO_ATTACH_REUSEPORT_CBPF and _EBPF.

Linux 4.5, and 4.19 for programs of type ``sk_reuseport``. No capability. A group has one slot, which any of its sockets
may change, and which goes with the last of them.
"""

from __future__ import annotations

import errno
from types import TracebackType
from typing import Any

from kbpf.backend import Backend
from kbpf.errors import BpfError
from kbpf.isa import cbpf
from kbpf.runtime.attach import backend_for, is_emulated
from kbpf.runtime.failures import doing
from kbpf.runtime.filter import Filter
from kbpf.runtime.link import Link
from kbpf.runtime.program import Program


class ReuseportLink(Link):
    """What `kbpf.attach_reuseport` gives: one of the sockets, and what chooses among them all.

    Keeps the socket object, not its number. What is in the slot cannot be seen: detaching takes off whatever is there.
    A link that is merely dropped leaves it there.
    """

    def __init__(self, backend: Backend, socket: Any, attached: Filter | Program) -> None:
        self._backend = backend
        self.socket = socket
        self.attached = attached

    @property
    def backend(self) -> str:
        """``"kernel"`` or ``"emulator"``."""
        return self._backend.name

    def replace(self, new: Filter | Program) -> None:
        """Put another in the slot, with no moment between them without one; if it is refused, the old one stays."""
        _put(self._backend, self.socket, new)
        self.attached = new

    def detach(self) -> bool:
        """SO_DETACH_REUSEPORT_BPF (Linux 5.3); False if nothing was there. SO_LOCK_FILTER does not hinder it.

        Raises `BpfError` (EBADF) when the socket was closed.
        """
        if self.attached is None:
            return False
        with doing(
            self._backend, "detach the group's program", operation="SO_DETACH_REUSEPORT_BPF", socket=self.socket
        ):
            try:
                self._backend.socket_detach_reuseport(self.socket)
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise
                self.attached = None
                return False
        self.attached = None
        return True

    def __enter__(self) -> ReuseportLink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.detach()
        except BpfError as failure:
            # A closed socket has left the group.
            if failure.errno not in (errno.EBADF, errno.ENOTSOCK):
                raise

    def __repr__(self) -> str:
        what = "detached" if self.attached is None else repr(self.attached)
        return f"<ReuseportLink {what} on {self.socket!r}, {self.backend}>"


def attach_reuseport(socket: Any, what: Filter | Program, backend: str | None = None) -> ReuseportLink:
    """Attach what chooses among the UDP or TCP sockets that share a port with this one (SO_REUSEPORT).

    A `Filter` or a program of type ``socket_filter`` sees what follows the transport header, and returns the socket's
    place in the order of binding; where there is none, the flow's hash decides. A program of type ``sk_reuseport``
    chooses from a map of type ``reuseport_sockarray`` (bpf_sk_select_reuseport), and drops the packet with SK_DROP (0).

    Raises `BpfError`: EINVAL for a socket that has not set SO_REUSEPORT or never shares a port, and for programs of
    other types, `PermissionDeniedError` where the socket's filter is locked. The emulator chooses among emulated
    sockets: `NotSupportedError` for others.
    """
    carrier = backend_for(socket, what, backend)
    _put(carrier, socket, what)
    return ReuseportLink(carrier, socket, what)


def _put(backend: Backend, socket: Any, what: Filter | Program) -> None:
    label = what.label if isinstance(what, Program) else f"a filter of {len(what)} instructions"
    operation = f"SO_ATTACH_REUSEPORT_{'EBPF' if isinstance(what, Program) else 'CBPF'}"
    with doing(backend, f"attach {label} to the group of sockets", operation=operation, socket=socket):
        if backend.name == "emulator" and not is_emulated(socket):
            raise OSError(errno.EOPNOTSUPP, "the emulator chooses among emulated sockets only")
        if isinstance(what, Program):
            backend.socket_attach_reuseport_bpf(socket, what.fileno())
        else:
            what.check()
            backend.socket_attach_reuseport_filter(socket, cbpf.encode(what.instructions))
