"""What all maps share: the checks of bpf(2)'s map commands, in the kernel's order (kernel/bpf/syscall.c).

A kind of map derives from `Map` and says what its elements do. Values live in memory regions, so a program holds
pointers to them; a pointer stays valid when its element is deleted, until the map goes.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import struct
import weakref
from typing import ClassVar
from weakref import WeakValueDictionary

from kbpf.backend import Batch
from kbpf.emulator.environment import environment
from kbpf.emulator.memory import M32, Region
from kbpf.errors import ENOTSUPP, EmulationFault
from kbpf.specs import MapSpec
from kbpf.uapi import constants as uapi

_ACCESS = uapi.BPF_F_RDONLY | uapi.BPF_F_WRONLY | uapi.BPF_F_RDONLY_PROG | uapi.BPF_F_WRONLY_PROG
#: Above this, memory is taken from mmap(2), which gives pages when they are touched.
_LAZY_SIZE = 1 << 20
_COUNT = struct.Struct("=Q")


def refused(number: int) -> OSError:
    """The error that bpf(2) would set."""
    return OSError(number, "")


def name_bytes(name: str) -> bytes:
    """The name as the kernel keeps it; EINVAL for what `bpf_obj_name_cpy` refuses."""
    encoded = name.encode().split(b"\0")[0]
    # The kernel's isalnum() knows Latin-1.
    if len(encoded) > 15 or any(not (c in b"_." or (chr(c).isalnum() and (c < 128 or c >= 0xC0))) for c in encoded):
        raise refused(errno.EINVAL)
    return encoded


def round8(size: int) -> int:
    return size + 7 & ~7


class Map:
    """A map. Keys and values are bytes of the map's sizes; failures are `OSError` with the kernel's errno."""

    #: bpftool's name of the type.
    type: ClassVar[str]
    #: BPF_F_* that may be given when it is created.
    creation_flags: ClassVar[int]
    per_cpu: ClassVar[bool] = False
    #: Batch commands that the type has.
    batches: ClassVar[frozenset[str]] = frozenset()
    #: Queues and stacks have no keys.
    keyless: ClassVar[bool] = False

    def __init__(self, spec: MapSpec, inner: Map | None = None) -> None:
        if spec.map_extra and spec.type != "bloom_filter":
            raise refused(errno.EINVAL)
        if spec.flags & uapi.BPF_F_RDONLY and spec.flags & uapi.BPF_F_WRONLY:
            raise refused(errno.EINVAL)
        self.spec = spec
        self.key_size = spec.key_size
        self.value_size = spec.value_size
        self.max_entries = spec.max_entries
        self.flags = spec.flags
        self.map_extra = spec.map_extra
        self.cpus = environment.cpus
        self.check_creation()
        self.frozen = False
        self.allocate()
        self.name = name_bytes(spec.name).decode(errors="replace")
        self.id = next(_ids)
        # Programs hold a map by the address of this region, which has no bytes.
        self.handle = Region(readable=False, writable=False, owner=weakref.ref(self))
        MAPS[self.id] = self

    # What a kind of map says.

    def check_creation(self) -> None:
        """Raise what BPF_MAP_CREATE does for these sizes and flags."""
        self.check_flags(self.creation_flags)

    def allocate(self) -> None:
        """Make room for the elements."""

    def find(self, key: bytes) -> int:
        """The address of the value for a program on this processor; 0 if there is none."""
        raise refused(ENOTSUPP)

    def store(self, key: bytes, value: bytes, flags: int) -> None:
        """A program's update. For per-CPU maps `value` is this processor's."""
        raise refused(ENOTSUPP)

    def remove(self, key: bytes) -> None:
        raise refused(ENOTSUPP)

    def read(self, key: bytes) -> bytes:
        """User space's lookup: the value, or all processors' values."""
        raise refused(ENOTSUPP)

    def write(self, key: bytes, value: bytes, flags: int) -> None:
        """User space's update."""
        self.store(key, value, flags)

    def following(self, key: bytes | None) -> bytes:
        """The key after `key`; the first if `key` is None or missing."""
        raise refused(ENOTSUPP)

    def take(self, key: bytes) -> bytes:
        """User space's lookup and delete."""
        raise refused(ENOTSUPP)

    def push(self, value: bytes, flags: int) -> None:
        raise refused(errno.EINVAL)

    def peek(self) -> bytes:
        raise refused(errno.EINVAL)

    def pop(self) -> bytes:
        raise refused(errno.EINVAL)

    # What kinds of map need for that.

    def check_flags(self, allowed: int) -> None:
        if self.flags & ~allowed:
            raise refused(errno.EINVAL)
        if self.flags & uapi.BPF_F_RDONLY_PROG and self.flags & uapi.BPF_F_WRONLY_PROG:
            raise refused(errno.EINVAL)

    def check_program_writes(self) -> None:
        """Fault where the verifier would not have let a program change the map."""
        if self.flags & uapi.BPF_F_RDONLY_PROG:
            raise EmulationFault("write into a map that programs may only read")

    def region(self, size: int) -> Region:
        """Zeroed memory for values, with the rights that the map's flags give programs."""
        if size > M32:
            raise refused(errno.ENOMEM)
        try:
            buffer = bytearray(size) if size < _LAZY_SIZE else mmap.mmap(-1, size)
        except (MemoryError, OSError, OverflowError):
            raise refused(errno.ENOMEM) from None
        return Region(
            buffer,
            readable=not self.flags & uapi.BPF_F_WRONLY_PROG,
            writable=not self.flags & uapi.BPF_F_RDONLY_PROG,
        )

    @property
    def slot_size(self) -> int:
        """Bytes from one value, or one processor's value, to the next."""
        return round8(self.value_size)

    @property
    def user_value_size(self) -> int:
        """Bytes of a value as user space passes it."""
        return round8(self.value_size) * self.cpus if self.per_cpu else self.value_size

    # The commands of bpf(2).

    def _check_key(self, key: bytes | None) -> bytes:
        if self.key_size:
            if key is None:
                raise refused(errno.EFAULT)
            return key
        if key is not None:
            raise refused(errno.EINVAL)
        return b""

    def command_lookup(self, key: bytes | None, flags: int = 0) -> bytes:
        # No map here has a bpf_spin_lock yet, so BPF_F_LOCK is refused as the kernel does without one.
        if flags:
            raise refused(errno.EINVAL)
        given = self._check_key(key)
        return self.peek() if self.keyless else self.read(given)

    def command_update(self, key: bytes | None, value: bytes, flags: int = 0) -> None:
        self._check_writable()
        if flags & uapi.BPF_F_LOCK:
            raise refused(errno.EINVAL)
        given = self._check_key(key)
        if self.keyless:
            self.push(value, flags)
        else:
            self.write(given, value, flags)

    def command_delete(self, key: bytes | None) -> None:
        self._check_writable()
        given = self._check_key(key)
        if self.keyless:
            raise refused(errno.EINVAL)
        self.remove(given)

    def command_next_key(self, key: bytes | None) -> bytes:
        if key is not None:
            self._check_key(key)
        return self.following(key)

    def command_take(self, key: bytes | None, flags: int = 0) -> bytes:
        if flags & ~uapi.BPF_F_LOCK:
            raise refused(errno.EINVAL)
        self._check_writable()
        if (self.keyless and flags) or flags & uapi.BPF_F_LOCK:
            raise refused(errno.EINVAL)
        given = self._check_key(key)
        return self.pop() if self.keyless else self.take(given)

    def command_freeze(self) -> None:
        if self.frozen:
            raise refused(errno.EBUSY)
        self.frozen = True

    def command_lookup_batch(self, token: bytes | None, count: int, delete: bool) -> Batch:
        if delete:
            self._check_writable()
        self._check_batch("take" if delete else "lookup")
        keys, values, token = self.chunk(token, count)
        if delete:
            for key in keys:
                self.remove(key)
        return Batch(b"".join(keys), b"".join(values), len(keys), token)

    def command_update_batch(self, keys: bytes, values: bytes, count: int, flags: int) -> int:
        self._check_writable()
        self._check_batch("update")
        if flags:
            raise refused(errno.EINVAL)
        size, value_size = self.key_size, self.user_value_size
        for done in range(count):
            try:
                self.write(
                    keys[done * size : (done + 1) * size], values[done * value_size : (done + 1) * value_size], 0
                )
            except OSError as error:
                error.done = done  # type: ignore[attr-defined]
                raise
        return count

    def command_delete_batch(self, keys: bytes, count: int, flags: int) -> int:
        self._check_writable()
        self._check_batch("delete")
        if flags:
            raise refused(errno.EINVAL)
        for done in range(count):
            try:
                self.remove(keys[done * self.key_size : (done + 1) * self.key_size])
            except OSError as error:
                error.done = done  # type: ignore[attr-defined]
                raise
        return count

    def chunk(self, token: bytes | None, count: int) -> tuple[list[bytes], list[bytes], bytes | None]:
        """Up to `count` keys and values from `token` on, and where to go on; None at the end."""
        raise refused(ENOTSUPP)

    def _check_writable(self) -> None:
        if self.frozen:
            raise refused(errno.EPERM)

    def _check_batch(self, operation: str) -> None:
        if operation not in self.batches:
            raise refused(ENOTSUPP)


_ids = itertools.count(1)
#: Maps by id, while anybody holds them.
MAPS: WeakValueDictionary[int, Map] = WeakValueDictionary()
