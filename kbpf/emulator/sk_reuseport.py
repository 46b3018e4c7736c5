"""`struct sk_reuseport_md` as sk_reuseport programs see it: a packet, and the group that one socket is chosen of.

Linux 4.19; migration of connections since 5.14. `sk_reuseport_is_valid_access` and its conversion in
net/core/filter.c, Linux 6.18.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from kbpf.emulator.fields import given, narrow
from kbpf.emulator.interpreter import PACKET_ADDRESS, Run
from kbpf.emulator.memory import M32
from kbpf.emulator.packet import Packet
from kbpf.emulator.sock import Sock
from kbpf.uapi.structs import STRUCTS

if TYPE_CHECKING:
    from kbpf.emulator.program import Program

_LAYOUT = STRUCTS["sk_reuseport_md"].fields


class ReuseportContext:
    """A `kbpf.emulator.interpreter.Context`. Offset 0 of the packet is its UDP or TCP header.

    `sock` is the member of the group that the packet was found for, `hash` the flow's. `migrating` is the listener that
    was closed, or the request that it leaves behind.
    """

    __slots__ = ("bind_inany", "hash", "migrating", "packet", "selected", "sock")

    def __init__(
        self, sock: Sock, packet: Packet, hash: int = 0, *, bind_inany: bool = False, migrating: Sock | None = None
    ) -> None:
        self.sock = sock
        self.packet = packet
        self.hash = hash
        self.bind_inany = bind_inany
        self.migrating = migrating
        #: The one that the program has chosen.
        self.selected: Sock | None = None

    def show(self, run: Run) -> None:
        run.show(memoryview(bytearray(self.packet.data)), writable=False)

    def load(self, offset: int, size: int) -> int | None:
        if offset % size:
            return None
        read = _WHOLE.get((offset, size))
        if read is not None:
            return read(self)
        part = _PARTS.get(offset & ~3)
        if part is None or size > 4:
            return None
        read, kept, least = part
        return narrow(read(self), offset, size, kept) if size >= least else None

    def store(self, offset: int, size: int, value: int) -> bool:
        return False

    def result(self) -> dict[str, Any]:
        """Programs set no fields: they choose a socket, which is ``selected``."""
        return {"selected": self.selected}


#: By offset and size.
_WHOLE: dict[tuple[int, int], Callable[[ReuseportContext], int]] = {
    (_LAYOUT["data"].offset, 8): lambda context: PACKET_ADDRESS,
    (_LAYOUT["data_end"].offset, 8): lambda context: (
        PACKET_ADDRESS + len(context.packet.buffer) - context.packet.offset
    ),
    (_LAYOUT["hash"].offset, 4): lambda context: context.hash & M32,
    (_LAYOUT["sk"].offset, 8): lambda context: context.sock.address,
    (_LAYOUT["migrating_sk"].offset, 8): lambda context: context.migrating.address if context.migrating else 0,
}
#: By offset: the value, how many bytes the kernel keeps of it, and the fewest that may be loaded.
_PARTS: dict[int, tuple[Callable[[ReuseportContext], int], int, int]] = {
    _LAYOUT["len"].offset: (lambda context: context.packet.length & M32, 4, 1),
    _LAYOUT["eth_protocol"].offset: (lambda context: socket.htons(context.packet.protocol), 2, 2),
    _LAYOUT["ip_protocol"].offset: (lambda context: context.sock.protocol, 2, 1),
    _LAYOUT["bind_inany"].offset: (lambda context: int(context.bind_inany), 1, 1),
}


def make(program: Program, fields: Mapping[str, Any], sock: Sock | None, packet: Packet) -> ReuseportContext:
    """A context over a member of a group, by default a UDP socket that is in none, and a packet."""
    if sock is None:
        sock = Sock(family=socket.AF_INET, type=socket.SOCK_DGRAM, protocol=socket.IPPROTO_UDP)
    context = ReuseportContext(sock, packet)
    for name, _, value in given("sk_reuseport_md", fields, ("hash", "bind_inany")):
        setattr(context, name, value)
    return context
