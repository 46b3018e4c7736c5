"""Capture files as Ethernet frames for an emulated interface."""

from __future__ import annotations

import os
from collections.abc import Iterator

from kbpf.emulator import ethernet
from kbpf.pcapfile import CaptureError, Record, open_capture

_DLT_EN10MB, _DLT_RAW, _DLT_LINUX_SLL, _DLT_LINUX_SLL2 = 1, 12, 113, 276


class Replay(Iterator[tuple[bytes, int, int]]):
    """Each packet of a capture as (frame, length on the wire, nanoseconds since 1970).

    Opens the file at once, so that a missing one is seen when it is asked for, and closes it at its end. Raises
    `CaptureError` for damage and for link types that cannot be made Ethernet: those but Ethernet, raw IP and
    Linux's cooked captures.
    """

    def __init__(self, source: str | os.PathLike[str] | bytes) -> None:
        self._capture = open_capture(source)

    def __next__(self) -> tuple[bytes, int, int]:
        try:
            while True:
                record = next(self._capture)
                frame = _frame(record)
                if len(frame) >= ethernet.HEADER:
                    wirelen = record.wirelen + len(frame) - len(record.data)
                    return frame, max(wirelen, len(frame)), record.timestamp_ns
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._capture.close()


def _frame(record: Record) -> bytes:
    data = record.data
    if record.dlt == _DLT_EN10MB:
        return data
    if record.dlt == _DLT_RAW:
        return bytes(12) + ethernet.ip_protocol(data).to_bytes(2, "big") + data
    if record.dlt == _DLT_LINUX_SLL:
        return bytes(6) + data[6:12] + data[14:]
    if record.dlt == _DLT_LINUX_SLL2:
        return bytes(6) + data[12:18] + data[:2] + data[20:]
    raise CaptureError(f"packets of link type {record.dlt} cannot be played on an Ethernet interface", 0)
