"""Filters on sockets, and packet sockets.

Classic filters since Linux 2.2 (read back since 3.8, locked since 3.9), eBPF since 3.19. No capability is needed, but
CAP_NET_ADMIN for a classic filter on TCP (measured on 6.18; Debian's 6.1 wants none) and CAP_NET_RAW for packet and raw
sockets. The traps: ``sock_fprog.len`` has 16 bits, SO_GET_FILTER counts instructions where every other option counts
bytes, and a filter on a UNIX stream socket is accepted and never runs. What lies in a packet ring (PACKET_RX_RING) no
drain can reach: attach before the ring is bound.
"""

from __future__ import annotations

import errno
import socket as sockets
import struct
from typing import Literal

from kbpf.backend import SocketLike
from kbpf.isa import cbpf
from kbpf.kernel import syscall
from kbpf.specs import SOCKET_LAYOUTS, Layout
from kbpf.uapi import constants as uapi

# Larger than any header that a socket option puts before the data (PACKET_VNET_HDR).
_DRAIN_ROOM = 64
# More packets than any receive buffer holds: a drain ends even where nothing stops new ones.
_DRAIN_MOST = 1 << 20
# ICMP errors for what was sent earlier, and a device going down: the next receive reports them, before the packets.
_PENDING = (errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EPROTO, errno.ENETDOWN)

_SOCKADDR_LL = struct.Struct("=HHiHBB8s")

_INET = (sockets.AF_INET, sockets.AF_INET6)
_ETHERNET = (uapi.ARPHRD_ETHER, uapi.ARPHRD_LOOPBACK)
# Devices whose packets have no link header.
_BARE = (uapi.ARPHRD_NONE, uapi.ARPHRD_RAWIP, uapi.ARPHRD_TUNNEL, uapi.ARPHRD_TUNNEL6, uapi.ARPHRD_SIT)

# (type, protocol) of IPv4 and IPv6 sockets, where the protocol decides.
_BY_PROTOCOL: dict[tuple[int, int], str] = {
    (sockets.SOCK_STREAM, sockets.IPPROTO_TCP): "tcp",
    (sockets.SOCK_DGRAM, sockets.IPPROTO_UDP): "udp",
    (sockets.SOCK_DGRAM, sockets.IPPROTO_ICMP): "icmp",
    (sockets.SOCK_DGRAM, sockets.IPPROTO_ICMPV6): "icmp6",
}


class SocketCalls:
    """The sockets' part of the backend."""

    def socket_layout(self, socket: SocketLike) -> Layout:
        fd = socket.fileno()
        family, type, protocol = _identity(fd)
        if family == sockets.AF_PACKET:
            return SOCKET_LAYOUTS["packet_dgram" if type == sockets.SOCK_DGRAM else _link_layout(fd)]
        name = ""
        if family in _INET:
            if type == sockets.SOCK_RAW:
                name = "raw4" if family == sockets.AF_INET else "raw6"
            else:
                name = _BY_PROTOCOL.get((type, protocol), "")
        elif family == sockets.AF_UNIX:
            if type == sockets.SOCK_STREAM:
                raise OSError(errno.EOPNOTSUPP, "Linux never runs a filter on a UNIX stream socket")
            name = "unix"
        elif family == sockets.AF_NETLINK:
            name = "netlink"
        if not name:
            raise OSError(errno.EOPNOTSUPP, f"what a filter sees on this socket (family {family}) is not known")
        return SOCKET_LAYOUTS[name]

    def socket_attach_filter(self, socket: SocketLike, program: bytes) -> None:
        _set_filter(socket, uapi.SO_ATTACH_FILTER, program)

    def socket_attach_bpf(self, socket: SocketLike, program: int) -> None:
        # Not Python's setsockopt: it passes eight bytes on an AF_VSOCK socket.
        syscall.setsockopt(socket.fileno(), sockets.SOL_SOCKET, uapi.SO_ATTACH_BPF, struct.pack("i", program))

    def socket_detach(self, socket: SocketLike) -> None:
        syscall.setsockopt(socket.fileno(), sockets.SOL_SOCKET, uapi.SO_DETACH_FILTER, bytes(4))

    def socket_get_filter(self, socket: SocketLike) -> bytes:
        most = cbpf.MAXINSNS
        data, count = syscall.getsockopt(
            socket.fileno(), sockets.SOL_SOCKET, uapi.SO_GET_FILTER, room=8 * most, optlen=most
        )
        return data[: 8 * count]

    def socket_lock(self, socket: SocketLike) -> None:
        syscall.setsockopt(socket.fileno(), sockets.SOL_SOCKET, uapi.SO_LOCK_FILTER, struct.pack("i", 1))

    def socket_drain(self, socket: SocketLike) -> int:
        fd = socket.fileno()
        drained = 0
        for _ in range(_DRAIN_MOST):
            try:
                syscall.recv(fd, _DRAIN_ROOM, sockets.MSG_DONTWAIT | sockets.MSG_TRUNC)
                drained += 1
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno not in _PENDING and error.errno != errno.EINTR:
                    raise
        return drained

    def socket_drainable(self, socket: SocketLike) -> bool:
        family, type, _ = _identity(socket.fileno())
        return family == sockets.AF_PACKET or (family in _INET and type in (sockets.SOCK_DGRAM, sockets.SOCK_RAW))

    def socket_attach_reuseport_filter(self, socket: SocketLike, program: bytes) -> None:
        _set_filter(socket, uapi.SO_ATTACH_REUSEPORT_CBPF, program)

    def socket_attach_reuseport_bpf(self, socket: SocketLike, program: int) -> None:
        value = struct.pack("i", program)
        syscall.setsockopt(socket.fileno(), sockets.SOL_SOCKET, uapi.SO_ATTACH_REUSEPORT_EBPF, value)

    def socket_detach_reuseport(self, socket: SocketLike) -> None:
        syscall.setsockopt(socket.fileno(), sockets.SOL_SOCKET, uapi.SO_DETACH_REUSEPORT_BPF, bytes(4))

    def packet_socket(
        self, interface: str | None, *, type: Literal["raw", "dgram"] = "raw", protocol: int = uapi.ETH_P_ALL
    ) -> sockets.socket:
        # Without a protocol it receives nothing: no packet of another interface is queued before it is bound.
        made = sockets.socket(sockets.AF_PACKET, sockets.SOCK_RAW if type == "raw" else sockets.SOCK_DGRAM, 0)
        try:
            # Python's own bind() cuts a long name, to what may be another interface's.
            index = 0 if interface is None else _interface_index(interface)
            address = _SOCKADDR_LL.pack(sockets.AF_PACKET, sockets.htons(protocol), index, 0, 0, 0, b"")
            syscall.bind(made.fileno(), address)
        except BaseException:
            made.close()
            raise
        return made


def _set_filter(socket: SocketLike, option: int, program: bytes) -> None:
    if len(program) % 8:
        raise syscall.failure(errno.EINVAL)
    # A longer program must not become a shorter one by losing high bits. Linux refuses anything above 4096.
    count = min(len(program) // 8, 0xFFFF)
    syscall.set_filter(socket.fileno(), sockets.SOL_SOCKET, option, count, program)


def socket_option(fd: int, option: int) -> int:
    """An integer option of level SOL_SOCKET."""
    data, _ = syscall.getsockopt(fd, sockets.SOL_SOCKET, option, room=4)
    return int(struct.unpack("i", data)[0])


def _interface_index(name: str) -> int:
    try:
        return sockets.if_nametoindex(name)
    except OSError:
        # Python's error has no errno.
        raise syscall.failure(errno.ENODEV) from None


def _identity(fd: int) -> tuple[int, int, int]:
    """Family, type and protocol."""
    return socket_option(fd, uapi.SO_DOMAIN), socket_option(fd, uapi.SO_TYPE), socket_option(fd, uapi.SO_PROTOCOL)


def _link_layout(fd: int) -> str:
    """The layout of a raw packet socket, from the type of the device that it is bound to."""
    address = syscall.getsockname(fd).ljust(_SOCKADDR_LL.size, b"\0")
    _, _, index, device_type, _, _, _ = _SOCKADDR_LL.unpack(address[: _SOCKADDR_LL.size])
    if index > 0 and device_type in _ETHERNET:
        return "packet_ethernet"
    return "packet_ip" if index > 0 and device_type in _BARE else "packet"
