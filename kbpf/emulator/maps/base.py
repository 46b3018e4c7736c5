"""What all maps share.

A kind of map derives from `Map` and says what its elements do; `kbpf.emulator.maps.file` has the checks that all
commands make before. Values live in memory regions, so a program holds pointers to them; a pointer stays valid when
its element is deleted, until the map goes.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import weakref
from typing import TYPE_CHECKING, Any, ClassVar, Protocol
from weakref import WeakValueDictionary

from kbpf.backend import object_name
from kbpf.emulator.environment import environment
from kbpf.emulator.maps.special import special_fields
from kbpf.emulator.memory import M32, REGIONS, MutableBuffer, Region
from kbpf.errors import ENOTSUPP, EmulationFault
from kbpf.specs import MapSpec
from kbpf.uapi import constants as uapi

if TYPE_CHECKING:
    from kbpf.emulator.btf import Btf
    from kbpf.emulator.maps.perf import PerfBuffer, PerfCounter

#: Above this, memory is taken from mmap(2), which gives pages when they are touched.
_LAZY_SIZE = 1 << 20


def refused(number: int) -> OSError:
    """The error that bpf(2) would set."""
    return OSError(number, "")


def round8(size: int) -> int:
    return size + 7 & ~7


def page_buffer(size: int) -> MutableBuffer:
    """Zeroed memory; where it is much, pages that are taken when they are touched. ENOMEM if there is none."""
    try:
        return bytearray(size) if size < _LAZY_SIZE else mmap.mmap(-1, size)
    except (MemoryError, OSError, OverflowError):
        raise refused(errno.ENOMEM) from None


class Descriptors(Protocol):
    """What descriptors stand for, which some maps take as values; EBADF, or EINVAL for one of another kind."""

    def is_open(self, fd: int) -> bool: ...

    def program(self, fd: int) -> Any: ...

    def map(self, fd: int) -> Map: ...

    def perf_event_of(self, fd: int) -> PerfBuffer | PerfCounter: ...


class Kept(Protocol):
    """What the kernel keeps in a field of a value."""

    #: It goes when user space has no descriptor and no pin of the map left.
    needs_user: bool

    def free(self) -> None:
        """It is in the value no longer."""
        ...


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
    #: Types that mmap(2) takes.
    mappable: ClassVar[bool] = False
    #: For arrays of programs: the type that they take, once one was put in.
    owner_type: str = ""

    def __init__(self, spec: MapSpec, descriptors: Descriptors, inner: int | None = None) -> None:
        """`inner` is the descriptor of the template, for maps of maps."""
        self.descriptors = descriptors
        self.inner = inner or 0
        if spec.map_extra and spec.type != "bloom_filter":
            raise refused(errno.EINVAL)
        if spec.flags & uapi.BPF_F_RDONLY and spec.flags & uapi.BPF_F_WRONLY:
            raise refused(errno.EINVAL)
        self.spec = spec
        #: The BTF that describes it, once that has an id.
        self.btf: Btf | None = None
        self.key_size = spec.key_size
        self.value_size = spec.value_size
        self.max_entries = spec.max_entries
        self.flags = spec.flags | (0 if spec.numa_node is None else uapi.BPF_F_NUMA_NODE)
        self.map_extra = spec.map_extra
        self.cpus = environment.cpus
        self.check_creation()
        self.special = special_fields(spec)
        self.has_lock = any(field.name == "bpf_spin_lock" for field in self.special)
        #: What is in the fields of values that are the kernel's own, by their address.
        self.kept: dict[int, Kept] = {}
        # Those are rights of the descriptor, not the map's.
        self.flags &= ~(uapi.BPF_F_RDONLY | uapi.BPF_F_WRONLY)
        self.frozen = False
        #: Files and pins by which user space holds the map.
        self.users = 0
        self.allocate()
        self.name = object_name(spec.name)
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

    def chunk(self, token: bytes | None, count: int) -> tuple[list[bytes], list[bytes], bytes | None]:
        """Up to `count` keys and values from `token` on, and where to go on; None at the end."""
        raise refused(ENOTSUPP)

    def put_through(self, file: object, key: bytes) -> None:
        """User space has updated an element through a descriptor of this file."""

    def closed(self, file: object) -> None:
        """The last descriptor of a file is closed."""

    def abandoned(self) -> None:
        """User space has no descriptor and no pin left; programs may still use the map."""
        for address in [address for address, kept in self.kept.items() if kept.needs_user]:
            self.kept.pop(address).free()

    def free_fields(self, value: int) -> None:
        """The value at this address is gone or written over, and with it what the kernel keeps in it."""
        for field in self.special:
            kept = self.kept.pop(value + field.offset, None)
            if kept is not None:
                kept.free()
            if field.is_pointer:
                at = (value & M32) + field.offset
                memory = REGIONS[value >> 32].buffer
                memory[at : at + field.size] = bytes(field.size)  # type: ignore[index]

    def key_at(self, value: int) -> bytes:
        """The key of the element whose value is, or was, at this address."""
        raise NotImplementedError

    def contains(self, value: bytes) -> bool:
        """Whether the value is in a map that can only be asked that."""
        raise refused(errno.EINVAL)

    def memory(self, offset: int, size: int, writable: bool) -> memoryview:
        """What mmap(2) gives of a `mappable` map."""
        raise NotImplementedError

    def is_mapped(self) -> bool:
        """Whether user space has mapped the map for writing."""
        return False

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
        region = Region(
            page_buffer(size),
            readable=not self.flags & uapi.BPF_F_WRONLY_PROG,
            writable=not self.flags & uapi.BPF_F_RDONLY_PROG,
        )
        if self.special:
            _SPECIAL[region.number] = self
        return region

    def cleared(self, value: bytes) -> bytes:
        """A value, or all processors' values, as it is stored and read: fields that are the kernel's own are 0."""
        if not self.special:
            return value
        out = bytearray(value)
        for start in range(0, len(out), self.slot_size):
            for _, offset, size in self.special:
                out[start + offset : start + offset + size] = bytes(size)
        return bytes(out)

    @property
    def slot_size(self) -> int:
        """Bytes from one value, or one processor's value, to the next."""
        return round8(self.value_size)

    @property
    def user_value_size(self) -> int:
        """Bytes of a value as user space passes it."""
        return round8(self.value_size) * self.cpus if self.per_cpu else self.value_size


_ids = itertools.count(1)
#: Maps by id, while anybody holds them.
MAPS: WeakValueDictionary[int, Map] = WeakValueDictionary()
#: Maps with special fields, by the numbers of the regions that have their values.
_SPECIAL: WeakValueDictionary[int, Map] = WeakValueDictionary()


def field_at(address: int, name: str) -> tuple[Map, int]:
    """The map whose special field lies at an address, and the address of its value; faults where there is none."""
    found = _SPECIAL.get(address >> 32)
    if found is not None:
        for field in found.special:
            if field.name == name and (address & M32) % found.slot_size == field.offset:
                return found, address - field.offset
    raise EmulationFault(f"no {name} of a map's value is here", address=address)
