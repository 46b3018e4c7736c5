"""Array and per-CPU array: a fixed number of values, indexed by a u32 (kernel/bpf/arraymap.c)."""

from __future__ import annotations

import errno
import sys
import weakref
from mmap import PAGESIZE
from typing import Any

from kbpf.emulator.environment import environment
from kbpf.emulator.maps.base import Map, refused, round8
from kbpf.uapi import constants as uapi

_FLAGS = uapi.BPF_F_NUMA_NODE | uapi.BPF_F_RDONLY | uapi.BPF_F_WRONLY | uapi.BPF_F_RDONLY_PROG | uapi.BPF_F_WRONLY_PROG
#: The most that a per-CPU value may take (PCPU_MIN_UNIT_SIZE).
PER_CPU_LIMIT = 32768


class Array(Map):
    """All elements exist from the start, zeroed; none can be deleted."""

    type = "array"
    creation_flags = _FLAGS | uapi.BPF_F_MMAPABLE | uapi.BPF_F_INNER_MAP
    batches = frozenset({"lookup", "update"})
    mappable = True

    def check_creation(self) -> None:
        if self.key_size != 4 or not self.value_size or not self.max_entries:
            raise refused(errno.EINVAL)
        super().check_creation()
        if self.value_size > 0x7FFFFFFF:
            raise refused(errno.E2BIG)

    def allocate(self) -> None:
        self._slot = round8(self.value_size)
        self._stride = self._slot * (self.cpus if self.per_cpu else 1)
        size = self._stride * self.max_entries
        if self.flags & uapi.BPF_F_MMAPABLE:
            size += -size % PAGESIZE
        self.values = self.region(size)
        #: What user space has mapped for writing.
        self._mapped: list[weakref.ref[Any]] = []

    def find(self, key: bytes) -> int:
        index = int.from_bytes(key, sys.byteorder)
        return self.values.address + index * self._stride if index < self.max_entries else 0

    def all_keys(self) -> list[bytes]:
        """All keys, in order."""
        return [index.to_bytes(4, sys.byteorder) for index in range(self.max_entries)]

    def place(self, key: bytes) -> int:
        """The address of the value for a program on this processor, without that counting as use; 0 if none."""
        return self.find(key)

    def key_at(self, value: int) -> bytes:
        return ((value - self.values.address) // self._stride).to_bytes(4, sys.byteorder)

    def value_address(self, offset: int) -> int:
        """The address of a byte of the only value, for BPF_PSEUDO_MAP_VALUE."""
        return self.values.address + offset

    def store(self, key: bytes, value: bytes, flags: int) -> None:
        at = self._place(key, flags)
        self.values.buffer[at : at + self.value_size] = self.cleared(value)  # type: ignore[index]
        self.free_fields(self.values.address + at)

    def remove(self, key: bytes) -> None:
        raise refused(errno.EINVAL)

    def read(self, key: bytes) -> bytes:
        index = int.from_bytes(key, sys.byteorder)
        if index >= self.max_entries:
            raise refused(errno.ENOENT)
        at = index * self._stride
        return self.cleared(bytes(self.values.buffer[at : at + self.user_value_size]))

    def following(self, key: bytes | None) -> bytes:
        index = -1 if key is None else int.from_bytes(key, sys.byteorder)
        if index >= self.max_entries:
            index = -1
        if index == self.max_entries - 1:
            raise refused(errno.ENOENT)
        return (index + 1).to_bytes(4, sys.byteorder)

    def memory(self, offset: int, size: int, writable: bool) -> memoryview:
        if not self.flags & uapi.BPF_F_MMAPABLE or offset % PAGESIZE or size <= 0:
            raise refused(errno.EINVAL)
        if offset + size > len(self.values.buffer):
            raise refused(errno.EINVAL)
        if not writable:
            return memoryview(self.values.buffer)[offset : offset + size].toreadonly()
        import ctypes

        # What every view of the mapping keeps, also one that is cut or cast from another.
        mapping = (ctypes.c_ubyte * size).from_buffer(self.values.buffer, offset)
        self._mapped = [*(mapped for mapped in self._mapped if mapped() is not None), weakref.ref(mapping)]
        return memoryview(mapping).cast("B")

    def is_mapped(self) -> bool:
        return any(mapped() is not None for mapped in self._mapped)

    def chunk(self, token: bytes | None, count: int) -> tuple[list[bytes], list[bytes], bytes | None]:
        start = 0 if token is None else (int.from_bytes(token, sys.byteorder) + 1) & 0xFFFFFFFF
        if start > self.max_entries:
            start = 0
        end = min(start + count, self.max_entries)
        keys = [index.to_bytes(4, sys.byteorder) for index in range(start, end)]
        values = [self.read(key) for key in keys]
        # As in Linux, a chunk that ends with the map does not say so if it is full.
        return keys, values, (keys[-1] if keys else token) if len(keys) == count else None

    def _place(self, key: bytes, flags: int) -> int:
        """Where the element lies that an update may change."""
        if flags & ~uapi.BPF_F_LOCK > uapi.BPF_EXIST:
            raise refused(errno.EINVAL)
        index = int.from_bytes(key, sys.byteorder)
        if index >= self.max_entries:
            raise refused(errno.E2BIG)
        if flags & uapi.BPF_NOEXIST:
            raise refused(errno.EEXIST)
        if flags & uapi.BPF_F_LOCK and not self.has_lock:
            raise refused(errno.EINVAL)
        return index * self._stride


class PerCpuArray(Array):
    """An array whose values have one slot for each possible processor."""

    type = "percpu_array"
    creation_flags = _FLAGS
    per_cpu = True
    mappable = False

    def check_creation(self) -> None:
        super().check_creation()
        if self.flags & uapi.BPF_F_NUMA_NODE:
            raise refused(errno.EINVAL)
        if round8(self.value_size) > PER_CPU_LIMIT:
            raise refused(errno.E2BIG)

    def find(self, key: bytes) -> int:
        base = super().find(key)
        return base and base + environment.cpu * self._slot

    def store(self, key: bytes, value: bytes, flags: int) -> None:
        at = self._place(key, flags) + environment.cpu * self._slot
        self.values.buffer[at : at + self.value_size] = self.cleared(value)  # type: ignore[index]

    def write(self, key: bytes, value: bytes, flags: int) -> None:
        at = self._place(key, flags)
        self.values.buffer[at : at + self._stride] = self.cleared(value)  # type: ignore[index]
