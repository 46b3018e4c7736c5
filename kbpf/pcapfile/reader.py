"""Opening capture files of either format, from wherever their bytes come."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal

from kbpf.pcapfile import pcap, pcapng
from kbpf.pcapfile.records import CaptureError, Interface, Record
from kbpf.pcapfile.stream import Stream


class Capture(Iterator[Record]):
    """An open capture file: an iterator over its records, once, and a context manager.

    `interfaces` grows while a pcapng file is read; a pcap file's one is there from the start.
    """

    def __init__(self, file: BinaryIO, owns_file: bool = False) -> None:
        self._file = file
        self._owns_file = owns_file
        self.interfaces: list[Interface] = []
        stream = Stream(file)
        magic = stream.read_up_to(4)
        self.format: Literal["pcap", "pcapng"]
        if magic == pcapng.MAGIC:
            self.format = "pcapng"
            self._records = pcapng.read_pcapng(stream, self.interfaces)
        elif len(magic) == 4 and pcap.byte_order(magic):
            self.format = "pcap"
            self._records = pcap.read_pcap(stream, magic, self.interfaces)
        else:
            raise CaptureError(f"this is no pcap or pcapng file: it begins with {magic.hex() or 'nothing'}", 0)

    def __next__(self) -> Record:
        return next(self._records)

    def close(self) -> None:
        """Close the file, if it was opened here."""
        if self._owns_file:
            self._file.close()

    def __enter__(self) -> Capture:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_capture(source: str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO) -> Capture:
    """Open a capture by path, or read one from bytes or from a binary file object, which stays the caller's.

    Raises `CaptureError` if it does not begin like a pcap or pcapng file, `OSError` if it cannot be opened.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return Capture(io.BytesIO(source))
    if not isinstance(source, (str, os.PathLike)):
        return Capture(source)
    file = Path(source).open("rb")  # noqa: SIM115  the Capture closes it
    try:
        return Capture(file, owns_file=True)
    except BaseException:
        file.close()
        raise
