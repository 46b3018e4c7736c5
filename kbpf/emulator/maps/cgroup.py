"""Maps about control groups: which groups there are to ask about, and values of a group that a program is attached to.

Groups are the real operating system's, named by a descriptor of their directory and known by its inode number
(kernel/bpf/arraymap.c, kernel/bpf/local_storage.c).
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from kbpf.emulator.environment import environment
from kbpf.emulator.maps.array import PER_CPU_LIMIT
from kbpf.emulator.maps.base import Map, refused
from kbpf.emulator.maps.descriptors import DescriptorArray, number
from kbpf.emulator.maps.local_storage import MOST_VALUE
from kbpf.emulator.maps.owners import group_behind
from kbpf.emulator.memory import Region
from kbpf.errors import ENOTSUPP
from kbpf.uapi import constants as uapi

#: struct bpf_cgroup_storage_key: the group and the attach type.
_KEY = struct.Struct("=QII")


class CgroupArray(DescriptorArray):
    """Groups by index (Linux 4.8), those of version 2. User space reads nothing back."""

    type = "cgroup_array"

    def resolve(self, descriptor: int) -> int:
        return group_behind(descriptor, "cgroup2")

    def read(self, key: bytes) -> bytes:
        raise refused(ENOTSUPP)


class SharedCgroupStorage(Map):
    """A value for each group that a program with this map is attached to (Linux 4.19).

    Keys are a group's id (Linux 5.9), or that and the attach type. Nobody adds or deletes elements: they appear when a
    program is attached, and stay with the group. A program that is run without being attached asks on behalf of the
    group of `environment.cgroup_id`. BPF_PROG_TEST_RUN has a value of its own, which begins as zeroes.
    """

    type = "cgroup_storage"
    creation_flags = (
        uapi.BPF_F_NUMA_NODE | uapi.BPF_F_RDONLY | uapi.BPF_F_WRONLY | uapi.BPF_F_RDONLY_PROG | uapi.BPF_F_WRONLY_PROG
    )
    most_value = MOST_VALUE

    def check_creation(self) -> None:
        if self.key_size not in (8, _KEY.size) or not self.value_size:
            raise refused(errno.EINVAL)
        if self.value_size > self.most_value:
            raise refused(errno.E2BIG)
        super().check_creation()
        if self.max_entries:
            raise refused(errno.EINVAL)

    def allocate(self) -> None:
        #: By group and attach type, those that came last first.
        self._values: dict[tuple[int, int], Region] = {}

    def new_value(self) -> Region:
        """Zeroes, for all processors where each has its own."""
        return self.region(self.slot_size * (self.cpus if self.per_cpu else 1))

    def address(self, group: int, attach_type: int) -> int:
        """The address of the value for a program that is attached there."""
        tests = _tests.get()
        if tests is not None:
            if self.id not in tests:
                tests[self.id] = self.new_value()
            value = tests[self.id]
        else:
            name = group, attach_type if self.key_size == _KEY.size else 0
            if name not in self._values:
                self._values = {name: self.new_value(), **self._values}
            value = self._values[name]
        return value.address + (environment.cpu * self.slot_size if self.per_cpu else 0)

    def read(self, key: bytes) -> bytes:
        return self.cleared(bytes(self._value(key).buffer[: self.user_value_size]))

    def write(self, key: bytes, value: bytes, flags: int) -> None:
        if flags & ~(uapi.BPF_F_LOCK | uapi.BPF_EXIST):
            raise refused(errno.EINVAL)
        buffer = self._value(key).buffer
        buffer[: len(value)] = self.cleared(value)  # type: ignore[index]

    def remove(self, key: bytes) -> None:
        raise refused(errno.EINVAL)

    def following(self, key: bytes | None) -> bytes:
        names = list(self._values)
        if key is not None:
            name = self._name(key)
            names = names[names.index(name) + 1 :] if name in names else []
        if not names:
            raise refused(errno.ENOENT)
        group, attach_type = names[0]
        return _KEY.pack(group, attach_type, 0)[: self.key_size]

    def _name(self, key: bytes) -> tuple[int, int]:
        return number(key[:8]), number(key[8:12])

    def _value(self, key: bytes) -> Region:
        value = self._values.get(self._name(key))
        if value is None:
            raise refused(errno.ENOENT)
        return value


class PerCpuCgroupStorage(SharedCgroupStorage):
    """The same with a value for each processor (Linux 4.20)."""

    type = "percpu_cgroup_storage"
    per_cpu = True
    most_value = PER_CPU_LIMIT


#: The group that the program which runs is attached to; None: that of the process.
_group: ContextVar[int | None] = ContextVar("_group", default=None)


@contextmanager
def values_of_group(group: int) -> Iterator[None]:
    """What runs inside is attached to this group."""
    token = _group.set(group)
    try:
        yield
    finally:
        _group.reset(token)


def attached_group() -> int:
    """The group that the program which runs is attached to."""
    group = _group.get()
    return environment.cgroup_id if group is None else group


#: In BPF_PROG_TEST_RUN, the values of this run by the map's id.
_tests: ContextVar[dict[int, Region] | None] = ContextVar("_tests", default=None)


@contextmanager
def values_of_a_test() -> Iterator[None]:
    """What runs inside has values of its own, which go afterwards."""
    token = _tests.set({})
    try:
        yield
    finally:
        _tests.reset(token)
