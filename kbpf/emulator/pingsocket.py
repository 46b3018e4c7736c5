"""Ping sockets of the emulated network (net/ipv4/ping.c, net/ipv6/ping.c): SOCK_DGRAM of ICMP and ICMPv6.

They send requests for an echo, whose identifier is the socket's port, and hear the replies. A filter sees the ICMP
header at offset 0. Anybody may have one here; Linux asks net.ipv4.ping_group_range.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any
from weakref import WeakMethod

from kbpf.emulator import headers
from kbpf.emulator.headers import IPPROTO_ICMPV6, IpHeader
from kbpf.emulator.icmp import ECHO
from kbpf.emulator.inetsocket import AF_INET
from kbpf.emulator.interface import EmulatedInterface
from kbpf.emulator.packet import Packet
from kbpf.emulator.rawsocket import RawSocket
from kbpf.emulator.slot import error
from kbpf.uapi.constants import BPF_TCP_ESTABLISHED

if TYPE_CHECKING:
    from kbpf.emulator.network import Network

SOCK_DGRAM = 2
_HEADER = 8
_MOST_DATA = 0xFFFF


class PingSocket(RawSocket):
    """An emulated ping socket of AF_INET or AF_INET6."""

    def __init__(self, network: Network, family: int, proto: int) -> None:
        super().__init__(network, family, proto, SOCK_DGRAM)
        self.sock.local_port = 0
        # Identifiers may be shared, and the last one to bind hears (INET_PROTOSW_REUSE).
        self._binding.reuseaddr = True

    def hear(self) -> None:
        """Nothing comes in before there is an identifier."""

    def deliver(self, device: EmulatedInterface, packet: Packet, header: IpHeader) -> bool:
        """Queue a reply, offset 0 its ICMP header, if it is for this socket (`ping_lookup`)."""
        sock, ident = self.sock, int.from_bytes(packet.data[4:6], "big")
        if ident != sock.local_port or (header.version == 4) != (self.family == AF_INET):
            return False
        if (any(sock.local) and sock.local != header.target) or sock.bound_dev_if not in (0, device.index):
            return False
        self.take(packet, header)
        return True

    # Binding and connecting.

    def bind(self, address: tuple[Any, ...]) -> None:
        """Take an identifier, 0 for any that is free, and hear only replies to this address."""
        local, ident = self._parse(address, "bind")
        with self._arrived:
            self._open()
            if self.sock.local_port:
                raise error(errno.EINVAL)
            self._check_local(local)
            self._bind(ident)
            self.sock.local = local

    def _bind(self, ident: int) -> None:
        self.sock.local_port = self.network.inet.ports.claim(self._binding, self.sock.local, ident)
        self.network.inet.pings.append(WeakMethod(self.deliver))

    def connect(self, address: tuple[Any, ...]) -> None:
        """Send to this address; replies are heard from anywhere."""
        remote, port = self._parse(address, "connect")
        with self._arrived:
            self._open()
            _, source, target = self._way(remote)
            if not self.sock.local_port:
                self._bind(0)
            if not any(self.sock.local):
                self.sock.local = source
            self.sock.remote, self.sock.remote_port, self.sock.state = target, port, BPF_TCP_ESTABLISHED

    def _send(self, data: bytes, remote: bytes) -> int:
        if len(data) > _MOST_DATA:
            raise error(errno.EMSGSIZE)
        if len(data) < _HEADER or data[:2] != bytes((ECHO[4 if self.family == AF_INET else 6], 0)):
            raise error(errno.EINVAL)
        if not self.sock.local_port:
            self._bind(0)
        message = data[:2] + bytes(2) + self.sock.local_port.to_bytes(2, "big") + data[6:]
        if self.proto != IPPROTO_ICMPV6:
            message = headers.with_checksum(message, self.proto, headers.ones_sum(message) ^ 0xFFFF)
        return super()._send(message, remote)

    def _closed(self) -> None:
        super()._closed()
        self.network.inet.ports.release(self._binding)
        self.network.inet.pings[:] = [one for one in self.network.inet.pings if one() not in (None, self.deliver)]

    def __repr__(self) -> str:
        return f"<PingSocket {'closed' if self.closed else self.sock.local_port}>"
