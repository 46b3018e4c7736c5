"""The link header for a next hop, as bpf_redirect_neigh has it made (`__bpf_redirect_neigh`, net/core/filter.c).

Routes and link addresses are the environment's. Nobody is asked for addresses (ARP, neighbour discovery): a packet for
an unknown one is dropped.
"""

from __future__ import annotations

import ipaddress
import socket
import sys

from kbpf.emulator.environment import environment
from kbpf.emulator.ethernet import ETH_P_IP, ETH_P_IPV6
from kbpf.emulator.interface import EmulatedInterface
from kbpf.emulator.packet import Packet
from kbpf.emulator.routes import Address, find

#: Where the destination lies in an IP header, and how long it is, by EtherType.
_DESTINATIONS = {ETH_P_IP: slice(16, 20), ETH_P_IPV6: slice(24, 40)}
_REFUSING = ("blackhole", "unreachable", "prohibit")
_SHORTEST = {ETH_P_IP: 20, ETH_P_IPV6: 40}


def address_packet(packet: Packet, target: EmulatedInterface, neighbour: bytes) -> bool:
    """Give a packet the link header for its next hop; False if there is none or its link address is unknown.

    `neighbour` is a ``struct bpf_redir_neigh``, or empty: then the next hop is the route's.
    """
    start = packet.network or 0
    header = bytes(packet.buffer[start:])
    if packet.protocol not in _DESTINATIONS or len(header) < _SHORTEST[packet.protocol]:
        return False
    hop = _given(neighbour) if neighbour else _routed(header[_DESTINATIONS[packet.protocol]], target)
    if hop is None or (hop.version == 4 and packet.protocol == ETH_P_IPV6):
        target.counters.tx_dropped += 1
        return False
    link = environment.neighbours.get(str(hop))
    if link is None or not target.header:
        return False
    packet.pull(start - packet.offset)
    packet.buffer = link + target.address + packet.protocol.to_bytes(2, "big") + header
    packet.offset = packet.mac = packet.metadata = 0
    packet.network, packet.length = target.header, packet.length + target.header
    packet.transport = None
    return True


def _given(neighbour: bytes) -> Address | None:
    family = int.from_bytes(neighbour[:4], sys.byteorder)
    if family == socket.AF_INET:
        return ipaddress.IPv4Address(neighbour[4:8])
    return ipaddress.IPv6Address(neighbour[4:20]) if family == socket.AF_INET6 else None


def _routed(destination: bytes, target: EmulatedInterface) -> Address | None:
    to = ipaddress.ip_address(destination)
    route = find(target.network.inet.routes() if target.network else (), to, None, target.index)
    if to.version == 4 and (route is None or route.kind in _REFUSING):
        # The device is given, and Linux takes it that whoever is meant can be reached by it.
        return to
    if route is None or route.kind != "unicast":
        return None
    return ipaddress.ip_address(route.via) if route.via is not None else to
