"""Arrays whose values are descriptors (kernel/bpf/arraymap.c), and the array of programs.

User space puts descriptors in and reads ids out; the array keeps what they stand for.
"""

from __future__ import annotations

import errno
import sys
from typing import Any, Protocol

from kbpf.emulator.interpreter import Code
from kbpf.emulator.maps.base import Map, refused
from kbpf.uapi import constants as uapi

#: What all of them may be created with.
_FLAGS = uapi.BPF_F_NUMA_NODE | uapi.BPF_F_RDONLY | uapi.BPF_F_WRONLY


def number(data: bytes) -> int:
    """An index or a descriptor."""
    return int.from_bytes(data, sys.byteorder)


class DescriptorArray(Map):
    """Objects by index; none at first."""

    creation_flags = _FLAGS

    def check_creation(self) -> None:
        if self.key_size != 4 or self.value_size != 4 or not self.max_entries:
            raise refused(errno.EINVAL)
        super().check_creation()

    def allocate(self) -> None:
        self._held: dict[int, Any] = {}

    def resolve(self, descriptor: int) -> Any:
        """What to keep for a descriptor; raises what the update does."""
        raise NotImplementedError

    def held(self, index: int) -> Any:
        """What an element keeps; None if nothing."""
        return self._held.get(index)

    def find(self, key: bytes) -> int:
        raise refused(errno.EINVAL)

    def read(self, key: bytes) -> bytes:
        held = self._held.get(number(key))
        if held is None:
            raise refused(errno.ENOENT)
        id: int = held.id
        return id.to_bytes(4, sys.byteorder)

    def write(self, key: bytes, value: bytes, flags: int) -> None:
        index = number(key)
        if flags:
            raise refused(errno.EINVAL)
        if index >= self.max_entries:
            raise refused(errno.E2BIG)
        self._held[index] = self.resolve(number(value))

    def remove(self, key: bytes) -> None:
        index = number(key)
        if index >= self.max_entries:
            raise refused(errno.E2BIG)
        if self._held.pop(index, None) is None:
            raise refused(errno.ENOENT)

    def following(self, key: bytes | None) -> bytes:
        index = -1 if key is None else number(key)
        if index >= self.max_entries:
            index = -1
        if index == self.max_entries - 1:
            raise refused(errno.ENOENT)
        return (index + 1).to_bytes(4, sys.byteorder)


class Target(Protocol):
    """A loaded program."""

    code: Code
    id: int
    type: str


class ProgArray(DescriptorArray):
    """Where bpf_tail_call finds the next program. The first program decides which type the array takes."""

    type = "prog_array"

    def code_at(self, index: int) -> Code | None:
        """What a tail call goes on with."""
        program = self._held.get(index)
        return None if program is None else program.code

    def claim(self, type: str) -> None:
        """A program of this type uses it, or goes into it; EINVAL where others do (`bpf_prog_map_compatible`)."""
        if self.owner_type not in ("", type):
            raise refused(errno.EINVAL)
        self.owner_type = type

    def abandoned(self) -> None:
        # Else programs that tail call each other would never go.
        self._held.clear()

    def resolve(self, descriptor: int) -> Target:
        program: Target = self.descriptors.program(descriptor)
        self.claim(program.type)
        return program
