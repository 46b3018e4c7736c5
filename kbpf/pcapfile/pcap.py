"""The pcap format: one header, then records of a 16-byte header and the packet.

The magic number tells the byte order and the resolution of the timestamps. As in
draft-ietf-opsawg-pcap; version 2.4 is the only one in use.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from kbpf.pcapfile.linktypes import dlt_of_linktype
from kbpf.pcapfile.records import CaptureError, Interface, Record
from kbpf.pcapfile.stream import MAX_RECORD, Stream

HEADER_SIZE = 24


class _Variant(NamedTuple):
    ticks: int
    #: Bytes after the usual 16 of a record's header.
    extra: int = 0


#: By magic number. The third is a Linux variant of the nineties that libpcap still reads.
VARIANTS = {
    0xA1B2C3D4: _Variant(1_000_000),
    0xA1B23C4D: _Variant(1_000_000_000),
    0xA1B2CD34: _Variant(1_000_000, extra=8),
}

# The upper bits of the link-type field tell the length of the frame check sequence.
_LINKTYPE_MASK = 0x03FFFFFF


def byte_order(magic: bytes) -> str | None:
    """``"<"`` or ``">"`` as `struct` takes it, or None if this is no pcap file."""
    for order in "<>":
        if struct.unpack(order + "I", magic)[0] in VARIANTS:
            return order
    return None


class Header(NamedTuple):
    """What a file's header says of its records: their byte order and headers, and where they were captured."""

    order: str
    record: struct.Struct
    interface: Interface


def read_pcap(stream: Stream, magic: bytes, interfaces: list[Interface]) -> Iterator[Record]:
    """The records of a pcap file whose first four bytes, `magic`, were read. Its interface is appended at once."""
    header = read_header(stream, magic)
    interfaces.append(header.interface)
    return _records(stream, header)


def read_header(stream: Stream, magic: bytes) -> Header:
    """The header of a pcap file whose first four bytes were read."""
    order = byte_order(magic) or "<"
    header = magic + stream.read(HEADER_SIZE - len(magic), "the pcap header")
    number, major, _minor, _zone, _accuracy, snaplen, linktype = struct.unpack(order + "IHHiIII", header)
    if major != 2:
        raise CaptureError(f"pcap version {major} is unknown, version 2 is expected", 4)
    variant = VARIANTS[number]
    interface = Interface(dlt_of_linktype(linktype & _LINKTYPE_MASK), snaplen, ticks=variant.ticks)
    return Header(order, struct.Struct(f"{order}IIII{variant.extra}x"), interface)


def _records(stream: Stream, header: Header) -> Iterator[Record]:
    while (record := read_record(stream, header)) is not None:
        yield record


def read_record(stream: Stream, header: Header) -> Record | None:
    """The next record; None at the end of the file."""
    start, interface = stream.offset, header.interface
    raw = stream.read_up_to(header.record.size)
    if not raw:
        return None
    if len(raw) < header.record.size:
        raise CaptureError("the file ends within a record's header", stream.offset)
    seconds, fraction, kept, wirelen = header.record.unpack(raw)
    if kept > MAX_RECORD:
        raise CaptureError(f"a record says that it has {kept} bytes", start)
    data = stream.read(kept, "a packet")
    stamp = seconds * 1_000_000_000 + fraction * (1_000_000_000 // interface.ticks)
    return Record(stamp, data, wirelen, interface.dlt)
