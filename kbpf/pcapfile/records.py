"""What a capture file holds, and what may be wrong with it."""

from __future__ import annotations

from typing import Any, NamedTuple

from kbpf.errors import KbpfError


class CaptureError(KbpfError, ValueError):
    """A capture file is not one, is cut off or is corrupt; `offset` is the byte where that was seen.

    Where `kbpf.run_capture` raised it, `file` is the file's name, if it was given by name, `result` what came out of
    all files, and `others` are the errors of other files.
    """

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message, offset)
        self.message = message
        self.offset = offset
        self.file: str | None = None
        self.result: Any = None
        self.others: list[CaptureError] = []

    def __str__(self) -> str:
        where = "" if self.file is None else f"{self.file}: "
        return f"{where}{self.message} (at byte {self.offset})"


class Interface(NamedTuple):
    """Where packets were captured. A pcap file has one; a pcapng file may have several, each with its own link type."""

    #: DLT_* of the link header.
    dlt: int
    #: Most bytes kept of a packet; 0 for no limit.
    snaplen: int = 0
    name: str = ""
    #: Timestamp ticks in a second, and seconds to add to every timestamp.
    ticks: int = 1_000_000
    offset_seconds: int = 0

    def nanoseconds(self, ticks: int) -> int:
        """A timestamp of this interface as nanoseconds since 1970."""
        return (self.offset_seconds * self.ticks + ticks) * 1_000_000_000 // self.ticks


class Record(NamedTuple):
    """One packet of a capture file.

    `wirelen` is its length on the wire, `data` the bytes that were kept of it. `timestamp_ns` counts from
    1970; it is 0 where the file has none (pcapng's simple packets). `interface` is an index into
    `Capture.interfaces`.
    """

    timestamp_ns: int
    data: bytes
    wirelen: int
    dlt: int = 1
    interface: int = 0
