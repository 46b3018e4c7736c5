"""Hash and per-CPU hash (kernel/bpf/hashtab.c).

Keys are found in a dict; values lie in slots of memory regions. As in the kernel, updating an existing key gives it
another slot, so a pointer that a program holds keeps the old value. Linux promises no order; here it is that of
insertion.
"""

from __future__ import annotations

import errno
import struct

from kbpf.emulator.environment import environment
from kbpf.emulator.maps.array import PER_CPU_LIMIT
from kbpf.emulator.maps.base import Map, refused, round8
from kbpf.emulator.maps.turns import in_turn
from kbpf.emulator.memory import M32, Buffer, Region
from kbpf.errors import ENOTSUPP
from kbpf.uapi import constants as uapi

#: KMALLOC_MAX_SIZE less what the kernel keeps with each element.
_ELEMENT_LIMIT = (1 << 22) - 48
#: The table has a power of two of 16-byte buckets, whose size must fit 32 bits.
_MOST_ENTRIES = 1 << 27
#: Values are allocated in chunks of about this many bytes.
_CHUNK = 1 << 16
_TOKEN = struct.Struct("=Q")


class Entry:
    """One element, in a ring that keeps the order; `serial` grows along it."""

    __slots__ = ("address", "key", "next", "previous", "serial")

    def __init__(self, key: bytes, address: int, serial: int) -> None:
        self.key = key
        self.address = address
        self.serial = serial
        self.previous = self.next = self


class Slots:
    """Places for values of one size, in chunks that are allocated as needed."""

    def __init__(self, owner: Map, size: int, limit: int) -> None:
        self._owner = owner
        self._size = size
        self._per_chunk = max(1, min(limit, _CHUNK // size))
        self._free: list[int] = []
        self._chunks: dict[int, Region] = {}

    def take(self) -> int:
        """The address of a free slot, with what its last user left in it."""
        if not self._free:
            region = self._owner.region(self._size * self._per_chunk)
            self._chunks[region.number] = region
            self._free.extend(region.address + i * self._size for i in reversed(range(self._per_chunk)))
        return self._free.pop()

    def give(self, address: int) -> None:
        self._free.append(address)

    def read(self, address: int, size: int) -> bytes:
        buffer, at = self._at(address)
        return bytes(buffer[at : at + size])

    def write(self, address: int, data: bytes) -> None:
        buffer, at = self._at(address)
        buffer[at : at + len(data)] = data  # type: ignore[index]

    def _at(self, address: int) -> tuple[Buffer, int]:
        return self._chunks[address >> 32].buffer, address & M32


class Hash(Map):
    """A hash table with room for `max_entries`."""

    type = "hash"
    creation_flags = (
        uapi.BPF_F_NO_PREALLOC
        | uapi.BPF_F_NO_COMMON_LRU
        | uapi.BPF_F_NUMA_NODE
        | uapi.BPF_F_RDONLY
        | uapi.BPF_F_WRONLY
        | uapi.BPF_F_RDONLY_PROG
        | uapi.BPF_F_WRONLY_PROG
        | uapi.BPF_F_ZERO_SEED
    )
    batches = frozenset({"lookup", "update", "delete", "take"})
    evicts = False

    def check_creation(self) -> None:
        super().check_creation()
        if not self.evicts and self.flags & uapi.BPF_F_NO_COMMON_LRU:
            raise refused(errno.EINVAL)
        if self.evicts and self.flags & uapi.BPF_F_NO_PREALLOC:
            raise refused(ENOTSUPP)
        if self.flags & uapi.BPF_F_NUMA_NODE and (self.per_cpu or self.flags & uapi.BPF_F_NO_COMMON_LRU):
            raise refused(errno.EINVAL)
        if not (self.max_entries and self.key_size and self.value_size):
            raise refused(errno.EINVAL)
        if self.key_size + self.value_size >= _ELEMENT_LIMIT:
            raise refused(errno.E2BIG)
        if self.per_cpu and round8(self.value_size) > PER_CPU_LIMIT:
            raise refused(errno.E2BIG)
        if self.max_entries > _MOST_ENTRIES:
            raise refused(errno.E2BIG)

    def allocate(self) -> None:
        self._slot = round8(self.value_size)
        self._entries: dict[bytes, Entry] = {}
        self._ends = Entry(b"", 0, 0)
        self._serial = 0
        self._slots = Slots(self, self._slot * (self.cpus if self.per_cpu else 1), self.max_entries + 1)
        # An update takes this slot and leaves its old one here.
        self._spare = 0
        #: Of values with special fields, the keys by address; in Linux a value lies behind its key.
        self._keys: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, key: bytes) -> int:
        entry = self._entries.get(key)
        if entry is None:
            return 0
        self.used(entry)
        return self.place(key)

    def all_keys(self) -> list[bytes]:
        """All keys there are."""
        return list(self._entries)

    def key_at(self, value: int) -> bytes:
        return self._keys.get(value, bytes(self.key_size))

    def place(self, key: bytes) -> int:
        """The address of the value for a program on this processor, without that counting as use; 0 if none."""
        entry = self._entries.get(key)
        if entry is None:
            return 0
        return entry.address + environment.cpu * self._slot if self.per_cpu else entry.address

    @in_turn
    def read(self, key: bytes) -> bytes:
        entry = self._entries.get(key)
        if entry is None:
            raise refused(errno.ENOENT)
        return self._value(entry)

    @in_turn
    def store(self, key: bytes, value: bytes, flags: int) -> None:
        if not self.per_cpu:
            self._put(key, value, flags)
            return
        # A program sets its own processor's value; a new element has zeroes for the others.
        value = self.cleared(value)
        entry = self._check_update(key, flags)
        at = environment.cpu * self._slot
        if entry is None:
            self._add(key, bytes(at) + value + bytes(self._slot * self.cpus - at - len(value)))
        else:
            self._slots.write(entry.address + at, value)
            self.used(entry)

    @in_turn
    def write(self, key: bytes, value: bytes, flags: int) -> None:
        self._put(key, value, flags)

    @in_turn
    def remove(self, key: bytes) -> None:
        entry = self._entries.pop(key, None)
        if entry is None:
            raise refused(errno.ENOENT)
        self._unlink(entry)
        self.free_fields(entry.address)
        self._slots.give(entry.address)

    @in_turn
    def take(self, key: bytes) -> bytes:
        value = self.read(key)
        self.remove(key)
        return value

    @in_turn
    def following(self, key: bytes | None) -> bytes:
        entry = None if key is None else self._entries.get(key)
        after = (entry or self._ends).next
        if after is self._ends:
            raise refused(errno.ENOENT)
        return after.key

    @in_turn
    def chunk(self, token: bytes | None, count: int) -> tuple[list[bytes], list[bytes], bytes | None]:
        start = _TOKEN.unpack(token)[0] if token is not None else 0
        entry = self._ends.next
        if start:
            entry = next((e for e in self._entries.values() if e.serial >= start), self._ends)
        keys: list[bytes] = []
        values: list[bytes] = []
        while entry is not self._ends and len(keys) < count:
            keys.append(entry.key)
            values.append(self._value(entry))
            entry = entry.next
        return keys, values, None if entry is self._ends else _TOKEN.pack(entry.serial)

    def _value(self, entry: Entry) -> bytes:
        """As user space reads it."""
        return self.cleared(self._slots.read(entry.address, self.user_value_size))

    # What an LRU map does otherwise.

    def used(self, entry: Entry) -> None:
        """A program has looked the element up."""

    def make_room(self) -> None:
        """The map is full, and a new element is to be added."""
        raise refused(errno.E2BIG)

    def _check_update(self, key: bytes, flags: int) -> Entry | None:
        condition = flags & ~uapi.BPF_F_LOCK
        if condition > uapi.BPF_EXIST or (flags != condition and not self.has_lock):
            raise refused(errno.EINVAL)
        entry = self._entries.get(key)
        if entry is not None and condition == uapi.BPF_NOEXIST:
            raise refused(errno.EEXIST)
        if entry is None and condition == uapi.BPF_EXIST:
            raise refused(errno.ENOENT)
        return entry

    def _put(self, key: bytes, value: bytes, flags: int) -> None:
        entry = self._check_update(key, flags)
        value = self.cleared(value)
        if entry is None:
            self._add(key, value)
        elif self.per_cpu:
            # In place: programs that hold a pointer see it.
            self._slots.write(entry.address, value)
        elif flags & uapi.BPF_F_LOCK:
            # So here, and what is the kernel's own stays.
            value = self._with_fields(value, self._slots.read(entry.address, self.value_size))
            self._slots.write(entry.address, value)
        else:
            address = self._spare or self._slots.take()
            self._place_value(address, key, value)
            self._spare, entry.address = entry.address, address
            self.free_fields(self._spare)
            self.used(entry)

    def _add(self, key: bytes, value: bytes) -> None:
        if len(self._entries) >= self.max_entries:
            self.make_room()
        address = self._slots.take()
        self._place_value(address, key, value)
        self._serial += 1
        entry = self._entries[key] = Entry(key, address, self._serial)
        self._append(entry)

    def _with_fields(self, value: bytes, of: bytes) -> bytes:
        """The value, with the special fields of another."""
        for _, offset, size in self.special:
            value = value[:offset] + of[offset : offset + size] + value[offset + size :]
        return value

    def _place_value(self, address: int, key: bytes, value: bytes) -> None:
        self._slots.write(address, value)
        if self.special:
            self._keys[address] = key

    def _append(self, entry: Entry) -> None:
        ends = self._ends
        entry.previous, entry.next = ends.previous, ends
        ends.previous.next = ends.previous = entry

    @staticmethod
    def _unlink(entry: Entry) -> None:
        entry.previous.next, entry.next.previous = entry.next, entry.previous


class PerCpuHash(Hash):
    """A hash table whose values have one slot for each possible processor."""

    type = "percpu_hash"
    per_cpu = True
