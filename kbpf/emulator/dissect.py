"""Where a packet's payload starts, as the kernel's flow dissector finds it (`skb_get_poff`, net/core/flow_dissector.c).

The layers are a table of functions: each looks at what lies at a position of the buffer and says what follows, where.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kbpf.emulator.packet import Packet
from kbpf.uapi.constants import (
    ETH_P_8021AD,
    ETH_P_8021Q,
    ETH_P_ARP,
    ETH_P_IP,
    ETH_P_IPV6,
    ETH_P_MPLS_MC,
    ETH_P_MPLS_UC,
    ETH_P_PPP_SES,
    ETH_P_RARP,
)

# EtherTypes (linux/if_ether.h).
_BATMAN, _TEB, _PPTP_PPP, _TIPC, _PTP, _PRP, _CFM, _FCOE, _HSR = (
    0x4305, 0x6558, 0x880B, 0x88CA, 0x88F7, 0x88FB, 0x8902, 0x8906, 0x892F,
)  # fmt: skip
_VLAN = (ETH_P_8021Q, ETH_P_8021AD)
# IP protocols.
_IPIP, _TCP, _IPV6, _FRAGMENT, _GRE, _MPLS = 4, 6, 41, 44, 47, 137
#: Hop-by-hop options, routing, destination options: length in units of 8 bytes after the first 8.
_OPTIONS = {0, 43, 60}
#: Lengths of transport headers that have a fixed one (DCCP's and SCTP's as far as the kernel counts them).
_HEADERS = {17: 8, 136: 8, 1: 8, 58: 8, 2: 8, 33: 12, 132: 12}
#: Headers that are looked into before the dissector has had enough.
_MOST_HEADERS = 15


class _Found(NamedTuple):
    """What a layer is followed by: a protocol of the next layer (None: nothing more to follow) at a position.

    `transport` is the IP protocol that was named; `skip` says whether its header counts, not so in later fragments.
    """

    at: int
    protocol: int | None = None
    transport: int | None = None
    skip: bool = True


def _word(data: bytes, at: int) -> int:
    return data[at] << 8 | data[at + 1]


def payload_offset(packet: Packet) -> int:
    """Offset of the transport payload from the program's offset 0; 0 if the packet is not understood."""
    if packet.network is None:
        return 0
    data, at, protocol = bytes(packet.buffer), packet.network, packet.protocol
    transport, skip = 0, True
    # A tag in the metadata is a header too.
    headers = 0 if packet.vlan_tci is None else 1
    while True:
        layer = _LAYERS.get(protocol)
        found = layer(data, at) if layer else None
        if found is None:
            return 0
        at, skip = found.at, found.skip
        transport = transport if found.transport is None else found.transport
        headers += 1
        if found.protocol is None or headers > _MOST_HEADERS:
            break
        protocol = found.protocol
    start = min(at - packet.offset & 0xFFFF, packet.length & 0xFFFF)
    if not skip:
        return start
    if transport == _TCP:
        at = packet.offset + start + 12
        return start + max(20, data[at] >> 4 << 2) if at < len(data) else start
    return start + _HEADERS.get(transport, 0)


def _vlan(data: bytes, at: int) -> _Found | None:
    return _Found(at + 4, _word(data, at + 2)) if len(data) >= at + 4 else None


def _ipv4(data: bytes, at: int) -> _Found | None:
    if len(data) < at + 20 or data[at] & 15 < 5:
        return None
    transport, fragment = data[at + 9], _word(data, at + 6)
    at += (data[at] & 15) * 4
    if fragment & 0x3FFF:
        # A fragment is not followed further; the first one still has its transport header.
        return _Found(at, None, transport, not fragment & 0x1FFF)
    return _transport(data, at, transport)


def _ipv6(data: bytes, at: int) -> _Found | None:
    if len(data) < at + 40:
        return None
    transport, at = data[at + 6], at + 40
    for _ in range(_MOST_HEADERS):
        if transport not in _OPTIONS and transport != _FRAGMENT:
            return _transport(data, at, transport)
        if len(data) < at + (8 if transport == _FRAGMENT else 2):
            return None
        following = data[at]
        if transport == _FRAGMENT:
            return _Found(at + 8, None, following, not _word(data, at + 2) & 0xFFF8)
        at += (data[at + 1] + 1) * 8
        transport = following
    return _Found(at, None, transport)


def _transport(data: bytes, at: int, transport: int) -> _Found | None:
    if transport == _GRE:
        return _gre(data, at)
    return _Found(at, {_IPIP: ETH_P_IP, _IPV6: ETH_P_IPV6, _MPLS: ETH_P_MPLS_UC}.get(transport), transport)


def _gre(data: bytes, at: int) -> _Found | None:
    if len(data) < at + 4:
        return None
    flags, protocol = _word(data, at), _word(data, at + 2)
    version = flags & 7
    if flags & 0x4000 or version > 1 or (version == 1 and not (protocol == _PPTP_PPP and flags & 0x2000)):
        # Routing, and versions that nobody uses, are not looked into.
        return _Found(at, None, _GRE)
    # Checksum, key, sequence number.
    inside = at + 4 + 4 * sum(bool(flags & flag) for flag in (0x8000, 0x2000, 0x1000))
    if version == 0:
        if protocol != _TEB:
            return _Found(inside, protocol, _GRE)
        return _Found(inside + 14, _word(data, inside + 12), _GRE) if len(data) >= inside + 14 else None
    inside += 4 if flags & 0x80 else 0
    if len(data) < inside + 4:
        return None
    return _Found(inside + 4, {0x21: ETH_P_IP, 0x57: ETH_P_IPV6}.get(_word(data, inside + 2), protocol), _GRE)


def _pppoe(data: bytes, at: int) -> _Found | None:
    if len(data) < at + 8 or data[at] != 0x11 or data[at + 1]:
        return None
    protocol, size = _word(data, at + 6), 8
    if protocol & 0x0100:
        # A compressed field has one byte.
        protocol, size = protocol >> 8, 7
    following = {0x21: ETH_P_IP, 0x57: ETH_P_IPV6, 0x281: ETH_P_MPLS_UC, 0x283: ETH_P_MPLS_MC}.get(protocol)
    return _Found(at + size, following) if following or protocol & 0x0101 == 0x0001 else None


def _batman(data: bytes, at: int) -> _Found | None:
    """B.A.T.M.A.N. unicast of version 15, with an Ethernet header behind it."""
    if len(data) < at + 24 or data[at] != 0x40 or data[at + 1] != 15:
        return None
    return _Found(at + 24, _word(data, at + 22))


def _hsr(data: bytes, at: int) -> _Found | None:
    return _Found(at + 6, _word(data, at + 4)) if len(data) >= at + 6 else None


def _last(needed: int = 0, size: int = 0) -> Callable[[bytes, int], _Found | None]:
    """A header of which `needed` bytes must be there, and `size` are skipped; nothing behind it is followed."""
    return lambda data, at: _Found(at + size) if not needed or len(data) >= at + needed else None


_LAYERS: dict[int, Callable[[bytes, int], _Found | None]] = {
    **dict.fromkeys(_VLAN, _vlan),
    ETH_P_IP: _ipv4,
    ETH_P_IPV6: _ipv6,
    **dict.fromkeys((ETH_P_ARP, ETH_P_RARP, _CFM), _last()),
    **dict.fromkeys((ETH_P_MPLS_UC, ETH_P_MPLS_MC), _last(size=4)),
    ETH_P_PPP_SES: _pppoe,
    _TIPC: _last(16),
    _PTP: _last(34, 34),
    _FCOE: _last(38, 38),
    **dict.fromkeys((_PRP, _HSR), _hsr),
    _BATMAN: _batman,
}
