"""`struct __sk_buff` as sk_skb programs see it: what a socket has received, without headers (Linux 4.14).

`sk_skb_is_valid_access` of net/core/filter.c, Linux 6.18. TCP leaves the bytes in pages: programs reach none of them
directly before bpf_skb_pull_data or another helper has moved them to the front.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kbpf.emulator.context import SK_SKB, SkBuff
from kbpf.emulator.fields import given
from kbpf.emulator.interpreter import PACKET_ADDRESS, Run
from kbpf.emulator.packet import Packet
from kbpf.emulator.sock import Sock
from kbpf.uapi.structs import STRUCTS

if TYPE_CHECKING:
    from kbpf.emulator.program import Program

_LAYOUT = STRUCTS["__sk_buff"].fields
_CB = _LAYOUT["cb"]


class StreamBuff(SkBuff):
    """A `kbpf.emulator.interpreter.Context`."""

    __slots__ = ("linear", "redirect")

    def __init__(self, packet: Packet) -> None:
        super().__init__(packet)
        self.access = SK_SKB
        packet.buffer = bytearray(packet.buffer)
        #: How many bytes programs reach directly.
        self.linear = 0
        #: Where a helper has redirected it, and whether to what is received there.
        self.redirect: tuple[Sock, bool] | None = None

    def show(self, run: Run) -> None:
        start = self.packet.offset
        run.show(memoryview(self.packet.buffer)[start : start + self.linear], True)

    def load(self, offset: int, size: int) -> int | None:
        if (offset, size) == _LAYOUT["data_end"][:2]:
            return PACKET_ADDRESS + self.linear
        return super().load(offset, size)

    def store(self, offset: int, size: int, value: int) -> bool:
        """The control block is TCP's own here."""
        if _CB.offset <= offset < _CB.offset + _CB.size * _CB.count:
            return False
        return super().store(offset, size, value)

    def result(self) -> dict[str, Any]:
        """The fields that programs may set."""
        return {"priority": self.packet.priority, "tc_index": self.packet.tc_index}


def make(program: Program, fields: Mapping[str, Any], sock: Sock | None, packet: Packet) -> StreamBuff:
    """A context over what has come for a socket, by default for a new TCP socket."""
    for _ in given("__sk_buff", fields, ()):
        pass
    if packet.socket is None:
        packet.socket = sock or Sock(family=socket.AF_INET, type=socket.SOCK_STREAM, protocol=socket.IPPROTO_TCP)
    return StreamBuff(packet)
