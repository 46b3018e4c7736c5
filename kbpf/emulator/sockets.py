"""The emulator's part of the seam that has to do with sockets.

Takes emulated sockets, and sockets of the operating system that `wrap` put into a `FilteredSocket`.
"""

from __future__ import annotations

import errno
import socket as _sockets
from typing import Any, Literal

from kbpf.emulator.endpoint import Endpoint
from kbpf.emulator.filtered import FilteredSocket, filtered
from kbpf.emulator.inetsocket import InetEndpoint
from kbpf.emulator.packetsocket import SOCK_DGRAM, SOCK_RAW, EmulatedPacketSocket
from kbpf.emulator.program import Program
from kbpf.emulator.reconstruct import Kind
from kbpf.emulator.reuseport import selector_of
from kbpf.emulator.slot import Runnable, Slot, error
from kbpf.errors import ENOTSUPP
from kbpf.specs import SOCKET_LAYOUTS, Layout

_TYPES = {"raw": SOCK_RAW, "dgram": SOCK_DGRAM}


def is_emulated(socket: Any) -> bool:
    """Whether filters on this socket are the emulator's."""
    return isinstance(socket, (Endpoint, FilteredSocket))


def wrap(socket: Any) -> Endpoint | FilteredSocket:
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
    """What lies at offset 0 of what a filter on this socket sees; `OSError` EOPNOTSUPP where it never runs."""
    kind = _kind(socket)
    if kind.family == _sockets.AF_UNIX:
        name = "" if kind.type == _sockets.SOCK_STREAM else "unix"
    elif kind.family == 16:
        name = "netlink"
    elif kind.family == 17:
        name = "packet_dgram" if kind.type == SOCK_DGRAM else _packet_layout(socket)
    elif kind.type == SOCK_RAW:
        name = "raw4" if kind.family == _sockets.AF_INET else "raw6"
    else:
        name = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmp6"}.get(kind.protocol, "")
    if not name:
        raise error(errno.EOPNOTSUPP)
    return SOCKET_LAYOUTS[name]


def _kind(socket: Any) -> Kind:
    if isinstance(socket, Endpoint):
        return Kind(socket.family, socket.type, socket.proto)
    return _wrapped(socket).kind


def _packet_layout(socket: Any) -> str:
    if isinstance(socket, EmulatedPacketSocket):
        if socket.interface is None:
            return "packet"
        return "packet_ethernet" if socket.interface.header else "packet_ip"
    return _real_packet_layout(socket)


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
    """Packet, raw and UDP sockets are; UNIX and netlink sockets, streams and listeners are not."""
    kind = _kind(socket)
    inet = kind.family in (_sockets.AF_INET, _sockets.AF_INET6)
    return kind.family == 17 or (inet and kind.type in (SOCK_DGRAM, SOCK_RAW))


def attach_reuseport(socket: Any, program: Runnable) -> None:
    """SO_ATTACH_REUSEPORT_CBPF, _EBPF: the program of the group that shares the socket's port.

    `OSError` EINVAL for sockets that are in none and have not set SO_REUSEPORT, EPERM when the filter is locked.
    """
    _shares_port(socket).attach_reuseport(selector_of(program))


def attach_sk_reuseport(socket: Any, program: Program) -> None:
    """SO_ATTACH_REUSEPORT_EBPF with a program of type sk_reuseport; ENOTSUPP for sockets that never share a port."""
    if not isinstance(socket, InetEndpoint) or socket.proto not in (6, 17):
        raise error(ENOTSUPP)
    socket.attach_reuseport(selector_of(program))


def detach_reuseport(socket: Any) -> None:
    """SO_DETACH_REUSEPORT_BPF; `OSError` ENOENT where there is none."""
    _shares_port(socket).detach_reuseport()


def _shares_port(socket: Any) -> InetEndpoint:
    """`OSError` EINVAL for sockets that never share a port, EBADF once they are closed."""
    if isinstance(socket, InetEndpoint) and socket.closed:
        raise error(errno.EBADF)
    if not isinstance(socket, InetEndpoint) or socket.proto not in (6, 17):
        raise error(errno.EINVAL)
    return socket


def _slot(socket: Any) -> Slot:
    holder = socket if isinstance(socket, Endpoint) else _wrapped(socket)
    if holder.fileno() < 0:
        raise error(errno.EBADF)
    return holder.slot


def _wrapped(socket: Any) -> FilteredSocket:
    """The FilteredSocket; a socket of the operating system that was not wrapped is not one of ours."""
    if not isinstance(socket, FilteredSocket):
        raise error(errno.ENOTSOCK)
    return socket
