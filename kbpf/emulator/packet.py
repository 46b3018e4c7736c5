"""What a socket buffer is to a program: bytes, where the headers lie in them, and metadata.

The counterpart of the kernel's ``struct sk_buff``, as far as a filter can tell. Whoever delivers
packets (an emulated interface, a socket, BPF_PROG_TEST_RUN) builds one; programs read it through
`__sk_buff`, classic loads and helpers.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class Packet:
    """A packet on its way to a program.

    `buffer` is all there is, from the first header that can still be reached to the last byte. `offset`, `mac` and
    `network` are positions in `buffer`: where the program's offset 0 is (``skb->data``), and where the link header and
    the network header start. A `mac` or `network` of None means that it was never set: loads relative to it find
    nothing. (The kernel sets `network` for every packet: for UNIX and netlink sockets it is where the data starts.)

    Numbers are in host order, `protocol` and `vlan_proto` too; the context gives them as stored.
    """

    buffer: bytes
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

    def __post_init__(self) -> None:
        if self.length < 0:
            self.length = len(self.buffer) - self.offset

    @property
    def data(self) -> bytes:
        """The bytes from offset 0 on."""
        return self.buffer[self.offset :] if self.offset else self.buffer
