"""Values that belong to an object of the kernel: a socket, a file, a process, a control group.

User space names the object by a descriptor, of the real operating system; programs name it by what they hold. The
value is for all who name the same object (kernel/bpf/bpf_local_storage.c). Linux frees it with the object. Nobody can
name an object that is gone, so here it may stay with the map.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Hashable
from weakref import WeakSet

from kbpf.emulator.maps.base import Map, refused
from kbpf.emulator.maps.owners import described, file_behind, group_behind
from kbpf.emulator.maps.special import described_value
from kbpf.emulator.memory import Region
from kbpf.emulator.process_sock import sock_of
from kbpf.emulator.sock import Sock
from kbpf.uapi import constants as uapi

#: What fits 16 bits together with the kernel's own part of an element.
MOST_VALUE = 0xFFFF - 128


class LocalStorage(Map):
    """One value for each object. The map needs BTF, BPF_F_NO_PREALLOC and no `max_entries`."""

    creation_flags = uapi.BPF_F_NO_PREALLOC | uapi.BPF_F_CLONE

    def check_creation(self) -> None:
        super().check_creation()
        named = self.spec.btf and self.spec.btf_key_type_id and self.spec.btf_value_type_id
        if not named or not self.flags & uapi.BPF_F_NO_PREALLOC or self.max_entries:
            raise refused(errno.EINVAL)
        if self.key_size != 4 or not self.value_size:
            raise refused(errno.EINVAL)
        if self.value_size > MOST_VALUE:
            raise refused(errno.E2BIG)
        if described_value(self.spec) is None:
            raise refused(errno.EINVAL)

    def allocate(self) -> None:
        self._values: dict[Hashable, Region] = {}

    def owner(self, descriptor: int) -> Hashable:
        """What identifies the object behind a descriptor; raises what the commands do."""
        raise NotImplementedError

    def value_of(self, owner: Hashable) -> Region | None:
        """An object's value; None if it has none."""
        return self._values.get(owner)

    def put(self, owner: Hashable, value: bytes) -> Region:
        """Give an object a value, in memory that is new; what is at hand of the old one is left as it is."""
        region = self._values[owner] = self.region(self.value_size)
        assert not isinstance(region.buffer, bytes)
        region.buffer[:] = self.cleared(value)
        return region

    def drop(self, owner: Hashable) -> Region:
        """Take an object's value; ENOENT."""
        region = self._values.pop(owner, None)
        if region is None:
            raise refused(errno.ENOENT)
        return region

    def read(self, key: bytes) -> bytes:
        value = self.value_of(self._owner(key))
        if value is None:
            raise refused(errno.ENOENT)
        return self.cleared(bytes(value.buffer))

    def write(self, key: bytes, value: bytes, flags: int) -> None:
        owner = self._owner(key)
        condition = flags & ~uapi.BPF_F_LOCK
        if condition > uapi.BPF_EXIST:
            raise refused(errno.EINVAL)
        if condition == uapi.BPF_NOEXIST and owner in self._values:
            raise refused(errno.EEXIST)
        if condition == uapi.BPF_EXIST and owner not in self._values:
            raise refused(errno.ENOENT)
        self.put(owner, value)

    def remove(self, key: bytes) -> None:
        self.drop(self._owner(key))

    def _owner(self, key: bytes) -> Hashable:
        return self.owner(int.from_bytes(key, sys.byteorder, signed=True))


class SocketStorage(LocalStorage):
    """Linux 5.2. A socket is known by its cookie.

    With BPF_F_CLONE (Linux 5.4) a connection begins with its listener's value, but for one of the process's own: a
    process is not told whose connection it has accepted.
    """

    type = "sk_storage"

    def allocate(self) -> None:
        super().allocate()
        if self.flags & uapi.BPF_F_CLONE:
            _cloned.add(self)

    def owner(self, descriptor: int) -> Hashable:
        return sock_of(descriptor).cookie


#: The maps whose values connections inherit.
_cloned: WeakSet[SocketStorage] = WeakSet()


def inherit_values(child: Sock, listener: Sock) -> None:
    """A listener has made a connection (`bpf_sk_storage_clone`)."""
    for storage in list(_cloned):
        value = storage.value_of(listener.cookie)
        if value is not None:
            storage.put(child.cookie, bytes(value.buffer))


class InodeStorage(LocalStorage):
    """Linux 5.10."""

    type = "inode_storage"

    def owner(self, descriptor: int) -> Hashable:
        file = file_behind(descriptor)
        return file.st_dev, file.st_ino


class TaskStorage(LocalStorage):
    """Linux 5.11. Descriptors are those of pidfd_open(2)."""

    type = "task_storage"

    def owner(self, descriptor: int) -> Hashable:
        process = int(described(descriptor).get("Pid", "0"))
        if process <= 0:
            raise refused(errno.EBADF if process == 0 else errno.ENOENT)
        return process


class CgroupStorage(LocalStorage):
    """Linux 6.2."""

    type = "cgrp_storage"

    def owner(self, descriptor: int) -> Hashable:
        return group_behind(descriptor, "cgroup", "cgroup2")
