"""Stack traces by id (kernel/bpf/stackmap.c, Linux 4.6). Tracing programs put them in, user space reads and deletes.

An id is the hash of the addresses, so that the same stack gets the same one; another stack with the same id is in its
way.
"""

from __future__ import annotations

import errno
import sys
from typing import NamedTuple

from kbpf.emulator import stacks
from kbpf.emulator.maps.base import Map, refused
from kbpf.emulator.maps.bloom import jhash
from kbpf.emulator.task import Task
from kbpf.uapi import constants as uapi

_FLAGS = uapi.BPF_F_SKIP_FIELD_MASK | uapi.BPF_F_USER_STACK | uapi.BPF_F_FAST_STACK_CMP | uapi.BPF_F_REUSE_STACKID


class _Bucket(NamedTuple):
    hash: int
    data: bytes


class StackTrace(Map):
    """Ids are below `max_entries` rounded up to a power of two."""

    type = "stack_trace"
    creation_flags = uapi.BPF_F_NUMA_NODE | uapi.BPF_F_RDONLY | uapi.BPF_F_WRONLY | uapi.BPF_F_STACK_BUILD_ID

    def check_creation(self) -> None:
        super().check_creation()
        frame = self._frame
        if not self.max_entries or self.key_size != 4 or not 0 < self.value_size // frame <= stacks.MOST_FRAMES:
            raise refused(errno.EINVAL)
        if self.value_size % frame:
            raise refused(errno.EINVAL)
        if self.max_entries > 1 << 31:
            raise refused(errno.E2BIG)

    def allocate(self) -> None:
        self._ids = 1 << (self.max_entries - 1).bit_length()
        self._buckets: dict[int, _Bucket] = {}

    @property
    def _frame(self) -> int:
        return stacks.BUILD_ID if self.flags & uapi.BPF_F_STACK_BUILD_ID else stacks.ADDRESS

    def keep(self, task: Task, flags: int) -> int:
        """bpf_get_stackid: the id of a thread's stack, which is put in; raises `OSError` with the kernel's errno."""
        if flags & ~_FLAGS:
            raise refused(errno.EINVAL)
        found = stacks.frames(task, flags, self.value_size // self._frame)
        if not found:
            raise refused(errno.EFAULT)
        addresses = stacks.addresses(found)
        hash = jhash(addresses, 0)
        id = hash & self._ids - 1
        there = self._buckets.get(id)
        same_hash = there is not None and there.hash == hash
        if same_hash and flags & uapi.BPF_F_FAST_STACK_CMP:
            return id
        # A new place is taken before the old one goes, and by build id even before the two are compared.
        full = len(self._buckets) == self.max_entries
        data = addresses
        if self.flags & uapi.BPF_F_STACK_BUILD_ID:
            if full:
                raise refused(errno.ENOMEM)
            data = stacks.build_ids(task, found, bool(flags & uapi.BPF_F_USER_STACK))
        if there is not None and same_hash and there.data == data:
            return id
        if there is not None and not flags & uapi.BPF_F_REUSE_STACKID:
            raise refused(errno.EEXIST)
        if full:
            raise refused(errno.ENOMEM)
        self._buckets[id] = _Bucket(hash, data)
        return id

    def find(self, key: bytes) -> int:
        raise refused(errno.EOPNOTSUPP)

    def read(self, key: bytes) -> bytes:
        bucket = self._buckets.get(_number(key))
        if bucket is None:
            raise refused(errno.ENOENT)
        return bucket.data.ljust(self.value_size, b"\0")

    def store(self, key: bytes, value: bytes, flags: int) -> None:
        raise refused(errno.EINVAL)

    def remove(self, key: bytes) -> None:
        if _number(key) >= self._ids:
            raise refused(errno.E2BIG)
        if self._buckets.pop(_number(key), None) is None:
            raise refused(errno.ENOENT)

    def take(self, key: bytes) -> bytes:
        value = self.read(key)
        self.remove(key)
        return value

    def following(self, key: bytes | None) -> bytes:
        start = -1 if key is None or _number(key) >= self._ids else _number(key)
        after = min((id for id in self._buckets if id > start), default=None)
        if after is None:
            raise refused(errno.ENOENT)
        return after.to_bytes(4, sys.byteorder)


def _number(key: bytes) -> int:
    return int.from_bytes(key, sys.byteorder)
