"""TCP of the emulated network: connections and their states (RFC 9293; net/ipv4/tcp_input.c, tcp_output.c).

A filter sees the TCP header at offset 0. A listener's sees each SYN and the ACK that ends a handshake, and a connection
that was accepted has it too, and its lock. What a filter cuts off is not acknowledged, and comes again.

Simplified, where Linux leaves itself free or programs cannot tell: every segment with data is acknowledged at once;
there is a slow start and no other congestion control; what is lost comes again by a timer that starts with Linux's
least time (200 ms) and doubles; no selective acknowledgements, urgent data, keepalives, simultaneous opening, or SYN
cookies; timestamps are sent, and not checked.
"""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

from kbpf.emulator import headers
from kbpf.emulator.connection import Connection
from kbpf.emulator.datapath import backlog
from kbpf.emulator.ethernet import PACKET_HOST
from kbpf.emulator.headers import ACK, FIN, IPPROTO_TCP, RST, SYN, IpHeader, TcpHeader, TcpOptions
from kbpf.emulator.inet import Inet, Sending
from kbpf.emulator.interface import EmulatedInterface
from kbpf.emulator.packet import Packet
from kbpf.emulator.ports import Binding
from kbpf.emulator.segment import Segment, filtered
from kbpf.emulator.sock import MAPPED, Sock
from kbpf.uapi.constants import BPF_TCP_NEW_SYN_RECV

if TYPE_CHECKING:
    from kbpf.emulator.tcpsocket import TcpSocket


class TcpLayer:
    """TCP of one network: what is received goes to the connection or listener that the table finds."""

    def __init__(self, inet: Inet) -> None:
        self.inet = inet
        self.network = inet.network
        self.holders: dict[Sock, Connection | Listener] = {}
        inet.transports[IPPROTO_TCP] = self.receive

    def receive(self, device: EmulatedInterface, packet: Packet, header: IpHeader) -> None:
        """A packet comes in, offset 0 its TCP header (`tcp_v4_rcv`)."""
        counters = self.inet.counters
        found = headers.read_tcp(packet.data)
        if packet.pkt_type != PACKET_HOST:
            return
        if found is None or not self.inet.checksum_good(packet, header):
            counters["TcpInErrs"] += 1
            counters["TcpInCsumErrors"] += found is not None
            return
        counters["TcpInSegs"] += 1
        sock = self.network.sockets.lookup(
            IPPROTO_TCP, header.source, found.source_port, header.target, found.target_port, device.index, packet
        )
        holder = self.holders.get(sock) if sock is not None else None
        if holder is not None:
            holder.receive(packet, header, found)
        else:
            self.refuse(header, Segment(found, packet.data[found.size :]))

    def refuse(self, ip: IpHeader, segment: Segment) -> None:
        """Answer with a RST (`tcp_v4_send_reset`)."""
        got = segment.header
        if got.flags & RST:
            return
        seq, ack, flags = (got.ack, 0, RST) if got.flags & ACK else (0, segment.end, RST | ACK)
        made = headers.tcp(got.target_port, got.source_port, seq, ack, flags, 0, TcpOptions())
        self.inet.counters["TcpOutRsts"] += 1
        self.send(ip.target, ip.source, made, Sending())

    def send(self, source: bytes, target: bytes, segment: bytes, how: Sending, device: int = 0) -> None:
        """Send a segment; what cannot be sent is lost, as on any network."""
        self.inet.counters["TcpOutSegs"] += 1
        with backlog.event():
            try:
                path = self.inet.path(target, self.network.by_index(device))
                self.inet.send(path, source, target, IPPROTO_TCP, segment, how, partial=True)
            except OSError:
                return

    def hold(self, sock: Sock, holder: Connection | Listener) -> None:
        self.holders[sock] = holder
        self.network.sockets.add(sock)

    def drop(self, sock: Sock) -> None:
        self.holders.pop(sock, None)
        self.network.sockets.remove(sock)


class Listener:
    """A socket that is listening: requests, and connections that nobody has accepted."""

    def __init__(self, layer: TcpLayer, endpoint: TcpSocket, most: int) -> None:
        self.layer, self.sock, self.slot = layer, endpoint.sock, endpoint.slot
        self.endpoint = weakref.ref(endpoint)
        #: One more than that many connections may wait.
        self.most = most
        self.pending: deque[Connection] = deque()
        self.requests: list[Connection] = []

    @property
    def full(self) -> bool:
        return len(self.pending) > self.most

    def receive(self, packet: Packet, ip: IpHeader, header: TcpHeader) -> None:
        segment = filtered(self.sock, self.slot, packet, header)
        if segment is None or header.flags & RST:
            return
        if header.flags & ACK:
            self.layer.refuse(ip, segment)
        elif header.flags & SYN and not header.flags & FIN:
            self._request(ip, segment)

    def _request(self, ip: IpHeader, segment: Segment) -> None:
        """Somebody wants to connect (`tcp_conn_request`)."""
        endpoint = self.endpoint()
        if endpoint is None or self.full:
            self.layer.inet.counters["TcpExtListenDrops"] += 1
            return
        own = self.sock
        wide = own.family != 2 and len(ip.target) == 4
        sock = Sock(
            family=own.family,
            type=own.type,
            protocol=own.protocol,
            local=MAPPED + ip.target if wide else ip.target,
            # Where a program has given it the packet, not its own.
            local_port=segment.header.target_port,
            remote=MAPPED + ip.source if wide else ip.source,
            remote_port=segment.header.source_port,
            bound_dev_if=own.bound_dev_if,
            mark=own.mark,
            cgroup_id=own.cgroup_id,
            cgroup_ancestors=own.cgroup_ancestors,
            priority=own.priority,
            state=BPF_TCP_NEW_SYN_RECV,
            listener=own,
            tcp_here=True,
        )
        child = Connection(self.layer, Binding(sock, endpoint.binding.reuseaddr, endpoint.binding.reuseport))
        child.ip, child.listener, child.slot = replace(endpoint.ip), self, self.slot
        child.nodelay, child.room = endpoint.nodelay, endpoint.room
        self.requests.append(child)
        self.layer.inet.ports.share(child.binding)
        child.answer(segment)

    def close(self) -> None:
        """Nobody will accept: what is there is reset, requests are forgotten."""
        self.layer.drop(self.sock)
        for child in [*self.requests]:
            child.finish()
        for child in self.pending:
            child.abort()
        self.pending.clear()
