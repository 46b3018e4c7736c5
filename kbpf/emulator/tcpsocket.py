"""TCP sockets of the emulated network, with the methods and results of Python's `socket.socket`."""

from __future__ import annotations

import errno
import os
import struct
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from kbpf.emulator import cgroup_hooks, psock, tcp_events
from kbpf.emulator.connection import SENDING, Connection
from kbpf.emulator.endpoint import MSG_PEEK, Option
from kbpf.emulator.headers import IPPROTO_TCP
from kbpf.emulator.inetsocket import AF_INET, IpOptions, PortEndpoint
from kbpf.emulator.ports import Binding
from kbpf.emulator.psock_send import MESSAGE
from kbpf.emulator.slot import error
from kbpf.emulator.sock import MAPPED
from kbpf.emulator.stream import SHUT_RD, SHUT_RDWR, SHUT_WR, StreamEndpoint
from kbpf.emulator.tcp import Listener
from kbpf.emulator.transmission import RCVBUF
from kbpf.uapi.constants import (
    BPF_TCP_CLOSE,
    BPF_TCP_LISTEN,
    BPF_TCP_SYN_SENT,
    BPF_TCP_TIME_WAIT,
    SO_ACCEPTCONN,
    SOL_SOCKET,
)

if TYPE_CHECKING:
    from kbpf.emulator.network import Network

_SOCK_STREAM = 1
# Linux's numbers (asm-generic/socket.h, linux/tcp.h).
SO_LINGER, SOL_TCP, TCP_NODELAY = 13, 6, 1
_SOMAXCONN = 4096
#: net.ipv4.tcp_wmem's default, and what Linux lets it grow to on loopback as soon as a connection is there.
_SNDBUF, _SNDBUF_CONNECTED = 16384, 2626560
_LINGER = struct.Struct("=ii")


class TcpSocket(PortEndpoint, StreamEndpoint):
    """An emulated TCP socket: unconnected, listening, or the user's end of a connection."""

    OPTIONS: ClassVar[Mapping[tuple[int, int], Option]] = {
        **PortEndpoint.OPTIONS,
        (SOL_SOCKET, SO_ACCEPTCONN): Option(lambda end: end.listener is not None),
        (SOL_TCP, TCP_NODELAY): Option(lambda end: end.nodelay, lambda end, value: end._set_nodelay(bool(value))),
    }

    def __init__(self, network: Network, family: int, accepted: Connection | None = None) -> None:
        self.connection: Connection | None = None
        self.listener: Listener | None = None
        self.nodelay = False
        self._own_error = 0
        #: Whether the port was taken by connecting or listening: it is given back with the connection.
        self.any_port = False
        #: Whether connect() has yet to say how it went.
        self._connecting = False
        #: Whether it was shut down without a connection: there is an end to read.
        self._at_end = False
        self._linger: tuple[int, int] = (0, 0)
        binding = None if accepted is None else accepted.binding
        super().__init__(network, family, _SOCK_STREAM, IPPROTO_TCP, accepted=binding)
        self._rcvbuf, self._sndbuf = RCVBUF, _SNDBUF
        self.sock.tcp_here = True
        if accepted is not None:
            self._use(accepted)
            self._ip, self.nodelay, self.slot = accepted.ip, accepted.nodelay, accepted.slot
            self._rcvbuf, self._sndbuf = 2 * accepted.room, _SNDBUF_CONNECTED

    # What connections and listeners ask for.

    @property
    def binding(self) -> Binding:
        return self._binding

    @property
    def ip(self) -> IpOptions:
        return self._ip

    @property
    def room(self) -> int:
        """Bytes that may wait to be read."""
        return self._rcvbuf // 2

    @property
    def writable(self) -> bool:
        """Whether there is room to send without waiting for it (`sock_writeable`)."""
        return self.connection is not None and len(self.connection.outgoing) < self._sndbuf // 2

    def woken(self) -> None:
        """Something has changed."""
        self._woken()

    # ``sk_err`` is the connection's, which may have it before it has a user.

    @property
    def _error(self) -> int:
        return self._own_error if self.connection is None else self.connection.error

    @_error.setter
    def _error(self, number: int) -> None:
        if self.connection is None:
            self._own_error = number
        else:
            self.connection.error = number

    # Options.

    def getsockopt(self, level: int, option: int, buflen: int = 0) -> int | bytes:
        if (level, option) == (SOL_SOCKET, SO_LINGER):
            self._open()
            return _LINGER.pack(*self._linger)[:buflen] if buflen else self._linger[0]
        return super().getsockopt(level, option, buflen)

    def setsockopt(self, level: int, option: int, value: int | bytes | None, optlen: int = 0) -> None:
        if (level, option) == (SOL_SOCKET, SO_LINGER):
            self._open()
            if not isinstance(value, bytes) or len(value) < _LINGER.size:
                raise error(errno.EINVAL)
            on, seconds = _LINGER.unpack_from(value)
            self._linger = int(bool(on)), seconds
            return
        super().setsockopt(level, option, value, optlen)

    def _set_nodelay(self, value: bool) -> None:
        self.nodelay = value
        if self.connection is not None:
            self.connection.nodelay = value
            self.connection.push()

    def _set_rcvbuf(self, value: int) -> None:
        super()._set_rcvbuf(value)
        if self.connection is not None:
            self.connection.room = self.room

    # Binding, listening, connecting.

    def _refuse_bound(self) -> None:
        if self.sock.state != BPF_TCP_CLOSE or (self.sock.local_port and not self.any_port):
            raise error(errno.EINVAL)

    def _bind(self, local: bytes, port: int) -> None:
        self._claim(local, port)
        self.any_port = False

    def listen(self, backlog: int = 128) -> None:
        """Let others connect; one more than `backlog` may wait to be accepted."""
        with self._arrived:
            self._open()
            most = max(0, min(backlog, _SOMAXCONN))
            if self.listener is not None:
                self.listener.most = most
                return
            if self.sock.state != BPF_TCP_CLOSE or self.connection is not None:
                raise error(errno.EINVAL)
            if not self.sock.local_port:
                self._claim(self.sock.local, 0)
                self.any_port = True
            elif self.network.inet.ports.taken(self._binding, self.sock.local, self.sock.local_port):
                raise error(errno.EADDRINUSE)
            self._join_group()
            self.listener = Listener(self.network.tcp, self, most)
            self.sock.state = BPF_TCP_LISTEN
            self.network.tcp.hold(self.sock, self.listener)
            tcp_events.listening(self.sock)

    def accept(self) -> tuple[TcpSocket, tuple[Any, ...]]:
        """The next connection, and the address of its other end."""
        with self._arrived:
            self._open()
            listener = self.listener
            if listener is None:
                raise error(errno.EINVAL)
            self._wait_for(lambda: bool(listener.pending), self._timeout)
            connection = listener.pending.popleft()
            self._signal()
            made = TcpSocket(self.network, self.family, connection)
            sock = made.sock
            return made, made._shown(*cgroup_hooks.getpeername(sock, sock.remote, sock.remote_port))

    def _use(self, connection: Connection) -> None:
        connection.endpoint = weakref.ref(self)
        self.connection, self._incoming = connection, connection.incoming

    def connect(self, address: tuple[Any, ...]) -> None:
        """Connect, waiting as long as the socket's timeout says; BlockingIOError EINPROGRESS where it does not wait."""
        remote, port = self._parse(address, "connect")
        with self._arrived:
            self._open()
            if self.listener is not None:
                raise error(errno.EISCONN)
            again = self.connection is not None
            if not again:
                self._begin(remote, port)
                if self._timeout == 0.0:
                    raise BlockingIOError(errno.EINPROGRESS, os.strerror(errno.EINPROGRESS))
            elif not self._connecting:
                raise error(errno.EISCONN)
            elif self._timeout == 0.0 and self.sock.state == BPF_TCP_SYN_SENT:
                raise BlockingIOError(errno.EALREADY, os.strerror(errno.EALREADY))
            self._wait_for(lambda: self.sock.state != BPF_TCP_SYN_SENT, self._timeout)
            # A timeout is Python's, which does not ask connect(2) again, but for the error.
            self._connecting = not again and self._timeout is not None
            if self.sock.state == BPF_TCP_CLOSE:
                number = self._take_error() or errno.ECONNABORTED
                if not self._connecting:
                    self._disconnect()
                raise error(number)

    def connect_ex(self, address: tuple[Any, ...]) -> int:
        """`connect`, the error as a number."""
        try:
            self.connect(address)
        except OSError as failure:
            return failure.errno or errno.EAGAIN
        return 0

    def _begin(self, remote: bytes, port: int) -> None:
        remote, port = cgroup_hooks.connect(self.sock, remote, port)
        path, source, target = self._way(remote)
        if path.broadcast:
            raise error(errno.ENETUNREACH)
        sock, wide = self.sock, self.family != AF_INET and len(target) == 4
        if not sock.local_port or self.any_port:
            self._claim(sock.local, 0)
            self.any_port = True
        if not any(sock.local):
            sock.local = MAPPED + source if wide else source
        sock.remote, sock.remote_port = (MAPPED + target if wide else target), port
        connection = Connection(self.network.tcp, self._binding)
        connection.ip, connection.slot, connection.nodelay = self._ip, self.slot, self.nodelay
        connection.room = self.room
        self._sndbuf = max(self._sndbuf, _SNDBUF_CONNECTED) if self._sndbuf == _SNDBUF else self._sndbuf
        self._use(connection)
        self._connecting = True
        connection.open()

    def _disconnect(self) -> None:
        """Connecting has failed: the socket is as it was before, but for the port that it was bound to."""
        assert self.connection is not None
        self.connection.endpoint = None
        self.connection = None
        self._incoming = bytearray()
        self.sock.remote, self.sock.remote_port = bytes(len(self.sock.remote)), 0

    def _connected(self) -> bool:
        return self.connection is not None and self.sock.state not in (BPF_TCP_CLOSE, BPF_TCP_SYN_SENT)

    # Receiving and sending.

    def _ready(self) -> bool:
        if self.listener is not None:
            return bool(self.listener.pending)
        return super()._ready() or (self.sock.psock is not None and bool(self.sock.psock.messages))

    def _read(self, limit: int, flags: int) -> tuple[bytes, Any]:
        there = self.sock.psock
        if there is None or self.connection is None:
            return super()._read(limit, flags)
        with self._arrived:
            self._open()
            if not limit:
                return b"", None
            there.arrived(self.connection)

            def ready() -> bool:
                plain = not there.receives and bool(self._incoming)
                return bool(there.messages) or plain or bool(self._error) or self._ended()

            self._wait_for(ready, self._limit(flags))
            if there.messages:
                data = there.read(limit, peek=bool(flags & MSG_PEEK))
                self._consumed(len(data))
                self._signal()
                return data, None
            if there.receives:
                self._raise_read_error()
                return b"", None
            return super()._read(limit, flags)

    def _ended(self) -> bool:
        connection = self.connection
        if connection is None:
            return True
        over = self.sock.state in (BPF_TCP_CLOSE, BPF_TCP_TIME_WAIT)
        return connection.fin_received or connection.deaf or over

    def _may_read(self) -> None:
        if self.connection is None and (self.listener is not None or not self._at_end):
            raise error(errno.ENOTCONN)

    def _raise_read_error(self) -> None:
        if self.connection is None or not self.connection.fin_received:
            self._raise_error()

    def _consumed(self, count: int) -> None:
        if self.connection is not None:
            self.connection.read()

    def _transmit(self, data: bytes, flags: int) -> int:
        def room() -> bool:
            connection = self.connection
            if connection is None or self.sock.state not in (*SENDING, BPF_TCP_SYN_SENT):
                return True
            return self.sock.state in SENDING and len(connection.outgoing) < self._sndbuf

        self._wait_for(room, self._limit(flags))
        self._raise_error()
        connection, there = self.connection, self.sock.psock
        if there is not None and connection is not None and MESSAGE in there.programs:
            return there.sending.send(connection, data)
        if connection is None or self.sock.state not in SENDING:
            raise error(errno.EPIPE)
        sent = data[: self._sndbuf - len(connection.outgoing)]
        connection.outgoing += sent
        connection.push()
        return len(sent)

    def sendto(self, data: Any, *arguments: Any) -> int:
        """`send`: a connection's address is ignored."""
        return self.send(data, arguments[0] if len(arguments) > 1 else 0)

    # The end.

    def shutdown(self, how: int) -> None:
        """Receive no more, or send no more: a FIN follows what there is to send."""
        with self._arrived:
            self._open()
            if how not in (SHUT_RD, SHUT_WR, SHUT_RDWR):
                raise error(errno.EINVAL)
            if self.listener is not None:
                if how != SHUT_WR:
                    self._stop_listening()
                return
            connection = self.connection
            if connection is None or self.sock.state == BPF_TCP_CLOSE:
                # Refused, and done.
                self._at_end |= how != SHUT_WR
                raise error(errno.ENOTCONN)
            if how != SHUT_WR:
                connection.deaf = True
            if how != SHUT_RD:
                connection.end()
            self._woken()

    def _stop_listening(self) -> None:
        assert self.listener is not None
        tcp_events.state(self.sock, BPF_TCP_CLOSE)
        self.listener.close()
        self.listener, self._at_end = None, False
        self._leave_group()
        self.sock.state = BPF_TCP_CLOSE
        self._woken()

    def _closed(self) -> None:
        cgroup_hooks.sock_release(self.sock)
        if self.listener is not None:
            self._stop_listening()
        connection = self.connection
        psock.close(self.sock)
        if connection is not None:
            connection.close(harshly=self._linger == (1, 0))
        else:
            self.network.inet.ports.release(self._binding)
        self._leave_group()

    def __repr__(self) -> str:
        here = self._shown(self.sock.local, self.sock.local_port)[:2]
        state = "closed" if self.closed else "listening" if self.listener else "connected" if self._connected() else ""
        return f"<TcpSocket {state} at {here}>"
