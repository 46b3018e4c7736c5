"""Bloom filter: a set that answers "no" or "perhaps" (kernel/bpf/bloom_filter.c).

Values are pushed and peeked at; nothing is ever taken out. Which values that were not pushed it takes for pushed
depends on a random seed. With BPF_F_ZERO_SEED it is the same everywhere, here too: the hash is the kernel's jhash,
which is Bob Jenkins' lookup3.
"""

from __future__ import annotations

import errno
import struct
import sys
from collections.abc import Iterator

from kbpf.emulator.environment import environment
from kbpf.emulator.maps.base import Map, refused
from kbpf.emulator.memory import M32
from kbpf.errors import ENOTSUPP
from kbpf.uapi import constants as uapi

#: KMALLOC_MAX_SIZE: the most that a value may take.
_MOST_VALUE = 1 << 22
#: Hash functions where map_extra does not say how many.
_HASHES = 5
_START = 0xDEADBEEF
_TRIPLE = struct.Struct("=III")


class BloomFilter(Map):
    """Values without keys; `map_extra` is the number of hash functions, up to 15."""

    type = "bloom_filter"
    creation_flags = (
        uapi.BPF_F_NUMA_NODE
        | uapi.BPF_F_ZERO_SEED
        | uapi.BPF_F_RDONLY
        | uapi.BPF_F_WRONLY
        | uapi.BPF_F_RDONLY_PROG
        | uapi.BPF_F_WRONLY_PROG
    )
    keyless = True

    def check_creation(self) -> None:
        if not self.max_entries or not self.value_size or self.key_size or self.map_extra > 15:
            raise refused(errno.EINVAL)
        super().check_creation()
        if self.value_size > _MOST_VALUE:
            raise refused(errno.E2BIG)

    def allocate(self) -> None:
        self._hashes = self.map_extra or _HASHES
        # About k / ln 2 bits for each value, in the kernel's integer arithmetic.
        bits = self.max_entries * self._hashes // 5 * 7
        self._mask = min((1 << max(bits - 1, 63).bit_length()) - 1, M32)
        self._seed = 0 if self.flags & uapi.BPF_F_ZERO_SEED else environment.random32()
        #: Indices of the bits that are set.
        self._set: set[int] = set()

    def push(self, value: bytes, flags: int) -> None:
        if flags:
            raise refused(errno.EINVAL)
        self._set.update(self._bits(value))

    def contains(self, value: bytes) -> bool:
        """Whether the value was pushed, perhaps."""
        return all(bit in self._set for bit in self._bits(value))

    def peek(self) -> bytes:
        # User space that passes no value asks for zeroes.
        if not self.contains(bytes(self.value_size)):
            raise refused(errno.ENOENT)
        return bytes(self.value_size)

    def pop(self) -> bytes:
        raise refused(ENOTSUPP)

    def remove(self, key: bytes) -> None:
        raise refused(errno.EOPNOTSUPP)

    def following(self, key: bytes | None) -> bytes:
        raise refused(errno.EOPNOTSUPP)

    def _bits(self, value: bytes) -> Iterator[int]:
        for index in range(self._hashes):
            yield jhash(value, self._seed + index) & self._mask


def _rotate(value: int, bits: int) -> int:
    return (value << bits | value >> 32 - bits) & M32


def _mix(a: int, b: int, c: int) -> tuple[int, int, int]:
    for bits in (4, 6, 8, 16, 19, 4):
        # Each round is the one before with the names moved on.
        a = (a - c & M32) ^ _rotate(c, bits)
        c = c + b & M32
        a, b, c = b, c, a
    return a, b, c


def _last(a: int, b: int, c: int) -> int:
    for bits in (14, 11, 25, 16, 4, 14, 24):
        c = (c ^ b) - _rotate(b, bits) & M32
        a, b, c = b, c, a
    return b


def jhash(data: bytes, seed: int) -> int:
    """32 bits of hash; words are in the machine's byte order where they are whole, else little-endian."""
    a = b = c = _START + len(data) + seed & M32
    if len(data) % 4 == 0:
        # jhash2 counts words.
        a = b = c = _START + (len(data) // 4 << 2) + seed & M32
    elif sys.byteorder == "big":
        data = b"".join(data[i : i + 4][::-1] for i in range(0, len(data), 4))
    at = 0
    while len(data) - at > 12:
        x, y, z = _TRIPLE.unpack_from(data, at)
        a, b, c = _mix(a + x & M32, b + y & M32, c + z & M32)
        at += 12
    if at == len(data):
        return c
    x, y, z = _TRIPLE.unpack(data[at:].ljust(12, b"\0"))
    return _last(a + x & M32, b + y & M32, c + z & M32)
