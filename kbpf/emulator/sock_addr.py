"""`struct bpf_sock_addr` as cgroup_sock_addr programs see it: a socket, and an address that comes from user space or
goes there.

The address is kept as Linux has it, a ``struct sockaddr``, which the context's fields are parts of: what programs
attached to UNIX sockets find under ``user_port`` is the start of the path. Which fields there are depends on where the
program is attached (`sock_addr_is_valid_access`, Linux 6.18).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from socket import AF_INET, AF_INET6, AF_UNIX, IPPROTO_TCP, SOCK_STREAM
from typing import TYPE_CHECKING, Any, NamedTuple

from kbpf.emulator.attach_types import EXPECTED, numbers
from kbpf.emulator.fields import given, narrow
from kbpf.emulator.interpreter import Run
from kbpf.emulator.packet import Packet
from kbpf.emulator.sock import Sock
from kbpf.uapi.enums import ATTACH_TYPES
from kbpf.uapi.structs import STRUCTS

if TYPE_CHECKING:
    from kbpf.emulator.program import Program

_LAYOUT = STRUCTS["bpf_sock_addr"].fields
#: ``struct sockaddr_storage``, and where the address' parts are in it.
SOCKADDR_SIZE, PORT, ADDRESS4, ADDRESS6 = 128, 2, 4, 8
_ALL = EXPECTED["cgroup_sock_addr"]
_INET4, _INET6 = (
    _ALL & {number for name, number in ATTACH_TYPES.items() if name.startswith(prefixes)}
    for prefixes in (("cgroup_inet4_", "cgroup_udp4_"), ("cgroup_inet6_", "cgroup_udp6_"))
)
_SENDMSG4, _SENDMSG6 = numbers("cgroup_udp4_sendmsg"), numbers("cgroup_udp6_sendmsg")


class _Address(NamedTuple):
    """An address among the fields: whose attribute it is, where in it, and where programs are attached that see it."""

    attribute: str
    at: int
    attached: frozenset[int]


_ADDRESSES = {
    "user_ip4": _Address("sockaddr", ADDRESS4, _INET4),
    "user_ip6": _Address("sockaddr", ADDRESS6, _INET6),
    "user_port": _Address("sockaddr", PORT, _ALL),
    "msg_src_ip4": _Address("source", 0, _SENDMSG4),
    "msg_src_ip6": _Address("source", 0, _SENDMSG6),
}
_PORT = _LAYOUT["user_port"].offset
_OF_SOCK = {_LAYOUT[name].offset: name for name in ("family", "type", "protocol")}


class SockAddr:
    """A `kbpf.emulator.interpreter.Context`.

    `sockaddr` is the ``struct sockaddr``, `source` the packed address that a datagram is to be sent from.
    """

    __slots__ = ("attach_type", "retval", "sock", "sockaddr", "source")

    def __init__(self, sock: Sock, attach_type: int, sockaddr: bytes, source: bytes = b"") -> None:
        self.sock = sock
        self.attach_type = attach_type
        #: What the system call is to return: 0, or a negative errno.
        self.retval = 0
        self.sockaddr = bytearray(sockaddr.ljust(SOCKADDR_SIZE, b"\0"))
        self.source = bytearray(source.ljust(16, b"\0"))

    def show(self, run: Run) -> None:
        """There is no packet."""

    def _place(self, offset: int, size: int) -> tuple[bytearray, int] | None:
        """Where a whole word, or a pair of words of an IPv6 address at a multiple of eight, lies."""
        for name, (attribute, at, attached) in _ADDRESSES.items():
            field = _LAYOUT[name]
            inside = offset - field.offset
            if offset >= field.offset and inside + size <= 4 * field.count and self.attach_type in attached:
                return getattr(self, attribute), at + inside
        return None

    def load(self, offset: int, size: int) -> int | None:
        if offset % size:
            return None
        if offset == _LAYOUT["sk"].offset:
            return self.sock.address if size == 8 else None
        if offset in _OF_SOCK:
            return int(getattr(self.sock, _OF_SOCK[offset])) if size == 4 else None
        if offset == 0:
            return int.from_bytes(self.sockaddr[:2], sys.byteorder) if size == 4 else None
        place = self._place(offset & ~3, max(size, 4))
        if place is None:
            return None
        buffer, at = place
        if offset & ~3 == _PORT:
            return narrow(int.from_bytes(buffer[at : at + 2], sys.byteorder), offset, size, 2)
        return narrow(int.from_bytes(buffer[at : at + max(size, 4)], sys.byteorder), offset, size)

    def store(self, offset: int, size: int, value: int) -> bool:
        if size < 4 or offset % size:
            return False
        place = self._place(offset, size)
        if place is None:
            return False
        buffer, at = place
        kept = 2 if offset == _PORT else size
        buffer[at : at + kept] = (value & (1 << 8 * kept) - 1).to_bytes(kept, sys.byteorder)
        return True

    def result(self) -> dict[str, Any]:
        """The fields that programs may set, as they load them."""
        found = {}
        for name, address in _ADDRESSES.items():
            if self.attach_type in address.attached:
                field = _LAYOUT[name]
                words = tuple(self.load(field.offset + 4 * word, 4) for word in range(field.count))
                found[name] = words if field.count > 1 else words[0]
        return found


def make(program: Program, fields: Mapping[str, Any], sock: Sock | None, packet: Packet) -> SockAddr:
    """A context over a socket, by default a new stream of the attach type's family, and an address of that family."""
    attached = program.attach_type
    family = AF_INET if attached in _INET4 else AF_INET6 if attached in _INET6 else AF_UNIX
    if sock is None:
        sock = Sock(family=family, type=SOCK_STREAM, protocol=0 if family == AF_UNIX else IPPROTO_TCP)
    context = SockAddr(sock, attached, family.to_bytes(2, sys.byteorder))
    names = tuple(name for name, address in _ADDRESSES.items() if attached in address.attached)
    for name, index, value in given("bpf_sock_addr", fields, ("user_family", *names)):
        if name == "user_family":
            context.sockaddr[:2] = (value & 0xFFFF).to_bytes(2, sys.byteorder)
        else:
            context.store(_LAYOUT[name].offset + 4 * index, 4, value)
    return context
