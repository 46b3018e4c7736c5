"""Capture files as far as their first header, read from what is at hand of them (`kbpf.pcapfile.windows`)."""

from __future__ import annotations

from kbpf.pcapfile import pcap, pcapng
from kbpf.pcapfile.records import CaptureError, Interface, Record
from kbpf.pcapfile.stream import MAX_RECORD, Stream
from kbpf.pcapfile.windows import Windows


class View:
    """A file over what is at hand of another one, from a position on."""

    def __init__(self, windows: Windows, position: int) -> None:
        self._windows, self._position = windows, position

    def read(self, size: int) -> bytes:
        data = self._windows.copy(self._position, size)
        self._position += len(data)
        return data


class Pcap:
    """A pcap file as far as its header."""

    name = "pcap"

    def __init__(self, stream: Stream, magic: bytes) -> None:
        self._header = header = pcap.read_header(stream, magic)
        self.interfaces = [header.interface]
        self.first = 0
        self.order, self.record_header = header.order, header.record.size
        #: Where the records begin, and what files must have in common to be written into one.
        self.start = stream.offset
        self.kind = ("pcap", header.order, header.record.size, header.interface.dlt, header.interface.ticks)

    def read(self, stream: Stream) -> Record | None:
        return pcap.read_record(stream, self._header)


class Pcapng:
    """A pcapng file as far as its first section header. All of it is copied but packets that do not match."""

    name = "pcapng"
    record_header = 0
    start = 0
    kind = ("pcapng",)

    def __init__(self, stream: Stream) -> None:
        self.interfaces: list[Interface] = []
        self._blocks = pcapng.Blocks(stream, self.interfaces)

    @property
    def first(self) -> int:
        return self._blocks.first

    @property
    def order(self) -> str:
        return self._blocks.order

    def read(self, stream: Stream) -> Record | None:
        self._blocks.stream = stream
        return self._blocks.read()


def first_section(windows: Windows) -> tuple[Pcapng, Stream]:
    """A pcapng file that was read up to the end of its first section header, however long that is."""
    while True:
        stream = Stream(View(windows, 0))
        stream.skip(len(pcapng.MAGIC), "the section header")
        try:
            return Pcapng(stream), stream
        except CaptureError:
            if not cut_off(windows, stream):
                raise
        windows.more(0)


def cut_off(windows: Windows, stream: Stream, position: int = 0) -> bool:
    """Whether what was read from a position on may have been bad only as the end of what is at hand cut it off."""
    at_hand = len(windows.buffer)
    return not windows.final and stream.offset == windows.base + at_hand and at_hand - position <= 2 * MAX_RECORD
