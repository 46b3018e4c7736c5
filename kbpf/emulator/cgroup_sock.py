"""`struct bpf_sock` as the context of cgroup_sock programs: a socket that is made, bound or gone.

Which fields may be read and set depends on where the program is attached (`__sock_filter_check_attach_type`, Linux
6.18).
"""

from __future__ import annotations

from collections.abc import Mapping
from socket import AF_INET, IPPROTO_TCP, SOCK_STREAM
from typing import TYPE_CHECKING, Any

from kbpf.emulator import sock
from kbpf.emulator.attach_types import numbers
from kbpf.emulator.fields import given
from kbpf.emulator.interpreter import Run
from kbpf.emulator.packet import Packet
from kbpf.emulator.sock import WRITABLE, Sock
from kbpf.uapi.structs import STRUCTS

if TYPE_CHECKING:
    from kbpf.emulator.program import Program

_LAYOUT = STRUCTS["bpf_sock"].fields
_MADE = numbers("cgroup_inet_sock_create", "cgroup_inet_sock_release")
_BOUND4, _BOUND6 = numbers("cgroup_inet4_post_bind"), numbers("cgroup_inet6_post_bind")
#: Fields that only programs for some attach types see, by the offsets of their words.
_ONLY_AT = {
    _LAYOUT[name].offset + 4 * word: at
    for name, at in {
        **dict.fromkeys(WRITABLE.values(), _MADE),
        "src_ip4": _BOUND4,
        "src_ip6": _BOUND6,
        "src_port": _BOUND4 | _BOUND6,
    }.items()
    for word in range(_LAYOUT[name].count)
}


class SockContext:
    """A `kbpf.emulator.interpreter.Context` over a socket."""

    __slots__ = ("attach_type", "retval", "sock")

    def __init__(self, sock: Sock, attach_type: int) -> None:
        self.sock = sock
        self.attach_type = attach_type
        #: What the system call is to return: 0, or a negative errno.
        self.retval = 0

    def show(self, run: Run) -> None:
        """There is no packet."""

    def load(self, offset: int, size: int) -> int | None:
        if self.attach_type not in _ONLY_AT.get(offset & ~3, (self.attach_type,)):
            return None
        return sock.load(self.sock, offset, size)

    def store(self, offset: int, size: int, value: int) -> bool:
        name = WRITABLE.get(offset)
        if name is None or size != 4 or self.attach_type not in _MADE:
            return False
        setattr(self.sock, name, value)
        return True

    def result(self) -> dict[str, Any]:
        """The fields that programs may set."""
        return {name: getattr(self.sock, name) for name in WRITABLE.values()} if self.attach_type in _MADE else {}


def make(program: Program, fields: Mapping[str, Any], of: Sock | None, packet: Packet) -> SockContext:
    """A context over a socket, by default a new TCP socket; `fields` are those that programs may set."""
    context = SockContext(of or Sock(family=AF_INET, type=SOCK_STREAM, protocol=IPPROTO_TCP), program.attach_type)
    for name, _, value in given("bpf_sock", fields, tuple(WRITABLE.values())):
        setattr(context.sock, name, value)
    return context
