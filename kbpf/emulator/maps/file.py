"""What a map's descriptor stands for: bpf(2) commands, checked in the kernel's order (kernel/bpf/syscall.c)."""

from __future__ import annotations

import errno
from collections.abc import Callable

from kbpf.backend import Batch
from kbpf.emulator.maps.base import Map, refused
from kbpf.errors import ENOTSUPP
from kbpf.uapi import constants as uapi


def release(map: Map) -> None:
    """User space holds the map by one file or pin less."""
    map.users -= 1
    if not map.users:
        map.abandoned()


class MapFile:
    """A map and what may be done with it through this descriptor."""

    __slots__ = ("__weakref__", "descriptors", "map", "readable", "writable")

    def __init__(self, map: Map, flags: int = 0) -> None:
        """`flags` are BPF_F_RDONLY or BPF_F_WRONLY, or others, which say nothing here."""
        if flags & uapi.BPF_F_RDONLY and flags & uapi.BPF_F_WRONLY:
            raise refused(errno.EINVAL)
        self.map = map
        #: Numbers that stand for this file.
        self.descriptors = 0
        self.readable = not flags & uapi.BPF_F_WRONLY
        self.writable = not flags & uapi.BPF_F_RDONLY

    def opened(self) -> None:
        """Another descriptor stands for this file."""
        if not self.descriptors:
            self.map.users += 1
        self.descriptors += 1

    def closed(self) -> None:
        """A descriptor is closed."""
        self.descriptors -= 1
        if not self.descriptors:
            self.map.closed(self)
            release(self.map)

    def lookup(self, key: bytes | None, flags: int = 0) -> bytes:
        if flags & ~uapi.BPF_F_LOCK:
            raise refused(errno.EINVAL)
        self._check_readable()
        self._check_lock(flags)
        given = self._key(key)
        return self.map.peek() if self.map.keyless else self.map.read(given)

    def update(self, key: bytes | None, value: bytes, flags: int = 0) -> None:
        self._check_writable()
        self._check_lock(flags)
        given = self._key(key)
        if self.map.keyless:
            self.map.push(value, flags)
        else:
            self.map.write(given, value, flags)
            self.map.put_through(self, given)

    def delete(self, key: bytes | None) -> None:
        self._check_writable()
        self.map.remove(self._key(key))

    def next_key(self, key: bytes | None) -> bytes:
        self._check_readable()
        return self.map.following(None if key is None else self._key(key))

    def take(self, key: bytes | None, flags: int = 0) -> bytes:
        """BPF_MAP_LOOKUP_AND_DELETE_ELEM."""
        if flags & ~uapi.BPF_F_LOCK:
            raise refused(errno.EINVAL)
        self._check_readable()
        self._check_writable()
        if flags and self.map.keyless:
            raise refused(errno.EINVAL)
        self._check_lock(flags)
        given = self._key(key)
        return self.map.pop() if self.map.keyless else self.map.take(given)

    def contains(self, value: bytes) -> bool:
        self._check_readable()
        return self.map.contains(value)

    def memory(self, offset: int, size: int, writable: bool) -> memoryview:
        if not self.readable or (writable and not self.writable):
            raise refused(errno.EACCES)
        if not self.map.mappable or self.map.special:
            raise refused(ENOTSUPP)
        if not self.writable:
            # Linux makes a private mapping of it, which maps do not take.
            raise refused(errno.EINVAL)
        if writable and self.map.frozen:
            raise refused(errno.EPERM)
        if writable and self.map.flags & uapi.BPF_F_RDONLY_PROG:
            raise refused(errno.EACCES)
        return self.map.memory(offset, size, writable)

    def freeze(self) -> None:
        if self.map.special:
            # Programs would no longer be able to use those fields.
            raise refused(ENOTSUPP)
        if self.map.is_mapped():
            raise refused(errno.EBUSY)
        self._check_writable()
        self.map.frozen = True

    def lookup_batch(self, token: bytes | None, count: int, delete: bool) -> Batch:
        self._check_readable()
        if delete:
            self._check_writable()
        self._check_batch("take" if delete else "lookup")
        keys, values, after = self.map.chunk(token, count)
        if delete:
            for key in keys:
                self.map.remove(key)
        return Batch(b"".join(keys), b"".join(values), len(keys), after)

    def update_batch(self, keys: bytes, values: bytes, count: int, flags: int) -> int:
        size, value_size = self.map.key_size, self.map.user_value_size

        def one(index: int) -> None:
            value = values[index * value_size : (index + 1) * value_size]
            self.map.write(keys[index * size : (index + 1) * size], value, flags)

        return self._change_batch("update", count, flags, one)

    def delete_batch(self, keys: bytes, count: int, flags: int) -> int:
        size = self.map.key_size
        return self._change_batch(
            "delete", count, flags, lambda index: self.map.remove(keys[index * size : (index + 1) * size])
        )

    def _change_batch(self, operation: str, count: int, flags: int, one: Callable[[int], None]) -> int:
        """Do one element after the other; the error that stops it says in `done` how many were."""
        done = 0
        try:
            self._check_writable()
            self._check_batch(operation)
            if flags & ~uapi.BPF_F_LOCK:
                raise refused(errno.EINVAL)
            self._check_lock(flags)
            for done in range(count):
                one(done)
        except OSError as error:
            error.done = done  # type: ignore[attr-defined]
            raise
        return count

    def _check_readable(self) -> None:
        if not self.readable:
            raise refused(errno.EPERM)

    def _check_writable(self) -> None:
        if not self.writable or self.map.frozen:
            raise refused(errno.EPERM)

    def _check_lock(self, flags: int) -> None:
        if flags & uapi.BPF_F_LOCK and not self.map.has_lock:
            raise refused(errno.EINVAL)

    def _check_batch(self, operation: str) -> None:
        if operation not in self.map.batches:
            raise refused(ENOTSUPP)

    def _key(self, key: bytes | None) -> bytes:
        if not self.map.key_size:
            if key is not None:
                raise refused(errno.EINVAL)
            return b""
        if key is None:
            raise refused(errno.EFAULT)
        return key
