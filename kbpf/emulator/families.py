"""socket(2) on the emulated network."""

from __future__ import annotations

import errno
import socket as _socket

from kbpf.emulator.endpoint import Endpoint
from kbpf.emulator.network import Network, current
from kbpf.emulator.slot import error
from kbpf.emulator.udp import UdpSocket

_INET = (int(_socket.AF_INET), int(_socket.AF_INET6))
_IPPROTO_UDP = 17


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
        raise error(errno.EPROTONOSUPPORT)
    raise error(errno.EAFNOSUPPORT)
