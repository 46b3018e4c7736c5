"""What a socket buffer is to a program: bytes, where the headers lie in them, and metadata.

The counterpart of the kernel's ``struct sk_buff``, as far as a filter can tell. Whoever delivers
packets (an emulated interface, a socket, BPF_PROG_TEST_RUN) builds one; programs read it through
`__sk_buff`, classic loads and helpers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from kbpf.emulator.internet_checksum import add, partial, shift
from kbpf.emulator.memory import M32
from kbpf.emulator.sock import Sock

if TYPE_CHECKING:
    from kbpf.emulator.interface import EmulatedInterface

#: Bytes that drivers leave before a packet, and the step in which more are made.
NET_SKB_PAD = 64


#: What the kernel keeps behind the bytes (struct skb_shared_info, x86-64), the memory that small packets come in where
#: they are moved to (SKB_SMALL_HEAD_CACHE_SIZE), and the most that there is in one piece (KMALLOC_MAX_SIZE).
_SHARED_INFO, _SMALL_MEMORY, _MOST_MEMORY = 320, 576, 1 << 22


def _power_of_two(size: int) -> int:
    """The memory that so many bytes are given."""
    return 1 << (size - 1).bit_length()


@dataclass(slots=True, kw_only=True)
class Tunnel:
    """The tunnel that a packet is to leave by: ``struct bpf_tunnel_key`` and flags as a program gave them, options."""

    key: bytes
    flags: int
    options: bytes | None = None


class Redirect(NamedTuple):
    """What bpf_redirect and its kin have noted down: the device's index, and how (BPF_F_INGRESS)."""

    ifindex: int
    flags: int = 0
    #: To the other end of that device's cable (bpf_redirect_peer).
    peer: bool = False
    #: With a link header for the next hop: ``struct bpf_redir_neigh``, or empty for the route's (bpf_redirect_neigh).
    neighbour: bytes | None = None


@dataclass(slots=True, kw_only=True)
class Packet:
    """A packet on its way to a program.

    `buffer` is all there is, from the first header that can still be reached to the last byte. `offset`, `mac` and
    `network` are positions in `buffer`: where the program's offset 0 is (``skb->data``), and where the link header and
    the network header start. A `mac` or `network` of None means that it was never set: loads relative to it find
    nothing. (The kernel sets `network` for every packet: for UNIX and netlink sockets it is where the data starts.)

    Numbers are in host order, `protocol` and `vlan_proto` too; the context gives them as stored.
    """

    #: A bytearray where programs may write into it, whose size then never changes: see `resize`.
    buffer: bytes | bytearray
    offset: int = 0
    mac: int | None = None
    network: int | None = None
    #: ``skb->len``, counted from `offset`; more than the bytes at hand where a capture was cut.
    length: int = -1
    #: EtherType; 0 for UNIX and netlink sockets.
    protocol: int = 0
    #: PACKET_HOST 0, BROADCAST 1, MULTICAST 2, OTHERHOST 3, OUTGOING 4.
    pkt_type: int = 0
    #: The device's index; None: the packet has no device.
    ifindex: int | None = None
    #: The device's ARPHRD_* type.
    hatype: int = 1
    ingress_ifindex: int = 0
    mark: int = 0
    priority: int = 0
    queue: int = 0
    hash: int = 0
    tc_index: int = 0
    napi_id: int = 0
    gso_segs: int = 0
    gso_size: int = 0
    #: The tag that was taken out of the bytes; None: no tag in the metadata.
    vlan_tci: int | None = None
    vlan_proto: int = 0x8100
    #: ``skb->cb`` as programs see it, five words.
    cb: tuple[int, int, int, int, int] = (0, 0, 0, 0, 0)
    #: Nanoseconds, of the packet's clock (`tstamp_type`) and of the network card's.
    tstamp: int = 0
    tstamp_type: int = 0
    hwtstamp: int = 0
    #: When it came or went, in nanoseconds since 1970: what packet sockets report.
    timestamp_ns: int = 0
    #: What traffic control keeps beside the packet.
    tc_classid: int = 0
    wire_len: int = 0
    #: Whether `hash` is one, or still to be made.
    hash_known: bool = False
    #: Where the transport header starts, counted from the start of `buffer`, once somebody has said so.
    transport: int | None = None
    #: What was cut off behind `buffer`, and may come back.
    behind: bytes = b""
    #: Bytes of metadata before offset 0, which an XDP program has put there for traffic control.
    metadata: int = 0
    #: Bytes that are free before `buffer`, and those of all the memory that it lies in; 0: as much as it needs.
    headroom: int = NET_SKB_PAD
    memory: int = 0
    #: Its segments have a kind (``gso_type``), if only that a program has changed them (SKB_GSO_DODGY).
    gso_kind: bool = False
    #: A tunnel's header was pushed before the packet's own.
    encapsulated: bool = False
    #: How many checksums behind one another are known to be right, less one; None: none is.
    csum_level: int | None = None
    #: The sum that the network card has made from the network header on (``skb->csum``), and whether it is to be true.
    csum: int = 0
    csum_complete: bool = False
    #: The device is to make the transport checksum: the field has the pseudo header's sum (CHECKSUM_PARTIAL).
    checksum_partial: bool = False
    tunnel: Tunnel | None = None
    #: The socket that it belongs to (``skb->sk``).
    socket: Sock | None = None
    #: Whether traffic control sees it on its way in.
    at_ingress: bool = False
    #: The device that it is on, where it is on the emulated network.
    device: EmulatedInterface | None = None
    #: Where a program has redirected the packet.
    redirect: Redirect | None = None
    #: It comes from an XDP program, as bytes and nothing else (``struct xdp_frame``).
    is_frame: bool = False
    #: A program has redirected it to this device, and generic XDP leaves it alone (``skb->redirected``).
    redirected: bool = False

    def __post_init__(self) -> None:
        if self.length < 0:
            self.length = len(self.buffer) - self.offset

    @property
    def data(self) -> bytes:
        """The bytes from offset 0 on."""
        return bytes(self.buffer[self.offset :] if self.offset else self.buffer)

    def sum_in(self, data: bytes, at: int = 0) -> None:
        """Bytes have come into what is summed up (`skb_postpush_rcsum`)."""
        if self.csum_complete:
            self.csum = add(self.csum, shift(partial(data, 0), at))

    def sum_out(self, data: bytes, at: int = 0) -> None:
        """Bytes go out of what is summed up (`skb_postpull_rcsum`)."""
        if self.csum_complete:
            self.csum = add(self.csum, shift(~partial(data, 0) & M32, at))

    def copy(self) -> Packet:
        """Another one like it, whose bytes are its own."""
        return replace(self, buffer=bytes(self.buffer), redirect=None)

    def push(self, size: int, room: int = 0) -> None:
        """Move offset 0 to the front, into what lies there or into zeroes, with `room` to spare (`skb_push`)."""
        missing = max(size - self.offset, 0)
        if missing:
            self._make_headroom(missing, room)
            self.buffer = bytearray(missing) + self.buffer
            self.mac = None if self.mac is None else self.mac + missing
            self.network = None if self.network is None else self.network + missing
            self.transport = None if self.transport is None else self.transport + missing
        self.offset += missing - size
        self.length += size

    def has_headroom(self, size: int, room: int = 0) -> bool:
        """Whether there is memory to `push` so much, which Linux finds out before it changes anything."""
        grown = self._growth(max(size - self.offset, 0), room)
        return not grown or self._memory(grown) <= _MOST_MEMORY

    def _growth(self, size: int, room: int) -> int:
        lacking = max(size + room - self.headroom, 0)
        return -(-lacking // NET_SKB_PAD) * NET_SKB_PAD

    def _memory(self, grown: int) -> int:
        """What the packet would take with `grown` bytes more: each move goes to the next size that there is."""
        before = self.memory or _power_of_two(self.headroom + len(self.buffer) + _SHARED_INFO)
        size = before + grown
        return _SMALL_MEMORY if size <= _SMALL_MEMORY else _power_of_two(size)

    def _make_headroom(self, size: int, room: int) -> None:
        """Use bytes before the buffer, moving it where there are too few (`skb_cow`)."""
        grown = self._growth(size, room)
        if grown:
            self.memory = self._memory(grown)
            self.headroom += grown
            if self.transport is None:
                # The kernel moves "not set", which is 0xffff, too: it is a position now, just before `grown`.
                self.transport = grown - 1 - self.headroom
        self.headroom -= size

    def pull(self, size: int) -> None:
        """Move offset 0 to the back (`skb_pull`)."""
        self.offset += size
        self.length -= size

    def resize(self, length: int) -> None:
        """Cut at the end, or add zeroes, so that `length` bytes follow offset 0; what was summed up is not any more."""
        end = self.offset + length
        if length != self.length:
            self.csum_complete = False
        self.behind = bytes(self.buffer[end:]) + self.behind[max(length - self.length, 0) :]
        self.buffer = bytearray(self.buffer[:end].ljust(end, b"\0"))
        self.length = length
