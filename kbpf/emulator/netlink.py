"""Netlink sockets of the emulated network: NETLINK_USERSOCK, between processes (net/netlink/af_netlink.c).

What the kernel would answer (routes, links) is not there. A filter sees the message, and who sends one message is told
the length that the filter left.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from kbpf.emulator.endpoint import Ancillary, DatagramEndpoint, Endpoint, Message, Option, truesize
from kbpf.emulator.environment import environment
from kbpf.emulator.packet import Packet
from kbpf.emulator.slot import error
from kbpf.emulator.sock import Sock

if TYPE_CHECKING:
    from kbpf.emulator.network import Network

AF_NETLINK, NETLINK_USERSOCK = 16, 2
_INFO = 320


class NetlinkSocket(DatagramEndpoint):
    """An emulated netlink socket. Addresses are (port id, bits of groups)."""

    OPTIONS: ClassVar[Mapping[tuple[int, int], Option]] = Endpoint.OPTIONS

    def __init__(self, network: Network, type: int) -> None:
        self.closed = True
        self.network = network
        self.sock = Sock(family=AF_NETLINK, type=type, protocol=NETLINK_USERSOCK)
        self._port = self._groups = 0
        self._to: tuple[int, int] | None = None
        super().__init__(AF_NETLINK, type, NETLINK_USERSOCK)

    def bind(self, address: tuple[int, int]) -> None:
        """Take a port id, any that is free for 0, and listen to groups."""
        port, groups = address
        with self._arrived:
            self._open()
            if self._port and port != self._port:
                raise error(errno.EINVAL)
            if not self._port:
                self._take_port(port)
            self._groups = groups

    def _take_port(self, port: int) -> None:
        taken = self.network.netlink
        if port in taken:
            raise error(errno.EADDRINUSE)
        port = port or os.getpid()
        while port in taken:
            port = environment.random32() | 1 << 31
        self._port = port
        taken[port] = self

    def getsockname(self) -> tuple[int, int]:
        self._open()
        return self._port, self._groups

    def getpeername(self) -> tuple[int, int]:
        self._open()
        return self._to or (0, 0)

    def connect(self, address: tuple[int, int]) -> None:
        """Send to this port id and these groups."""
        with self._arrived:
            self._open()
            if not self._port:
                self._take_port(0)
            self._to = address[0], address[1]

    def send(self, data: Any, flags: int = 0) -> int:
        """Send to where the socket is connected to, else to the kernel."""
        return self.sendto(data, flags, self._to or (0, 0))

    def sendall(self, data: Any, flags: int = 0) -> None:
        self.send(data, flags)

    def sendto(self, data: Any, *arguments: Any) -> int:
        """``sendto(data, address)`` or ``sendto(data, flags, address)``; gives the length that a filter left."""
        flags = arguments[0] if len(arguments) > 1 else 0
        port, groups = arguments[-1]
        sent = bytes(data)
        with self._arrived:
            self._open()
            if len(sent) > self._sndbuf - 32:
                raise error(errno.EMSGSIZE)
            if not self._port:
                self._take_port(0)
            if groups:
                # Linux sends to the first of them only.
                self._broadcast(groups & -groups, port, sent)
            target = self.network.netlink.get(port)
            if target is None:
                raise error(errno.ECONNREFUSED)
            there = target
            self._wait_for(lambda: there.closed or there._queued_size <= there._rcvbuf, self._limit(flags))
            if target.closed:
                raise error(errno.ECONNREFUSED)
            return target.deliver(sent, (self._port, 0))

    def sendmsg(
        self, buffers: Iterable[Any], ancdata: Iterable[Ancillary] = (), flags: int = 0, address: Any = None
    ) -> int:
        """Send what is in the buffers, as one message; no ancillary data means anything here."""
        return self.sendto(b"".join(bytes(buffer) for buffer in buffers), flags, address or self._to or (0, 0))

    def _broadcast(self, group: int, port: int, data: bytes) -> None:
        """To all that listen to the group, but this socket and whom the message is for anyway."""
        for target in list(self.network.netlink.values()):
            if target is self or target._port == port or not target._groups & group:
                continue
            if target._queued_size > target._rcvbuf:
                target._error = errno.ENOBUFS
                target._woken()
            else:
                target.deliver(data, (self._port, group))

    def deliver(self, data: bytes, address: tuple[int, int]) -> int:
        """Filter a message, and queue what is kept; the length that is left, all of it where it is dropped."""
        packet = Packet(buffer=data, network=0, socket=self.sock)
        filtering = self.slot.program is not None
        kept = min(self.slot.run(packet), len(data)) if filtering else len(data)
        if filtering and not kept:
            return len(data)
        self._enqueue(Message(data[:kept], address=address, size=truesize(len(data) + _INFO)))
        return kept

    def _closed(self) -> None:
        self._queue.clear()
        if self.network.netlink.get(self._port) is self:
            del self.network.netlink[self._port]

    def __repr__(self) -> str:
        return f"<NetlinkSocket {'closed' if self.closed else (self._port, self._groups)}>"
