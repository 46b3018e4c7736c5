"""What a TCP socket has beside itself while it is in a sockmap or sockhash (``struct sk_psock``, net/core/skmsg.c).

It takes the programs that the map has when it is put in, whatever happens to the map's afterwards. A verdict program
runs over each segment that comes, over the FIN too, which is one without bytes; the socket reads what was passed or
redirected to it. What one socket redirects to another gets there when the event is over, in its order.
"""

from __future__ import annotations

import errno
import weakref
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from kbpf.emulator.datapath import backlog
from kbpf.emulator.headers import ACK, PSH
from kbpf.emulator.maps.base import refused
from kbpf.emulator.packet import Packet
from kbpf.emulator.psock_send import SENDING, SK_PASS, Messages
from kbpf.emulator.sk_skb import StreamBuff
from kbpf.emulator.slot import error
from kbpf.emulator.sock import as_ipv4
from kbpf.uapi.constants import ETH_P_IP, ETH_P_IPV6

if TYPE_CHECKING:
    from kbpf.emulator.connection import Connection
    from kbpf.emulator.program import Program
    from kbpf.emulator.sock import Sock

#: Where such a map has a program (``struct sk_psock_progs``).
STREAM_VERDICT, ANY_VERDICT = "sk_skb_stream_verdict", "sk_skb_verdict"
_VERDICTS = (STREAM_VERDICT, ANY_VERDICT)


class Programs(dict[str, "Program"]):
    """A map's programs, by attach type. Equal only to itself, since it stands for the map."""

    __eq__ = object.__eq__


class _Message(NamedTuple):
    """What waits to be read; nothing, where it was a FIN or a program has left nothing."""

    data: bytearray
    fin: bool


class _Redirected(NamedTuple):
    """What is on its way to a socket: to what that receives, or to its other end."""

    data: bytes
    ingress: bool
    fin: bool


class Psock:
    """One socket's."""

    def __init__(self, sock: Sock) -> None:
        self._sock = weakref.ref(sock)
        self.programs: dict[str, Program] = {}
        #: The elements that it is, each by its map's programs and the key.
        self.links: list[tuple[Programs, bytes]] = []
        #: Whether a verdict program runs over what comes.
        self.receives = False
        #: False after an error: nothing is passed or redirected to it any more (SK_PSOCK_TX_ENABLED).
        self.enabled = True
        self.messages: deque[_Message] = deque()
        self.sending = Messages(self.programs)
        self._redirected: deque[_Redirected] = deque()

    @property
    def size(self) -> int:
        """Bytes that wait to be read."""
        return sum(len(message.data) for message in self.messages)

    # In maps.

    def take(self, programs: Programs) -> None:
        """Take a map's programs; EBUSY where it has some for the same place (`sock_map_link`)."""
        own = self.programs
        for place in programs:
            taken = _VERDICTS if place in _VERDICTS else (place,)
            if any(other in own for other in taken):
                raise refused(errno.EBUSY)
        own.update(programs)
        self.receives |= any(place in programs for place in _VERDICTS)

    def leave(self, programs: Programs, key: bytes) -> None:
        """It is no longer that element (`sock_map_unref`)."""
        if (programs, key) in self.links:
            self.links.remove((programs, key))
            if self.receives and any(place in programs for place in _VERDICTS):
                self.receives = False
                for place in _VERDICTS:
                    self.programs.pop(place, None)
        self.settle()

    def settle(self) -> None:
        """It goes, with what has not been read, where it is in no map (`sk_psock_drop`)."""
        sock = self._sock()
        if not self.links and sock is not None and sock.psock is self:
            sock.psock = None
            self.enabled = self.receives = False

    # What comes.

    def arrived(self, connection: Connection, flags: int = ACK | PSH, *, fin: bool = False) -> None:
        """Bytes are in the connection's queue, or a FIN without any has come (`sk_psock_verdict_data_ready`)."""
        if not self.receives or connection.endpoint is None:
            # Nobody has accepted it: the first who reads runs the program.
            return
        data = bytes(connection.incoming)
        if not data and not fin:
            return
        connection.incoming.clear()
        with backlog.event():
            self._run(connection, data, fin, flags)
        connection.read()
        connection.woken()

    def _run(self, connection: Connection, data: bytes, fin: bool, flags: int) -> None:
        sock, end = connection.sock, connection.rcv_nxt
        packet = Packet(
            buffer=data,
            protocol=ETH_P_IPV6 if as_ipv4(sock.remote) is None else ETH_P_IP,
            ingress_ifindex=connection.came_by,
            gso_segs=1,
            socket=sock,
            # TCP's own (``struct tcp_skb_cb``): sequence numbers and flags.
            cb=(end - len(data) - connection.fin_received & 0xFFFFFFFF, end, 0, flags, 0),
        )
        program = self.programs.get(STREAM_VERDICT) or self.programs[ANY_VERDICT]
        buff = StreamBuff(packet)
        if program.execute(packet, packet.data, context=buff) == SK_PASS:
            self._apply(packet.data, fin, buff.redirect)

    def _apply(self, data: bytes, fin: bool, redirect: tuple[Sock, bool] | None) -> None:
        """Do as a program says that has not dropped it (`sk_psock_verdict_apply`)."""
        if redirect is None or redirect == (self._sock(), True):
            self._receive(data, fin)
            return
        target, ingress = redirect
        other = target.psock
        if other is None or target.closed or not other.enabled or not backlog.count_redirect():
            return
        other._redirected.append(_Redirected(data, ingress, fin))
        backlog.put(other.go_on)

    def _receive(self, data: bytes, fin: bool) -> None:
        if not self.enabled:
            return
        if self._redirected:
            # Behind what is on its way.
            self._redirected.append(_Redirected(data, True, fin))
        else:
            self.messages.append(_Message(bytearray(data), fin))

    def go_on(self) -> None:
        """Bring what is on its way, as far as there is room (`sk_psock_backlog`)."""
        sock = self._sock()
        while self._redirected and self.enabled and sock is not None:
            data, ingress, fin = self._redirected[0]
            connection = None if sock.connection is None else sock.connection()
            endpoint = None if connection is None or connection.endpoint is None else connection.endpoint()
            if connection is None or endpoint is None:
                return
            number = 0 if data else errno.EPIPE
            if ingress:
                self.messages.append(_Message(bytearray(data), fin))
            elif not endpoint.writable:
                return
            elif connection.sock.state not in SENDING:
                number = connection.error or errno.EPIPE
            elif data:
                connection.outgoing += data
                connection.push()
            if number:
                # Whoever uses the socket learns that the pipe is broken.
                connection.error, self.enabled = number, False
            else:
                self._redirected.popleft()
            connection.woken()

    # Reading.

    def receive(self, data: bytes) -> None:
        """Something is given to who reads."""
        if self.enabled and data:
            self.messages.append(_Message(bytearray(data), False))

    def read(self, limit: int, *, peek: bool) -> bytes:
        """At most so many bytes of what waits; EFAULT where a program has left nothing of what comes next."""
        found = bytearray()
        for message in list(self.messages):
            if not message.data:
                if not found and not message.fin:
                    raise error(errno.EFAULT)
                break
            part = message.data[: limit - len(found)]
            found += part
            if not peek:
                del message.data[: len(part)]
                if not message.data:
                    self.messages.popleft()
            if len(found) == limit:
                break
        return bytes(found)


def join(sock: Sock, programs: Programs) -> Psock | None:
    """A socket is about to be put into a map with these programs; None for one that no programs run for.

    `OSError` EBUSY, and EOPNOTSUPP where the map's programs would never see what comes.
    """
    if not sock.tcp_here:
        if programs:
            raise OSError(errno.EOPNOTSUPP, "the emulator runs programs of socket maps for its own TCP sockets only")
        return None
    if sock.psock is None:
        sock.psock = Psock(sock)
    try:
        sock.psock.take(programs)
    except OSError:
        sock.psock.settle()
        raise
    return sock.psock


def leave(sock: Sock, programs: Programs, key: bytes) -> None:
    """A socket is no longer that element of a map."""
    if sock.psock is not None:
        sock.psock.leave(programs, key)


def close(sock: Sock) -> None:
    """A socket is closed: it leaves all maps, and nobody reads what waits (`sock_map_close`)."""
    psock = sock.psock
    if psock is not None:
        psock.links.clear()
        psock.settle()
