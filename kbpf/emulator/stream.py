"""Sockets that carry bytes without bounds, and those that accept connections, as Python's `socket.socket` has them."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import Any, TypeVar

from kbpf.emulator.endpoint import MSG_PEEK, MSG_WAITALL, Ancillary, Endpoint, fill, room_in
from kbpf.emulator.slot import error

SelfStream = TypeVar("SelfStream", bound="StreamEndpoint")
SHUT_RD, SHUT_WR, SHUT_RDWR = range(3)


class StreamEndpoint(Endpoint):
    """A stream: subclasses fill `_incoming`, and say when nothing more can come."""

    def __init__(self, family: int, type: int, proto: int) -> None:
        super().__init__(family, type, proto)
        self._incoming = bytearray()

    def _ended(self) -> bool:
        """Whether nothing more can come."""
        raise NotImplementedError

    def _consumed(self, count: int) -> None:
        """So many bytes have been read."""
        raise NotImplementedError

    def _may_read(self) -> None:
        """`OSError` for a socket that cannot be read from at all."""

    def _raise_read_error(self) -> None:
        """Report what came in the meantime, before the end."""
        self._raise_error()

    def _transmit(self, data: bytes, flags: int) -> int:
        """Take some of the data, waiting until there is room; called under the lock."""
        raise NotImplementedError

    def _ready(self) -> bool:
        return bool(self._incoming) or bool(self._error) or self._ended()

    # Receiving.

    def _sender(self) -> Any:
        """The address of who sent what comes next; TCP does not tell it."""
        return None

    def _read(self, limit: int, flags: int) -> tuple[bytes, Any]:
        with self._arrived:
            self._open()
            self._may_read()
            whole = limit if flags & MSG_WAITALL else 1
            self._wait_for(self._ready, self._limit(flags))
            self._wait_for(
                lambda: len(self._incoming) >= whole or bool(self._error) or self._ended(), self._limit(flags)
            )
            if not self._incoming:
                self._raise_read_error()
            data = bytes(self._incoming[:limit])
            sender = self._sender() if data else None
            if data and not flags & MSG_PEEK:
                del self._incoming[: len(data)]
                self._consumed(len(data))
                self._signal()
            return data, sender

    def recv(self, bufsize: int, flags: int = 0) -> bytes:
        """At most `bufsize` bytes of what has come; none at the end."""
        if bufsize < 0:
            raise ValueError("negative buffersize in recv")
        return self._read(bufsize, flags)[0]

    def recvfrom(self, bufsize: int, flags: int = 0) -> tuple[bytes, Any]:
        """`recv`, and the sender where the family tells it."""
        if bufsize < 0:
            raise ValueError("negative buffersize in recvfrom")
        return self._read(bufsize, flags)

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """Fill a buffer; returns the bytes stored."""
        return self.recvfrom_into(buffer, nbytes, flags)[0]

    def recvfrom_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> tuple[int, Any]:
        """`recv_into`, and the sender."""
        view = room_in(buffer, nbytes)
        data, sender = self._read(len(view), flags)
        view[: len(data)] = data
        return len(data), sender

    def recvmsg(self, bufsize: int, ancbufsize: int = 0, flags: int = 0) -> tuple[bytes, list[Ancillary], int, Any]:
        """`recv`; there is no ancillary data."""
        data, sender = self.recvfrom(bufsize, flags)
        return data, [], 0, sender

    def recvmsg_into(
        self, buffers: Iterable[Any], ancbufsize: int = 0, flags: int = 0
    ) -> tuple[int, list[Ancillary], int, Any]:
        """`recvmsg` into buffers, one after the other; returns the bytes stored first."""
        given = [memoryview(buffer).cast("B") for buffer in buffers]
        data, sender = self._read(sum(map(len, given)), flags)
        return fill(given, data), [], 0, sender

    # Sending.

    def send(self, data: Any, flags: int = 0) -> int:
        """Send as much of the data as there is room for, at least a byte; returns how much."""
        with self._arrived:
            self._open()
            return self._transmit(bytes(data), flags)

    def sendall(self, data: Any, flags: int = 0) -> None:
        """Send all of the data."""
        left = memoryview(bytes(data))
        while left:
            left = left[self.send(left, flags) :]

    def sendmsg(
        self, buffers: Iterable[Any], ancdata: Iterable[Ancillary] = (), flags: int = 0, address: Any = None
    ) -> int:
        """Send what is in the buffers; no ancillary data means anything here."""
        return self.send(b"".join(bytes(buffer) for buffer in buffers), flags)

    def drain(self) -> int:
        """Streams are never drained: what they have acknowledged would be lost."""
        raise error(errno.EINVAL)
