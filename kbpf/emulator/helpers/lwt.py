"""bpf_lwt_push_encap, which puts a header before a packet of a route: net/core/lwt_bpf.c, Linux 4.18 and 5.1."""

from __future__ import annotations

import errno
import socket
import sys

from kbpf.emulator.helpers.packet import check_context
from kbpf.emulator.internet_checksum import fold16, partial
from kbpf.emulator.interpreter import HelperFunction, Run
from kbpf.emulator.memory import M32
from kbpf.emulator.packet import Packet
from kbpf.errors import ENOTSUPP, EmulationFault
from kbpf.uapi.constants import BPF_LWT_ENCAP_IP, BPF_LWT_ENCAP_SEG6, BPF_LWT_ENCAP_SEG6_INLINE, ETH_P_IP, ETH_P_IPV6

#: LWT_BPF_MAX_HEADROOM.
_MOST_HEADER = 256
_IPV4, _IPV6, _UDP = 20, 40, 8
#: What a device wants before a packet, for its link header (LL_RESERVED_SPACE of loopback).
_LINK_ROOM = 16
#: Of a routing header: its fixed part, its type (RFC 8754), and where fields are in it.
_SRH_HEADER, _SEGMENT_ROUTING = 8, 4
_LENGTH, _TYPE, _LEFT, _FIRST = 1, 2, 3, 4


def lwt_push_encap(run: Run, skb: int, kind: int, header: int, size: int, _: int) -> int:
    check_context(skb)
    given, kind = run.read(header, size & M32), kind & M32
    sends = getattr(run.subject, "type", "") == "lwt_xmit"
    if kind == BPF_LWT_ENCAP_IP:
        return _push_ip(run, given, _LINK_ROOM if sends else 0)
    if sends or kind not in (BPF_LWT_ENCAP_SEG6, BPF_LWT_ENCAP_SEG6_INLINE):
        return -errno.EINVAL
    return _push_routing_header(run.packet, kind, given)


def _push_routing_header(packet: Packet, kind: int, header: bytes) -> int:
    if not _is_routing_header(header):
        return -errno.EINVAL
    if kind == BPF_LWT_ENCAP_SEG6_INLINE and packet.protocol != ETH_P_IPV6:
        return -errno.EBADMSG
    raise EmulationFault("the emulator does not have segment routing: bpf_lwt_push_encap gives packets IP headers")


def _is_routing_header(header: bytes) -> bool:
    """`seg6_validate_srh`."""
    if len(header) < _SRH_HEADER or header[_TYPE] != _SEGMENT_ROUTING or header[_LENGTH] + 1 << 3 != len(header):
        return False
    first = header[_FIRST]
    if header[_LEFT] > first or first > header[_LENGTH] // 2 - 1:
        return False
    # Options: a type, a length, and that many bytes.
    at = _SRH_HEADER + (first + 1 << 4)
    while at < len(header) - 1:
        at += 2 + header[at + 1]
    return at == len(header)


def _push_ip(run: Run, header: bytes, room: int) -> int:
    if not _IPV4 <= len(header) <= _MOST_HEADER:
        return -errno.EINVAL
    version = header[0] >> 4
    if version not in (4, 6):
        return -errno.EINVAL
    size, protocol = ((header[0] & 15) << 2, header[9]) if version == 4 else (_IPV6, header[6])
    if len(header) < size + (_UDP if protocol == socket.IPPROTO_UDP else 0):
        return -errno.EINVAL
    packet = run.packet
    if not packet.has_headroom(len(header), room):
        return -errno.ENOMEM
    packet.push(len(header), room)
    if not room:
        packet.sum_in(header)
    packet.encapsulated, packet.network = True, packet.offset
    if protocol == socket.IPPROTO_UDP:
        packet.transport = packet.offset + size
    packet.hash, packet.hash_known = 0, False
    packet.protocol = ETH_P_IP if version == 4 else ETH_P_IPV6
    buffer = bytearray(packet.buffer)
    buffer[packet.offset : packet.offset + len(header)] = (
        _summed(header, size) if version == 4 and not any(header[10:12]) else header
    )
    packet.buffer = buffer
    run.context.show(run)
    # Test runs give segments a size, and no kind.
    return -ENOTSUPP if packet.gso_size else 0


def _summed(header: bytes, size: int) -> bytes:
    """With the checksum filled in (`ip_fast_csum`, which gives up on a header that is too short)."""
    total = ~fold16(partial(header[:size], 0)) & 0xFFFF
    checksum = total.to_bytes(2, sys.byteorder) if size >= _IPV4 else header[:2]
    return header[:10] + checksum + header[12:]


HELPERS: dict[str, HelperFunction] = {"lwt_push_encap": lwt_push_encap}
