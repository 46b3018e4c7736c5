"""`struct bpf_sockopt` as cgroup_sockopt programs see it: an option that is set or read, and its value (Linux 5.3).

The value may be read and written, in room for at least sixteen bytes where one is set, and a page at most.
`cg_sockopt_is_valid_access` of kernel/bpf/cgroup.c, Linux 6.18.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kbpf.emulator.attach_types import numbers
from kbpf.emulator.fields import given
from kbpf.emulator.interpreter import PACKET_ADDRESS, Run
from kbpf.emulator.memory import M32
from kbpf.emulator.packet import Packet
from kbpf.emulator.sock import Sock
from kbpf.uapi.structs import STRUCTS

if TYPE_CHECKING:
    from kbpf.emulator.program import Program

_LAYOUT = STRUCTS["bpf_sockopt"].fields
_AT = {_LAYOUT[name].offset: name for name in ("level", "optname", "optlen", "retval")}
_GET, _SET = numbers("cgroup_getsockopt"), numbers("cgroup_setsockopt")
#: Where programs may set a field.
_WRITABLE = {"level": _SET, "optname": _SET, "optlen": _GET | _SET, "retval": _GET}
LEAST, MOST = 16, 4096


class SockoptContext:
    """A `kbpf.emulator.interpreter.Context`. `optlen` is as the system call's user gives it, or the kernel's answer."""

    __slots__ = ("attach_type", "level", "optlen", "optname", "optval", "retval", "sock")

    def __init__(
        self, sock: Sock, attach_type: int, level: int, optname: int, optval: bytes, optlen: int, retval: int = 0
    ) -> None:
        self.sock = sock
        self.attach_type = attach_type
        self.level = level
        self.optname = optname
        self.optlen = optlen
        room = min(max(optlen, LEAST) if attach_type in _SET else optlen, MOST)
        self.optval = bytearray(optval[:room].ljust(room, b"\0"))
        #: What the system call returns: of the kernel where an option is read, 0 or a negative errno.
        self.retval = retval

    def show(self, run: Run) -> None:
        run.show(self.optval, writable=True)

    def load(self, offset: int, size: int) -> int | None:
        pointer = {
            (_LAYOUT["sk"].offset, 8): self.sock.address,
            (_LAYOUT["optval"].offset, 8): PACKET_ADDRESS,
            (_LAYOUT["optval_end"].offset, 8): PACKET_ADDRESS + len(self.optval),
        }.get((offset, size))
        name = _AT.get(offset)
        if pointer is not None or name is None or size != 4:
            return pointer
        if name == "retval" and self.attach_type not in _GET:
            return None
        return int(getattr(self, name)) & M32

    def store(self, offset: int, size: int, value: int) -> bool:
        name = _AT.get(offset)
        if name is None or size != 4 or self.attach_type not in _WRITABLE[name]:
            return False
        setattr(self, name, value - (value >> 31 << 32))
        return True

    def result(self) -> dict[str, Any]:
        """The fields that programs may set, and ``optval``, the value's bytes with the room behind it."""
        fields = {name: getattr(self, name) for name, at in _WRITABLE.items() if self.attach_type in at}
        return {**fields, "optval": bytes(self.optval)}


def make(program: Program, fields: Mapping[str, Any], sock: Sock | None, packet: Packet) -> SockoptContext:
    """A context over a socket, by default a new TCP socket; ``optval`` are the value's bytes."""
    if sock is None:
        sock = Sock(family=socket.AF_INET, type=socket.SOCK_STREAM, protocol=socket.IPPROTO_TCP)
    rest = dict(fields)
    value = bytes(rest.pop("optval", b""))
    found = {name: number for name, _, number in given("bpf_sockopt", rest, ("level", "optname", "optlen", "retval"))}
    returned = found.get("retval", 0)
    return SockoptContext(
        sock,
        program.attach_type,
        found.get("level", 0),
        found.get("optname", 0),
        value,
        found.get("optlen", len(value)),
        returned - (returned >> 31 << 32),
    )
