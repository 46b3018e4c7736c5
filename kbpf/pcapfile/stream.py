"""Reading exact amounts from a binary stream that may end anywhere, without trusting its lengths."""

from __future__ import annotations

from typing import Protocol

from kbpf.pcapfile.records import CaptureError

#: A record longer than this is taken for corruption; the largest link types in use stay below.
MAX_RECORD = 128 * 1024 * 1024
_CHUNK = 1024 * 1024


class Readable(Protocol):
    """What can be read from."""

    def read(self, size: int, /) -> bytes | None: ...


class Stream:
    """A binary stream and how far it has been read. Pipes and sockets, which return short reads, work too."""

    def __init__(self, file: Readable) -> None:
        self._file = file
        self.offset = 0

    def read_up_to(self, size: int) -> bytes:
        """`size` bytes, or fewer at the end of the file. Memory follows what is there, not what is asked for."""
        data = self._file.read(min(size, _CHUNK)) or b""
        self.offset += len(data)
        if len(data) == size:
            return data
        parts = [data]
        left = size - len(data)
        while left and parts[-1]:
            parts.append(self._file.read(min(left, _CHUNK)) or b"")
            left -= len(parts[-1])
            self.offset += len(parts[-1])
        return b"".join(parts)

    def read(self, size: int, what: str) -> bytes:
        """`size` bytes; raises `CaptureError` naming `what` where the file ends before."""
        data = self.read_up_to(size)
        if len(data) < size:
            raise CaptureError(f"the file ends within {what}: {len(data)} of {size} bytes", self.offset)
        return data

    def skip(self, size: int, what: str) -> None:
        """Read past `size` bytes."""
        while size:
            size -= len(self.read(min(size, _CHUNK), what))
