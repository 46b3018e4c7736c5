"""What a socket in a map sends where the map has a program for messages (`tcp_bpf_sendmsg`, net/ipv4/tcp_bpf.c)."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import TYPE_CHECKING

from kbpf.emulator.datapath import backlog
from kbpf.emulator.packet import Packet
from kbpf.emulator.sk_msg import SkMsg
from kbpf.emulator.slot import error
from kbpf.uapi.constants import BPF_TCP_CLOSE_WAIT, BPF_TCP_ESTABLISHED

if TYPE_CHECKING:
    from kbpf.emulator.connection import Connection
    from kbpf.emulator.program import Program
    from kbpf.emulator.sock import Sock

SK_DROP, SK_PASS = 0, 1
#: The attach type of programs for messages.
MESSAGE = "sk_msg_verdict"
#: The states in which data may still be sent.
SENDING = (BPF_TCP_ESTABLISHED, BPF_TCP_CLOSE_WAIT)
_PASSED, _REDIRECTED, _DROPPED = range(3)


class Messages:
    """Verdicts over one socket's messages, and what of them is still to come."""

    def __init__(self, programs: Mapping[str, Program]) -> None:
        self._programs = programs
        #: The verdict that still applies, and for how many bytes; None and 0: the program is asked.
        self._verdict: int | None = None
        self._apply_bytes = 0
        self._redirect: tuple[Sock, bool] | None = None
        #: What is held back, and how many bytes more it waits for.
        self._cork: SkMsg | None = None
        self._cork_bytes = 0

    def send(self, connection: Connection, data: bytes) -> int:
        """Send as the program says; gives how many bytes are taken. EACCES for what is dropped."""
        if not data:
            return 0
        message = self._cork or SkMsg(connection.sock)
        message.append(data)
        if self._cork_bytes:
            self._cork_bytes = max(self._cork_bytes - len(data), 0)
            if self._cork_bytes:
                return len(data)
            self._verdict = None
        with backlog.event():
            return self._judge(connection, message, len(data))

    def _judge(self, connection: Connection, message: SkMsg, taken: int) -> int:
        """Run the program, and do as it says, until nothing is left (`tcp_bpf_send_verdict`)."""
        grown = 0
        while True:
            if self._verdict is None:
                before = message.size
                self._verdict = self._run(message)
                grown = message.size - before
            if message.cork_bytes > message.size:
                self._cork, self._cork_bytes = message, message.cork_bytes - message.size
                return taken
            count = min(message.size, self._apply_bytes or message.size)
            self._apply_bytes = max(self._apply_bytes - count, 0)
            if self._verdict == _DROPPED:
                message.clear()
                return _counted(taken - count + grown, errno.EACCES)
            if self._verdict == _PASSED:
                failed = _push(connection, message.take(count))
                corked = False
            else:
                assert self._redirect is not None
                target, ingress = self._redirect
                corked, self._cork = self._cork is not None, None
                if not self._apply_bytes:
                    self._verdict = None
                failed = _give(target, message.take(count), ingress)
            if failed:
                left = count + message.size
                message.clear()
                return _counted(taken if corked else taken - left, failed)
            if not self._apply_bytes:
                self._verdict = self._redirect = None
            if corked or not message.size:
                return taken

    def _run(self, message: SkMsg) -> int:
        program = self._programs.get(MESSAGE)
        if program is None:
            return _PASSED
        message.begin()
        message.redirect = None
        packet = Packet(buffer=b"", socket=message.sock)
        value = program.execute(packet, b"", context=message)
        self._apply_bytes = message.apply_bytes
        if value != SK_PASS:
            return _DROPPED
        self._redirect = message.redirect
        return _PASSED if message.redirect is None else _REDIRECTED


def _counted(taken: int, number: int) -> int:
    """What send(2) gives where it ends early."""
    if taken > 0:
        return taken
    raise error(number)


def _push(connection: Connection, data: bytes) -> int:
    """Have a connection send; gives an errno, or 0."""
    if connection.sock.state not in SENDING:
        failed, connection.error = connection.error or errno.EPIPE, 0
        return failed
    connection.outgoing += data
    connection.push()
    return 0


def _give(target: Sock, data: bytes, ingress: bool) -> int:
    """Give a message to another socket (`tcp_bpf_sendmsg_redir`); gives an errno, or 0."""
    psock, connection = target.psock, None if target.connection is None else target.connection()
    if psock is None or connection is None:
        return errno.EPIPE
    if not ingress:
        return _push(connection, data)
    psock.receive(data)
    connection.woken()
    return 0
