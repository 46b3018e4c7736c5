"""Maps of what the kernel holds by descriptors: programs, maps, sockets, events, control groups.

User space stores a descriptor, and the map holds what it stands for, also when the descriptor is closed. What is read
back is another number, an id or a cookie, or nothing at all. So objects are stored and not numbers, which keeps an id
from being taken for a descriptor.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import TYPE_CHECKING, Any, ClassVar

from kbpf.backend import Backend
from kbpf.runtime.codecs import Codec, codec
from kbpf.runtime.failures import doing
from kbpf.runtime.map import Map
from kbpf.runtime.maps.arrays import IndexedMap
from kbpf.runtime.maps.base import STORES, BpfMap
from kbpf.runtime.resource import Resource
from kbpf.types import Int
from kbpf.uapi.constants import BPF_ANY

if TYPE_CHECKING:
    from kbpf.runtime.program import Program

_NUMBERS = {4: Int(name="__u32", size=4), 8: Int(name="__u64", size=8)}


def descriptor_of(value: Any, backend: Backend, wanted: str) -> int:
    """The descriptor of an object; `TypeError` for what has none, `ValueError` for the other backend's."""
    if isinstance(value, Resource) and value.backend != backend.name:
        raise ValueError(f"{value.label} is the {value.backend}'s, the map the {backend.name}'s")
    if not hasattr(value, "fileno"):
        raise TypeError(f"{value!r} is no {wanted}")
    fd: int = value.fileno()
    return fd


class References(Map):
    """A map that takes objects for values and gives numbers for them.

    Bytes are taken as they are, for those who have a descriptor alone.
    """

    #: What a value is, for messages.
    wanted: ClassVar[str]
    holds_data = False

    def _codecs(self) -> tuple[Codec, Codec]:
        key, value = super()._codecs()
        number = codec(_NUMBERS.get(value.size), value.size)

        def encode(value: Any) -> bytes:
            if isinstance(value, (bytes, bytearray, memoryview)):
                return number.encode(value)
            return descriptor_of(value, self._backend, self.wanted).to_bytes(number.size, sys.byteorder)

        return key, number._replace(encode=encode)


class ProgramArray(References, IndexedMap):
    """Where bpf_tail_call finds programs: ``array[0] = program``; reading gives the program's id.

    The first program says of which type all must be (`BpfError` EINVAL for others). Only programs that are stored keep
    running when their objects are closed; the array lets go of all of them when user space has let go of it, with no
    descriptor and no pin left.
    """

    wanted = "Program"
    has_gaps = True

    def _hints(self, number: int, operation: str) -> tuple[str, ...]:
        if number == errno.EINVAL and operation in STORES:
            kind = self.info.owner_type
            return (f"the first program said that all are of type {kind}",) if kind else ()
        return super()._hints(number, operation)

    def program(self, index: int) -> Program:
        """Open the program at an index: the caller closes it. Needs CAP_SYS_ADMIN."""
        from kbpf.runtime.program import Program

        return Program.open(id=self[index], backend=self.backend)


class MapOfMaps(References):
    """Maps by key: ``outer[key] = inner``; reading gives the inner map's id.

    All must be like the template that it was made with (`BpfError` EINVAL for others).
    """

    wanted = "map"
    has_gaps = True

    def _hints(self, number: int, operation: str) -> tuple[str, ...]:
        if number == errno.EINVAL and operation in STORES:
            return ("maps in it have the type, sizes and flags of its template, arrays its max_entries too",)
        return super()._hints(number, operation)

    def inner(self, at: Any, /, *, key: Any = None, value: Any = None) -> BpfMap:
        """Open the map at a key of this one: the caller closes it. Needs CAP_SYS_ADMIN.

        `key` and `value` say what its keys and values are, as for `open`. Raises `KeyError` where there is none.
        """
        return BpfMap.open(id=self[at], backend=self.backend, key=key, value=value)


class ArrayOfMaps(MapOfMaps, IndexedMap):
    """The same by index."""


class SocketMap(References):
    """Sockets by key, which programs find and redirect to; reading gives the socket's cookie.

    A socket that is closed leaves the map. Where values have 4 bytes nothing can be read (ENOSPC): make them 8.
    """

    wanted = "socket"

    def _hints(self, number: int, operation: str) -> tuple[str, ...]:
        if number == errno.ENOSPC and "lookup" in operation:
            return ("values of 4 bytes have no room for a socket's cookie: create the map with values of 8",)
        return super()._hints(number, operation)


class SocketArray(SocketMap, IndexedMap):
    """The same by index: sockmap, reuseport_sockarray, and xskmap, of which nothing can be read."""

    has_gaps = True

    def _is_missing(self, error: OSError) -> bool:
        return super()._is_missing(error) or (self.type == "sockmap" and error.errno == errno.EINVAL)


class EventArray(References, IndexedMap):
    """Perf events by processor; `events` reads what programs send. Nothing can be read back."""

    wanted = "perf event: pass what has its descriptor"
    has_gaps = True


class CgroupArray(References, IndexedMap):
    """Control groups of version 2 by index, for programs to ask whether they run in one. Nothing can be read back.

    ``array[0] = "/sys/fs/cgroup/web"`` or an open directory.
    """

    wanted = "directory of a control group"
    has_gaps = True

    def update_element(self, key: Any, value: Any, flags: int = BPF_ANY) -> None:
        if not isinstance(value, (str, os.PathLike)):
            super().update_element(key, value, flags)
            return
        with doing(self._backend, f"store {os.fspath(value)} in {self.label}", operation="map_update_elem"):
            fd = os.open(value, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            super().update_element(key, fd.to_bytes(4, sys.byteorder), flags)
        finally:
            os.close(fd)


class Storage(Map):
    """Values that belong to objects, and go with them: sockets, files, processes, control groups.

    Keys are what has the object's descriptor, or the number of one: ``storage[sock]``, ``storage[os.pidfd_open(pid)]``.
    The object is meant, so any descriptor of it finds the value. Nobody can list the keys: walking over the map, `len`
    and `snapshot` raise `NotSupportedError`.
    """

    def _codecs(self) -> tuple[Codec, Codec]:
        _, value = super()._codecs()
        number = codec(Int(name="int", size=4, signed=True), self.shape.key_size)

        def encode(key: Any) -> bytes:
            if isinstance(key, (int, bytes, bytearray, memoryview)):
                return number.encode(key)
            return number.encode(descriptor_of(key, self._backend, "descriptor"))

        # No packer: an object is no number that one could pack.
        return Codec(number.size, encode, number.decode, number.decode_many), value
