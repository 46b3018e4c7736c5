"""`struct xdp_md` as programs see it: a frame with room before and behind it, and fragments where it is long.

The counterpart of the kernel's ``struct xdp_buff``. Programs reach metadata and the first piece of the frame directly,
the fragments only through helpers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kbpf.emulator.interpreter import PACKET_ADDRESS, Run
from kbpf.emulator.packet import Redirect
from kbpf.uapi.structs import STRUCTS

if TYPE_CHECKING:
    from kbpf.emulator.maps.redirect import RedirectMap

_FIELDS = {field.offset: name for name, field in STRUCTS["xdp_md"].fields.items()}

#: Bytes before a frame (XDP_PACKET_HEADROOM), those of them that the kernel keeps for itself (struct xdp_frame), the
#: size of a frame's memory, and what the kernel keeps at its end (struct skb_shared_info, x86-64).
HEADROOM, RESERVED, FRAME, SHARED_INFO = 256, 40, 4096, 320


class XdpBuff:
    """The context of one run of an XDP program; a `kbpf.emulator.interpreter.Context`.

    `memory` is one frame's, of `room` bytes; `meta`, `data` and `end` are positions in it: of the metadata, the first
    byte, and behind the last of the first piece.
    """

    __slots__ = (
        "data",
        "egress_ifindex",
        "end",
        "fragments",
        "ingress_ifindex",
        "memory",
        "meta",
        "queue",
        "redirect",
        "redirected_by",
    )

    def __init__(
        self, frame: bytes, *, metadata: int = 0, fragments: list[bytearray] | None = None, room: int = FRAME
    ) -> None:
        self.memory = bytearray(room)
        self.meta = HEADROOM - metadata
        self.data = HEADROOM
        self.end = self.meta + len(frame)
        self.memory[self.meta : self.end] = frame
        self.fragments = fragments or []
        self.ingress_ifindex = 1
        #: Of a devmap's program: the device that the frame is to leave by.
        self.egress_ifindex: int | None = None
        self.queue = 0
        #: Where the program has redirected the frame.
        self.redirect: Redirect | None = None
        #: Or by which map: (the map, index, flags).
        self.redirected_by: tuple[RedirectMap, int, int] | None = None

    @property
    def length(self) -> int:
        return self.end - self.data + sum(map(len, self.fragments))

    def show(self, run: Run) -> None:
        run.show(memoryview(self.memory)[self.meta : self.end], writable=True)

    def load(self, offset: int, size: int) -> int | None:
        name = _FIELDS.get(offset)
        if size != 4 or name is None:
            return None
        if name == "data_meta":
            return PACKET_ADDRESS
        if name == "data":
            return PACKET_ADDRESS + self.data - self.meta
        if name == "data_end":
            return PACKET_ADDRESS + self.end - self.meta
        return {
            "ingress_ifindex": self.ingress_ifindex,
            "rx_queue_index": self.queue,
            "egress_ifindex": self.egress_ifindex,
        }.get(name)

    def store(self, offset: int, size: int, value: int) -> bool:
        return False

    def whole(self) -> bytes:
        """Metadata and frame, as they lie one behind the other."""
        return bytes(self.memory[self.meta : self.end]) + b"".join(self.fragments)

    def read(self, offset: int, size: int) -> bytes:
        return (bytes(self.memory[self.data : self.end]) + b"".join(self.fragments))[offset : offset + size]

    def write(self, offset: int, data: bytes) -> None:
        """Overwrite bytes of the frame, over all its pieces."""
        first = self.end - self.data
        here = data[: max(first - offset, 0)]
        self.memory[self.data + offset : self.data + offset + len(here)] = here
        offset, data = max(offset - first, 0), data[len(here) :]
        for piece in self.fragments:
            here = data[: max(len(piece) - offset, 0)]
            piece[offset : offset + len(here)] = here
            offset, data = max(offset - len(piece), 0), data[len(here) :]
