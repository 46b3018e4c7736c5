"""A TCP segment that a socket's filter has seen."""

from __future__ import annotations

from dataclasses import dataclass

from kbpf.emulator import cgroup_hooks
from kbpf.emulator.headers import FIN, SYN, TcpHeader
from kbpf.emulator.packet import Packet
from kbpf.emulator.slot import Slot
from kbpf.emulator.sock import Sock

M32 = 0xFFFFFFFF


def after(one: int, other: int) -> bool:
    """Whether a sequence number comes after another."""
    return 0 < (one - other & M32) < 1 << 31


@dataclass(frozen=True)
class Segment:
    """A segment as its filter left it."""

    header: TcpHeader
    data: bytes
    #: The bytes of the header, options and all.
    start: bytes = b""

    @property
    def syn(self) -> bool:
        return bool(self.header.flags & SYN)

    @property
    def fin(self) -> bool:
        return bool(self.header.flags & FIN)

    @property
    def end(self) -> int:
        """The sequence number that follows."""
        return self.header.seq + self.syn + self.fin + len(self.data) & M32


def filtered(sock: Sock, slot: Slot, packet: Packet, header: TcpHeader) -> Segment | None:
    """Run a socket's filter over a packet, offset 0 its TCP header, and cut it; None where it is dropped."""
    packet.socket = sock
    kept = slot.run(packet) if cgroup_hooks.ingress(sock, packet) else 0
    if not kept:
        return None
    data = packet.data
    return Segment(header, data[header.size : max(kept, header.size)], data[: header.size])
