"""IPv4 and IPv6 of an emulated network: addresses, routes, what is received for this host, and what is sent.

The counterpart of net/ipv4/ip_input.c and ip_output.c and their IPv6 siblings. Like Linux's loopback and veth, devices
compute checksums: what packet sockets see of a packet that is sent has the pseudo header's sum in the checksum field,
and what was sent with it is not checked again.

Simplified: packets are neither forwarded nor fragmented nor put together, link addresses of neighbours are known
(`environment.neighbours`, else the other end of the cable), there is no multicast, and ``lo`` takes frames from and to
127.0.0.0/8 that somebody puts there (as with ``net.ipv4.conf.lo.route_localnet``).
"""

from __future__ import annotations

import errno
import ipaddress
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple, TypeAlias
from weakref import WeakMethod

from kbpf.emulator import cgroup_hooks, ethernet, headers
from kbpf.emulator.environment import environment
from kbpf.emulator.headers import IpHeader
from kbpf.emulator.interface import EmulatedInterface
from kbpf.emulator.netfilter import Hooks
from kbpf.emulator.packet import Packet
from kbpf.emulator.ports import Ports
from kbpf.emulator.routes import RT_TABLE_LOCAL, Route, find
from kbpf.emulator.slot import error
from kbpf.emulator.sock import Sock

if TYPE_CHECKING:
    from kbpf.emulator.network import Network

#: Takes a packet whose offset 0 is the transport header.
Transport: TypeAlias = Callable[[EmulatedInterface, Packet, IpHeader], object]
_Interface: TypeAlias = "ipaddress.IPv4Interface | ipaddress.IPv6Interface"

#: What a route ends with that leads nowhere (`fib_props`).
_REFUSED = {"unreachable": errno.EHOSTUNREACH, "prohibit": errno.EACCES, "blackhole": errno.EINVAL}
_BROADCAST = b"\xff" * 4


class Path(NamedTuple):
    """Where a packet leaves: the device, the address that this host has there, and the next hop's link address."""

    device: EmulatedInterface
    source: bytes
    link: bytes
    broadcast: bool = False


class Sending(NamedTuple):
    """What a socket says of the packets that it sends, beside their bytes."""

    sock: Sock | None = None
    mark: int = 0
    priority: int = 0
    ttl: int = 64
    tos: int = 0
    hash: int = 0
    gso_segs: int = 0
    dont_fragment: bool = True


class Inet:
    """The Internet protocols of one network."""

    def __init__(self, network: Network) -> None:
        self.network = network
        #: By interface, in the order in which they were added.
        self._addresses: dict[EmulatedInterface, list[_Interface]] = {}
        self._idents = itertools.count(1)
        #: Who takes received packets, by IP protocol.
        self.transports: dict[int, Transport] = {}
        #: Who sees each received packet before that, offset 0 the network header: raw sockets.
        self.raw: list[WeakMethod[Callable[[EmulatedInterface, Packet, IpHeader], bool]]] = []
        #: Who may be meant by a reply to an echo, offset 0 its ICMP header: ping sockets.
        self.pings: list[WeakMethod[Callable[[EmulatedInterface, Packet, IpHeader], bool]]] = []
        #: What ``nstat`` counts, by its names: ``UdpInErrors``.
        self.counters: Counter[str] = Counter()
        self.ports = Ports()
        self.netfilter = Hooks()
        network.handle(ethernet.ETH_P_IP, self.receive4)
        network.handle(ethernet.ETH_P_IPV6, self.receive6)

    # Addresses and routes.

    def add_address(self, device: EmulatedInterface, address: str) -> None:
        """Give an interface an address, with the length of its prefix; `OSError` EEXIST where it has it already."""
        given = ipaddress.ip_interface(address)
        had = self._addresses.setdefault(device, [])
        if given in had:
            raise error(errno.EEXIST)
        had.append(given)

    def forget(self, device: EmulatedInterface) -> None:
        """An interface has gone, and its addresses with it."""
        self._addresses.pop(device, None)

    def routes(self) -> Iterator[Route]:
        """Those of the environment, and those that addresses bring (`fib_add_ifaddr`, `addrconf_prefix_route`)."""
        yield from environment.routes
        for device, addresses in self._addresses.items():
            for own in addresses:
                net, metric, source = str(own.network), 256 if own.version == 6 else 0, str(own.ip)
                yield Route(to=source, device=device.index, kind="local", table=RT_TABLE_LOCAL)
                if own.is_loopback:
                    yield Route(to=net, device=device.index, kind="local", table=RT_TABLE_LOCAL)
                else:
                    yield Route(to=net, device=device.index, metric=metric, source=source)
                if own.version == 4 and own.network.prefixlen < 31:
                    broadcast = str(own.network.broadcast_address)
                    yield Route(to=broadcast, device=device.index, kind="broadcast", table=RT_TABLE_LOCAL)

    def is_local(self, address: bytes) -> bool:
        """Whether it is one of this host's own."""
        wanted = ipaddress.ip_address(address)
        return any(
            wanted == own.ip or (own.version == 4 and own.is_loopback and wanted in own.network)
            for addresses in self._addresses.values()
            for own in addresses
        )

    def is_broadcast(self, address: bytes) -> bool:
        """Whether it is everybody's on one of the links, 255.255.255.255 too."""
        if address == _BROADCAST:
            return True
        wanted = ipaddress.ip_address(address)
        return wanted.version == 4 and any(
            wanted == own.network.broadcast_address and own.network.prefixlen < 31
            for addresses in self._addresses.values()
            for own in addresses
        )

    def path(self, target: bytes, device: EmulatedInterface | None = None) -> Path:
        """The way to an address, out of `device` where that is given; `OSError` ENETUNREACH and its kin."""
        wanted = ipaddress.ip_address(target)
        if target == _BROADCAST and device is not None:
            return Path(device, self._own(device, 4), ethernet.BROADCAST, True)
        broadcast = self.is_broadcast(target)
        if device is None and not broadcast and self.is_local(target):
            lo = self.network.interface("lo")
            source = self._own(lo, 4) if wanted.version == 4 and wanted.is_loopback else target
            return Path(lo, source, bytes(6))
        best: tuple[int, EmulatedInterface, bytes] | None = None
        for candidate, addresses in self._addresses.items():
            for own in addresses:
                fits = wanted in own.network and device in (None, candidate)
                if fits and (best is None or own.network.prefixlen > best[0]):
                    best = own.network.prefixlen, candidate, own.ip.packed
        route = find(environment.routes, wanted, None, None if device is None else device.index)
        if route is not None and (best is None or route.network.prefixlen > best[0]):
            if route.kind in _REFUSED:
                raise error(_REFUSED[route.kind])
            out = self.network.by_index(route.device)
            if out is None:
                raise error(errno.ENETUNREACH)
            source = ipaddress.ip_address(route.source).packed if route.source else self._own(out, wanted.version)
            return Path(out, source, self._neighbour(out, route.via or str(wanted)))
        if best is None:
            raise error(errno.ENETUNREACH)
        _, device, source = best
        if broadcast:
            return Path(device, source, bytes(6) if device.loopback else ethernet.BROADCAST, True)
        return Path(device, source, self._neighbour(device, str(wanted)))

    def _own(self, device: EmulatedInterface, version: int) -> bytes:
        for own in self._addresses.get(device, ()):
            if own.version == version:
                return own.ip.packed
        raise error(errno.EADDRNOTAVAIL)

    def _neighbour(self, device: EmulatedInterface, hop: str) -> bytes:
        known = environment.neighbours.get(hop)
        if known is not None:
            return known
        return bytes(6) if device.loopback or device.peer is None else device.peer.address

    # Receiving.

    def receive4(self, device: EmulatedInterface, packet: Packet) -> None:
        """A packet of ETH_P_IP comes in (`ip_rcv`)."""
        header = headers.read_ipv4(packet.data)
        if header is None or packet.pkt_type == ethernet.PACKET_OTHERHOST:
            return
        if not self.netfilter.accept("prerouting", 4) or header.fragmented:
            return
        if self._martian(device, header.source) or not (
            self.is_local(header.target) or self.is_broadcast(header.target)
        ):
            return
        self._deliver(device, packet, header)

    def receive6(self, device: EmulatedInterface, packet: Packet) -> None:
        """A packet of ETH_P_IPV6 comes in (`ipv6_rcv`)."""
        header = headers.read_ipv6(packet.data)
        if header is None or packet.pkt_type == ethernet.PACKET_OTHERHOST:
            return
        source, target = ipaddress.IPv6Address(header.source), ipaddress.IPv6Address(header.target)
        if source.is_multicast or (not device.loopback and (source.is_loopback or target.is_loopback)):
            return
        if self.netfilter.accept("prerouting", 6) and self.is_local(header.target):
            self._deliver(device, packet, header)

    def _martian(self, device: EmulatedInterface, source: bytes) -> bool:
        """A sender that cannot be there (`ip_route_input_slow`)."""
        address = ipaddress.IPv4Address(source)
        if address.is_multicast or source == _BROADCAST or (source[0] == 0 and any(source)):
            return True
        return not device.loopback and (address.is_loopback or self.is_local(source))

    def _deliver(self, device: EmulatedInterface, packet: Packet, header: IpHeader) -> None:
        """To raw sockets, and to whose protocol it is (`ip_protocol_deliver_rcu`)."""
        if not self.netfilter.accept("local_in", header.version):
            return
        if packet.length > header.end:
            packet.resize(header.end)
        raw = [socket for reference in self.raw if (socket := reference()) is not None]
        taken = [socket(device, packet, header) for socket in raw]
        transport = self.transports.get(header.protocol)
        packet.transport = packet.offset + header.start
        if transport is not None:
            packet.pull(header.start)
            transport(device, packet, header)
        elif not any(taken):
            self.counters["IpInUnknownProtos"] += header.version == 4

    def checksum_good(self, packet: Packet, header: IpHeader) -> bool:
        """Whether the transport checksum of a packet, offset 0 its transport header, is right or was never made."""
        if packet.checksum_partial:
            return True
        data = packet.data
        seed = 0 if header.protocol == headers.IPPROTO_ICMP else headers.pseudo_sum(
            header.source, header.target, header.protocol, len(data)
        )  # fmt: skip
        return headers.ones_sum(data, seed) == 0xFFFF

    # Sending.

    def send(
        self,
        path: Path,
        source: bytes,
        target: bytes,
        protocol: int,
        segment: bytes,
        how: Sending,
        *,
        partial: bool = False,
    ) -> None:
        """Send a transport segment, whose checksum is yet to be made if it is `partial`.

        Raises `OSError` EMSGSIZE for more than the MTU.
        """
        version = 4 if len(target) == 4 else 6
        size = headers.IPV4_SIZE if version == 4 else headers.IPV6_SIZE
        if size + len(segment) > min(path.device.mtu, 0xFFFF if version == 4 else headers.IPV6_SIZE + 0xFFFF):
            raise error(errno.EMSGSIZE)
        if partial:
            seed = headers.pseudo_sum(source, target, protocol, len(segment))
            segment = headers.with_checksum(segment, protocol, seed)
        if version == 4:
            ident = next(self._idents) & 0xFFFF
            header = headers.ipv4(
                source,
                target,
                protocol,
                len(segment),
                ttl=how.ttl,
                tos=how.tos,
                ident=ident,
                fragment=headers.DONT_FRAGMENT if how.dont_fragment else 0,
            )
        else:
            label = how.hash & 0xFFFFF
            header = headers.ipv6(
                source, target, protocol, len(segment), hops=how.ttl, traffic_class=how.tos, label=label
            )
        self.emit(path, header + segment, how, partial)

    def emit(self, path: Path, data: bytes, how: Sending, partial: bool = False) -> None:
        """Send an IP packet that is complete, but for a `partial` checksum.

        `OSError` EPERM where a netfilter program or one of the sender's control group does not let it.
        """
        device = path.device
        protocol = ethernet.ip_protocol(data)
        version = 4 if protocol == ethernet.ETH_P_IP else 6
        if not all(self.netfilter.accept(hook, version) for hook in ("local_out", "postrouting")):
            raise error(errno.EPERM)
        link = path.link + device.address[:6].ljust(6, b"\0") + protocol.to_bytes(2, "big") if device.header else b""
        packet = Packet(
            buffer=link + data,
            mac=0,
            network=len(link),
            protocol=protocol,
            ifindex=device.index,
            hatype=device.hatype,
            mark=how.mark,
            priority=how.priority,
            hash=how.hash,
            hash_known=bool(how.hash),
            gso_segs=how.gso_segs,
            socket=how.sock,
            timestamp_ns=environment.real_clock(),
            checksum_partial=partial,
        )
        if how.sock is None or cgroup_hooks.egress(how.sock, packet):
            self.network.send(device, packet)
