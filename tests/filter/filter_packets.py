"""Packets for the tests, made of headers."""

from __future__ import annotations

import random
import struct

A, B, C = "10.0.0.1", "10.0.0.2", "192.168.1.5"


def ipv4(
    payload: bytes, protocol: int, source: str = A, destination: str = B, options: int = 0, fragment: int = 0
) -> bytes:
    header = struct.pack(
        "!BBHHHBBH4s4s",
        0x45 + options,
        0,
        20 + 4 * options + len(payload),
        0,
        fragment,
        64,
        protocol,
        0,
        _address(source),
        _address(destination),
    )
    return header + b"\1" * (4 * options) + payload


def _address(text: str) -> bytes:
    return bytes(int(part) for part in text.split("."))


def ipv6(payload: bytes, next_header: int, source: int = 1, destination: int = 2) -> bytes:
    addresses = (0xFE80 << 112 | source).to_bytes(16, "big") + (0xFE80 << 112 | destination).to_bytes(16, "big")
    return struct.pack("!IHBB", 0x60000000, len(payload), next_header, 64) + addresses + payload


def udp(source: int, destination: int, data: bytes = b"data") -> bytes:
    return struct.pack("!HHHH", source, destination, 8 + len(data), 0) + data


def tcp(source: int, destination: int, flags: int = 0x02) -> bytes:
    return struct.pack("!HHIIBBHHH", source, destination, 1, 2, 0x50, flags, 100, 0, 0) + b"data"


def arp(source: str = A, destination: str = B) -> bytes:
    return struct.pack(
        "!HHBBH6s4s6s4s", 1, 0x800, 6, 4, 1, b"\2" * 6, _address(source), b"\0" * 6, _address(destination)
    )


def network_packets() -> list[tuple[int, bytes]]:
    """(EtherType, network packet) of many kinds."""
    packets: list[tuple[int, bytes]] = []
    for source, destination in ((A, B), (B, C), (C, A)):
        for ports in ((1024, 80), (53, 53), (7070, 443), (22, 7070)):
            for fragment, options in ((0, 0), (0, 3), (0x2000, 0), (0x0010, 0)):
                packets.append((0x800, ipv4(tcp(*ports), 6, source, destination, options, fragment)))
                packets.append((0x800, ipv4(udp(*ports), 17, source, destination, options, fragment)))
        packets.append((0x800, ipv4(struct.pack("!HHIII", 80, 53, 1, 2, 3), 132, source, destination)))
        packets.append((0x800, ipv4(b"\x08\0\0\0abcd", 1, source, destination)))
        packets.append((0x806, arp(source, destination)))
        packets.append((0x8035, arp(source, destination)))
    for ports in ((1024, 80), (53, 53), (7070, 443)):
        packets.append((0x86DD, ipv6(tcp(*ports), 6)))
        packets.append((0x86DD, ipv6(udp(*ports), 17, 2, 1)))
        packets.append((0x86DD, ipv6(b"\x06\0\0\0\0\0\0\0" + tcp(*ports), 44)))
        packets.append((0x86DD, ipv6(b"\x11\0\0\0\0\0\0\0" + b"\x3a\1" + b"\0" * 14, 0)))
    packets.append((0x86DD, ipv6(b"\x80\0\0\0abcd", 58)))
    return packets


def frames(dlt: int, seed: int = 1) -> list[bytes]:
    """Packets behind the link header of `dlt`, whole, cut at random, and noise."""
    rng = random.Random(seed)
    whole = []
    for kind, packet in network_packets():
        if dlt == 1:
            mac = bytes(rng.choice((0, 1, 2, 0xFF)) for _ in range(12))
            whole.append(mac + struct.pack("!H", kind) + packet)
            if rng.random() < 0.2:
                whole.append(mac + struct.pack("!HHH", 0x8100, rng.choice((5, 0x2005, 7)), kind) + packet)
        elif dlt == 12:
            whole.append(packet)
        elif dlt == 0:
            whole.append(struct.pack("<I", {0x800: 2, 0x86DD: 10}.get(kind, 1)) + packet)
        elif dlt == 113:
            whole.append(struct.pack("!HHH8sH", rng.choice((0, 4)), 1, 6, b"\2" * 8, kind) + packet)
        else:
            whole.append(struct.pack("!HHIHBB8s", kind, 0, 3, 1, rng.choice((0, 4)), 6, b"\2" * 8) + packet)
    cut = [frame[: rng.randrange(len(frame))] for frame in whole for _ in range(2)]
    noise = [rng.randbytes(rng.randrange(100)) for _ in range(20)]
    llc = [
        b"\1" * 12 + struct.pack("!H", 60) + rng.choice((b"\xfe\xfe\3", b"\x42\x42\3", b"\xe0\xe0\3")) + b"\x83" * 40
        for _ in range(8)
    ]
    return whole + cut + noise + (llc if dlt == 1 else [])
