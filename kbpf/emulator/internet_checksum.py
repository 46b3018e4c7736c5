"""The Internet's checksum as the kernel sums it up (include/net/checksum.h).

Sums are in the machine's byte order, and one's complement: a carry comes back in at the low end.
"""

from __future__ import annotations

import struct

from kbpf.emulator.memory import M32


def add(a: int, b: int) -> int:
    """`csum_add`."""
    total = a + b
    return (total & M32) + (total >> 32)


def subtract(a: int, b: int) -> int:
    """`csum_sub`."""
    return add(a, ~b & M32)


def shift(total: int, at: int) -> int:
    """What the sum of some bytes counts as where they begin at an offset (`csum_shift`)."""
    return (total >> 8 | total << 24 & M32) if at & 1 else total


def fold16(total: int) -> int:
    """`csum_from32to16`."""
    total = (total & 0xFFFF) + (total >> 16)
    return (total & 0xFFFF) + (total >> 16)


def partial(data: bytes, seed: int) -> int:
    """`csum_partial`: of words, the last one filled up with zeroes."""
    data = data.ljust(len(data) + 3 & ~3, b"\0")
    total: int = sum(struct.unpack(f"={len(data) // 4}I", data)) + seed
    while total >> 32:
        total = (total & M32) + (total >> 32)
    return total
