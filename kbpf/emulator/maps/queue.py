"""Queue and stack: values without keys (kernel/bpf/queue_stack_maps.c)."""

from __future__ import annotations

import errno
from collections import deque

from kbpf.emulator.maps.base import Map, refused
from kbpf.emulator.maps.turns import in_turn
from kbpf.uapi import constants as uapi

#: KMALLOC_MAX_SIZE: the most that a value may take.
_MOST_VALUE = 1 << 22


class Queue(Map):
    """First in, first out. BPF_EXIST pushes onto a full map by dropping its oldest value."""

    type = "queue"
    creation_flags = (
        uapi.BPF_F_NUMA_NODE | uapi.BPF_F_RDONLY | uapi.BPF_F_WRONLY | uapi.BPF_F_RDONLY_PROG | uapi.BPF_F_WRONLY_PROG
    )
    keyless = True

    def check_creation(self) -> None:
        if not self.max_entries or not self.value_size or self.key_size:
            raise refused(errno.EINVAL)
        super().check_creation()
        if self.value_size > _MOST_VALUE:
            raise refused(errno.E2BIG)

    def allocate(self) -> None:
        self._values: deque[bytes] = deque()

    @in_turn
    def push(self, value: bytes, flags: int) -> None:
        if flags & uapi.BPF_NOEXIST or flags > uapi.BPF_EXIST:
            raise refused(errno.EINVAL)
        if len(self._values) >= self.max_entries:
            if not flags & uapi.BPF_EXIST:
                raise refused(errno.E2BIG)
            self._values.popleft()
        self._values.append(value)

    @in_turn
    def peek(self) -> bytes:
        if not self._values:
            raise refused(errno.ENOENT)
        return self._values[self._end]

    @in_turn
    def pop(self) -> bytes:
        value = self.peek()
        del self._values[self._end]
        return value

    def find(self, key: bytes) -> int:
        raise refused(errno.EINVAL)

    def remove(self, key: bytes) -> None:
        raise refused(errno.EINVAL)

    def following(self, key: bytes | None) -> bytes:
        raise refused(errno.EINVAL)

    _end = 0


class Stack(Queue):
    """Last in, first out."""

    type = "stack"
    _end = -1
