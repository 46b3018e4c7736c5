"""The bytes of a capture file in pieces, for readers that look at memory: mapped, or read where that cannot be.

Gzip and zstd are recognised by their first bytes; zstd needs the `zstd` extra.
"""

from __future__ import annotations

import errno
import io
import mmap
import os
import stat
import sys
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from kbpf.errors import MissingDependencyError
from kbpf.pcapfile.records import CaptureError
from kbpf.pcapfile.stream import Readable

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_MADV_POPULATE_READ = 22
#: Bytes that are read at a time.
PIECE = 1 << 22
#: Bytes of a mapped file that are looked at together before they are touched.
SLICE = 1 << 20


class _Rest:
    """A file of which the first bytes were read, from its beginning all the same, in pieces that are whole."""

    def __init__(self, first: bytes, file: Readable) -> None:
        self._first, self._file = first, file

    def read(self, size: int) -> bytes:
        parts, self._first = [self._first[:size]], self._first[size:]
        left = size - len(parts[0])
        while left:
            data = self._file.read(left)
            if data is None:
                raise BlockingIOError(errno.EAGAIN, "a capture is read from a file that waits for its data")
            if not data:
                break
            parts.append(data)
            left -= len(data)
        return b"".join(parts)


class Windows:
    """A context manager over a file, by path (``"-"`` is standard input) or as an open binary file, left open.

    `buffer` is what is at hand, `base` the offset of its first byte, after decompression; `final` says that nothing
    follows it. `more` brings the next piece. `size` is the file's, 0 where it is not known.
    """

    def __init__(self, source: str | os.PathLike[str] | BinaryIO) -> None:
        self.base, self.final = 0, False
        self.buffer: Any = b""
        self._mapped: mmap.mmap | None = None
        #: A part of a mapped file that was read, and where it begins.
        self._part, self._part_at = b"", 0
        self._owned = False
        if isinstance(source, (str, os.PathLike)):
            self._owned = os.fspath(source) != "-"
            file: Any = Path(source).open("rb") if self._owned else sys.stdin.buffer  # noqa: SIM115
        else:
            file = source
        self._file = file
        try:
            self.size = _size(file)
            # A pipe may bring them one by one.
            magic = _Rest(b"", file).read(4)
            whole = _Rest(magic, file)
            self.compressed = magic[:2] == _GZIP or magic == _ZSTD
            self._reader = _decompressed(whole, magic) if self.compressed else whole
            if self.size and not self.compressed and self._owned:
                self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self.buffer, self.final = self._mapped, True
            else:
                self.more(0)
        except BaseException:
            self.close()
            raise

    @property
    def consumed(self) -> int:
        """How far into the file itself, compressed as it may be, has been read."""
        if self.final and not self.compressed:
            return self.base + len(self.buffer)
        try:
            return int(self._file.tell())
        except (OSError, ValueError):
            return self.base + len(self.buffer)

    def populate(self, position: int, size: int) -> int:
        """Have the pages of a mapped file ready, all at once rather than one by one when they are touched.

        Returns where what may be touched then ends: behind `size` bytes, or where the buffer does. Raises
        `CaptureError` where somebody has cut the file off meanwhile: pages behind its end may not be touched.
        """
        end = min(position + size, len(self.buffer))
        if self._mapped is not None:
            self.check(position, end)
            start = position - position % mmap.PAGESIZE
            try:
                # Linux 5.14.
                self._mapped.madvise(_MADV_POPULATE_READ, start, end - start)
            except OSError as error:
                if error.errno == errno.EFAULT:
                    raise _shorter(position) from None
        return end

    def check(self, position: int, end: int) -> None:
        """Raise `CaptureError` where a mapped file does not go on to `end` any longer."""
        if self._mapped is not None and os.fstat(self._file.fileno()).st_size < end:
            raise _shorter(position)

    def copy(self, position: int, size: int) -> bytes:
        """`size` bytes of the buffer, fewer at its end. Raises `CaptureError` as `populate` does.

        Mapped memory is not touched for it: it is not known how long ago somebody has looked at it.
        """
        if self._mapped is None:
            return bytes(self.buffer[position : position + size])
        size = min(size, len(self.buffer) - position)
        start = position - self._part_at
        if start < 0 or start + size > len(self._part):
            self._part, self._part_at, start = os.pread(self._file.fileno(), max(size, SLICE), position), position, 0
            if len(self._part) < size:
                raise _shorter(position)
        return self._part[start : start + size]

    def more(self, position: int) -> None:
        """Drop what lies before `position` of the buffer, and read on; raises `CaptureError` for bad compression."""
        rest = bytes(self.buffer[position:])
        try:
            # What is left over is small, but where a record is larger than a piece.
            read = self._reader.read(max(PIECE, len(rest)))
        except (EOFError, OSError, zlib.error, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise CaptureError(f"the compressed file is damaged: {error}", self.base + len(self.buffer)) from None
        self.base += position
        self.buffer = rest + (read or b"")
        self.final = not read

    def close(self) -> None:
        if self._mapped is not None:
            self.buffer = b""
            self._mapped.close()
        if self._owned:
            self._file.close()

    def __enter__(self) -> Windows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _shorter(position: int) -> CaptureError:
    return CaptureError("the file has become shorter while it was read", position)


def _size(file: Any) -> int:
    try:
        status = os.fstat(file.fileno())
    except (AttributeError, OSError, io.UnsupportedOperation):
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def _decompressed(file: Any, magic: bytes) -> Any:
    if magic[:2] == _GZIP:
        import gzip

        return gzip.GzipFile(fileobj=file, mode="rb")
    try:
        import zstandard
    except ImportError:
        raise MissingDependencyError(
            "zstandard, which reads zstd files, is not installed: pip install 'kbpf[zstd]'"
        ) from None
    return zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
