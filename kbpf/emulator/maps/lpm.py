"""LPM trie: keys are prefixes, a lookup finds the longest that matches (kernel/bpf/lpm_trie.c).

A key is a u32 prefix length in host order and up to 256 bytes of data. Iteration is in post-order: longer prefixes
before those that contain them, the 0 branch first.
"""

from __future__ import annotations

import errno
import struct

from kbpf.emulator.maps.base import Map, refused, round8
from kbpf.emulator.maps.hash import Slots
from kbpf.emulator.maps.turns import in_turn
from kbpf.uapi import constants as uapi

_LENGTH = struct.Struct("=I")
_LEAST_KEY, _MOST_KEY = 5, 260
#: KMALLOC_MAX_SIZE less a node of the trie.
_MOST_VALUE = (1 << 22) - 256 - 40

#: A prefix: its length and its bits, left-aligned in the key's data.
_Prefix = tuple[int, bytes]


class LpmTrie(Map):
    """Prefixes in a dict; a lookup tries each length that there is, from the longest down."""

    type = "lpm_trie"
    creation_flags = (
        uapi.BPF_F_NO_PREALLOC
        | uapi.BPF_F_NUMA_NODE
        | uapi.BPF_F_RDONLY
        | uapi.BPF_F_WRONLY
        | uapi.BPF_F_RDONLY_PROG
        | uapi.BPF_F_WRONLY_PROG
    )
    batches = frozenset({"lookup", "update", "delete"})

    def check_creation(self) -> None:
        if not self.max_entries or not self.flags & uapi.BPF_F_NO_PREALLOC:
            raise refused(errno.EINVAL)
        super().check_creation()
        if not _LEAST_KEY <= self.key_size <= _MOST_KEY or not 1 <= self.value_size <= _MOST_VALUE:
            raise refused(errno.EINVAL)

    def allocate(self) -> None:
        self._bits = (self.key_size - 4) * 8
        #: The value's address, and the key as it was given: bits after the prefix do not count, but are kept.
        self._entries: dict[_Prefix, tuple[int, bytes]] = {}
        self._lengths: dict[int, int] = {}
        self._slots = Slots(self, round8(self.value_size), self.max_entries + 1)
        self._order: list[_Prefix] | None = None

    def find(self, key: bytes) -> int:
        length, data = self._split(key)
        if length > self._bits:
            return 0
        for candidate in sorted(self._lengths, reverse=True):
            if candidate <= length:
                found = self._entries.get((candidate, self._cut(data, candidate)))
                if found is not None:
                    return found[0]
        return 0

    @in_turn
    def read(self, key: bytes) -> bytes:
        address = self.find(key)
        if not address:
            raise refused(errno.ENOENT)
        return self._slots.read(address, self.value_size)

    @in_turn
    def store(self, key: bytes, value: bytes, flags: int) -> None:
        if flags > uapi.BPF_EXIST:
            raise refused(errno.EINVAL)
        prefix = self._prefix(key)
        old = self._entries.get(prefix)
        if old is None:
            if flags == uapi.BPF_EXIST:
                raise refused(errno.ENOENT)
            if len(self._entries) >= self.max_entries:
                raise refused(errno.ENOSPC)
            self._lengths[prefix[0]] = self._lengths.get(prefix[0], 0) + 1
            self._order = None
        elif flags == uapi.BPF_NOEXIST:
            raise refused(errno.EEXIST)
        # As with hashes, an update takes a new slot.
        address = self._slots.take()
        self._slots.write(address, value)
        self._entries[prefix] = address, key
        if old is not None:
            self._slots.give(old[0])

    @in_turn
    def remove(self, key: bytes) -> None:
        prefix = self._prefix(key)
        entry = self._entries.pop(prefix, None)
        if entry is None:
            raise refused(errno.ENOENT)
        self._slots.give(entry[0])
        self._order = None
        self._lengths[prefix[0]] -= 1
        if not self._lengths[prefix[0]]:
            del self._lengths[prefix[0]]

    @in_turn
    def following(self, key: bytes | None) -> bytes:
        order = self._post_order()
        if not order:
            raise refused(errno.ENOENT)
        at = 0
        if key is not None:
            length, data = self._split(key)
            prefix = (length, self._cut(data, length)) if length <= self._bits else None
            if prefix in self._entries:
                at = order.index(prefix) + 1
        if at == len(order):
            raise refused(errno.ENOENT)
        return self._entries[order[at]][1]

    @in_turn
    def chunk(self, token: bytes | None, count: int) -> tuple[list[bytes], list[bytes], bytes | None]:
        keys: list[bytes] = []
        key = token
        while len(keys) < count:
            try:
                key = self.following(key)
            except OSError:
                return keys, [self.read(key) for key in keys], None
            keys.append(key)
        return keys, [self.read(key) for key in keys], key

    @staticmethod
    def _split(key: bytes) -> _Prefix:
        return _LENGTH.unpack_from(key)[0], key[4:]

    def _cut(self, data: bytes, length: int) -> bytes:
        """The data with all bits after the prefix cleared."""
        kept = int.from_bytes(data, "big") >> self._bits - length << self._bits - length
        return kept.to_bytes(len(data), "big")

    def _prefix(self, key: bytes) -> _Prefix:
        length, data = self._split(key)
        if length > self._bits:
            raise refused(errno.EINVAL)
        return length, self._cut(data, length)

    def _post_order(self) -> list[_Prefix]:
        if self._order is None:
            # A prefix's range ends with all ones after it: those with the same end nest, the longest first.
            def last(prefix: _Prefix) -> tuple[int, int]:
                length, data = prefix
                return int.from_bytes(data, "big") | (1 << self._bits - length) - 1, -length

            self._order = sorted(self._entries, key=last)
        return self._order
