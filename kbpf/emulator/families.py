"""socket(2) on the emulated network."""

from __future__ import annotations

import errno
import socket as _socket

from kbpf.emulator.endpoint import Endpoint
from kbpf.emulator.netlink import AF_NETLINK, NETLINK_USERSOCK, NetlinkSocket
from kbpf.emulator.network import Network, current
from kbpf.emulator.pingsocket import PingSocket
from kbpf.emulator.rawsocket import RawSocket
from kbpf.emulator.slot import error
from kbpf.emulator.tcpsocket import TcpSocket
from kbpf.emulator.udp import UdpSocket
from kbpf.emulator.unix import AF_UNIX, UnixDatagramSocket, UnixEndpoint, UnixStreamSocket

_INET = (int(_socket.AF_INET), int(_socket.AF_INET6))
_IPPROTO_ICMP, _IPPROTO_TCP, _IPPROTO_UDP, _IPPROTO_ICMPV6, _IPPROTO_RAW = 1, 6, 17, 58, 255


def socket(
    family: int = _socket.AF_INET,
    type: int = _socket.SOCK_STREAM,
    proto: int = 0,
    *,
    network: Network | None = None,
) -> Endpoint:
    """An emulated socket, with the methods, results and errors of `socket.socket`.

    It is on the current network, or on `network`. Raises `OSError` as socket(2) does: EAFNOSUPPORT for families that
    the emulator does not have, EPROTONOSUPPORT and ESOCKTNOSUPPORT for what they do not have.
    """
    there = current() if network is None else network
    if family in _INET:
        if type == _socket.SOCK_DGRAM and proto in (0, _IPPROTO_UDP):
            return UdpSocket(there, family)
        if type == _socket.SOCK_STREAM and proto in (0, _IPPROTO_TCP):
            return TcpSocket(there, family)
        if type == _socket.SOCK_DGRAM and proto == (_IPPROTO_ICMP if family == _socket.AF_INET else _IPPROTO_ICMPV6):
            return PingSocket(there, family, proto)
        if type == _socket.SOCK_RAW and 0 < proto < _IPPROTO_RAW:
            return RawSocket(there, family, proto)
        raise error(errno.EPROTONOSUPPORT)
    if family == AF_NETLINK:
        if type not in (_socket.SOCK_DGRAM, _socket.SOCK_RAW):
            raise error(errno.ESOCKTNOSUPPORT)
        if proto != NETLINK_USERSOCK:
            raise error(errno.EPROTONOSUPPORT)
        return NetlinkSocket(there, type)
    if family == AF_UNIX:
        return _unix(there, type)
    raise error(errno.EAFNOSUPPORT)


def socketpair(
    family: int = AF_UNIX, type: int = _socket.SOCK_STREAM, proto: int = 0, *, network: Network | None = None
) -> tuple[UnixEndpoint, UnixEndpoint]:
    """Two emulated UNIX sockets that are connected to each other; `OSError` EOPNOTSUPP for other families."""
    if family != AF_UNIX:
        raise error(errno.EOPNOTSUPP if family in _INET else errno.EAFNOSUPPORT)
    there = current() if network is None else network
    one, other = _unix(there, type), _unix(there, type)
    one.join(other)
    other.join(one)
    return one, other


def _unix(network: Network, type: int) -> UnixEndpoint:
    if type == _socket.SOCK_STREAM:
        return UnixStreamSocket(network)
    if type in (_socket.SOCK_DGRAM, _socket.SOCK_SEQPACKET):
        return UnixDatagramSocket(network, type)
    raise error(errno.ESOCKTNOSUPPORT)
