"""Writing pcap files."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from kbpf.pcapfile.linktypes import linktype_of_dlt
from kbpf.pcapfile.records import CaptureError, Record

_RESOLUTIONS = {1_000_000_000: 0xA1B23C4D, 1_000_000: 0xA1B2C3D4}


class PcapWriter:
    """Writes packets of one link type to a pcap file, in native byte order; a context manager.

    `target` is a path, or a binary file object, which stays the caller's. `ticks` is the resolution of
    the timestamps in ticks a second: nanoseconds, or microseconds for the oldest readers.
    """

    def __init__(
        self,
        target: str | os.PathLike[str] | BinaryIO,
        dlt: int = 1,
        *,
        snaplen: int = 262144,
        ticks: int = 1_000_000_000,
    ) -> None:
        if ticks not in _RESOLUTIONS:
            raise ValueError(f"timestamps of a pcap file have 10**6 or 10**9 ticks a second, not {ticks}")
        header = struct.pack("=IHHiIII", _RESOLUTIONS[ticks], 2, 4, 0, 0, snaplen, linktype_of_dlt(dlt))
        self.dlt = dlt
        self._nanoseconds_per_tick = 1_000_000_000 // ticks
        self._snaplen = snaplen
        self._owns_file = isinstance(target, (str, os.PathLike))
        self._file = Path(target).open("wb") if isinstance(target, (str, os.PathLike)) else target  # noqa: SIM115
        self._offset = len(header)
        self._file.write(header)

    def write(self, data: bytes, timestamp_ns: int = 0, wirelen: int | None = None) -> None:
        """Write one packet, cut to the file's snaplen; `wirelen` is its length on the wire, if not that of `data`.

        Raises `CaptureError` for a time that does not fit (before 1970 or after 2106).
        """
        kept = data[: self._snaplen]
        seconds, nanoseconds = divmod(timestamp_ns, 1_000_000_000)
        try:
            header = struct.pack(
                "=IIII",
                seconds,
                nanoseconds // self._nanoseconds_per_tick,
                len(kept),
                len(data) if wirelen is None else wirelen,
            )
        except struct.error:
            raise CaptureError(
                f"a pcap file has no room for time {timestamp_ns} ns, wirelen {wirelen}", self._offset
            ) from None
        self._file.write(header + kept)
        self._offset += len(header) + len(kept)

    def write_record(self, record: Record) -> None:
        """Write a record as it was read; raises `CaptureError` if its link type is not the file's."""
        if record.dlt != self.dlt:
            raise CaptureError(f"a packet of link type {record.dlt} in a file of link type {self.dlt}", self._offset)
        self.write(record.data, record.timestamp_ns, record.wirelen)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """Close the file, if it was opened here; flush it otherwise."""
        if self._owns_file:
            self._file.close()
        else:
            self._file.flush()

    def __enter__(self) -> PcapWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
