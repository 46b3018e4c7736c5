"""Capture files as Ethernet frames for an emulated interface."""

from __future__ import annotations

import os
from collections.abc import Iterator

from kbpf.emulator import ethernet
from kbpf.pcapfile import CaptureError, Record, open_capture

_DLT_EN10MB, _DLT_RAW, _DLT_LINUX_SLL, _DLT_LINUX_SLL2 = 1, 12, 113, 276


def frames(source: str | os.PathLike[str] | bytes) -> Iterator[tuple[bytes, int, int]]:
    """Each packet as (frame, length on the wire, nanoseconds since 1970).

    Opens the file at once, so that a missing one is seen when it is asked for. Raises `CaptureError` for damage
    and for link types that cannot be made Ethernet: those but Ethernet, raw IP and Linux's cooked captures.
    """
    capture = open_capture(source)

    def read() -> Iterator[tuple[bytes, int, int]]:
        with capture:
            for record in capture:
                frame = _frame(record)
                if len(frame) >= ethernet.HEADER:
                    yield frame, max(record.wirelen + len(frame) - len(record.data), len(frame)), record.timestamp_ns

    return read()


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
