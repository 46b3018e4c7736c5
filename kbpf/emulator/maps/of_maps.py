"""Maps of maps (kernel/bpf/map_in_map.c, arraymap.c, hashtab.c).

User space writes descriptors and reads ids; a program that looks one up gets the map. A program that was verified
against the template must be safe with every map that can take its place, so those must be like it.
"""

from __future__ import annotations

import errno
import sys

from kbpf.emulator.maps.base import Map, refused
from kbpf.emulator.maps.descriptors import DescriptorArray, number
from kbpf.emulator.maps.hash import Hash
from kbpf.errors import ENOTSUPP
from kbpf.uapi import constants as uapi

#: Types that cannot be in a map of maps.
_NEVER = frozenset({"prog_array", "struct_ops", "cgroup_storage", "percpu_cgroup_storage"})
#: Types whose size the program was verified with.
_SIZED = frozenset({"array", "xskmap"})


class InnerMaps(Map):
    """A map whose values are maps like `template`."""

    def allocate(self) -> None:
        #: What maps in it must be like.
        self.template = self.descriptors.map(self.inner)
        if isinstance(self.template, InnerMaps):
            raise refused(errno.EINVAL)
        if self.template.type in _NEVER:
            raise refused(ENOTSUPP)
        super().allocate()

    def resolve(self, descriptor: int) -> Map:
        """The map behind a descriptor, if it may stand in for the template."""
        given, template = self.descriptors.map(descriptor), self.template
        alike = (given.type, given.key_size, given.value_size, given.flags, given.special) == (
            template.type,
            template.key_size,
            template.value_size,
            template.flags,
            template.special,
        )
        sized = template.type in _SIZED and not template.flags & uapi.BPF_F_INNER_MAP
        if not alike or (sized and given.max_entries != template.max_entries):
            raise refused(errno.EINVAL)
        return given


class ArrayOfMaps(InnerMaps, DescriptorArray):
    """Maps by index; none at first."""

    type = "array_of_maps"
    batches = frozenset({"lookup", "update"})

    def find(self, key: bytes) -> int:
        inner = self._held.get(number(key))
        return 0 if inner is None else inner.handle.address

    def chunk(self, token: bytes | None, count: int) -> tuple[list[bytes], list[bytes], bytes | None]:
        keys: list[bytes] = []
        key = token
        while len(keys) < count:
            try:
                key = self.following(key)
            except OSError:
                return keys, [self.read(key) for key in keys], None
            if number(key) in self._held:
                keys.append(key)
        return keys, [self.read(key) for key in keys], key


class HashOfMaps(InnerMaps, Hash):
    """Maps by key."""

    type = "hash_of_maps"

    def check_creation(self) -> None:
        if self.value_size != 4:
            raise refused(errno.EINVAL)
        super().check_creation()

    def allocate(self) -> None:
        super().allocate()
        self._maps: dict[bytes, Map] = {}

    def find(self, key: bytes) -> int:
        inner = self._maps.get(key)
        return 0 if inner is None else inner.handle.address

    def write(self, key: bytes, value: bytes, flags: int) -> None:
        inner = self.resolve(number(value))
        super().write(key, inner.id.to_bytes(4, sys.byteorder), flags)
        self._maps[key] = inner

    def remove(self, key: bytes) -> None:
        super().remove(key)
        del self._maps[key]

    def take(self, key: bytes) -> bytes:
        raise refused(ENOTSUPP)
