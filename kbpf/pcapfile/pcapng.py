"""The pcapng format: blocks in sections, each section with its own byte order and interfaces.

As in draft-ietf-opsawg-pcapng. Read: section header, interface description, enhanced, simple and the
obsolete packet block; other blocks are skipped.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from kbpf.pcapfile.linktypes import dlt_of_linktype
from kbpf.pcapfile.records import CaptureError, Interface, Record
from kbpf.pcapfile.stream import MAX_RECORD, Stream

#: The type of a section header block, the same in both byte orders.
MAGIC = b"\x0a\x0d\x0d\x0a"
_SECTION, _INTERFACE, _OBSOLETE_PACKET, _SIMPLE_PACKET, _ENHANCED_PACKET = 0x0A0D0D0A, 1, 2, 3, 6
_READ = (_INTERFACE, _OBSOLETE_PACKET, _SIMPLE_PACKET, _ENHANCED_PACKET)
_BYTE_ORDER_MAGIC = b"\x1a\x2b\x3c\x4d"
# Options of an interface description.
_END, _NAME, _RESOLUTION, _TIME_OFFSET = 0, 2, 9, 14


def read_pcapng(stream: Stream, interfaces: list[Interface]) -> Iterator[Record]:
    """The records of a pcapng file whose magic number was read. Appends to `interfaces` as it meets them."""
    return Blocks(stream, interfaces).records()


class Blocks:
    """Reads a file whose magic number was read, block by block.

    `order` is the byte order of the section, `first` where its interfaces begin in `interfaces`, to which those that
    are met are appended. `stream` may be replaced by another one that goes on where it was.
    """

    def __init__(self, stream: Stream, interfaces: list[Interface]) -> None:
        self.stream = stream
        self.interfaces = interfaces
        self.first = len(interfaces)
        self.order = _section(stream, stream.read(4, "the section header"))

    def records(self) -> Iterator[Record]:
        """All that are left."""
        while True:
            start = self.stream.offset
            record = self.read()
            if record is not None:
                yield record
            elif self.stream.offset == start:
                return

    def read(self) -> Record | None:
        """The record in the next block; None if it is of another kind, or if the file is at its end."""
        stream, order = self.stream, self.order
        start = stream.offset
        head = stream.read_up_to(8)
        if not head:
            return None
        if len(head) < 8:
            raise CaptureError("the file ends within a block's header", stream.offset)
        kind, total = struct.unpack(order + "II", head)
        if kind == _SECTION:
            self.order = _section(stream, head[4:])
            self.first = len(self.interfaces)
            return None
        if total < 12 or total % 4:
            raise CaptureError(f"a block says that it has {total} bytes", start)
        if kind not in _READ:
            stream.skip(total - 12, "a block")
        elif total > MAX_RECORD:
            raise CaptureError(f"a block says that it has {total} bytes", start)
        else:
            body = stream.read(total - 12, "a block")
        (again,) = struct.unpack(order + "I", stream.read(4, "a block"))
        if again != total:
            raise CaptureError(f"a block's length is {total} at its start and {again} at its end", stream.offset - 4)
        if kind == _INTERFACE:
            self.interfaces.append(_interface(body, order, start))
        elif kind in _READ:
            return _packet(kind, body, order, self.interfaces, self.first, start)
        return None


def _section(stream: Stream, length: bytes) -> str:
    """Read a section header after its type and length; returns the section's byte order."""
    start = stream.offset - 8
    magic = stream.read(4, "the section header")
    if magic not in (_BYTE_ORDER_MAGIC, _BYTE_ORDER_MAGIC[::-1]):
        raise CaptureError(f"a section's byte-order magic is {magic.hex()}", stream.offset - 4)
    order = ">" if magic == _BYTE_ORDER_MAGIC else "<"
    (total,) = struct.unpack(order + "I", length)
    if total < 28 or total % 4:
        raise CaptureError(f"a section header says that it has {total} bytes", start)
    (major,) = struct.unpack(order + "H", stream.read(2, "the section header"))
    if major != 1:
        raise CaptureError(f"pcapng version {major} is unknown, version 1 is expected", stream.offset - 2)
    stream.skip(total - 18, "the section header")
    (again,) = struct.unpack(order + "I", stream.read(4, "the section header"))
    if again != total:
        raise CaptureError(f"a block's length is {total} at its start and {again} at its end", stream.offset - 4)
    return order


def _interface(body: bytes, order: str, start: int) -> Interface:
    if len(body) < 8:
        raise CaptureError("an interface description is too short", start)
    linktype, snaplen = struct.unpack_from(order + "HxxI", body)
    name, ticks, offset_seconds = "", 1_000_000, 0
    position = 8
    while position + 4 <= len(body):
        code, size = struct.unpack_from(order + "HH", body, position)
        value = body[position + 4 : position + 4 + size]
        if code == _END:
            break
        if len(value) < size:
            raise CaptureError(f"option {code} of an interface description is cut off", start + 8 + position)
        if code == _NAME:
            name = value.decode(errors="replace")
        elif code == _RESOLUTION and size == 1:
            # The exponent of ten, or of two with the high bit set.
            ticks = 2 ** (value[0] & 0x7F) if value[0] & 0x80 else 10 ** value[0]
        elif code == _TIME_OFFSET and size == 8:
            (offset_seconds,) = struct.unpack(order + "q", value)
        position += 4 + size + -size % 4
    return Interface(dlt_of_linktype(linktype), snaplen, name, ticks, offset_seconds)


def _packet(kind: int, body: bytes, order: str, interfaces: list[Interface], first: int, start: int) -> Record:
    """A packet block as a record; `first` is where the section's interfaces begin in the list."""
    header = {
        _ENHANCED_PACKET: struct.Struct(order + "IIIII"),
        _OBSOLETE_PACKET: struct.Struct(order + "HxxIIII"),
        _SIMPLE_PACKET: struct.Struct(order + "I"),
    }[kind]
    if len(body) < header.size:
        raise CaptureError("a packet block is too short", start)
    index, high, low = 0, 0, 0
    room = len(body) - header.size
    if kind == _SIMPLE_PACKET:
        (wirelen,) = header.unpack_from(body)
        kept = min(wirelen, room)
    else:
        index, high, low, kept, wirelen = header.unpack_from(body)
    if first + index >= len(interfaces):
        raise CaptureError(f"a packet is from interface {index}, which was not described", start)
    interface = interfaces[first + index]
    if kind == _SIMPLE_PACKET:
        kept = min(kept, interface.snaplen or kept)
    if kept > room:
        raise CaptureError(f"a packet of {kept} bytes is in a block with room for {room}", start)
    timestamp = 0 if kind == _SIMPLE_PACKET else interface.nanoseconds(high << 32 | low)
    return Record(timestamp, body[header.size : header.size + kept], wirelen, interface.dlt, first + index)
