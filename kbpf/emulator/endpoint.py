"""What all emulated sockets share: the methods of Python's `socket.socket` for waiting, options, queues and closing.

Waiting lets the emulated machine's time pass: what is due by `environment.clock` happens while a socket waits. Timeouts
are the caller's and count in real time. A program that waits in select(2) on descriptors of emulated sockets waits for
what others do, and nothing becomes due meanwhile.
"""

from __future__ import annotations

import errno
import os
import socket as _socket
import struct
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, TypeVar

from kbpf.emulator import process_sock
from kbpf.emulator.clock import run_due, until_due
from kbpf.emulator.datapath import backlog
from kbpf.emulator.slot import Slot, error
from kbpf.emulator.sock import Sock
from kbpf.uapi.constants import (
    SO_ACCEPTCONN,
    SO_DETACH_FILTER,
    SO_DOMAIN,
    SO_ERROR,
    SO_LOCK_FILTER,
    SO_MARK,
    SO_MEMINFO,
    SO_PRIORITY,
    SO_PROTOCOL,
    SO_RCVBUF,
    SO_TYPE,
    SOL_SOCKET,
)

SelfEndpoint = TypeVar("SelfEndpoint", bound="Endpoint")
#: As recvmsg gives them: (level, type, data).
Ancillary = tuple[int, int, bytes]

# Linux's numbers, which Python has on Linux only (linux/socket.h, asm-generic/socket.h).
MSG_PEEK, MSG_TRUNC, MSG_DONTWAIT, MSG_EOR, MSG_WAITALL = 0x02, 0x20, 0x40, 0x80, 0x100
SO_SNDBUF = 7
# net.core.rmem_default, rmem_max (Linux 6.18: 4 MiB, before 208 KiB), and the least that SO_RCVBUF and SO_SNDBUF give
# (sock.h, SOCK_MIN_RCVBUF and SOCK_MIN_SNDBUF).
BUFFER_DEFAULT, BUFFER_MAX, RCVBUF_MIN, SNDBUF_MIN = 212992, 4194304, 2304, 4608
#: What a small packet's buffer takes, beside struct sk_buff.
_SKB, _SKB_SMALL = 256, 576


def room_in(buffer: Any, nbytes: int) -> memoryview:
    """The bytes of a buffer that ``recv_into(buffer, nbytes)`` may write; 0 of them is all."""
    view = memoryview(buffer).cast("B")
    if not 0 <= nbytes <= len(view):
        raise ValueError("nbytes is greater than the length of the buffer, or negative")
    return view[: nbytes or len(view)]


def truesize(need: int) -> int:
    """What a packet counts for whose data, headroom and shared info need so many bytes (`kmalloc_size_roundup`)."""
    if need <= _SKB_SMALL:
        return _SKB + _SKB_SMALL
    return _SKB + (1 << (need - 1).bit_length() if need <= 8192 else need + -need % 4096)


class Option(NamedTuple):
    """A socket option that is an int: how it is read, and set where it can be."""

    get: Callable[[Any], int]
    set: Callable[[Any, int], None] | None = None


def stored(attribute: str, mask: int = 0xFFFFFFFF) -> Option:
    """An option that is an attribute."""
    return Option(lambda end: int(getattr(end, attribute)), lambda end, value: setattr(end, attribute, value & mask))


def flag(attribute: str) -> Option:
    """An option that is on or off."""
    return Option(lambda end: int(getattr(end, attribute)), lambda end, value: setattr(end, attribute, bool(value)))


@dataclass
class Message:
    """What waits to be received: a datagram as the filter left it."""

    data: bytes
    #: Its length, where that is more than the bytes at hand.
    length: int = -1
    #: Where it came from, as Python tells it.
    address: Any = None
    ancillary: tuple[Ancillary, ...] = ()
    #: What it counts for against the buffer.
    size: int = 0
    #: What has it is told when it is taken out, or thrown away.
    taken: Callable[[], object] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.length < 0:
            self.length = len(self.data)


class Endpoint:
    """An emulated socket. Subclasses say what makes it readable, and how it receives and sends."""

    #: What programs see of it; subclasses make it.
    sock: Sock
    OPTIONS: ClassVar[Mapping[tuple[int, int], Option]] = {
        (SOL_SOCKET, SO_TYPE): Option(lambda end: end.type),
        (SOL_SOCKET, SO_DOMAIN): Option(lambda end: end.family),
        (SOL_SOCKET, SO_PROTOCOL): Option(lambda end: end.proto),
        (SOL_SOCKET, SO_ERROR): Option(lambda end: end._take_error()),
        (SOL_SOCKET, SO_ACCEPTCONN): Option(lambda end: 0),
        (SOL_SOCKET, SO_RCVBUF): Option(lambda end: end._rcvbuf, lambda end, value: end._set_rcvbuf(value)),
        (SOL_SOCKET, SO_SNDBUF): Option(lambda end: end._sndbuf, lambda end, value: end._set_sndbuf(value)),
        (SOL_SOCKET, SO_MARK): stored("_mark"),
        (SOL_SOCKET, SO_PRIORITY): stored("_priority"),
        (SOL_SOCKET, SO_LOCK_FILTER): Option(lambda end: end.slot.locked, lambda end, value: end._lock_filter(value)),
    }

    def __init__(self, family: int, type: int, proto: int) -> None:
        self.closed = True
        self.family, self.type, self.proto = int(family), int(type), int(proto)
        self.slot = Slot()
        self._arrived = threading.Condition(backlog.lock)
        self._timeout = _socket.getdefaulttimeout()
        self._rcvbuf = self._sndbuf = BUFFER_DEFAULT
        self._mark = self._priority = 0
        #: SO_ERROR: an errno that came in the meantime.
        self._error = 0
        # The readable end and the one that is written to; made when somebody asks for a descriptor.
        self._wake: tuple[_socket.socket, _socket.socket] | None = None
        self._signalled = False
        self.closed = False

    # Waiting.

    def _ready(self) -> bool:
        """Whether reading would not wait."""
        raise NotImplementedError

    def _readable(self) -> bool:
        """Whether select says that there is something to read."""
        return self._ready()

    def _woken(self) -> None:
        """Something has changed: those who wait look again."""
        self._arrived.notify_all()
        self._signal()

    def _limit(self, flags: int) -> float | None:
        """How long to wait. As in Python, a socket with a timeout waits whatever the flag says."""
        return 0.0 if flags & MSG_DONTWAIT and self._timeout is None else self._timeout

    def _wait_for(self, ready: Callable[[], bool], timeout: float | None) -> None:
        """Until it is ready, time passing; BlockingIOError or TimeoutError where it is not in time."""
        run_due()
        if ready():
            return
        if timeout == 0.0:
            self._signal()
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        deadline = None if timeout is None else time.monotonic() + timeout
        while not ready():
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError("timed out")
            self._arrived.wait(until_due(left))
            self._open()
            run_due()

    def _take_error(self) -> int:
        found, self._error = self._error, 0
        return found

    def _raise_error(self) -> None:
        """Report what came in the meantime, once."""
        found = self._take_error()
        if found:
            self._signal()
            raise error(found)

    # Options.

    def _option(self, level: int, option: int) -> Option | None:
        return self.OPTIONS.get((level, option))

    def getsockopt(self, level: int, option: int, buflen: int = 0) -> int | bytes:
        """The options that matter to filters and captures; `OSError` ENOPROTOOPT for others."""
        self._open()
        with self._arrived:
            if (level, option) == (SOL_SOCKET, SO_MEMINFO):
                given = struct.pack("=9I", *self._meminfo())
                return given[:buflen] if buflen else int.from_bytes(given[:4], "little")
            found = self._option(level, option)
            if found is None:
                raise error(errno.ENOPROTOOPT)
            value = int(found.get(self))
        return struct.pack("=i" if value < 0 else "=I", value)[:buflen] if buflen else value

    def setsockopt(self, level: int, option: int, value: int | bytes | None, optlen: int = 0) -> None:
        """The options that matter to filters and captures; `OSError` ENOPROTOOPT for others.

        Filters are attached through `kbpf.attach`: SO_ATTACH_FILTER takes a pointer, which means nothing here.
        """
        self._open()
        if isinstance(value, int):
            number = value
        elif value is None or len(value) < 4:
            raise error(errno.EINVAL)
        else:
            number = int(struct.unpack_from("=i", value)[0])
        with self._arrived:
            if (level, option) == (SOL_SOCKET, SO_DETACH_FILTER):
                self.slot.detach()
                return
            found = self._option(level, option)
            if found is None or found.set is None:
                raise error(errno.ENOPROTOOPT)
            found.set(self, number)

    def _meminfo(self) -> list[int]:
        """SK_MEMINFO_*: used and granted for receiving and sending, forward, queued, options, backlog, drops."""
        return [0, self._rcvbuf, 0, self._sndbuf, 0, 0, 0, 0, 0]

    def _set_rcvbuf(self, value: int) -> None:
        self._rcvbuf = max(2 * min(value & 0xFFFFFFFF, BUFFER_MAX), RCVBUF_MIN)

    def _set_sndbuf(self, value: int) -> None:
        self._sndbuf = max(2 * min(value & 0xFFFFFFFF, BUFFER_MAX), SNDBUF_MIN)

    def _lock_filter(self, value: int) -> None:
        if value:
            self.slot.lock()
        else:
            self.slot.refuse_if_locked()

    # As Python has them.

    def settimeout(self, value: float | None) -> None:
        if value is not None and value < 0:
            raise ValueError("Timeout value out of range")
        self._timeout = None if value is None else float(value)

    def gettimeout(self) -> float | None:
        return self._timeout

    @property
    def timeout(self) -> float | None:
        return self._timeout

    def setblocking(self, flag: bool) -> None:
        self._timeout = None if flag else 0.0

    def getblocking(self) -> bool:
        return self._timeout != 0.0

    def fileno(self) -> int:
        """A descriptor for select and its kin: readable while there is something to read.

        Beyond that it is good for maps of sockets and of their values; -1 once the socket is closed.
        """
        with self._arrived:
            if self.closed:
                return -1
            if self._wake is None:
                self._wake = _socket.socketpair()
                process_sock.keep(self._wake[0].fileno(), self.sock)
                self._signal()
            return self._wake[0].fileno()

    def _signal(self) -> None:
        """Keep the descriptor's readability equal to whether there is something to read."""
        if self._wake is None:
            return
        ready = self._readable()
        if ready and not self._signalled:
            self._wake[1].send(b"\0")
        elif self._signalled and not ready:
            self._wake[0].recv(1)
        self._signalled = ready

    def close(self) -> None:
        with self._arrived:
            if self.closed:
                return
            self.closed = self.sock.closed = True
            try:
                self._closed()
            finally:
                # A program that sees the end of what was sent may fault.
                if self._wake is not None:
                    for end in self._wake:
                        end.close()
                self._arrived.notify_all()

    def _closed(self) -> None:
        """Leave what the socket is registered with; called once, under the lock."""
        raise NotImplementedError

    def _open(self) -> None:
        if self.closed:
            raise error(errno.EBADF)

    def __enter__(self: SelfEndpoint) -> SelfEndpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self, warn: Callable[..., None] = warnings.warn) -> None:
        if not getattr(self, "closed", True):
            warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()


class DatagramEndpoint(Endpoint):
    """A socket with a queue of messages."""

    def __init__(self, family: int, type: int, proto: int) -> None:
        super().__init__(family, type, proto)
        self._queue: deque[Message] = deque()
        #: What is in the queue counts for so much.
        self._queued_size = 0
        #: SO_MEMINFO's drops, which /proc/net/udp shows too.
        self._drops = 0

    def _ready(self) -> bool:
        return bool(self._queue) or bool(self._error)

    def _address(self, got: Message) -> Any:
        """The sender, as Python tells it."""
        return got.address

    def _ancillary(self, got: Message) -> Iterable[Ancillary]:
        """What is told beside the data, where it was asked for."""
        return got.ancillary

    def _enqueue(self, message: Message) -> None:
        self._queue.append(message)
        self._queued_size += message.size
        self._woken()

    def _meminfo(self) -> list[int]:
        return [self._queued_size, self._rcvbuf, 0, self._sndbuf, 0, 0, 0, 0, self._drops]

    def _take(self, flags: int) -> Message | None:
        """The next message; None at the end of what can be received."""
        with self._arrived:
            self._open()
            self._wait_for(self._ready, self._limit(flags))
            self._raise_error()
            if not self._queue:
                return None
            if flags & MSG_PEEK:
                return self._queue[0]
            return self._dequeue()

    def _dequeue(self) -> Message:
        got = self._queue.popleft()
        self._queued_size -= got.size
        if got.taken is not None:
            got.taken()
        self._signal()
        return got

    def drain(self) -> int:
        """Throw away what is queued."""
        with self._arrived:
            self._open()
            count = len(self._queue)
            while self._queue:
                self._dequeue()
            return count

    def recv(self, bufsize: int, flags: int = 0) -> bytes:
        """The next datagram, at most `bufsize` bytes of it; the rest is lost. With MSG_TRUNC the result is padded."""
        return self.recvfrom(bufsize, flags)[0]

    def recvfrom(self, bufsize: int, flags: int = 0) -> tuple[bytes, Any]:
        """`recv`, and the sender's address as Python gives it."""
        if bufsize < 0:
            raise ValueError("negative buffersize in recvfrom")
        got = self._take(flags)
        if got is None:
            return b"", None
        data = got.data[:bufsize]
        # The kernel returns the whole length with MSG_TRUNC, and Python makes its result that long.
        return (data.ljust(got.length, b"\0") if flags & MSG_TRUNC else data), self._address(got)

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """Fill a buffer; returns the bytes stored, or the datagram's length with MSG_TRUNC."""
        return self.recvfrom_into(buffer, nbytes, flags)[0]

    def recvfrom_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> tuple[int, Any]:
        """`recv_into`, and the sender."""
        view = room_in(buffer, nbytes)
        got = self._take(flags)
        if got is None:
            return 0, None
        data = got.data[: len(view)]
        view[: len(data)] = data
        return (got.length if flags & MSG_TRUNC else len(data)), self._address(got)

    def recvmsg(self, bufsize: int, ancbufsize: int = 0, flags: int = 0) -> tuple[bytes, list[Ancillary], int, Any]:
        """`recvfrom` with ancillary data, where it was asked for and there is room."""
        got = self._take(flags)
        if got is None:
            return b"", [], 0, None
        return (
            got.data[:bufsize],
            _fitting(self._ancillary(got), ancbufsize),
            self._flags(got, bufsize),
            self._address(got),
        )

    def recvmsg_into(
        self, buffers: Iterable[Any], ancbufsize: int = 0, flags: int = 0
    ) -> tuple[int, list[Ancillary], int, Any]:
        """`recvmsg` into buffers, one after the other; returns the bytes stored first."""
        got = self._take(flags)
        if got is None:
            return 0, [], 0, None
        at = fill(buffers, got.data)
        stored = got.length if flags & MSG_TRUNC else at
        return stored, _fitting(self._ancillary(got), ancbufsize), self._flags(got, at), self._address(got)

    def _flags(self, got: Message, room: int) -> int:
        """``msg_flags``: whether there was no room for all of it."""
        return MSG_TRUNC if got.length > room else 0


def fill(buffers: Iterable[Any], data: bytes) -> int:
    """Put data into buffers, one after the other; returns how much there was room for."""
    at = 0
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        part = data[at : at + len(view)]
        view[: len(part)] = part
        at += len(part)
    return at


def _fitting(ancillary: Iterable[Ancillary], room: int) -> list[Ancillary]:
    """The messages there is room for."""
    given = list(ancillary)
    while sum(_socket.CMSG_SPACE(len(data)) for _, _, data in given) > room:
        given.pop()
    return given
