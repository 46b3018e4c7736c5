"""Who has which port: the rules of bind(2) (net/ipv4/inet_connection_sock.c, net/ipv4/udp.c)."""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass

from kbpf.emulator.environment import environment
from kbpf.emulator.slot import error
from kbpf.emulator.sock import MAPPED, Sock
from kbpf.uapi.constants import BPF_TCP_LISTEN

#: net.ipv4.ip_local_port_range.
_EPHEMERAL = range(32768, 61000)


@dataclass(eq=False)
class Binding:
    """A socket's claim to its port, and with whom it shares: SO_REUSEADDR, SO_REUSEPORT."""

    sock: Sock
    reuseaddr: bool = False
    reuseport: bool = False


class Ports:
    """Claims by protocol and port."""

    def __init__(self) -> None:
        self._bindings: dict[tuple[int, int], list[Binding]] = {}

    def of(self, protocol: int, port: int) -> list[Binding]:
        return self._bindings.get((protocol, port), [])

    def claim(self, binding: Binding, local: bytes, port: int) -> int:
        """Give a port, any that is free for 0; `OSError` EADDRINUSE."""
        protocol = binding.sock.protocol
        if port:
            if self.taken(binding, local, port):
                raise error(errno.EADDRINUSE)
        else:
            start = environment.random32()
            tried = (_EPHEMERAL[(start + step) % len(_EPHEMERAL)] for step in range(len(_EPHEMERAL)))
            port = next((free for free in tried if not self.of(protocol, free)), 0)
            if not port:
                raise error(errno.EADDRINUSE)
        self._bindings.setdefault((protocol, port), []).append(binding)
        return port

    def share(self, binding: Binding) -> None:
        """An accepted connection has its listener's port."""
        self._bindings.setdefault((binding.sock.protocol, binding.sock.local_port), []).append(binding)

    def release(self, binding: Binding) -> None:
        """Give up the claim; nothing where there is none."""
        key = binding.sock.protocol, binding.sock.local_port
        held = self._bindings.get(key, [])
        if binding in held:
            held.remove(binding)
        if not held:
            self._bindings.pop(key, None)

    def taken(self, binding: Binding, local: bytes, port: int) -> bool:
        """Whether somebody has the port who does not share it (`inet_bind_conflict`)."""
        return any(
            _overlap(binding.sock, local, other.sock)
            and not (_shares(binding) and other.reuseport)
            and not (binding.reuseaddr and other.reuseaddr and other.sock.state != BPF_TCP_LISTEN)
            for other in self.of(binding.sock.protocol, port)
            if other is not binding and _same_device(binding.sock, other.sock)
        )


def _shares(binding: Binding) -> bool:
    """Whether it shares its port with others that do; not a TCP socket that was given a program before it listens."""
    return binding.reuseport and (binding.sock.protocol != socket.IPPROTO_TCP or binding.sock.reuseport is None)


def _same_device(one: Sock, other: Sock) -> bool:
    return 0 in (one.bound_dev_if, other.bound_dev_if) or one.bound_dev_if == other.bound_dev_if


def _overlap(sock: Sock, local: bytes, other: Sock) -> bool:
    """Whether a packet could be for both (`inet_rcv_saddr_equal`)."""
    mine, theirs = _bare(local), _bare(other.local)
    if len(mine) == len(theirs):
        return mine == theirs or not any(mine) or not any(theirs)
    wide, narrow, of_wide = (mine, theirs, sock) if len(mine) == 16 else (theirs, mine, other)
    return not of_wide.v6only and not (any(wide) and any(narrow))


def _bare(address: bytes) -> bytes:
    return address[12:] if address.startswith(MAPPED) else address
