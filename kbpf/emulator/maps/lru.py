"""LRU hash and per-CPU LRU hash: a full map makes room by itself (kernel/bpf/bpf_lru_list.c).

Linux promises only roughly least recently used: it keeps free elements per processor and evicts before the map is
full. Here exactly `max_entries` stay, and the one that goes is the one that no program or update has touched longest.
"""

from __future__ import annotations

from kbpf.emulator.maps.hash import Entry, Hash
from kbpf.emulator.maps.turns import in_turn


class LruHash(Hash):
    """A hash table that evicts. Lookups by user space do not count as use, as in Linux."""

    type = "lru_hash"
    evicts = True

    @in_turn
    def find(self, key: bytes) -> int:
        return super().find(key)

    def used(self, entry: Entry) -> None:
        self._unlink(entry)
        self._serial += 1
        entry.serial = self._serial
        self._append(entry)

    def make_room(self) -> None:
        self.remove(self._ends.next.key)


class PerCpuLruHash(LruHash):
    """An LRU hash whose values have one slot for each possible processor."""

    type = "lru_percpu_hash"
    per_cpu = True
