"""Memory that goes on at its start: the data of ring buffers."""

from __future__ import annotations

from kbpf.emulator.memory import MutableBuffer


class Circle:
    """`size` bytes from `start` on in a buffer; positions grow for ever. `size` is a power of two."""

    __slots__ = ("_buffer", "_start", "size")

    def __init__(self, buffer: MutableBuffer, start: int, size: int) -> None:
        self._buffer = buffer
        self._start = start
        self.size = size

    def read(self, position: int, size: int) -> bytes:
        at = position & self.size - 1
        first = self._slice(at, min(size, self.size - at))
        return first + self._slice(0, size - len(first))

    def write(self, position: int, data: bytes | bytearray) -> None:
        at = position & self.size - 1
        first = data[: self.size - at]
        start = self._start
        self._buffer[start + at : start + at + len(first)] = first
        self._buffer[start : start + len(data) - len(first)] = data[len(first) :]

    def _slice(self, at: int, size: int) -> bytes:
        return bytes(self._buffer[self._start + at : self._start + at + size])
