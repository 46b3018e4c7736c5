"""Program array: where bpf_tail_call finds the next program (kernel/bpf/arraymap.c).

User space puts descriptors in and reads ids out. The first program decides which type the array takes.
"""

from __future__ import annotations

import errno
import sys
from typing import Protocol

from kbpf.emulator.interpreter import Code
from kbpf.emulator.maps.base import Map, refused
from kbpf.uapi import constants as uapi


class Target(Protocol):
    """A loaded program."""

    code: Code
    id: int
    type: str


class ProgArray(Map):
    """Programs by index."""

    type = "prog_array"
    creation_flags = uapi.BPF_F_NUMA_NODE | uapi.BPF_F_RDONLY | uapi.BPF_F_WRONLY

    def check_creation(self) -> None:
        if self.key_size != 4 or self.value_size != 4 or not self.max_entries:
            raise refused(errno.EINVAL)
        super().check_creation()

    def allocate(self) -> None:
        self._programs: dict[int, Target] = {}
        self._takes = ""

    def code_at(self, index: int) -> Code | None:
        """What a tail call goes on with."""
        program = self._programs.get(index)
        return None if program is None else program.code

    def find(self, key: bytes) -> int:
        raise refused(errno.EINVAL)

    def read(self, key: bytes) -> bytes:
        program = self._programs.get(int.from_bytes(key, sys.byteorder))
        if program is None:
            raise refused(errno.ENOENT)
        return program.id.to_bytes(4, sys.byteorder)

    def write(self, key: bytes, value: bytes, flags: int) -> None:
        index = int.from_bytes(key, sys.byteorder)
        if flags:
            raise refused(errno.EINVAL)
        if index >= self.max_entries:
            raise refused(errno.E2BIG)
        program: Target = self.programs(int.from_bytes(value, sys.byteorder))
        if self._takes not in ("", program.type):
            raise refused(errno.EINVAL)
        self._takes = program.type
        self._programs[index] = program

    def remove(self, key: bytes) -> None:
        index = int.from_bytes(key, sys.byteorder)
        if index >= self.max_entries:
            raise refused(errno.E2BIG)
        if self._programs.pop(index, None) is None:
            raise refused(errno.ENOENT)

    def following(self, key: bytes | None) -> bytes:
        index = -1 if key is None else int.from_bytes(key, sys.byteorder)
        if index >= self.max_entries:
            index = -1
        if index == self.max_entries - 1:
            raise refused(errno.ENOENT)
        return (index + 1).to_bytes(4, sys.byteorder)
