"""UNIX sockets of the emulated network (net/unix/af_unix.c).

A filter on a datagram or seqpacket socket sees the payload and may cut it; on a stream it never runs. Names are those
of the network, abstract ones and paths: no file is made, and a path is free again when its socket is closed.
Descriptors (SCM_RIGHTS) cannot be sent.
"""

from __future__ import annotations

import errno
import os
import socket as _socket
import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from kbpf.emulator.endpoint import Ancillary, DatagramEndpoint, Endpoint, Message, Option
from kbpf.emulator.environment import environment
from kbpf.emulator.packet import Packet
from kbpf.emulator.slot import error
from kbpf.emulator.sock import Sock
from kbpf.emulator.stream import SHUT_RD, SHUT_RDWR, SHUT_WR, StreamEndpoint
from kbpf.uapi.constants import BPF_TCP_CLOSE, BPF_TCP_ESTABLISHED, BPF_TCP_LISTEN, SO_ACCEPTCONN, SOL_SOCKET

if TYPE_CHECKING:
    from kbpf.emulator.network import Network

AF_UNIX = 1
_SOCK_STREAM, _SOCK_SEQPACKET = 1, 5
#: net.unix.max_dgram_qlen: datagrams that wait from those whom the receiver is not connected to.
_MOST_DATAGRAMS = 10
_SOMAXCONN = 4096
_PATH_MAX = 108
# Shared info beside data, the least buffer, the most that lies in one, in a stream's buffer, and in one of its packets;
# struct sk_buff, and a page.
_INFO, _LEAST, _LINEAR, _STREAM_LINEAR, _STREAM_MOST = 320, 512, 16064, 3776, 3776 + 32768
_SKB, _PAGE = 256, 4096


def _truesize(linear: int, paged: int) -> int:
    """What a packet counts for at its sender."""
    return _SKB + max(_LEAST, 1 << (linear + _INFO - 1).bit_length()) + paged + -paged % _PAGE


def _datagram_size(length: int) -> int:
    return _truesize(min(length, _LINEAR), max(length - _LINEAR, 0))


def _stream_size(length: int) -> int:
    over = max(length - _STREAM_LINEAR, 0)
    paged = min(length, over + -over % _PAGE)
    return _truesize(length - paged, paged)


class UnixEndpoint(Endpoint):
    """What UNIX sockets of all types share: names, connections, and what is under way from each."""

    OPTIONS: ClassVar[Mapping[tuple[int, int], Option]] = {
        **Endpoint.OPTIONS,
        (SOL_SOCKET, SO_ACCEPTCONN): Option(lambda end: end._state == BPF_TCP_LISTEN),
    }

    def __init__(self, network: Network, type: int) -> None:
        self.network = network
        self.sock = Sock(family=AF_UNIX, type=type)
        self._name = b""
        self._other: weakref.ref[UnixEndpoint] | None = None
        self._state = BPF_TCP_CLOSE
        self._no_more_in = self._no_more_out = False
        #: What its messages that nobody has read count for.
        self._under_way = 0
        #: Connections that nobody has accepted, and how many more than that may wait.
        self._pending: deque[UnixEndpoint] = deque()
        self._most_pending = 0
        super().__init__(AF_UNIX, type, 0)

    @property
    def _peer(self) -> UnixEndpoint | None:
        found = None if self._other is None else self._other()
        return None if found is None or found.closed else found

    def _meminfo(self) -> list[int]:
        return [0, self._rcvbuf, self._under_way, self._sndbuf, 0, 0, 0, 0, 0]

    def join(self, peer: UnixEndpoint) -> None:
        """Have this end of a connection be connected to the other."""
        self._other = weakref.ref(peer)
        self._state = self.sock.state = BPF_TCP_ESTABLISHED

    # Names.

    def bind(self, address: str | bytes) -> None:
        """Bind to a path, or to an abstract name (after a zero byte); an empty name takes one that is free."""
        name = _packed(address)
        with self._arrived:
            self._open()
            if self._name:
                raise error(errno.EINVAL)
            if not name:
                name = self._free_name()
            if self._key(name) in self.network.unix:
                raise error(errno.EADDRINUSE)
            self._name = name
            self.network.unix[self._key(name)] = self

    def _key(self, name: bytes) -> tuple[bytes, int]:
        """What a name is found by: abstract ones are each type's own."""
        return name, self.type if name[:1] == b"\0" else 0

    def _free_name(self) -> bytes:
        while True:
            name = b"\0%05x" % (environment.random32() & 0xFFFFF)
            if self._key(name) not in self.network.unix:
                return name

    def getsockname(self) -> str | bytes:
        self._open()
        return _shown(self._name)

    def getpeername(self) -> str | bytes:
        self._open()
        found = None if self._other is None else self._other()
        if found is None or self._state != BPF_TCP_ESTABLISHED:
            raise error(errno.ENOTCONN)
        return _shown(found._name)

    def _find(self, address: str | bytes) -> UnixEndpoint:
        """Who is bound to the name; `OSError` ENOENT, ECONNREFUSED, EPROTOTYPE."""
        name = _packed(address)
        found = self.network.unix.get(self._key(name))
        if found is None or found.closed:
            raise error(errno.ECONNREFUSED if name[:1] == b"\0" else errno.ENOENT)
        if found.type != self.type:
            raise error(errno.EPROTOTYPE)
        return found

    # Connections.

    def connect_ex(self, address: str | bytes) -> int:
        """`connect`, the error as a number."""
        try:
            self.connect(address)
        except OSError as failure:
            return failure.errno or 0
        return 0

    def connect(self, address: str | bytes) -> None:
        """Connect to who listens at the address, waiting while too many do."""
        with self._arrived:
            self._open()

            def room() -> bool:
                there = self._find(address)
                if there._state != BPF_TCP_LISTEN or there._no_more_in:
                    raise error(errno.ECONNREFUSED)
                return len(there._pending) <= there._most_pending

            self._wait_for(room, self._timeout)
            if self._state != BPF_TCP_CLOSE:
                raise error(errno.EISCONN if self._state == BPF_TCP_ESTABLISHED else errno.EINVAL)
            listener = self._find(address)
            child = type(self)(self.network, self.type)
            child._name = listener._name
            child.join(self)
            self.join(child)
            listener._pending.append(child)
            listener._woken()

    def listen(self, backlog: int = 128) -> None:
        """Let others connect; one more than `backlog` may wait."""
        with self._arrived:
            self._open()
            if not self._name or self._state not in (BPF_TCP_CLOSE, BPF_TCP_LISTEN):
                raise error(errno.EINVAL)
            self._state = self.sock.state = BPF_TCP_LISTEN
            self._most_pending = max(0, min(backlog, _SOMAXCONN))

    def accept(self) -> tuple[UnixEndpoint, str | bytes]:
        """The next connection, and the name of who connected."""
        with self._arrived:
            self._open()
            if self._state != BPF_TCP_LISTEN:
                raise error(errno.EINVAL)
            self._wait_for(lambda: bool(self._pending), self._timeout)
            made = self._pending.popleft()
            self._woken()
            peer = made._other() if made._other is not None else None
            return made, _shown(peer._name if peer is not None else b"")

    def shutdown(self, how: int) -> None:
        """Send or receive no more; the other end of a connection notices."""
        with self._arrived:
            self._open()
            if how not in (SHUT_RD, SHUT_WR, SHUT_RDWR):
                raise error(errno.EINVAL)
            self._end(how != SHUT_WR, how != SHUT_RD)
            peer = self._peer
            if peer is not None and self.type != _socket.SOCK_DGRAM:
                peer._end(how != SHUT_RD, how != SHUT_WR)

    def _end(self, reading: bool, writing: bool) -> None:
        self._no_more_in |= reading
        self._no_more_out |= writing
        self._woken()

    # What is under way.

    def _wait_for_room(self, flags: int) -> None:
        """Until what is under way leaves room for more (`sock_alloc_send_pskb`)."""
        self._wait_for(lambda: self._under_way < self._sndbuf or self._no_more_out, self._limit(flags))

    def _arrives(self, size: int) -> None:
        """Something of ours was read, or thrown away."""
        self._under_way -= size
        self._woken()

    def _unread(self) -> bool:
        """Whether something waits to be read."""
        raise NotImplementedError

    def _closed(self) -> None:
        if self.network.unix.get(self._key(self._name)) is self:
            del self.network.unix[self._key(self._name)]
        for child in self._pending:
            self._reset(child._peer, True)
            child.close()
        self._pending.clear()
        if self.type != _socket.SOCK_DGRAM:
            self._reset(self._peer, self._unread())
        self._forget()
        peer = self._peer
        if peer is not None:
            peer._woken()

    def _reset(self, peer: UnixEndpoint | None, harshly: bool) -> None:
        if peer is not None:
            if harshly:
                peer._error = errno.ECONNRESET
            peer._end(True, True)

    def _forget(self) -> None:
        """Throw away what waits to be read, so that its senders have room again."""
        raise NotImplementedError

    def __repr__(self) -> str:
        kind = {_SOCK_STREAM: "stream", _SOCK_SEQPACKET: "seqpacket"}.get(self.type, "dgram")
        return f"<UnixSocket {kind} {'closed' if self.closed else _shown(self._name)!r}>"


class UnixDatagramSocket(UnixEndpoint, DatagramEndpoint):
    """An emulated AF_UNIX socket of type SOCK_DGRAM or SOCK_SEQPACKET."""

    def _ready(self) -> bool:
        # A datagram socket that is shut down has no end for those who do not wait.
        ended = self._no_more_in and (self.type == _SOCK_SEQPACKET or self._timeout is None)
        return bool(self._pending) or super()._ready() or ended

    def _address(self, got: Message) -> str | bytes | None:
        """The name that the sender has now."""
        assert isinstance(got.address, UnixEndpoint)
        return _shown(got.address._name) or None

    def _take(self, flags: int) -> Message | None:
        if self.type == _SOCK_SEQPACKET and self._state != BPF_TCP_ESTABLISHED and not self.closed:
            raise error(errno.ENOTCONN)
        return super()._take(flags)

    def connect(self, address: str | bytes) -> None:
        if self.type == _SOCK_SEQPACKET:
            super().connect(address)
            return
        with self._arrived:
            self._open()
            target = self._find(address)
            if not _takes(target, self):
                raise error(errno.EPERM)
            if self._other is not None and self._other() is not target:
                self._leave()
            self.join(target)

    def _leave(self) -> None:
        """Be connected to nobody. What has come is lost, which who was connected to us learns."""
        before = self._peer
        mutual = before is not None and before is not self and before._other is not None and before._other() is self
        if self._queue and before is not None and mutual:
            before._error = errno.ECONNRESET
            before._woken()
        self._forget()
        self._other, self._state = None, BPF_TCP_CLOSE

    # Sending.

    def send(self, data: Any, flags: int = 0) -> int:
        """Send a message to where the socket is connected to."""
        with self._arrived:
            self._open()
            return self._send(bytes(data), flags, None)

    def sendall(self, data: Any, flags: int = 0) -> None:
        self.send(data, flags)

    def sendto(self, data: Any, *arguments: Any) -> int:
        """``sendto(data, address)`` or ``sendto(data, flags, address)``; a seqpacket socket ignores the address."""
        flags = arguments[0] if len(arguments) > 1 else 0
        with self._arrived:
            self._open()
            return self._send(bytes(data), flags, None if self.type == _SOCK_SEQPACKET else arguments[-1])

    def sendmsg(
        self, buffers: Iterable[Any], ancdata: Iterable[Ancillary] = (), flags: int = 0, address: Any = None
    ) -> int:
        """Send what is in the buffers, as one message; `OSError` EINVAL for ancillary data, which is not there."""
        if tuple(ancdata):
            raise error(errno.EINVAL)
        data = b"".join(bytes(buffer) for buffer in buffers)
        return self.send(data, flags) if address is None else self.sendto(data, flags, address)

    def _send(self, data: bytes, flags: int, address: str | bytes | None) -> int:
        if self.type == _SOCK_SEQPACKET and self._state != BPF_TCP_ESTABLISHED:
            raise error(errno.ENOTCONN)
        if address is None and self._other is None:
            raise error(errno.ENOTCONN)
        if len(data) > self._sndbuf - 32:
            raise error(errno.EMSGSIZE)
        self._raise_error()
        self._wait_for_room(flags)
        if self._no_more_out:
            raise error(errno.EPIPE)
        connected = self._other() if self._other is not None else None
        target = connected if address is None else self._find(address)
        kept = len(data)
        # Even when the other end was closed, its filter is asked first.
        if target is not None and target.slot.program is not None:
            value = target.slot.run(Packet(buffer=data, network=0, socket=target.sock))
            if not value:
                return kept
            kept = min(value, kept)
        if target is None or target.closed:
            # A datagram socket is free to connect again.
            self._leave()
            raise error(errno.ECONNREFUSED)
        assert isinstance(target, UnixDatagramSocket)
        if not _takes(target, self):
            raise error(errno.EPERM)
        if target._no_more_in:
            raise error(errno.EPIPE)
        if target._peer is not self:
            self._wait_for(lambda: len(target._queue) <= _MOST_DATAGRAMS or target.closed, self._limit(flags))
        if target.closed:
            raise error(errno.ECONNREFUSED)
        size = _datagram_size(len(data))
        self._under_way += size
        target._enqueue(Message(data[:kept], address=self, taken=lambda: self._arrives(size)))
        return len(data)

    def _unread(self) -> bool:
        # An empty message that comes first is not looked at (`unix_release_sock`).
        first = bool(self._queue) and not self._queue[0].length
        return len(self._queue) > first

    def _forget(self) -> None:
        while self._queue:
            self._dequeue()


class UnixStreamSocket(UnixEndpoint, StreamEndpoint):
    """An emulated AF_UNIX socket of type SOCK_STREAM. No filter ever runs on it."""

    def __init__(self, network: Network, type: int = _SOCK_STREAM) -> None:
        super().__init__(network, type)
        #: Its packets that are not wholly read: bytes left, what they count for, and for whom.
        self._packets: deque[tuple[int, int, UnixStreamSocket]] = deque()

    def _ready(self) -> bool:
        return bool(self._pending) or super()._ready()

    def _ended(self) -> bool:
        return self._no_more_in

    def _sender(self) -> str | bytes | None:
        return _shown(self._packets[0][2]._name) or None

    def _may_read(self) -> None:
        if self._state != BPF_TCP_ESTABLISHED:
            raise error(errno.EINVAL)

    def _consumed(self, count: int) -> None:
        while self._packets and count >= self._packets[0][0]:
            left, size, sender = self._packets.popleft()
            count -= left
            sender._arrives(size)
        if count:
            left, size, sender = self._packets[0]
            self._packets[0] = left - count, size, sender

    def _transmit(self, data: bytes, flags: int) -> int:
        if self._state != BPF_TCP_ESTABLISHED:
            raise error(errno.ENOTCONN)
        if self._no_more_out:
            raise error(errno.EPIPE)
        sent = 0
        while sent < len(data):
            if not self._writable(flags, bool(sent)):
                break
            peer = self._peer
            assert isinstance(peer, UnixStreamSocket)
            part = data[sent : sent + min((self._sndbuf >> 1) - 64, _STREAM_MOST)]
            size = _stream_size(len(part))
            self._under_way += size
            peer._incoming += part
            peer._packets.append((len(part), size, self))
            peer._woken()
            sent += len(part)
        return sent

    def _writable(self, flags: int, some: bool) -> bool:
        """Whether more can be sent; what keeps it from that is an error only if nothing was sent."""
        try:
            self._wait_for_room(flags)
            if self._no_more_out or self._peer is None:
                raise error(errno.EPIPE)
        except OSError:
            if some:
                return False
            raise
        return True

    def sendto(self, data: Any, *arguments: Any) -> int:
        self._open()
        raise error(errno.EISCONN if self._state == BPF_TCP_ESTABLISHED else errno.EOPNOTSUPP)

    def _unread(self) -> bool:
        return bool(self._incoming)

    def _forget(self) -> None:
        for _, size, sender in self._packets:
            sender._arrives(size)
        self._packets.clear()


def _takes(target: UnixEndpoint, sender: UnixEndpoint) -> bool:
    """Whether a datagram socket may send there (`unix_may_send`): not if it is connected to somebody else."""
    return target._other is None or target._other() is sender


def _packed(address: str | bytes) -> bytes:
    name = os.fsencode(address) if isinstance(address, str) else bytes(address)
    if len(name) > _PATH_MAX or (len(name) == _PATH_MAX and name[:1] != b"\0"):
        raise OSError("AF_UNIX path too long")
    return name


def _shown(name: bytes) -> str | bytes:
    """A name as Python shows it: abstract ones as bytes."""
    return name if name[:1] == b"\0" else os.fsdecode(name)
