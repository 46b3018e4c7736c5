"""Helpers that make room in a packet or take it away: VLAN tags, headers, the tail (net/core/filter.c, skbuff.c).

They work on whole packets in one piece. Programs reach the packet by new addresses afterwards.
"""

from __future__ import annotations

import errno
import socket

from kbpf.emulator.ethernet import ETH_P_802_2, ETH_P_802_3, ETH_P_8021Q, HEADER, VLAN_PROTOCOLS
from kbpf.emulator.helpers.packet import check_context
from kbpf.emulator.interpreter import HelperFunction, Run
from kbpf.emulator.memory import M32
from kbpf.emulator.packet import Packet
from kbpf.errors import ENOTSUPP
from kbpf.uapi import constants as uapi

_TAG = 4
_ADDRESSES = 12
_ETH_P_802_3_MIN = 0x0600
_IP_HEADER = {uapi.ETH_P_IP: 20, uapi.ETH_P_IPV6: 40}
#: SKB_MAX_ALLOC on x86-64: four pages less what the kernel keeps in them.
_MOST_DATA = 16064
_MOST_ROOM = 0xFFF
#: What no packet grows beyond here; the kernel's memory and its 16-bit header offsets end near it.
_MOST_MEMORY = 1 << 17
_ENCAP_L3 = uapi.BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | uapi.BPF_F_ADJ_ROOM_ENCAP_L3_IPV6
_ENCAP_L4 = uapi.BPF_F_ADJ_ROOM_ENCAP_L4_GRE | uapi.BPF_F_ADJ_ROOM_ENCAP_L4_UDP
_DECAP_L3 = uapi.BPF_F_ADJ_ROOM_DECAP_L3_IPV4 | uapi.BPF_F_ADJ_ROOM_DECAP_L3_IPV6
_INNER_MAC_SHIFT = uapi.BPF_ADJ_ROOM_ENCAP_L2_SHIFT
_ROOM_FLAGS = (
    uapi.BPF_F_ADJ_ROOM_FIXED_GSO
    | _ENCAP_L3
    | _ENCAP_L4
    | uapi.BPF_F_ADJ_ROOM_ENCAP_L2_ETH
    | uapi.BPF_ADJ_ROOM_ENCAP_L2_MASK << _INNER_MAC_SHIFT
    | _DECAP_L3
    | uapi.BPF_F_ADJ_ROOM_NO_CSUM_RESET
)
_SHRINK_FLAGS = uapi.BPF_F_ADJ_ROOM_FIXED_GSO | _DECAP_L3 | uapi.BPF_F_ADJ_ROOM_NO_CSUM_RESET
_PACKET_TYPES = 4


def _signed(value: int) -> int:
    return (value & M32 ^ 1 << 31) - (1 << 31)


def _insert(packet: Packet, at: int, size: int) -> bytearray:
    """Put zeroes in at an offset; what lies before moves to the front, where the link and network headers are then.

    An offset behind the packet is not refused: bytes that were cut off come back.
    """
    whole = bytes(packet.buffer[packet.offset :]) + packet.behind
    packet.push(size)
    whole = whole[:at].ljust(at, b"\0") + bytes(size) + whole[at:]
    packet.buffer = bytearray(packet.buffer[: packet.offset]) + whole[: packet.length]
    packet.behind = whole[packet.length :]
    return packet.buffer


def _remove(packet: Packet, at: int, size: int) -> None:
    """Take bytes out at an offset; what lies before moves to the back."""
    buffer, start = bytearray(packet.buffer), packet.offset
    buffer[start + size : start + size + at] = buffer[start : start + at]
    packet.buffer = buffer
    packet.pull(size)


def _moved(packet: Packet, by: int) -> None:
    """The link and the network header have moved with the bytes before them."""
    followed = packet.transport is not None and packet.transport == packet.network
    packet.mac = None if packet.mac is None else packet.mac + by
    packet.network = None if packet.network is None else packet.network + by
    if followed:
        packet.transport = packet.network


def _link_header(packet: Packet) -> int:
    """Bytes between the link and the network header."""
    return (packet.network or 0) - (packet.mac or 0)


def skb_vlan_push(run: Run, skb: int, protocol: int, tci: int, *_: int) -> int:
    check_context(skb)
    packet = run.packet
    # The protocol comes as it is stored.
    protocol = socket.ntohs(protocol & 0xFFFF)
    if packet.length > _MOST_MEMORY:
        return -errno.ENOMEM
    if packet.vlan_tci is not None:
        if not packet.has_headroom(_TAG):
            return -errno.ENOMEM
        tag = packet.vlan_proto.to_bytes(2, "big") + packet.vlan_tci.to_bytes(2, "big")
        buffer = _insert(packet, _ADDRESSES, _TAG)
        packet.sum_in(tag)
        buffer[packet.offset + _ADDRESSES : packet.offset + _ADDRESSES + _TAG] = tag
        packet.mac = packet.offset
        packet.network = None if packet.network is None else packet.network - _TAG
        packet.protocol = packet.vlan_proto
    packet.vlan_tci = tci & 0xFFFF
    packet.vlan_proto = protocol if protocol in VLAN_PROTOCOLS else ETH_P_8021Q
    run.context.show(run)
    return 0


def skb_vlan_pop(run: Run, skb: int, *_: int) -> int:
    """Take the outer tag away; one behind it goes into the metadata."""
    check_context(skb)
    packet = run.packet
    failed = 0
    if packet.vlan_tci is not None:
        packet.vlan_tci = None
    elif packet.protocol in VLAN_PROTOCOLS:
        failed = -errno.ENOMEM if _take_tag(packet) is None else 0
    else:
        return 0
    if not failed and packet.protocol in VLAN_PROTOCOLS:
        protocol, tci = packet.protocol, _take_tag(packet)
        if tci is None:
            failed = -errno.ENOMEM
        else:
            packet.vlan_tci, packet.vlan_proto = tci, protocol
    run.context.show(run)
    return failed


def _take_tag(packet: Packet) -> int | None:
    """Take a tag out of the bytes (`__skb_vlan_pop`); None where it is cut."""
    frame = bytes(packet.buffer[packet.offset :])
    if len(frame) < HEADER + _TAG:
        return None
    following = int.from_bytes(frame[HEADER + 2 : HEADER + _TAG], "big")
    if following < _ETH_P_802_3_MIN:
        following = ETH_P_802_3 if frame[HEADER + _TAG : HEADER + _TAG + 2] == b"\xff\xff" else ETH_P_802_2
    packet.protocol = following
    packet.sum_out(frame[_ADDRESSES : _ADDRESSES + _TAG])
    _remove(packet, _ADDRESSES, _TAG)
    packet.mac = None if packet.mac is None else packet.mac + _TAG
    if packet.network is not None and packet.network - packet.offset < HEADER:
        packet.network = packet.offset + HEADER
    return int.from_bytes(frame[HEADER : HEADER + 2], "big")


def skb_change_type(run: Run, skb: int, kind: int, *_: int) -> int:
    check_context(skb)
    if run.packet.pkt_type >= _PACKET_TYPES or kind & M32 >= _PACKET_TYPES:
        return -errno.EINVAL
    run.packet.pkt_type = kind & M32
    return 0


def skb_change_head(run: Run, skb: int, size: int, flags: int, *_: int) -> int:
    check_context(skb)
    packet, size = run.packet, size & M32
    length = packet.length + size & M32
    if flags or (not packet.gso_size and length > _MOST_DATA) or length < packet.length:
        return -errno.EINVAL
    if length > _MOST_MEMORY or not packet.has_headroom(size):
        return -errno.ENOMEM
    packet.push(size)
    buffer = bytearray(packet.buffer)
    buffer[packet.offset : packet.offset + size] = bytes(size)
    packet.buffer = buffer
    packet.mac = packet.offset
    run.context.show(run)
    return 0


def skb_change_tail(run: Run, skb: int, length: int, flags: int, *_: int) -> int:
    check_context(skb)
    packet, length = run.packet, length & M32
    # The last header that is not behind offset 0 must stay.
    starts = [at - packet.offset for at in (packet.network, packet.transport) if at is not None and at > packet.offset]
    if flags or not (starts[-1] if starts else 0) <= length <= _MOST_DATA:
        return -errno.EINVAL
    if packet.encapsulated:
        return -ENOTSUPP
    packet.resize(length)
    if packet.gso_size:
        packet.gso_size = packet.gso_segs = 0
    run.context.show(run)
    return 0


def skb_change_proto(run: Run, skb: int, protocol: int, flags: int, *_: int) -> int:
    """IPv4 to IPv6 or back, as far as the header's size goes."""
    check_context(skb)
    packet = run.packet
    if flags:
        return -errno.EINVAL
    target = socket.ntohs(protocol & 0xFFFF)
    if {packet.protocol, target} != set(_IP_HEADER):
        return -ENOTSUPP
    difference = _IP_HEADER[target] - _IP_HEADER[packet.protocol]
    failed = _grow(packet, _link_header(packet), difference)
    if not failed:
        packet.protocol = target
        packet.gso_kind |= bool(packet.gso_size)
        packet.hash, packet.hash_known = 0, False
    run.context.show(run)
    return failed


def _grow(packet: Packet, at: int, size: int) -> int:
    """Add zeroes behind the link header, or take bytes away."""
    if size >= 0:
        if not packet.has_headroom(size):
            return -errno.ENOMEM
        _insert(packet, at, size)
    else:
        if at - size > packet.length:
            return -errno.ENOMEM
        packet.sum_out(packet.data[at : at - size])
        _remove(packet, at, -size)
    _moved(packet, -size)
    return 0


def skb_adjust_room(run: Run, skb: int, difference: int, mode: int, flags: int, _: int) -> int:
    check_context(skb)
    packet, difference, mode = run.packet, _signed(difference), mode & M32
    if flags & ~_ROOM_FLAGS:
        return -errno.EINVAL
    if abs(difference) > _MOST_ROOM:
        return -errno.EFAULT
    header = _IP_HEADER.get(packet.protocol)
    if header is None or mode not in (uapi.BPF_ADJ_ROOM_NET, uapi.BPF_ADJ_ROOM_MAC):
        return -ENOTSUPP
    at = _link_header(packet) + (header if mode == uapi.BPF_ADJ_ROOM_NET else 0)
    failed = _decap_error(packet, flags, difference)
    if failed:
        return failed
    least = header if not flags & _DECAP_L3 else 40 if flags & uapi.BPF_F_ADJ_ROOM_DECAP_L3_IPV6 else 20
    present = packet.length - ((packet.network or 0) - packet.offset)
    if difference < 0 and (-difference >= present or present + difference < least):
        return -ENOTSUPP
    if difference >= 0 and packet.length + difference > _MOST_DATA and not packet.gso_size:
        return -ENOTSUPP
    failed = _shrink(packet, at, difference, flags) if difference < 0 else _widen(packet, at, difference, flags)
    if not failed and not flags & uapi.BPF_F_ADJ_ROOM_NO_CSUM_RESET:
        packet.csum_level = None
    run.context.show(run)
    return failed


def _decap_error(packet: Packet, flags: int, difference: int) -> int:
    """Whether a tunnel's header may be taken away so."""
    if not flags & _DECAP_L3:
        return 0
    if difference >= 0 or flags & _DECAP_L3 == _DECAP_L3:
        return -errno.EINVAL
    return 0


def _shrink(packet: Packet, at: int, difference: int, flags: int) -> int:
    if flags & ~_SHRINK_FLAGS:
        return -errno.EINVAL
    if packet.gso_size:
        return -ENOTSUPP
    failed = _grow(packet, at, difference)
    if not failed and flags & _DECAP_L3:
        to_six = bool(flags & uapi.BPF_F_ADJ_ROOM_DECAP_L3_IPV6)
        packet.protocol = uapi.ETH_P_IPV6 if to_six else uapi.ETH_P_IP
    return failed


def _widen(packet: Packet, at: int, size: int, flags: int) -> int:
    if packet.gso_size:
        return -ENOTSUPP
    inner_mac = flags >> _INNER_MAC_SHIFT & uapi.BPF_ADJ_ROOM_ENCAP_L2_MASK
    link_header, outer = _link_header(packet), flags & _ENCAP_L3
    if outer:
        if outer == _ENCAP_L3 or flags & _ENCAP_L4 == _ENCAP_L4:
            return -errno.EINVAL
        if flags & uapi.BPF_F_ADJ_ROOM_ENCAP_L2_ETH and inner_mac < HEADER:
            return -errno.EINVAL
        if packet.encapsulated:
            return -errno.EALREADY
        if inner_mac > size:
            return -errno.EINVAL
    failed = _grow(packet, at, size)
    if failed or not outer:
        return failed
    packet.encapsulated = True
    packet.network = packet.offset + link_header
    six = outer == uapi.BPF_F_ADJ_ROOM_ENCAP_L3_IPV6
    if flags & _ENCAP_L4:
        packet.transport = packet.network + (40 if six else 20)
    packet.protocol = uapi.ETH_P_IPV6 if six else uapi.ETH_P_IP
    return 0


HELPERS: dict[str, HelperFunction] = {
    "skb_vlan_push": skb_vlan_push,
    "skb_vlan_pop": skb_vlan_pop,
    "skb_change_type": skb_change_type,
    "skb_change_head": skb_change_head,
    "skb_change_tail": skb_change_tail,
    "skb_change_proto": skb_change_proto,
    "skb_adjust_room": skb_adjust_room,
}
