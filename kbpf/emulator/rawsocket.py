"""Raw IPv4 and IPv6 sockets of the emulated network (net/ipv4/raw.c, net/ipv6/raw.c).

A filter sees the IPv4 header at offset 0, or what follows the IPv6 header. Headers of the caller's own (IP_HDRINCL,
IPPROTO_RAW) cannot be sent.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakMethod

from kbpf.emulator import cgroup_hooks, headers
from kbpf.emulator.datapath import backlog
from kbpf.emulator.endpoint import Ancillary, DatagramEndpoint, Message
from kbpf.emulator.headers import IPPROTO_ICMPV6, IpHeader
from kbpf.emulator.inetsocket import AF_INET, InetEndpoint, bare
from kbpf.emulator.interface import EmulatedInterface
from kbpf.emulator.packet import Packet
from kbpf.emulator.slot import error
from kbpf.emulator.udp import ip_truesize
from kbpf.uapi.constants import BPF_TCP_ESTABLISHED

if TYPE_CHECKING:
    from kbpf.emulator.network import Network

_SOCK_RAW = 3
_MOST_DATA = 0xFFFF


class RawSocket(InetEndpoint, DatagramEndpoint):
    """An emulated raw socket of AF_INET or AF_INET6, for one IP protocol."""

    def __init__(self, network: Network, family: int, proto: int, type: int = _SOCK_RAW) -> None:
        super().__init__(network, family, type, proto)
        # The protocol is shown where others have a port.
        self.sock.local_port = proto
        self.hear()

    def hear(self) -> None:
        """Have `deliver` called for what comes in."""
        self.network.inet.raw.append(WeakMethod(self.deliver))

    def deliver(self, device: EmulatedInterface, packet: Packet, header: IpHeader) -> bool:
        """See a packet, offset 0 its network header, and queue it if it is for this socket (`raw_v4_input`)."""
        sock = self.sock
        ours = header.protocol == self.proto and (header.version == 4) == (self.family == AF_INET)
        if not ours or sock.bound_dev_if not in (0, device.index):
            return False
        if (any(sock.local) and sock.local != header.target) or (any(sock.remote) and sock.remote != header.source):
            return False
        seen = replace(packet, buffer=bytes(packet.buffer))
        if header.version == 6:
            if self.proto == IPPROTO_ICMPV6 and not self._checked(packet, header):
                return True
            seen.pull(header.start)
        self.take(seen, header)
        return True

    def take(self, packet: Packet, header: IpHeader) -> None:
        """Filter a packet and queue what is kept (`sock_queue_rcv_skb`)."""
        packet.socket = self.sock
        kept = self.slot.run(packet) if cgroup_hooks.ingress(self.sock, packet) else 0
        if not kept:
            return
        if self._queued_size >= self._rcvbuf:
            self._drops += 1
            return
        size = ip_truesize(header.end, header.end - header.start)
        self._enqueue(Message(packet.data[:kept], address=self._shown(header.source, 0), size=size))

    def _checked(self, packet: Packet, header: IpHeader) -> bool:
        seen = replace(packet)
        seen.pull(header.start)
        return self.network.inet.checksum_good(seen, header)

    def bind(self, address: tuple[Any, ...]) -> None:
        """Hear only what is for this address; the port means nothing."""
        local, _ = self._parse(address, "bind")
        with self._arrived:
            self._open()
            self._check_local(local)
            self.sock.local = local

    def connect(self, address: tuple[Any, ...]) -> None:
        """Send to and hear from this address only."""
        remote, port = self._parse(address, "connect")
        with self._arrived:
            self._open()
            _, source, target = self._way(remote)
            if not any(self.sock.local):
                self.sock.local = source
            self.sock.remote, self.sock.remote_port, self.sock.state = target, port, BPF_TCP_ESTABLISHED

    def connect_ex(self, address: tuple[Any, ...]) -> int:
        """`connect`, the error as a number."""
        try:
            self.connect(address)
        except OSError as failure:
            return failure.errno or 0
        return 0

    def _connected(self) -> bool:
        return self.sock.state == BPF_TCP_ESTABLISHED

    # Sending.

    def send(self, data: Any, flags: int = 0) -> int:
        """Send to where the socket is connected to."""
        with self._arrived:
            self._open()
            if not self._connected():
                raise error(errno.EDESTADDRREQ)
            return self._send(bytes(data), self.sock.remote)

    def sendall(self, data: Any, flags: int = 0) -> None:
        self.send(data, flags)

    def sendto(self, data: Any, *arguments: Any) -> int:
        """``sendto(data, address)`` or ``sendto(data, flags, address)``; IPv6's port is 0 or the protocol."""
        remote, port = self._parse(arguments[-1], "sendto")
        with self._arrived:
            self._open()
            if self.type == _SOCK_RAW and self.family != AF_INET and port not in (0, self.proto):
                raise error(errno.EINVAL)
            return self._send(bytes(data), remote)

    def sendmsg(
        self, buffers: Iterable[Any], ancdata: Iterable[Ancillary] = (), flags: int = 0, address: Any = None
    ) -> int:
        """Send what is in the buffers, as one packet; no ancillary data means anything here."""
        data = b"".join(bytes(buffer) for buffer in buffers)
        return self.send(data, flags) if address is None else self.sendto(data, flags, address)

    def _send(self, data: bytes, remote: bytes) -> int:
        self._raise_error()
        if len(data) > _MOST_DATA:
            raise error(errno.EMSGSIZE)
        if self.family != AF_INET and len(bare(remote)) == 4:
            raise error(errno.EINVAL)
        path, source, target = self._way(remote)
        if path.broadcast and not self._broadcast:
            raise error(errno.EACCES)
        if self.proto == IPPROTO_ICMPV6 and len(data) >= 4:
            empty = headers.with_checksum(data, IPPROTO_ICMPV6, 0)
            seed = headers.pseudo_sum(source, target, IPPROTO_ICMPV6, len(data))
            data = headers.with_checksum(data, IPPROTO_ICMPV6, headers.ones_sum(empty, seed) ^ 0xFFFF)
        with backlog.event():
            how = self._ip.sending(self.sock, target)
            self.network.inet.send(path, source, target, self.proto, data, how)
        return len(data)

    def _closed(self) -> None:
        cgroup_hooks.sock_release(self.sock)
        self._queue.clear()
        self.network.inet.raw[:] = [one for one in self.network.inet.raw if one() not in (None, self.deliver)]

    def __repr__(self) -> str:
        return f"<RawSocket {'closed' if self.closed else f'for protocol {self.proto}'}>"
