"""Regions under 64-bit addresses: all that an emulated program can reach.

An emulated address is ``region << 32 | offset``. Registers and memory hold plain u64, so an address survives
spills, maps and arithmetic; what it points to is decided, with bounds and rights, at each access. Region 0 is
never there, so NULL and small numbers fault.

Regions below `FIRST_SHARED` belong to one run: its context, its stack, its packet. The others outlive runs: map
values and map handles. `REGIONS` holds those weakly; they go with the map that owns them, and a number is never used
again.
"""

from __future__ import annotations

import itertools
import struct
import weakref
from mmap import mmap
from typing import Protocol, TypeAlias
from weakref import WeakValueDictionary

from kbpf.errors import EmulationFault

M32 = 0xFFFFFFFF
M64 = 0xFFFFFFFFFFFFFFFF

CONTEXT, STACK, PACKET, FLOW_KEYS = 1, 2, 3, 4
FIRST_SHARED, FIRST_FREE = 0x100, 0x10

MutableBuffer: TypeAlias = "bytearray | memoryview | mmap"
Buffer: TypeAlias = "bytes | MutableBuffer"

#: Loads and stores by size, in the machine's byte order as on Linux.
UNSIGNED = {1: struct.Struct("=B"), 2: struct.Struct("=H"), 4: struct.Struct("=I"), 8: struct.Struct("=Q")}


class Region:
    """What outlives a run, under a number of its own.

    Bytes; or `fields`, where an object's structure is computed; or, without rights, a handle that programs pass on.
    """

    __slots__ = ("__weakref__", "buffer", "fields", "number", "owner", "readable", "writable")

    def __init__(
        self,
        buffer: Buffer = b"",
        *,
        readable: bool = True,
        writable: bool = True,
        owner: weakref.ref[object] | None = None,
        fields: Fields | None = None,
    ) -> None:
        self.number = next(_numbers)
        self.buffer = buffer
        self.fields = fields
        self.readable = readable
        self.writable = writable
        self.owner = owner
        REGIONS[self.number] = self

    @property
    def address(self) -> int:
        return self.number << 32


# Native code finds regions by the low byte of their number, of which the first few are the runs' own. No generator:
# threads may be at it together.
_numbers = filter(lambda number: number & 0xFF >= FIRST_FREE, itertools.count(FIRST_SHARED))
REGIONS: WeakValueDictionary[int, Region] = WeakValueDictionary()


class Fields(Protocol):
    """A region that is computed rather than stored: a context, whose fields may be pointers, or a kernel object."""

    def load(self, offset: int, size: int) -> int | None:
        """The field as an unsigned number; None where such a load is not allowed."""
        ...

    def store(self, offset: int, size: int, value: int) -> bool:
        """Whether the store is allowed."""
        ...


class Space:
    """What one run can reach.

    `readable` and `writable` are what the engines look into first: buffers by region number. What is not there
    (shared regions on first use, computed ones, and faults) goes through the methods.
    """

    __slots__ = ("readable", "writable")

    def __init__(self) -> None:
        self.readable: dict[int, Buffer] = {}
        self.writable: dict[int, MutableBuffer] = {}

    def fields(self, number: int) -> Fields | None:
        """The computed region with this number."""
        region = REGIONS.get(number)
        return None if region is None else region.fields

    def load(self, address: int, size: int) -> int:
        """An unsigned number of 1, 2, 4 or 8 bytes."""
        address &= M64
        fields = self.fields(address >> 32)
        if fields is not None:
            value = fields.load(address & M32, size)
            if value is None:
                raise EmulationFault(f"invalid context access of {size} bytes at {address & M32}", address=address)
            return value
        buffer, offset = self._readable(address, size)
        return int(UNSIGNED[size].unpack_from(buffer, offset)[0])

    def store(self, address: int, size: int, value: int) -> None:
        """Store the low `size` bytes of an unsigned number."""
        address &= M64
        fields = self.fields(address >> 32)
        if fields is not None:
            if not fields.store(address & M32, size, value & ((1 << 8 * size) - 1)):
                raise EmulationFault(f"invalid context write of {size} bytes at {address & M32}", address=address)
            return
        buffer, offset = self._writable(address, size)
        UNSIGNED[size].pack_into(buffer, offset, value & ((1 << 8 * size) - 1))

    def read(self, address: int, size: int) -> bytes:
        """Bytes that a program handed over by address."""
        buffer, offset = self._readable(address & M64, size)
        return bytes(buffer[offset : offset + size])

    def write(self, address: int, data: bytes) -> None:
        buffer, offset = self._writable(address & M64, len(data))
        buffer[offset : offset + len(data)] = data

    def check_writable(self, address: int, size: int) -> None:
        """Fault unless `size` bytes may be written there."""
        self._writable(address & M64, size)

    def owner(self, address: int) -> object:
        """What the handle at `address` stands for; None if nothing."""
        region = REGIONS.get(address >> 32)
        return None if region is None or region.owner is None or address & M32 else region.owner()

    def keep(self, region: Region) -> None:
        """The region's owner lets go of it; this run may still hold its address."""
        if region.readable:
            self.readable[region.number] = region.buffer
        if region.writable and not isinstance(region.buffer, bytes):
            self.writable[region.number] = region.buffer

    def forget(self, region: Region) -> None:
        """The region is gone for this run; who holds its address faults."""
        self.readable.pop(region.number, None)
        self.writable.pop(region.number, None)
        REGIONS.pop(region.number, None)

    def _readable(self, address: int, size: int) -> tuple[Buffer, int]:
        number, offset = address >> 32, address & M32
        buffer = self.readable.get(number)
        if buffer is None:
            region = REGIONS.get(number)
            if region is None or not region.readable:
                raise EmulationFault(f"invalid read of {size} bytes", address=address)
            buffer = self.readable[number] = region.buffer
        if offset + size > len(buffer):
            raise EmulationFault(f"read of {size} bytes out of bounds", address=address)
        return buffer, offset

    def _writable(self, address: int, size: int) -> tuple[MutableBuffer, int]:
        number, offset = address >> 32, address & M32
        buffer = self.writable.get(number)
        if buffer is None:
            region = REGIONS.get(number)
            if region is None or not region.writable or isinstance(region.buffer, bytes):
                raise EmulationFault(f"invalid write of {size} bytes", address=address)
            buffer = self.writable[number] = region.buffer
        if offset + size > len(buffer):
            raise EmulationFault(f"write of {size} bytes out of bounds", address=address)
        return buffer, offset
