"""A socket of the operating system, filtered in user space by an emulated program.

Only where the emulator was asked for by name. The program runs when the data is read, on each datagram: those that
it drops are skipped, those that it cuts are cut. `kbpf.emulator.reconstruct` says what it sees. Three things
differ from a filter in the kernel: what was queued before is filtered too, unless it was drained; select
and poll report a datagram that is then dropped (as they may on Linux), so that a reader must be ready for
BlockingIOError; and what others read from the same descriptor is not filtered.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import select
import socket as sockets
import time
import weakref
from types import TracebackType
from typing import Any

from kbpf.backend import SocketLike
from kbpf.emulator.endpoint import room_in
from kbpf.emulator.process_sock import sock_of
from kbpf.emulator.reconstruct import WANTED, Kind, packet_of
from kbpf.emulator.slot import Slot, error
from kbpf.uapi.constants import SO_DOMAIN, SO_PROTOCOL, SO_TYPE

_AF_NETLINK, _AF_PACKET = 16, 17
_UDP_HEADER = 8
# Room for ancillary data of our own: three small messages.
_OWN_ANCILLARY = 128
# Read in one go even if another reader took the packet that was measured and a larger one follows.
_LEAST_ROOM = 65536

_wrapped: weakref.WeakValueDictionary[int, FilteredSocket] = weakref.WeakValueDictionary()


def kind_of(socket: SocketLike) -> Kind:
    """Family, type and protocol of a socket; `OSError` EBADF or ENOTSOCK for what is none."""
    duplicate = _duplicate(socket)
    try:
        return Kind(
            duplicate.getsockopt(sockets.SOL_SOCKET, SO_DOMAIN),
            duplicate.getsockopt(sockets.SOL_SOCKET, SO_TYPE),
            duplicate.getsockopt(sockets.SOL_SOCKET, SO_PROTOCOL),
        )
    finally:
        duplicate.close()


def _duplicate(socket: SocketLike) -> sockets.socket:
    descriptor = os.dup(socket.fileno())
    try:
        return sockets.socket(fileno=descriptor)
    except BaseException:
        os.close(descriptor)
        raise


def filtered(socket: SocketLike) -> FilteredSocket:
    """The filtered socket around a real one: always the same one, as a socket has one slot.

    Raises `OSError` EOPNOTSUPP for streams, whose segments no process sees, and for families that are not known.
    """
    known = _wrapped.get(id(socket))
    if known is None:
        known = _wrapped[id(socket)] = FilteredSocket(socket)
    return known


class FilteredSocket:
    """Stands in for a `socket.socket`: receiving is filtered, everything else is the socket's own."""

    def __init__(self, socket: SocketLike) -> None:
        kind = kind_of(socket)
        families = (sockets.AF_UNIX, _AF_NETLINK, _AF_PACKET, sockets.AF_INET, sockets.AF_INET6)
        streams = kind.type not in (sockets.SOCK_DGRAM, sockets.SOCK_RAW, sockets.SOCK_SEQPACKET)
        if kind.family not in families or streams:
            raise OSError(
                errno.EOPNOTSUPP,
                "the emulator cannot filter this socket: it carries a stream, and no process sees a stream's packets"
                if streams
                else f"the emulator cannot filter a socket of family {kind.family}",
            )
        self.kind = kind
        self.slot = Slot()
        #: What was wrapped. Its own methods read what arrives unfiltered.
        self.unfiltered = socket
        # A second object over the same descriptor, which never closes it: its calls do not wait by themselves, and it
        # has a recv, which asyncio's transport sockets and the like have not.
        self._reader = sockets.socket(fileno=socket.fileno())
        self._socket = socket if isinstance(socket, sockets.socket) else self._reader
        # Ancillary messages that were turned on here, which the caller did not ask for, and how.
        self._own: dict[tuple[int, int], int] = {}
        for level, option, message in WANTED.get(kind.family, ()):
            with contextlib.suppress(OSError):
                if not self._reader.getsockopt(level, option):
                    self._reader.setsockopt(level, option, 1)
                    self._own[level, message] = option

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)

    def fileno(self) -> int:
        """The descriptor; -1 when the socket was closed."""
        return self.unfiltered.fileno()

    def recv(self, bufsize: int, flags: int = 0) -> bytes:
        """The next datagram that passes; blocking, timeouts and flags as `socket.socket.recv`."""
        return self.recvfrom(bufsize, flags)[0]

    def recvfrom(self, bufsize: int, flags: int = 0) -> tuple[bytes, Any]:
        if bufsize < 0:
            raise ValueError("negative buffersize in recvfrom")
        whole, _, _, address = self._receive(0, flags)
        data = whole[:bufsize]
        return (data.ljust(len(whole), b"\0") if flags & sockets.MSG_TRUNC else data), address

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        return self.recvfrom_into(buffer, nbytes, flags)[0]

    def recvfrom_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> tuple[int, Any]:
        view = room_in(buffer, nbytes)
        whole, _, _, address = self._receive(0, flags)
        data = whole[: len(view)]
        view[: len(data)] = data
        return (len(whole) if flags & sockets.MSG_TRUNC else len(data)), address

    def recvmsg(
        self, bufsize: int, ancbufsize: int = 0, flags: int = 0
    ) -> tuple[bytes, list[tuple[int, int, bytes]], int, Any]:
        whole, ancillary, msg_flags, address = self._receive(ancbufsize, flags)
        if len(whole) > bufsize:
            msg_flags |= sockets.MSG_TRUNC
        return whole[:bufsize], ancillary, msg_flags, address

    def recvmsg_into(
        self, buffers: Any, ancbufsize: int = 0, flags: int = 0
    ) -> tuple[int, list[tuple[int, int, bytes]], int, Any]:
        whole, ancillary, msg_flags, address = self._receive(ancbufsize, flags)
        position = 0
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            part = whole[position : position + len(view)]
            view[: len(part)] = part
            position += len(part)
        if position < len(whole):
            msg_flags |= sockets.MSG_TRUNC
        return (len(whole) if flags & sockets.MSG_TRUNC else position), ancillary, msg_flags, address

    def _receive(self, ancbufsize: int, flags: int) -> tuple[bytes, list[tuple[int, int, bytes]], int, Any]:
        """A datagram that passes, cut as the program says. The timeout counts from here, over all that are dropped."""
        if self.fileno() != self._reader.fileno():
            raise error(errno.EBADF)
        timeout = self._socket.gettimeout()
        if timeout is None and (flags & sockets.MSG_DONTWAIT or not os.get_blocking(self.fileno())):
            timeout = 0.0
        deadline = None if timeout is None else time.monotonic() + timeout
        wanted = flags | sockets.MSG_DONTWAIT
        while True:
            try:
                size = self._reader.recv_into(bytearray(1), 1, wanted | sockets.MSG_PEEK | sockets.MSG_TRUNC)
                room = max(size, _LEAST_ROOM)
                own = _OWN_ANCILLARY if self.kind.family in WANTED else 0
                data, ancillary, msg_flags, address = self._reader.recvmsg(room, ancbufsize + own, wanted)
            except BlockingIOError:
                if timeout == 0.0:
                    raise
                self._wait(deadline)
                continue
            if not data and self.kind.type == sockets.SOCK_SEQPACKET:
                return data, ancillary, msg_flags, address  # The other end has closed.
            kept = self._kept(data, ancillary, address)
            if kept is not None:
                ours = [m for m in ancillary if (m[0], m[1]) not in self._own]
                return data[:kept], ours, msg_flags & ~sockets.MSG_TRUNC, address
            _close_descriptors(ancillary)
            if flags & sockets.MSG_PEEK:
                with contextlib.suppress(BlockingIOError):
                    self._reader.recv(1, sockets.MSG_DONTWAIT)

    def _kept(self, data: bytes, ancillary: list[tuple[int, int, bytes]], address: Any) -> int | None:
        """How many bytes of the datagram the program leaves; None where it drops it."""
        if self.slot.program is None:
            return len(data)
        local = None if self.kind.family in (sockets.AF_UNIX, _AF_NETLINK) else self._reader.getsockname()
        packet = packet_of(self.kind, data, ancillary, address, local)
        if self.slot.classic is None and self.kind.family != _AF_PACKET:
            # Linux has the receiver there while its filter runs; for packet sockets it leaves the sender, if anybody.
            packet.socket = sock_of(self._reader.fileno())
        kept = self.slot.run(packet)
        if not kept:
            return None
        # UDP never loses its header.
        return max(kept, _UDP_HEADER) - _UDP_HEADER if self.kind.udp else kept

    def _wait(self, deadline: float | None) -> None:
        poll = select.poll()
        poll.register(self._reader.fileno(), select.POLLIN)
        left = None if deadline is None else deadline - time.monotonic()
        if (left is not None and left <= 0) or not poll.poll(None if left is None else left * 1000):
            raise TimeoutError("timed out")

    def drain(self) -> int:
        """Throw away what is queued, without waiting."""
        count = 0
        while True:
            try:
                _, ancillary, _, _ = self._reader.recvmsg(1, 0, sockets.MSG_DONTWAIT)
            except BlockingIOError:
                return count
            _close_descriptors(ancillary)
            count += 1

    def close(self) -> None:
        """Close the wrapped socket."""
        close = getattr(self.unfiltered, "close", None)
        if close is not None:
            close()

    def __del__(self) -> None:
        reader = self.__dict__.get("_reader")
        if reader is None:
            return
        if self.fileno() == reader.fileno():
            for (level, _), option in self.__dict__.get("_own", {}).items():
                with contextlib.suppress(OSError):
                    reader.setsockopt(level, option, 0)
        reader.detach()

    def __enter__(self) -> FilteredSocket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<FilteredSocket around {self.unfiltered!r}>"


def _close_descriptors(ancillary: list[tuple[int, int, bytes]]) -> None:
    """What is dropped takes the descriptors that it carried with it."""
    for level, number, data in ancillary:
        if (level, number) == (sockets.SOL_SOCKET, sockets.SCM_RIGHTS):
            descriptors = array.array("i")
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
            for descriptor in descriptors:
                os.close(descriptor)
