"""The hooks of control groups that sockets run programs in (include/linux/bpf-cgroup.h).

What a socket does calls the function of the hook, which raises `OSError` where a program says no: with EPERM, or with
what the program has set (bpf_set_retval). The programs of a hook run one after the other over the same context, all of
them, whatever the ones before have said.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from kbpf.emulator.cgroup_sock import SockContext
from kbpf.emulator.cgroups import effective
from kbpf.emulator.context import SkBuff
from kbpf.emulator.environment import environment
from kbpf.emulator.interpreter import Context
from kbpf.emulator.maps.cgroup import values_of_group
from kbpf.emulator.packet import Packet
from kbpf.emulator.sock import MAPPED, Sock
from kbpf.emulator.sock_addr import ADDRESS4, ADDRESS6, PORT, SockAddr
from kbpf.emulator.sock_ops import SockOps
from kbpf.uapi.enums import ATTACH_TYPES

if TYPE_CHECKING:
    from kbpf.emulator.program import Program

_MOST_ERRNO = 4095
#: What an egress program's value says beside whether the packet may pass: the network is congested.
_CONGESTED = 2


def _programs(attach_type: str, sock: Sock) -> list[tuple[int, Program]]:
    return effective(ATTACH_TYPES[attach_type], sock.cgroup_id, sock.cgroup_ancestors)


def _run(programs: list[tuple[int, Program]], context: SockContext | SockAddr | SockOps, flags: bool = False) -> int:
    """What the hook's call returns: 0 or a negative errno (`bpf_prog_run_array_cg`).

    With `flags` only a value's lowest bit says no.
    """
    nothing = Packet(buffer=b"")
    for group, program in programs:
        if not isinstance(context, SockOps):
            # A link may have been given a program for another place: what it may load is what it was checked for.
            context.attach_type = program.attach_type
        value = _execute(group, program, nothing, context)
        if not (value & 1 if flags else value) and not -_MOST_ERRNO <= context.retval < 0:
            context.retval = -errno.EPERM
    return context.retval


def _execute(group: int, program: Program, packet: Packet, context: Context) -> int:
    with values_of_group(group):
        return program.execute(packet, packet.data, context)


def _raise(returned: int) -> None:
    if returned:
        raise OSError(-returned, os.strerror(-returned))


# Sockets that are made, bound and gone.


def sock_create(sock: Sock) -> None:
    """A socket is made, of the process's group; programs may set its mark, priority and device."""
    sock.cgroup_id, sock.cgroup_ancestors = environment.cgroup_id, environment.cgroup_ancestors
    _sock(sock, "cgroup_inet_sock_create")


def sock_release(sock: Sock) -> None:
    """A socket is closed, which nobody can refuse."""
    with contextlib.suppress(OSError):
        _sock(sock, "cgroup_inet_sock_release")


def post_bind(sock: Sock) -> None:
    """A socket has its address and port, and loses them where a program says no."""
    _sock(sock, f"cgroup_inet{4 if sock.family == socket.AF_INET else 6}_post_bind")


def _sock(sock: Sock, attach_type: str) -> None:
    programs = _programs(attach_type, sock)
    if programs:
        _raise(_run(programs, SockContext(sock, ATTACH_TYPES[attach_type])))


# Addresses that come from user space or go there.


class Address(NamedTuple):
    """A packed address, and a port in host order."""

    address: bytes
    port: int


def _sockaddr(family: int, given: Address) -> bytes:
    """``struct sockaddr_in`` or ``struct sockaddr_in6``."""
    start = family.to_bytes(2, sys.byteorder) + given.port.to_bytes(2, "big")
    at = ADDRESS4 if family == socket.AF_INET else ADDRESS6
    return start.ljust(at, b"\0") + given.address


def _address(sock: Sock, attach_type: str, given: Address, source: bytes = b"") -> tuple[Address, bytes]:
    """The address as the programs leave it, and where a datagram is sent from."""
    programs = _programs(attach_type, sock)
    if not programs:
        return given, source
    size = len(given.address)
    family = socket.AF_INET if size == 4 else socket.AF_INET6
    context = SockAddr(sock, ATTACH_TYPES[attach_type], _sockaddr(family, given), source)
    _raise(_run(programs, context, flags=attach_type.endswith("_bind")))
    at = ADDRESS4 if size == 4 else ADDRESS6
    left, port = bytes(context.sockaddr[at : at + size]), context.sockaddr[PORT : PORT + 2]
    return Address(left, int.from_bytes(port, "big")), bytes(context.source[: len(source)])


def _of_family(what: str) -> Callable[[Sock, bytes, int], Address]:
    def hook(sock: Sock, address: bytes, port: int) -> Address:
        name = f"cgroup_inet{4 if len(address) == 4 else 6}_{what}"
        return _address(sock, name, Address(address, port))[0]

    return hook


#: Each takes the socket, a packed address of its family, and a port; gives what is to be used or shown instead.
bind, connect = _of_family("bind"), _of_family("connect")
getpeername, getsockname = _of_family("getpeername"), _of_family("getsockname")


def sendmsg(sock: Sock, address: bytes, port: int, source: bytes) -> tuple[Address, bytes]:
    """Where a datagram with an address of its own goes, and from; `source` is of the family that the packet has.

    Of a socket of AF_INET6, what goes to an IPv4 address is IPv4's.
    """
    narrow = address[12:] if address.startswith(MAPPED) else address
    if len(narrow) == 4:
        left, source = _address(sock, "cgroup_udp4_sendmsg", Address(narrow, port), source)
        return (left if len(address) == 4 else Address(MAPPED + left.address, left.port)), source
    left, source = _address(sock, "cgroup_udp6_sendmsg", Address(address, port), source)
    if left.address.startswith(MAPPED):
        # A program may not make it IPv4's.
        raise OSError(524, os.strerror(524))
    return left, source


def recvmsg(sock: Sock, address: bytes, port: int) -> Address:
    """Who a datagram is said to come from."""
    return _address(sock, f"cgroup_udp{4 if len(address) == 4 else 6}_recvmsg", Address(address, port))[0]


# Packets.


def egress(sock: Sock, packet: Packet) -> bool:
    """Whether a packet may leave, its network header known; `OSError` EPERM where the sender is told that it may not.

    A program that says no because the network is congested drops it as a full queue does, with ENOBUFS, which UDP tells
    nobody (IP_RECVERR aside).
    """
    programs = _programs("cgroup_inet_egress", sock)
    if not programs:
        return True
    values = _packet(programs, packet)
    if all(value & 1 for value in values):
        return True
    if not any(value & _CONGESTED for value in values):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))
    return False


def ingress(sock: Sock, packet: Packet) -> bool:
    """Whether a packet may come in to the socket."""
    programs = _programs("cgroup_inet_ingress", sock)
    return not programs or all(_packet(programs, packet))


def _packet(programs: list[tuple[int, Program]], packet: Packet) -> list[int]:
    """What programs say, who see it from its network header on, and may set its mark, priority and time."""
    network = packet.network or 0
    seen = replace(packet, offset=network, length=packet.length + packet.offset - network)
    values = [_execute(group, program, seen, SkBuff(seen, program.type)) for group, program in programs]
    packet.mark, packet.priority, packet.tstamp = seen.mark, seen.priority, seen.tstamp
    return values


# TCP.


def sock_ops(
    sock: Sock, op: int, *args: int, segment: bytes | None = None, length: int | None = None
) -> SockOps | None:
    """Tell or ask about a connection; the context as programs leave it, its reply in `args[0]`; None without programs.

    The reply counts only where no program has said no, which makes it -1 (`tcp_call_bpf`).
    """
    programs = _programs("cgroup_sock_ops", sock)
    if not programs:
        return None
    context = SockOps(sock, op, args, segment=segment, length=length)
    if _run(programs, context):
        context.args[0] = 0xFFFFFFFF
    return context
