"""Network devices of the emulated machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from kbpf.emulator import ethernet
from kbpf.emulator.replay import Replay

if TYPE_CHECKING:
    from kbpf.emulator.links import Chain, XdpLink
    from kbpf.emulator.network import Network

LOOPBACK_MTU, ETHERNET_MTU = 65536, 1500


@dataclass
class Counters:
    """What ``ip -s link`` shows of a device (struct rtnl_link_stats64), as far as the emulator counts."""

    rx_packets: int = 0
    tx_packets: int = 0
    rx_bytes: int = 0
    tx_bytes: int = 0
    rx_dropped: int = 0
    tx_dropped: int = 0


class SentFrame(NamedTuple):
    """A frame that has left an interface, and when, in nanoseconds since 1970."""

    data: bytes
    timestamp_ns: int


@dataclass(eq=False)
class EmulatedInterface:
    """A network device. `hatype` is ARPHRD_*: Ethernet (1) and loopback (772) have a link header, others have none."""

    name: str
    index: int
    address: bytes
    hatype: int = ethernet.ARPHRD_ETHER
    mtu: int = ETHERNET_MTU
    #: Where it is.
    network: Network | None = field(default=None, repr=False)
    #: The other end of a pair.
    peer: EmulatedInterface | None = field(default=None, repr=False)
    #: Frames still to come from a capture file; None: not fed by one.
    feed: Replay | None = field(default=None, repr=False)
    fed: bool = False
    #: The receive queue that its driver notes on a packet, counted from 1; 0: it notes none (`skb_record_rx_queue`).
    queue: int = 0
    counters: Counters = field(default_factory=Counters)
    #: The XDP program in the driver, or on socket buffers; and the traffic control programs by attach type.
    xdp_native: XdpLink | None = field(default=None, repr=False)
    xdp_generic: XdpLink | None = field(default=None, repr=False)
    tcx: dict[str, Chain] = field(default_factory=dict, repr=False)
    #: Who wants to know what leaves.
    captures: list[list[SentFrame]] = field(default_factory=list, repr=False)
    #: ``net.ipv4.conf.NAME.forwarding`` and IPv6's, which programs ask; the emulated network itself forwards nothing.
    forwards: bool = False
    forwards6: bool = False

    @property
    def loopback(self) -> bool:
        return self.hatype == ethernet.ARPHRD_LOOPBACK

    @property
    def watched(self) -> bool:
        """Whether a program sees what comes in."""
        return self.xdp_native is not None or self.xdp_generic is not None or "tcx_ingress" in self.tcx

    @property
    def runs_xdp(self) -> bool:
        """Whether its driver has a place for XDP programs, as Ethernet devices' and veth's have, and loopback's not."""
        return self.hatype == ethernet.ARPHRD_ETHER

    @property
    def header(self) -> int:
        """Bytes of link header."""
        return ethernet.HEADER if self.hatype in (ethernet.ARPHRD_ETHER, ethernet.ARPHRD_LOOPBACK) else 0
