"""The sockets of a network namespace, and which of them a packet belongs to.

The counterpart of net/ipv4/inet_hashtables.c, net/ipv4/udp.c and their IPv6 siblings: connections first, then what
programs say, then what is bound to the address, then what is bound to any address; of those that match, the one that
is bound to most, and of equals the one that came last. (UDP sockets bound to the address are looked for before
programs are asked; only connected ones then go before what programs say.)
"""

from __future__ import annotations

import socket
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from kbpf.emulator.packet import Packet
from kbpf.emulator.sk_lookup import LookupContext, asks
from kbpf.emulator.sock import ANY4, ANY6, LOOPBACK4_IPV6, Sock, as_ipv4
from kbpf.uapi.constants import BPF_TCP_CLOSE, BPF_TCP_ESTABLISHED, BPF_TCP_LISTEN

#: Takes the sock that was found, the packet, and the flow's hash; None where it chooses none that is there. Raises
#: `GroupRefusesError` where the packet is for nobody.
Selector: TypeAlias = Callable[[Sock, Packet, int], "Sock | None"]
#: The sender's address and port, the receiver's, and the device that the packet came in by.
_Tuple: TypeAlias = "tuple[bytes, int, bytes, int, int]"


class GroupRefusesError(Exception):
    """The program of a group that shares a port drops the packet."""


class LookupProgram(Protocol):
    """A loaded program of type sk_lookup."""

    def execute(self, packet: Packet | None, data: bytes, context: LookupContext) -> int: ...


@dataclass(eq=False)
class ReuseportGroup:
    """Sockets that share a port (net/core/sock_reuseport.c), in the order in which they were bound."""

    socks: list[Sock] = field(default_factory=list)
    #: The program of the group.
    selector: Selector | None = None
    #: Whether one of them has ever been connected; it is no longer among them (`udp_lib_rehash` detaches it).
    has_conns: bool = False
    #: When one of them last answered a connection with a SYN cookie, by `environment.clock`.
    syn_cookie_sent: int | None = None

    def add(self, sock: Sock) -> None:
        self.socks.append(sock)
        sock.reuseport = self

    def remove(self, sock: Sock) -> None:
        """The last one takes its place."""
        at = self.socks.index(sock)
        self.socks[at] = self.socks[-1]
        self.socks.pop()
        sock.reuseport = None

    def select(self, sock: Sock, packet: Packet | None, hash: int) -> Sock | None:
        """What the program says, else what the hash does (`reuseport_select_sock`); None if all are connected."""
        chosen = None
        if self.selector is not None and packet is not None:
            chosen = self.selector(sock, packet, hash)
        return chosen or self._by_hash(hash)

    def _by_hash(self, hash: int) -> Sock | None:
        first = hash * len(self.socks) >> 32
        for sock in self.socks[first:] + self.socks[:first]:
            if sock.state != BPF_TCP_ESTABLISHED:
                return sock
        return None


class SocketTable:
    """Sockets that packets can be for: bound UDP sockets, TCP listeners, connections and requests for them."""

    def __init__(self) -> None:
        #: By protocol and local port, the last one first.
        self._socks: dict[tuple[int, int], list[Sock]] = {}
        #: Programs of type sk_lookup, in the order in which they were attached (Linux 5.9).
        self.programs: list[LookupProgram] = []
        #: What chooses among sockets that share a port; Linux's depends on a secret.
        self.flow_hash: Callable[[bytes], int] = zlib.crc32

    def add(self, sock: Sock) -> None:
        """Packets can be for the socket from now on. Its protocol and local port must stay as they are."""
        socks = self._socks.setdefault((sock.protocol, sock.local_port), [])
        if sock in socks:
            return
        if sock.reuseport is not None and sock.family == socket.AF_INET6:
            socks.append(sock)
        else:
            socks.insert(0, sock)

    def connected(self, sock: Sock) -> None:
        """A bound UDP socket is connected: of those that are connected to the same, the last one is found."""
        socks = self._socks[sock.protocol, sock.local_port]
        socks.remove(sock)
        socks.insert(0, sock)

    def remove(self, sock: Sock) -> None:
        """Packets no longer find it; nothing where they never did."""
        key = sock.protocol, sock.local_port
        socks = self._socks.get(key, [])
        if sock in socks:
            socks.remove(sock)
        if not socks:
            self._socks.pop(key, None)

    def __contains__(self, sock: Sock) -> bool:
        return sock in self._socks.get((sock.protocol, sock.local_port), ())

    def lookup(
        self,
        protocol: int,
        remote: bytes,
        remote_port: int,
        local: bytes,
        local_port: int,
        ifindex: int = 0,
        packet: Packet | None = None,
    ) -> Sock | None:
        """The socket that a packet from `remote` to `local`, both packed, is for; None if there is none.

        `ifindex` is the device it came in by. The program of a reuseport group is asked only if there is a `packet`.
        A packet that has been assigned to a socket is for that one, or for another of its group (`inet_steal_sock`).
        """
        socks = self._socks.get((protocol, local_port), [])
        flow = remote, remote_port, local, local_port, ifindex
        find = self._tcp if protocol == socket.IPPROTO_TCP else self._udp
        try:
            if packet is not None and packet.socket is not None:
                assigned = packet.socket
                waits = assigned.state == (BPF_TCP_LISTEN if assigned.protocol == socket.IPPROTO_TCP else BPF_TCP_CLOSE)
                return (self._of_group(assigned, flow, packet) if waits else None) or assigned
            return find(socks, flow, packet)
        except GroupRefusesError:
            return None

    def _tcp(self, socks: list[Sock], flow: _Tuple, packet: Packet | None) -> Sock | None:
        connections = [sock for sock in socks if sock.state not in (BPF_TCP_LISTEN, BPF_TCP_CLOSE)]
        found = _connected(connections, flow)
        if found is not None:
            return found
        decided, chosen = self._ask_programs(socket.IPPROTO_TCP, flow, packet)
        if decided:
            return chosen
        local = flow[2]
        return self._listener(socks, local, flow, packet) or self._listener(socks, _any(local), flow, packet)

    def _udp(self, socks: list[Sock], flow: _Tuple, packet: Packet | None) -> Sock | None:
        # A table of connections since Linux 6.13: that one is bound to a device too does not count there.
        connections = [sock for sock in socks if sock.state == BPF_TCP_ESTABLISHED]
        found = _connected(connections, flow) or self._bound(socks, flow[2], flow, packet)
        if found is not None and found.state == BPF_TCP_ESTABLISHED:
            return found
        decided, chosen = self._ask_programs(socket.IPPROTO_UDP, flow, packet)
        if decided:
            return chosen
        found = found or self._bound(socks, _any(flow[2]), flow, packet)
        if found is None and flow[2] == LOOPBACK4_IPV6:
            # Linux falls back on the IPv4 address that a socket has kept, whatever the socket is connected to.
            kept = [sock for sock in connections if as_ipv4(sock.local) is None and not sock.v6only]
            kept = [sock for sock in kept if sock.remote_port == flow[1] and _on_device(sock, flow[4])]
            found = max(kept, key=lambda sock: bool(sock.bound_dev_if), default=None)
        return found

    def _ask_programs(self, protocol: int, flow: _Tuple, packet: Packet | None) -> tuple[bool, Sock | None]:
        """Whether lookup programs decide, and for which socket: None refuses (`BPF_PROG_SK_LOOKUP_RUN_ARRAY`)."""
        chosen, alone, dropped = None, False, False
        for program in self.programs:
            context = LookupContext(asks(protocol, *flow))
            context.selected, context.no_reuseport = chosen, alone
            passed = program.execute(Packet(buffer=b""), b"", context) != 0
            if passed and context.selected is not None:
                chosen, alone = context.selected, context.no_reuseport
            dropped |= not passed
        if chosen is None:
            return dropped, None
        return True, chosen if alone else self._of_group(chosen, flow, packet) or chosen

    def _listener(self, socks: list[Sock], bound: bytes, flow: _Tuple, packet: Packet | None) -> Sock | None:
        result, best = None, 0
        for sock in socks:
            if sock.state != BPF_TCP_LISTEN or not _bound_to(sock, bound) or not _on_device(sock, flow[4]):
                continue
            score = 1 + bool(sock.bound_dev_if) + (len(bound) == 4 and sock.family == socket.AF_INET)
            if score > best:
                chosen = self._of_group(sock, flow, packet)
                if chosen is not None:
                    return chosen
                result, best = sock, score
        return result

    def _bound(self, socks: list[Sock], bound: bytes, flow: _Tuple, packet: Packet | None) -> Sock | None:
        result, best = None, -1
        for sock in socks:
            score = _udp_score(sock, bound, flow)
            if score <= best:
                continue
            result, best = sock, score
            if sock.state == BPF_TCP_ESTABLISHED:
                continue
            chosen = self._of_group(sock, flow, packet)
            if chosen is None:
                continue
            assert sock.reuseport is not None
            if not sock.reuseport.has_conns:
                return chosen
            result, best = chosen, max(best, _udp_score(chosen, bound, flow))
        return result

    def _of_group(self, sock: Sock, flow: _Tuple, packet: Packet | None) -> Sock | None:
        if sock.reuseport is None:
            return None
        remote, remote_port, local, local_port, _ = flow
        ports = local_port.to_bytes(2, "big") + remote_port.to_bytes(2, "big")
        return sock.reuseport.select(sock, packet, self.flow_hash(local + remote + ports))


def _any(local: bytes) -> bytes:
    return ANY4 if len(local) == 4 else ANY6


def _connected(connections: list[Sock], flow: _Tuple) -> Sock | None:
    remote, remote_port, local, _, ifindex = flow
    for sock in connections:
        if sock.remote_port == remote_port and _ends(sock, len(local)) == (local, remote) and _on_device(sock, ifindex):
            return sock
    return None


def _ends(sock: Sock, size: int) -> tuple[bytes, bytes] | None:
    """A connection's addresses, of the size that the packet's have. One that carries IPv4 is none of IPv6's."""
    remote = as_ipv4(sock.remote)
    if size == 16:
        return (sock.local, sock.remote) if remote is None else None
    return None if remote is None else (as_ipv4(sock.local) or ANY4, remote)


def _bound_to(sock: Sock, bound: bytes) -> bool:
    """Whether the socket is bound to just this address, as packets of its family see it."""
    if len(bound) == 4:
        return as_ipv4(sock.local) == bound and not sock.v6only
    return sock.family == socket.AF_INET6 and sock.local == bound


def _on_device(sock: Sock, ifindex: int) -> bool:
    return sock.bound_dev_if in (0, ifindex)


def _udp_score(sock: Sock, bound: bytes, flow: _Tuple) -> int:
    """How much of the flow the socket is bound and connected to; -1 if it is to something else."""
    remote, remote_port, *_, ifindex = flow
    if not _bound_to(sock, bound) or not _on_device(sock, ifindex) or sock.remote_port not in (0, remote_port):
        return -1
    connected = any(sock.remote)
    if connected and remote != (as_ipv4(sock.remote) if len(bound) == 4 else sock.remote):
        return -1
    score = 4 * (bool(sock.remote_port) + connected + bool(sock.bound_dev_if))
    return score + (len(bound) == 4 and sock.family == socket.AF_INET)
