"""`struct sk_msg_md` as sk_msg programs see it: what is about to be sent (Linux 4.17; net/core/filter.c, skmsg.c).

A message lies in pieces, of which programs reach the first directly, or what they have pulled. The emulator has one
piece until a program makes more; Linux also begins a new one where its page ends.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kbpf.emulator.fields import given
from kbpf.emulator.interpreter import PACKET_ADDRESS, Run
from kbpf.emulator.packet import Packet
from kbpf.emulator.sock import Sock, load
from kbpf.uapi.structs import STRUCTS

if TYPE_CHECKING:
    from kbpf.emulator.program import Program

_LAYOUT = STRUCTS["sk_msg_md"].fields
_BPF_SOCK = STRUCTS["bpf_sock"].fields
#: Fields of the socket, by offset, and where ``struct bpf_sock`` has them.
_SHOWN = {
    _LAYOUT[name].offset + 4 * word: _BPF_SOCK[shown].offset + 4 * word
    for name, shown, words in (
        ("family", "family", 1),
        ("remote_ip4", "dst_ip4", 1),
        ("local_ip4", "src_ip4", 1),
        ("remote_ip6", "dst_ip6", 4),
        ("local_ip6", "src_ip6", 4),
        ("local_port", "src_port", 1),
    )
    for word in range(words)
}


class SkMsg:
    """A message of a socket's, and a `kbpf.emulator.interpreter.Context` over it."""

    __slots__ = ("_end", "_start", "apply_bytes", "cork_bytes", "pieces", "redirect", "sock")

    def __init__(self, sock: Sock) -> None:
        self.sock = sock
        self.pieces: list[bytearray] = []
        #: What of the first piece, or of the one that was pulled, programs reach.
        self._start, self._end = 0, 0
        self.apply_bytes = self.cork_bytes = 0
        #: Where a helper has redirected it, and whether to what is received there.
        self.redirect: tuple[Sock, bool] | None = None

    @property
    def size(self) -> int:
        return sum(map(len, self.pieces))

    def append(self, data: bytes) -> None:
        """More comes behind, into the last piece."""
        if self.pieces:
            self.pieces[-1] = self.pieces[-1] + data
        else:
            self.pieces = [bytearray(data)]

    def clear(self) -> None:
        """Nothing is left, nor what programs have said of it (`sk_msg_free`)."""
        self.pieces.clear()
        self.apply_bytes = self.cork_bytes = 0

    def begin(self) -> None:
        """Programs reach the first piece (`sk_msg_compute_data_pointers`)."""
        self._start, self._end = 0, len(self.pieces[0]) if self.pieces else 0

    def pull(self, start: int, end: int) -> None:
        """Programs reach just these bytes, in one piece."""
        first = self._split_at(start, keep=True)
        at = sum(map(len, self.pieces[:first]))
        last, reached = first, at + len(self.pieces[first])
        while reached < end:
            last += 1
            reached += len(self.pieces[last])
        self.pieces[first : last + 1] = [bytearray().join(self.pieces[first : last + 1])]
        # Nothing that lies before changes, so that the pulled piece may stand for all.
        self._start, self._end = start, end

    def _split_at(self, offset: int, *, keep: bool = False) -> int:
        """The index of the piece that begins at an offset; with `keep`, of the one that has it, as it is."""
        at = 0
        for index, piece in enumerate(self.pieces):
            if offset == at:
                return index
            if offset < at + len(piece):
                if keep:
                    return index
                self.pieces[index : index + 1] = [piece[: offset - at], piece[offset - at :]]
                return index + 1
            at += len(piece)
        return len(self.pieces)

    def insert(self, offset: int, size: int) -> None:
        """Put in a piece of zeroes. (Linux leaves what was in its page.)"""
        self.pieces.insert(self._split_at(offset), bytearray(size))
        self.begin()

    def remove(self, offset: int, size: int) -> None:
        first = self._split_at(offset)
        del self.pieces[first : self._split_at(offset + size)]
        self.begin()

    def take(self, size: int) -> bytes:
        """Take out so many bytes from the front."""
        end = self._split_at(size)
        taken = bytes(bytearray().join(self.pieces[:end]))
        del self.pieces[:end]
        return taken

    def show(self, run: Run) -> None:
        at = 0
        for piece in self.pieces:
            if at <= self._start and self._end <= at + len(piece):
                run.show(memoryview(piece)[self._start - at : self._end - at], True)
                return
            at += len(piece)
        run.show(memoryview(bytearray()), True)

    def load(self, offset: int, size: int) -> int | None:
        if size == 8:
            return {
                _LAYOUT["data"].offset: PACKET_ADDRESS,
                _LAYOUT["data_end"].offset: PACKET_ADDRESS + self._end - self._start,
                _LAYOUT["sk"].offset: self.sock.address,
            }.get(offset)
        if size != 4:
            return None
        if offset == _LAYOUT["size"].offset:
            return self.size
        if offset == _LAYOUT["remote_port"].offset:
            # In network order, in the field's upper half.
            return socket.htons(self.sock.remote_port) << 16
        return load(self.sock, _SHOWN[offset], 4) if offset in _SHOWN else None

    def store(self, offset: int, size: int, value: int) -> bool:
        return False

    def result(self) -> dict[str, Any]:
        """There is nothing that programs may set."""
        return {}


def make(program: Program, fields: Mapping[str, Any], sock: Sock | None, packet: Packet) -> SkMsg:
    """A message of these bytes, by default of a new TCP socket."""
    for _ in given("sk_msg_md", fields, ()):
        pass
    if sock is None:
        sock = Sock(family=socket.AF_INET, type=socket.SOCK_STREAM, protocol=socket.IPPROTO_TCP)
    message = SkMsg(sock)
    message.append(packet.data)
    message.begin()
    return message
