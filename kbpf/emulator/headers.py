"""IP, UDP and TCP headers: made, with their checksums, and read (RFC 791, 8200, 768, 9293, 1071).

Addresses are packed: 4 bytes for IPv4, 16 for IPv6.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

IPPROTO_ICMP, IPPROTO_TCP, IPPROTO_UDP, IPPROTO_ICMPV6 = 1, 6, 17, 58
#: IPv6 headers of options, with their length in units of 8 bytes after the first 8.
_HOP_BY_HOP, _ROUTING, _DESTINATION = 0, 43, 60
#: Where the checksum lies in a transport header.
CHECKSUM_AT = {IPPROTO_UDP: 6, IPPROTO_TCP: 16, IPPROTO_ICMP: 2, IPPROTO_ICMPV6: 2}

_IPV4 = struct.Struct("!BBHHHBBH4s4s")
_IPV6 = struct.Struct("!IHBB16s16s")
_UDP = struct.Struct("!HHHH")
_TCP = struct.Struct("!HHIIBBHHH")
UDP_SIZE, TCP_SIZE, IPV4_SIZE, IPV6_SIZE = _UDP.size, _TCP.size, _IPV4.size, _IPV6.size
DONT_FRAGMENT, MORE_FRAGMENTS = 0x4000, 0x2000

FIN, SYN, RST, PSH, ACK = 0x01, 0x02, 0x04, 0x08, 0x10


def ones_sum(data: bytes, seed: int = 0) -> int:
    """The Internet checksum before it is complemented: a one's complement sum of 16-bit words."""
    total: int = seed + sum(struct.unpack(f"!{len(data) // 2}H", data[: len(data) & ~1]))
    if len(data) & 1:
        total += data[-1] << 8
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def pseudo_sum(source: bytes, target: bytes, protocol: int, length: int) -> int:
    """The sum of the pseudo header, which starts a transport checksum."""
    return ones_sum(source + target + struct.pack("!II", length, protocol))


class IpHeader(NamedTuple):
    """What an IP header says. `start` is where it ends and its payload starts, `end` where that ends."""

    source: bytes
    target: bytes
    protocol: int
    start: int
    end: int
    fragmented: bool = False

    @property
    def version(self) -> int:
        return 4 if len(self.source) == 4 else 6


def read_ipv4(data: bytes) -> IpHeader | None:
    """The header that `data` starts with; None where Linux takes it for none (`ip_rcv_core`)."""
    if len(data) < IPV4_SIZE or data[0] >> 4 != 4:
        return None
    size = (data[0] & 15) * 4
    if size < IPV4_SIZE or len(data) < size or ones_sum(data[:size]) != 0xFFFF:
        return None
    _, _, length, _, fragment, _, protocol, _, source, target = _IPV4.unpack_from(data)
    if length < size or length > len(data):
        return None
    return IpHeader(source, target, protocol, size, length, bool(fragment & ~DONT_FRAGMENT))


def read_ipv6(data: bytes) -> IpHeader | None:
    """The header that `data` starts with, and the headers of options behind it (`ip6_rcv_core`)."""
    if len(data) < IPV6_SIZE or data[0] >> 4 != 6:
        return None
    _, length, following, _, source, target = _IPV6.unpack_from(data)
    at, end = IPV6_SIZE, IPV6_SIZE + length
    if end > len(data):
        return None
    while following in (_HOP_BY_HOP, _ROUTING, _DESTINATION):
        if at + 8 > end:
            return None
        following, at = data[at], at + (data[at + 1] + 1) * 8
    return IpHeader(source, target, following, at, end) if at <= end else None


def ipv4(
    source: bytes, target: bytes, protocol: int, length: int, *, ttl: int = 64, tos: int = 0, ident: int = 0,
    fragment: int = DONT_FRAGMENT,
) -> bytes:  # fmt: skip
    """A header for `length` bytes of payload."""
    fields = (0x45, tos, IPV4_SIZE + length, ident, fragment, ttl, protocol)
    check = ones_sum(_IPV4.pack(*fields, 0, source, target)) ^ 0xFFFF
    return _IPV4.pack(*fields, check, source, target)


def ipv6(
    source: bytes, target: bytes, protocol: int, length: int, *, hops: int = 64, traffic_class: int = 0, label: int = 0
) -> bytes:
    """A header for `length` bytes of payload."""
    return _IPV6.pack(6 << 28 | traffic_class << 20 | label, length, protocol, hops, source, target)


def udp(source_port: int, target_port: int, length: int) -> bytes:
    """A header for `length` bytes of payload, without its checksum."""
    return _UDP.pack(source_port, target_port, UDP_SIZE + length, 0)


class UdpHeader(NamedTuple):
    source_port: int
    target_port: int
    length: int
    checksum: int


def read_udp(data: bytes) -> UdpHeader | None:
    return UdpHeader(*_UDP.unpack_from(data)) if len(data) >= UDP_SIZE else None


class TcpOptions(NamedTuple):
    """The options that a segment carries; None, or False, for those it does not."""

    mss: int | None = None
    window_scale: int | None = None
    sack_permitted: bool = False
    #: TSval and TSecr.
    timestamps: tuple[int, int] | None = None


class TcpHeader(NamedTuple):
    """A TCP header. `size` is its own, with options."""

    source_port: int
    target_port: int
    seq: int
    ack: int
    flags: int
    window: int
    size: int
    options: TcpOptions


def tcp(source_port: int, target_port: int, seq: int, ack: int, flags: int, window: int, options: TcpOptions) -> bytes:
    """A header without its checksum, its options in Linux's order (`tcp_options_write`)."""
    written = b""
    if options.mss is not None:
        written += struct.pack("!BBH", 2, 4, options.mss)
    if options.timestamps is not None:
        written += (b"\x04\x02" if options.sack_permitted else b"\x01\x01") + struct.pack(
            "!BBII", 8, 10, *options.timestamps
        )
    elif options.sack_permitted:
        written += b"\x01\x01\x04\x02"
    if options.window_scale is not None:
        written += struct.pack("!BBBB", 1, 3, 3, options.window_scale)
    size = TCP_SIZE + len(written)
    return _TCP.pack(source_port, target_port, seq, ack, size // 4 << 4, flags, window, 0, 0) + written


def read_tcp(data: bytes) -> TcpHeader | None:
    """The header that `data` starts with; None where it is none."""
    if len(data) < TCP_SIZE:
        return None
    source_port, target_port, seq, ack, offset, flags, window, _, _ = _TCP.unpack_from(data)
    size = (offset >> 4) * 4
    if size < TCP_SIZE or len(data) < size:
        return None
    options = _tcp_options(data[TCP_SIZE:size])
    return TcpHeader(source_port, target_port, seq, ack, flags, window, size, options)


def _tcp_options(data: bytes) -> TcpOptions:
    found = TcpOptions()
    at = 0
    while at < len(data) and data[at]:
        if data[at] == 1:
            at += 1
            continue
        size = data[at + 1] if at + 1 < len(data) else 0
        body = data[at + 2 : at + size]
        if size < 2 or len(body) != size - 2:
            break
        if data[at] == 2 and size == 4:
            found = found._replace(mss=int.from_bytes(body, "big"))
        elif data[at] == 3 and size == 3:
            found = found._replace(window_scale=min(body[0], 14))
        elif data[at] == 4 and size == 2:
            found = found._replace(sack_permitted=True)
        elif data[at] == 8 and size == 10:
            found = found._replace(timestamps=struct.unpack("!II", body))
        at += size
    return found


def with_checksum(segment: bytes, protocol: int, total: int) -> bytes:
    """A transport segment with a number in its checksum field."""
    at = CHECKSUM_AT[protocol]
    return segment[:at] + total.to_bytes(2, "big") + segment[at + 2 :]
