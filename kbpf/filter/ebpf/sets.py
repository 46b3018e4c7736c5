"""Long lists of addresses as maps: a lookup in a hash or an LPM trie in place of a tree of tests.

Addresses are hashed; where there is a network among them, an LPM trie holds all (Linux 4.11). Keys are in network
order as in the packet, in a trie behind the length of the prefix. All of an address is loaded before it is looked up:
a packet that ends within an IPv6 address is rejected there, though its first word may be in none of those listed.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from kbpf.filter.values import M32, Condition, Pool, Test, Value
from kbpf.specs import MapSpec
from kbpf.uapi.constants import BPF_F_NO_PREALLOC

#: Longer lists than this go into maps.
MOST_TESTS = 64


class Membership(NamedTuple):
    """Adjacent words of four bytes, and the map that they are looked up in."""

    words: tuple[Value, ...]
    #: Index of the map among the program's.
    map: int
    #: The map is a trie, whose keys start with the length of a prefix.
    trie: bool


class MapPool(Pool):
    """A pool for programs that have maps."""

    def __init__(self, maps: Sequence[MapSpec] = ()) -> None:
        super().__init__()
        #: The program's maps: those given, and the sets.
        self.maps = list(maps)
        #: By the value that stands for the set in a test.
        self.memberships: dict[Value, Membership] = {}
        self._indexes: dict[tuple[int, frozenset[tuple[int, int]]], int] = {}
        self._tests_of: dict[tuple[tuple[Value, ...], int], Test] = {}

    def lookup(self, words: tuple[Value, ...], members: Sequence[tuple[int, int]]) -> Condition | None:
        if len(members) <= MOST_TESTS:
            return None
        bits = 32 * len(words)
        key = (bits, frozenset(members))
        index = self._indexes.get(key)
        if index is None:
            spec = _map(f"set{len(self.maps)}", bits, key[1])
            if spec is None:
                return None
            index = self._indexes[key] = len(self.maps)
            self.maps.append(spec)
        test = self._tests_of.get((words, index))
        if test is None:
            # A value of which nothing is known stands for the set.
            marker = Value("set", k=index)
            self.memberships[marker] = Membership(words, index, self.maps[index].type == "lpm_trie")
            test = self._tests_of[(words, index)] = Test("eq", words[0], M32, 0, marker)
        return test


def _map(name: str, bits: int, members: frozenset[tuple[int, int]]) -> MapSpec | None:
    """A map of (address, mask); None where a mask is no prefix's."""
    ones = (1 << bits) - 1
    lengths = {mask: mask.bit_count() for _, mask in members}
    if any(mask != ones ^ ones >> length for mask, length in lengths.items()):
        return None
    trie = any(length != bits for length in lengths.values())
    size = bits // 8
    headers = {mask: struct.pack("=I", length) if trie else b"" for mask, length in lengths.items()}
    keys = sorted(headers[mask] + address.to_bytes(size, "big") for address, mask in members)
    return MapSpec(
        type="lpm_trie" if trie else "hash",
        key_size=len(keys[0]),
        value_size=1,
        max_entries=len(keys),
        flags=BPF_F_NO_PREALLOC if trie else 0,
        name=name,
        contents=tuple((key, b"\1") for key in keys),
    )
