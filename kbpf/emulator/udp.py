"""UDP sockets of the emulated network (net/ipv4/udp.c, net/ipv6/udp.c).

A filter sees the UDP header at offset 0, and never cuts it off.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from kbpf.emulator import cgroup_hooks, headers, icmp
from kbpf.emulator.datapath import backlog
from kbpf.emulator.endpoint import Ancillary, DatagramEndpoint, Message, truesize
from kbpf.emulator.environment import environment
from kbpf.emulator.headers import IPPROTO_UDP, UDP_SIZE, IpHeader
from kbpf.emulator.inet import Inet
from kbpf.emulator.inetsocket import AF_INET, PortEndpoint, bare
from kbpf.emulator.interface import EmulatedInterface
from kbpf.emulator.packet import Packet
from kbpf.emulator.slot import error
from kbpf.emulator.sock import MAPPED, Sock
from kbpf.uapi.constants import BPF_TCP_ESTABLISHED

if TYPE_CHECKING:
    from kbpf.emulator.network import Network

SOCK_DGRAM = 2
#: The most that the header's length field leaves for data.
_MOST_DATA = 0xFFFF - UDP_SIZE
# What a small datagram's buffer needs beside headers and data; where data is more than fits into one of so many bytes,
# it lies in pages and counts as it is (`__ip_append_data`).
_ROOM, _LINEAR, _PAGED = 31 + 320, 16384, 832


def ip_truesize(packet: int, data: int) -> int:
    """What an IP packet, of which `data` bytes were the sender's, counts for against SO_RCVBUF."""
    need = packet + _ROOM
    if need <= _LINEAR:
        return truesize(need if need <= _LINEAR // 2 else _LINEAR)
    return _PAGED + data


class UdpLayer:
    """UDP of one network: what is received goes to the sockets that the table finds."""

    def __init__(self, inet: Inet) -> None:
        self._inet = inet
        self.sockets: WeakValueDictionary[Sock, UdpSocket] = WeakValueDictionary()
        inet.transports[IPPROTO_UDP] = self.receive

    def receive(self, device: EmulatedInterface, packet: Packet, header: IpHeader) -> None:
        """A packet comes in, offset 0 its UDP header (`__udp4_lib_rcv`)."""
        counters = self._inet.counters
        found = headers.read_udp(packet.data)
        if found is None or not UDP_SIZE <= (found.length or packet.length) <= packet.length:
            counters["UdpInErrors"] += 1
            return
        if found.length and found.length < packet.length:
            packet.resize(found.length)
        if not found.checksum and header.version == 6 and not packet.checksum_partial:
            counters["UdpInErrors"] += 1
            return
        if header.version == 4 and self._inet.is_broadcast(header.target):
            for endpoint in self._everybody(header, found, device):
                copy = replace(packet, buffer=bytes(packet.buffer))
                endpoint.deliver(copy, header, found)
            return
        sock = self._inet.network.sockets.lookup(
            IPPROTO_UDP, header.source, found.source_port, header.target, found.target_port, device.index, packet
        )
        endpoint_found = self.sockets.get(sock) if sock is not None else None
        if endpoint_found is not None:
            endpoint_found.deliver(packet, header, found)
        elif not self.good(packet, header, found):
            counters["UdpInCsumErrors"] += 1
            counters["UdpInErrors"] += 1
        else:
            counters["UdpNoPorts"] += 1
            icmp.port_unreachable(self._inet, packet, header)

    def good(self, packet: Packet, header: IpHeader, found: headers.UdpHeader) -> bool:
        """Whether the checksum is right; IPv4's may be left out."""
        return (header.version == 4 and not found.checksum) or self._inet.checksum_good(packet, header)

    def _everybody(self, header: IpHeader, found: headers.UdpHeader, device: EmulatedInterface) -> Iterable[UdpSocket]:
        """The sockets that a broadcast is for (`__udp4_lib_mcast_deliver`)."""
        for binding in self._inet.ports.of(IPPROTO_UDP, found.target_port):
            sock = binding.sock
            bound_well = sock.local4 in (bytes(4), header.target) and not sock.v6only
            connected_well = not sock.remote_port or (sock.remote4, sock.remote_port) == (
                header.source,
                found.source_port,
            )
            endpoint = self.sockets.get(sock)
            if bound_well and connected_well and sock.bound_dev_if in (0, device.index) and endpoint is not None:
                yield endpoint

    def refused(self, local: bytes, local_port: int, remote: bytes, remote_port: int, number: int) -> None:
        """An ICMP error came for what was sent from `local`: connected sockets report it (`__udp4_lib_err`)."""
        sock = self._inet.network.sockets.lookup(IPPROTO_UDP, remote, remote_port, local, local_port)
        endpoint = self.sockets.get(sock) if sock is not None else None
        if endpoint is not None and endpoint.sock.state == BPF_TCP_ESTABLISHED:
            endpoint.report(number)


class UdpSocket(PortEndpoint, DatagramEndpoint):
    """An emulated UDP socket."""

    def __init__(self, network: Network, family: int) -> None:
        super().__init__(network, family, SOCK_DGRAM, IPPROTO_UDP)
        network.udp.sockets[self.sock] = self

    # Receiving.

    def deliver(self, packet: Packet, header: IpHeader, found: headers.UdpHeader) -> None:
        """Filter a packet whose offset 0 is the UDP header, and queue what is kept (`udp_queue_rcv_one_skb`)."""
        counters = self.network.inet.counters
        if not self.network.udp.good(packet, header, found):
            counters["UdpInCsumErrors"] += 1
            self._drop()
            return
        packet.socket = self.sock
        kept = self.slot.run(packet) if cgroup_hooks.ingress(self.sock, packet) else 0
        if not kept:
            self._drop()
            return
        # UDP never loses its header.
        data = packet.data[UDP_SIZE : max(kept, UDP_SIZE)]
        size = ip_truesize(packet.length + header.start, packet.length - UDP_SIZE)
        if self._queued_size and self._queued_size + size > self._rcvbuf:
            counters["UdpRcvbufErrors"] += 1
            self._drop()
            return
        self._enqueue(Message(data, address=self._shown(header.source, found.source_port), size=size))

    # A program may say that a datagram comes from elsewhere; who does not ask for the address asks no program.

    def recv(self, bufsize: int, flags: int = 0) -> bytes:
        return super().recvfrom(bufsize, flags)[0]

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        return super().recvfrom_into(buffer, nbytes, flags)[0]

    def recvfrom(self, bufsize: int, flags: int = 0) -> tuple[bytes, Any]:
        data, address = super().recvfrom(bufsize, flags)
        return data, self._sender(address)

    def recvfrom_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> tuple[int, Any]:
        size, address = super().recvfrom_into(buffer, nbytes, flags)
        return size, self._sender(address)

    def recvmsg(self, bufsize: int, ancbufsize: int = 0, flags: int = 0) -> tuple[bytes, list[Ancillary], int, Any]:
        data, ancillary, found, address = super().recvmsg(bufsize, ancbufsize, flags)
        return data, ancillary, found, self._sender(address)

    def recvmsg_into(
        self, buffers: Iterable[Any], ancbufsize: int = 0, flags: int = 0
    ) -> tuple[int, list[Ancillary], int, Any]:
        size, ancillary, found, address = super().recvmsg_into(buffers, ancbufsize, flags)
        return size, ancillary, found, self._sender(address)

    def _sender(self, address: tuple[Any, ...]) -> tuple[Any, ...]:
        return self._shown(*cgroup_hooks.recvmsg(self.sock, *self._parse(address[:2], "recvfrom")))

    def _drop(self) -> None:
        self._drops += 1
        self.network.inet.counters["UdpInErrors"] += 1

    def _dequeue(self) -> Message:
        self.network.inet.counters["UdpInDatagrams"] += 1
        return super()._dequeue()

    def report(self, number: int) -> None:
        """An error that the next call is to end with."""
        self._error = number
        self._woken()

    # Binding and connecting.

    def _bind(self, local: bytes, port: int) -> None:
        self._claim(local, port)
        self._join_group()
        self.network.sockets.add(self.sock)

    def _autobind(self) -> None:
        """Take a port, before it is known whether anything can be sent."""
        if not self.sock.local_port:
            self._bind(self.sock.local, 0)

    def _unbind(self) -> None:
        self.network.sockets.remove(self.sock)
        super()._unbind()
        self._leave_group()

    def connect(self, address: tuple[Any, ...]) -> None:
        """Send to and receive from this address only."""
        remote, port = self._parse(address, "connect")
        with self._arrived:
            self._open()
            remote, port = cgroup_hooks.connect(self.sock, remote, port)
            self._autobind()
            path, source, target = self._way(remote)
            if path.broadcast and not self._broadcast:
                raise error(errno.EACCES)
            sock = self.sock
            if not any(sock.local):
                sock.local = MAPPED + source if self.family != AF_INET and len(source) == 4 else source
            sock.remote = MAPPED + target if self.family != AF_INET and len(target) == 4 else target
            sock.remote_port, sock.state = port, BPF_TCP_ESTABLISHED
            self._hash = environment.random32() or 1
            self.network.sockets.connected(sock)
            if sock.reuseport is not None:
                # What is connected is found by that alone (`udp_lib_hash4` and `udp_lib_rehash` detach it).
                sock.reuseport.has_conns = True
                sock.reuseport.remove(sock)

    def connect_ex(self, address: tuple[Any, ...]) -> int:
        """`connect`, the error as a number."""
        try:
            self.connect(address)
        except OSError as failure:
            return failure.errno or 0
        return 0

    # Sending.

    def send(self, data: Any, flags: int = 0) -> int:
        """Send to where the socket is connected to."""
        with self._arrived:
            self._open()
            self._autobind()
            if not self._connected():
                raise error(errno.EDESTADDRREQ)
            return self._send(bytes(data), self.sock.remote, self.sock.remote_port)

    def sendall(self, data: Any, flags: int = 0) -> None:
        self.send(data, flags)

    def sendto(self, data: Any, *arguments: Any) -> int:
        """``sendto(data, address)`` or ``sendto(data, flags, address)``."""
        remote, port = self._parse(arguments[-1], "sendto")
        with self._arrived:
            self._open()
            self._autobind()
            if not port:
                raise error(errno.EINVAL)
            narrow = len(bare(remote)) == 4
            own = self.sock.local4 if narrow else self.sock.local
            (remote, port), source = cgroup_hooks.sendmsg(self.sock, remote, port, own)
            if not port:
                raise error(errno.EINVAL)
            return self._send(bytes(data), remote, port, source if source != own else None)

    def sendmsg(
        self, buffers: Iterable[Any], ancdata: Iterable[Ancillary] = (), flags: int = 0, address: Any = None
    ) -> int:
        """Send what is in the buffers, as one datagram; no ancillary data means anything here."""
        data = b"".join(bytes(buffer) for buffer in buffers)
        return self.send(data, flags) if address is None else self.sendto(data, flags, address)

    def _send(self, data: bytes, remote: bytes, port: int, sent_from: bytes | None = None) -> int:
        if len(data) > _MOST_DATA - (headers.IPV4_SIZE if len(bare(remote)) == 4 else 0):
            raise error(errno.EMSGSIZE)
        path, source, target = self._way(remote)
        if sent_from is not None:
            if len(sent_from) == 4 and not self.network.inet.is_local(sent_from):
                raise error(errno.ENETUNREACH)
            source = sent_from
        if path.broadcast and not self._broadcast:
            raise error(errno.EACCES)
        self._raise_error()
        connected = self._connected() and (self.sock.remote_port == port) and bare(self.sock.remote) == target
        hash = self._hash if connected else 0
        if not hash and len(target) == 16:
            # IPv6 makes one for the flow label.
            ends = source + target + self.sock.local_port.to_bytes(2, "big") + port.to_bytes(2, "big")
            hash = environment.flow_hash(ends) & 0xFFFFFFFF or 1
        segment = headers.udp(self.sock.local_port, port, len(data)) + data
        with backlog.event():
            how = self._ip.sending(self.sock, target, hash)
            self.network.inet.send(path, source, target, IPPROTO_UDP, segment, how, partial=True)
            self.network.inet.counters["UdpOutDatagrams"] += 1
        return len(data)

    def _closed(self) -> None:
        cgroup_hooks.sock_release(self.sock)
        self._queue.clear()
        self._unbind()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"at {self._shown(self.sock.local, self.sock.local_port)[:2]}"
        return f"<UdpSocket {state}>"
