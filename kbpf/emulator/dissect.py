"""Where a packet's payload starts, as the kernel's flow dissector finds it (`skb_get_poff`, net/core/flow_dissector.c).

Follows IPv4 and IPv6 with extension headers, fragments, and IP in IP; other tunnels are not entered.
"""

from __future__ import annotations

from kbpf.emulator.packet import Packet
from kbpf.uapi.constants import ETH_P_ARP, ETH_P_IP, ETH_P_IPV6

_IPIP, _TCP, _IPV6, _FRAGMENT, _GRE = 4, 6, 41, 44, 47
#: Hop-by-hop options, routing, destination options: length in units of 8 bytes after the first 8.
_OPTIONS = {0, 43, 60}
#: Lengths of transport headers that have a fixed one (DCCP's and SCTP's as far as the kernel counts them).
_HEADERS = {17: 8, 136: 8, 1: 8, 58: 8, 2: 8, 33: 12, 132: 12}


def payload_offset(packet: Packet) -> int:
    """Offset of the transport payload from the program's offset 0; 0 if the packet is not understood."""
    if packet.network is None:
        return 0
    data, at, protocol = packet.buffer, packet.network, packet.protocol
    while True:
        if protocol == ETH_P_ARP:
            return _from_start(packet, at)
        if protocol == ETH_P_IP:
            if len(data) < at + 20 or data[at] & 15 < 5:
                return 0
            transport, fragment = data[at + 9], int.from_bytes(data[at + 6 : at + 8], "big")
            at += (data[at] & 15) * 4
            if fragment & 0x3FFF:
                # A fragment is not dissected further; the first one still has its transport header.
                return _from_start(packet, at if fragment & 0x1FFF else _skip_transport(data, at, transport))
        elif protocol == ETH_P_IPV6:
            if len(data) < at + 40:
                return 0
            transport, at = data[at + 6], at + 40
            while transport in _OPTIONS or transport == _FRAGMENT:
                # Of options only type and length are looked at.
                if len(data) < at + (8 if transport == _FRAGMENT else 2):
                    return 0
                following = data[at]
                if transport == _FRAGMENT:
                    first = not int.from_bytes(data[at + 2 : at + 4], "big") & 0xFFF8
                    at += 8
                    return _from_start(packet, _skip_transport(data, at, following) if first else at)
                at += (data[at + 1] + 1) * 8
                transport = following
        else:
            return 0
        at = min(at, len(data))
        if transport == _GRE and len(data) < at + 4:
            return 0
        if transport not in (_IPIP, _IPV6):
            return _from_start(packet, _skip_transport(data, at, transport))
        protocol = ETH_P_IP if transport == _IPIP else ETH_P_IPV6


def _from_start(packet: Packet, at: int) -> int:
    return at - packet.offset & 0xFFFFFFFF


def _skip_transport(data: bytes, at: int, transport: int) -> int:
    if transport == _TCP:
        return at + max(20, data[at + 12] >> 4 << 2) if len(data) > at + 12 else at
    return at + _HEADERS.get(transport, 0)
