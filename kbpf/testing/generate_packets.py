"""Random packets: Ethernet frames with believable headers and junk in them, and plain bytes.

Everything comes from the generator that is passed in, so that a seed names a packet.
"""

from __future__ import annotations

import ipaddress
import struct
from random import Random

#: The link-layer address that frames "to us" carry; also loopback's, which BPF_PROG_TEST_RUN compares with.
HOST_MAC = bytes(6)

ETH_IPV4, ETH_ARP, ETH_8021Q, ETH_IPV6, ETH_8021AD = 0x0800, 0x0806, 0x8100, 0x86DD, 0x88A8

#: RARP, PPPoE, MPLS, B.A.T.M.A.N., TIPC, PTP, PRP, CFM, FCoE, HSR.
_TYPES = (0x8035, 0x8864, 0x8847, 0x4305, 0x88CA, 0x88F7, 0x88FB, 0x8902, 0x8906, 0x892F)
_PORTS = (22, 53, 80, 443, 7070)


def payload(rng: Random, most: int = 120) -> bytes:
    """Plain bytes: often none or few, sometimes all alike, sometimes netlink attributes."""
    size = rng.choice(
        (0, 1, 2, 3, rng.randrange(16), rng.randrange(64), rng.randrange(most + 1), rng.randrange(most + 1))
    )
    kind = rng.random()
    if kind < 0.1:
        return bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFF))]) * size
    if kind < 0.2:
        return netlink_attributes(rng, most)
    return rng.randbytes(size)


def netlink_attributes(rng: Random, most: int = 120) -> bytes:
    """A few netlink attributes in a row, some nested, now and then with a wrong length."""
    out = b""
    while len(out) < most - 24 and rng.random() < 0.8:
        inside = netlink_attributes(rng, 40) if most > 40 and rng.random() < 0.3 else rng.randbytes(rng.randrange(12))
        length = 4 + len(inside) if rng.random() < 0.9 else rng.randrange(64)
        out += struct.pack("=HH", length, rng.randrange(8)) + inside + bytes(-len(inside) % 4)
    return out


def frame(rng: Random, *, host_mac: bytes = HOST_MAC, vlan: bool = False) -> bytes:
    """An Ethernet frame of 14 bytes or more. IPv4 and IPv6 frames hold their fixed header at least."""
    destination = rng.choice((host_mac, host_mac, b"\xff" * 6, b"\x01\x00\x5e\x00\x00\x01", b"\x02" + rng.randbytes(5)))
    tags = b""
    if vlan and rng.random() < 0.4:
        for _ in range(rng.choice((1, 1, 2))):
            tags += struct.pack(
                ">HH", rng.choice((ETH_8021Q, ETH_8021Q, ETH_8021AD)), rng.choice((0, rng.getrandbits(16)))
            )
    kind = rng.random()
    if kind < 0.45:
        ether_type, rest = ETH_IPV4, ipv4(rng)
    elif kind < 0.7:
        ether_type, rest = ETH_IPV6, ipv6(rng)
    elif kind < 0.8:
        ether_type, rest = ETH_ARP, struct.pack(">HHBBH", 1, ETH_IPV4, 6, 4, rng.choice((1, 2))) + rng.randbytes(20)
    else:
        # A length, as IEEE 802.3 has it, one of the types that Linux looks into, or one that nobody knows.
        ether_type = rng.choice((0, rng.randrange(1536), *_TYPES, rng.randrange(0x9100, 0x10000)))
        rest = rng.choice((b"\xff\xff", b"\x11\0\0\0\0\0\0\x21", b"\x40\x0f", b"")) + payload(rng)
        if tags:
            rest += bytes(2)
    return destination + b"\x02" + rng.randbytes(5) + tags + struct.pack(">H", ether_type) + rest


def ipv4(rng: Random) -> bytes:
    protocol = rng.choice((1, 6, 6, 17, 17, 47, 4, 41, rng.randrange(256)))
    options = rng.choice((0, 0, 0, 1, 10)) * 4
    body = transport(rng, protocol)
    fragment = rng.choice((0, 0, 0, 0x4000, 0x2000, rng.getrandbits(16)))
    header = struct.pack(
        ">BBHHHBBH", 0x40 | 5 + options // 4, rng.getrandbits(8), 20 + options + len(body), rng.getrandbits(16),
        fragment, 64, protocol, rng.getrandbits(16),
    )  # fmt: skip
    return header + address4(rng) + address4(rng) + rng.randbytes(options) + body


def ipv6(rng: Random) -> bytes:
    protocol = rng.choice((6, 17, 58, 0, 44, 43, 47, rng.randrange(256)))
    body = transport(rng, protocol)
    head = struct.pack(">IHBB", 6 << 28 | rng.getrandbits(28), len(body), protocol, 64)
    return head + rng.randbytes(16) + rng.randbytes(16) + body


def address4(rng: Random) -> bytes:
    return rng.choice((b"\x0a\x00\x00", b"\xc0\x00\x02")) + bytes([rng.randrange(4)])


def transport(rng: Random, protocol: int) -> bytes:
    """A TCP or UDP header with some data behind it, or junk; sometimes cut."""
    ports = struct.pack(">HH", *(rng.choice((*_PORTS, rng.getrandbits(16))) for _ in range(2)))
    data = payload(rng, 60)
    if protocol == 6:
        words = rng.choice((5, 5, 8))
        body = ports + rng.randbytes(8) + bytes([words << 4, rng.getrandbits(8)]) + rng.randbytes(6)
        body += rng.randbytes(4 * words - 20) + data
    elif protocol == 47:
        # GRE: flags and version, then what is inside.
        flags = rng.choice((0, 0, 0x8000, 0x2000, 0x3000, 0x2001, 0x3081, rng.getrandbits(16)))
        inside = rng.choice((ETH_IPV4, 0x6558, 0x880B, rng.getrandbits(16)))
        body = struct.pack(">HH", flags, inside) + data
    elif protocol in (4, 41):
        body = ipv4(rng) if protocol == 4 else ipv6(rng)
    elif protocol == 17:
        body = ports + struct.pack(">HH", 8 + len(data), 0) + data
    else:
        body = data
    return body if rng.random() < 0.9 else body[: rng.randrange(len(body) + 1)]


def udp_frame(rng: Random, *, mac: bytes, address: str, port: int, size: int | None = None) -> bytes:
    """A frame with a whole, right UDP datagram over IPv4, from a neighbour of `address` to it."""
    data = payload(rng) if size is None else rng.randbytes(size)
    datagram = struct.pack(">HHHH", rng.randrange(1, 0x10000), port, 8 + len(data), 0) + data
    header = struct.pack(
        ">BBHHHBBH", 0x45, rng.getrandbits(8) & 0xFC, 20 + len(datagram), rng.getrandbits(16), 0, 64, 17, 0
    )
    target = ipaddress.IPv4Address(address)
    header += (target + 98).packed + target.packed
    total = sum(struct.unpack(">10H", header))
    total = (total & 0xFFFF) + (total >> 16)
    checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    header = header[:10] + struct.pack(">H", checksum) + header[12:]
    return mac + b"\x02" + rng.randbytes(5) + struct.pack(">H", ETH_IPV4) + header + datagram
