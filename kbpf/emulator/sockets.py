"""The emulator's part of the seam that has to do with sockets.

Takes emulated packet sockets, and sockets of the operating system that `wrap` put into a `FilteredSocket`.
"""

from __future__ import annotations

import errno
import socket as _sockets
from typing import Any, Literal

from kbpf.emulator.filtered import FilteredSocket, filtered
from kbpf.emulator.packetsocket import SOCK_DGRAM, SOCK_RAW, EmulatedPacketSocket
from kbpf.emulator.slot import Runnable, Slot, error
from kbpf.specs import SOCKET_LAYOUTS, Layout

_TYPES = {"raw": SOCK_RAW, "dgram": SOCK_DGRAM}


def is_emulated(socket: Any) -> bool:
    """Whether filters on this socket are the emulator's."""
    return isinstance(socket, (EmulatedPacketSocket, FilteredSocket))


def wrap(socket: Any) -> EmulatedPacketSocket | FilteredSocket:
    """What filters this socket in the emulator: itself if it is the emulator's, else the `FilteredSocket` around it.

    Raises `OSError`: EOPNOTSUPP for streams, EBADF, ENOTSOCK.
    """
    return socket if is_emulated(socket) else filtered(socket)


def open_packet_socket(
    interface: str | None, *, type: Literal["raw", "dgram"] = "raw", protocol: int = 3
) -> EmulatedPacketSocket:
    """A packet socket on the emulated network; `OSError` ENODEV for an unknown interface."""
    return EmulatedPacketSocket(interface, _TYPES[type], protocol)


def layout_of(socket: Any) -> Layout:
    """What lies at offset 0 of what a filter on this socket sees."""
    if isinstance(socket, EmulatedPacketSocket):
        if socket.type == SOCK_DGRAM:
            name = "packet_dgram"
        elif socket.interface is None:
            name = "packet"
        else:
            name = "packet_ethernet" if socket.interface.header else "packet_ip"
        return SOCKET_LAYOUTS[name]
    family, type, protocol = _wrapped(socket).kind
    if family == _sockets.AF_UNIX:
        name = "unix"
    elif family == 16:
        name = "netlink"
    elif family == 17:
        name = "packet_dgram" if type == SOCK_DGRAM else _real_packet_layout(socket)
    elif type == SOCK_RAW:
        name = "raw4" if family == _sockets.AF_INET else "raw6"
    else:
        name = {1: "icmp", 17: "udp", 58: "icmp6"}.get(protocol, "")
        if not name:
            raise error(errno.EOPNOTSUPP)
    return SOCKET_LAYOUTS[name]


def _real_packet_layout(socket: FilteredSocket) -> str:
    name, _, _, hatype, _ = socket.getsockname()
    return "packet_ethernet" if name and hatype in (1, 772) else "packet"


def refuse_if_locked(socket: Any) -> None:
    """`OSError` EPERM when the filter is locked; to be asked before the new program is looked at."""
    _slot(socket).refuse_if_locked()


def attach(socket: Any, program: Runnable, classic: bytes | None) -> None:
    """Put a program into the socket's slot; `classic` are its instructions as given, None for an eBPF program."""
    _slot(socket).attach(program, classic)


def detach(socket: Any) -> None:
    """SO_DETACH_FILTER; `OSError` ENOENT without a filter, EPERM when locked."""
    _slot(socket).detach()


def get_filter(socket: Any) -> bytes:
    """SO_GET_FILTER: the classic instructions, empty without; `OSError` EACCES when an eBPF program is there."""
    return _slot(socket).get_filter()


def lock(socket: Any) -> None:
    """SO_LOCK_FILTER."""
    _slot(socket).lock()


def drain(socket: Any) -> int:
    """Throw away what is queued; returns how many packets that were."""
    _slot(socket)
    return int(socket.drain())


def drainable(socket: Any) -> bool:
    """Packet, raw and UDP sockets are; UNIX and netlink sockets are not."""
    if isinstance(socket, EmulatedPacketSocket):
        return True
    return _wrapped(socket).kind.family in (17, _sockets.AF_INET, _sockets.AF_INET6)


def _slot(socket: Any) -> Slot:
    if isinstance(socket, EmulatedPacketSocket):
        if socket.closed:
            raise error(errno.EBADF)
        return socket.slot
    wrapped = _wrapped(socket)
    if wrapped.fileno() < 0:
        raise error(errno.EBADF)
    return wrapped.slot


def _wrapped(socket: Any) -> FilteredSocket:
    """The FilteredSocket; a socket of the operating system that was not wrapped is not one of ours."""
    if not isinstance(socket, FilteredSocket):
        raise error(errno.ENOTSOCK)
    return socket
