"""Stack traces by id (kernel/bpf/stackmap.c). Only tracing programs put them in, so a map stays empty without such."""

from __future__ import annotations

import errno
import sys

from kbpf.emulator.maps.base import Map, refused
from kbpf.uapi import constants as uapi

#: kernel.perf_event_max_stack, as it is by default.
_MOST_FRAMES = 127
#: Bytes of a frame: an address, or a struct bpf_stack_build_id.
_ADDRESS, _BUILD_ID = 8, 32


class StackTrace(Map):
    """Ids are below `max_entries` rounded up to a power of two."""

    type = "stack_trace"
    creation_flags = uapi.BPF_F_NUMA_NODE | uapi.BPF_F_RDONLY | uapi.BPF_F_WRONLY | uapi.BPF_F_STACK_BUILD_ID

    def check_creation(self) -> None:
        super().check_creation()
        frame = _BUILD_ID if self.flags & uapi.BPF_F_STACK_BUILD_ID else _ADDRESS
        if not self.max_entries or self.key_size != 4 or not 0 < self.value_size // frame <= _MOST_FRAMES:
            raise refused(errno.EINVAL)
        if self.value_size % frame:
            raise refused(errno.EINVAL)
        if self.max_entries > 1 << 31:
            raise refused(errno.E2BIG)

    def find(self, key: bytes) -> int:
        raise refused(errno.EOPNOTSUPP)

    def read(self, key: bytes) -> bytes:
        raise refused(errno.ENOENT)

    def store(self, key: bytes, value: bytes, flags: int) -> None:
        raise refused(errno.EINVAL)

    def remove(self, key: bytes) -> None:
        ids = 1 << (self.max_entries - 1).bit_length()
        raise refused(errno.E2BIG if int.from_bytes(key, sys.byteorder) >= ids else errno.ENOENT)

    def take(self, key: bytes) -> bytes:
        raise refused(errno.ENOENT)

    def following(self, key: bytes | None) -> bytes:
        raise refused(errno.ENOENT)
