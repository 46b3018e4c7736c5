"""The way of a packet through the emulated kernel, from a device's driver to the protocols and back.

In: XDP in the driver, XDP on socket buffers, the packet sockets of ETH_P_ALL, traffic control, then the packet sockets
of the packet's protocol and the protocol itself (`__netif_receive_skb_core`). Out: traffic control, the packet sockets,
the cable (`__dev_queue_xmit`). As in Linux, what goes into a cable or is looped back is received only when whoever
sent it is done: it waits in the backlog.
"""

from __future__ import annotations

import errno
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from kbpf.emulator import ethernet, hooks
from kbpf.emulator.environment import environment
from kbpf.emulator.ethernet import Tag
from kbpf.emulator.interface import EmulatedInterface, SentFrame
from kbpf.emulator.neighbours import address_packet
from kbpf.emulator.packet import Packet, Redirect
from kbpf.emulator.xdp import XdpBuff
from kbpf.uapi.constants import BPF_F_INGRESS, ETH_P_ARP, XDP_PASS, XDP_REDIRECT, XDP_TX

if TYPE_CHECKING:
    from kbpf.emulator.packetsocket import EmulatedPacketSocket
    from kbpf.emulator.program import Program

#: net.core.netdev_max_backlog: packets that wait to be received.
_MOST_WAITING = 1000
#: How deep devices may send through one another (XMIT_RECURSION_LIMIT).
_DEEPEST = 8
#: How often programs may send packets elsewhere before what started it is over. In Linux such a loop has no end.
_MOST_REDIRECTS = 4096
#: What a device takes beside its MTU and link header.
_VLAN_HEADER = 4
_SENT, _DROPPED = 0, 1
#: What Linux has a handler for (LLC is built in where bridges are); what nobody takes is counted as dropped.
_ALWAYS_TAKEN = (ethernet.ETH_P_IP, ethernet.ETH_P_IPV6, ETH_P_ARP, ethernet.ETH_P_802_2)

#: Takes a packet whose offset 0 is the network header.
ProtocolHandler: TypeAlias = Callable[[EmulatedInterface, Packet], object]


@dataclass(frozen=True)
class Frame:
    """A frame on its way, with what the kernel would know of it."""

    data: bytes
    wirelen: int
    timestamp_ns: int
    mark: int = 0
    tag: Tag | None = None
    #: ``skb->protocol`` of a frame that is sent, in host order; 0: what its link header says.
    protocol: int = 0
    priority: int = 0


class Backlog:
    """What waits to happen: one order of events for the whole emulated machine."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._waiting: deque[Callable[[], object]] = deque()
        self._depth = 0
        #: How deep the sending through one another is, and how often programs have redirected, in this event.
        self.nested = 0
        self.redirects = 0

    def put(self, action: Callable[[], object]) -> bool:
        """Have something happen when the event is over; False if too much waits for that already."""
        if len(self._waiting) >= _MOST_WAITING:
            return False
        self._waiting.append(action)
        return True

    def count_redirect(self) -> bool:
        """A program redirects a packet; False when that is a loop."""
        self.redirects += 1
        return self.redirects <= _MOST_REDIRECTS

    @contextmanager
    def event(self) -> Iterator[None]:
        """Something happens; when the outermost event is over, what waits is done."""
        with self.lock:
            self._depth += 1
            try:
                yield
                while self._depth == 1 and self._waiting:
                    self._waiting.popleft()()
            except BaseException:
                # Left from a program's fault: nobody would come for it.
                self._waiting.clear()
                raise
            finally:
                self._depth -= 1
                if not self._depth:
                    self.nested = self.redirects = 0


#: The one of the emulated machine.
backlog = Backlog()


class Datapath:
    """The way of packets on one network. `listening` gives the packet sockets on a device, in order."""

    def __init__(
        self,
        listening: Callable[[EmulatedInterface], list[EmulatedPacketSocket]],
        by_index: Callable[[int], EmulatedInterface | None],
    ) -> None:
        self._listening = listening
        self._by_index = by_index
        #: Who takes received packets, by EtherType (`dev_add_pack`).
        self.protocols: dict[int, ProtocolHandler] = {}

    def outgoing(self, device: EmulatedInterface, frame: Frame) -> Packet:
        """The packet of a frame that a packet socket sends (`packet_snd`)."""
        network, protocol = device.header, frame.protocol or ethernet.ip_protocol(frame.data)
        if device.header:
            protocol = frame.protocol or ethernet.ether_type(frame.data)
            if device.hatype == ethernet.ARPHRD_ETHER and protocol in ethernet.VLAN_PROTOCOLS:
                network, _ = ethernet.behind_tags(frame.data)
        return _packet(frame, network, protocol)

    def incoming(self, device: EmulatedInterface, frame: Frame) -> Packet:
        """The packet of a frame that comes out of a cable."""
        return _packet(frame, device.header, 0)

    # Out.

    def transmit(self, device: EmulatedInterface, packet: Packet, sender: EmulatedPacketSocket | None = None) -> int:
        """Send a packet, offset 0 its link header, out of a device, to where its cable ends; gives NET_XMIT_*."""
        with backlog.event():
            packet.device, packet.ifindex, packet.hatype = device, device.index, device.hatype
            chain = device.tcx.get("tcx_egress")
            if chain is not None:
                packet.wire_len = packet.length
                verdict = hooks.run_traffic_control(chain, packet)
                if verdict == hooks.TC_ACT_SHOT:
                    return _DROPPED
                if verdict == hooks.TC_ACT_REDIRECT:
                    self._redirect(packet, ingress=False)
                    return _SENT
            if backlog.nested > _DEEPEST:
                device.counters.tx_dropped += 1
                return -errno.ENETDOWN
            self.tap(device, packet, sender)
            return self._cross(device, packet)

    def tap(self, device: EmulatedInterface, packet: Packet, sender: EmulatedPacketSocket | None) -> None:
        """Outgoing packets go to all ETH_P_ALL sockets but the sender (`dev_queue_xmit_nit`)."""
        seen = replace(packet, pkt_type=ethernet.PACKET_OUTGOING)
        for socket in self._listening(device):
            if socket.protocol == ethernet.ETH_P_ALL and socket is not sender:
                socket.deliver(device, seen, packet.timestamp_ns)

    def _cross(self, device: EmulatedInterface, packet: Packet) -> int:
        """Into the cable (`veth_xmit`, `loopback_xmit`)."""
        target = device if device.loopback else device.peer
        counters, length = device.counters, _counted(target or device, packet)
        sent = SentFrame(packet.data, packet.timestamp_ns)
        if target is not None and not device.loopback and not self._forward(target, packet):
            counters.tx_dropped += 1
            return _DROPPED
        if device.loopback:
            packet.ingress_ifindex, packet.tstamp, packet.socket = 0, 0, None
            if not _receive_later(device, packet):
                return _DROPPED
        counters.tx_packets += 1
        counters.tx_bytes += length
        _show(device, sent)
        return _SENT

    @staticmethod
    def _forward(target: EmulatedInterface, packet: Packet) -> bool:
        """Have another device receive a packet, as it came out of a cable (`__dev_forward_skb`)."""
        if packet.length > target.mtu + target.header + _VLAN_HEADER:
            return False
        _scrub(packet, target)
        packet.priority = 0
        return _receive_later(target, packet)

    # In.

    def receive(self, device: EmulatedInterface, packet: Packet, pkt_type: int | None = None) -> None:
        """A packet comes in, offset 0 its link header."""
        device.counters.rx_packets += 1
        device.counters.rx_bytes += packet.length if packet.is_frame else _counted(device, packet)
        packet.mac, packet.network = packet.offset, packet.offset + device.header
        packet.queue = device.queue
        self._place(device, packet)
        hooks.classify(device, packet, pkt_type)
        native = device.xdp_native
        if native is None or self._xdp(device, packet, native.program, native=True):
            self.enter(device, packet)

    def inject(self, device: EmulatedInterface, packet: Packet) -> None:
        """Have a packet come in that the driver knows nothing of."""
        packet.mac, packet.network = packet.offset, packet.offset + device.header
        hooks.classify(device, packet)
        self.enter(device, packet)

    def enter(self, device: EmulatedInterface, packet: Packet) -> None:
        """From the driver to the protocols (`__netif_receive_skb_core`)."""
        self._place(device, packet)
        generic = device.xdp_generic
        runs = generic is not None and not packet.redirected
        if generic is not None and runs and not self._xdp(device, packet, generic.program, native=False):
            return
        if packet.vlan_tci is None and not _untag(packet):
            return
        everything: list[EmulatedPacketSocket] = []
        others: list[EmulatedPacketSocket] = []
        for socket in self._listening(device):
            (everything if socket.protocol == ethernet.ETH_P_ALL else others).append(socket)
        for socket in everything:
            socket.deliver(device, packet, packet.timestamp_ns)
        chain = device.tcx.get("tcx_ingress")
        if chain is not None:
            packet.wire_len, packet.at_ingress = packet.length - device.header, True
            verdict = hooks.run_traffic_control(chain, packet)
            packet.at_ingress = False
            if verdict == hooks.TC_ACT_REDIRECT:
                self._redirect(packet, ingress=True)
            if verdict in (hooks.TC_ACT_REDIRECT, hooks.TC_ACT_SHOT):
                return
        packet.redirected = False
        if packet.vlan_tci is not None:
            # No VLAN device claimed it: Linux marks it as somebody else's and forgets the tag.
            packet.vlan_tci, packet.pkt_type = None, ethernet.PACKET_OTHERHOST
        taken = packet.protocol in _ALWAYS_TAKEN or (chain is None and bool(everything))
        for socket in others:
            if socket.protocol == packet.protocol:
                socket.deliver(device, packet, packet.timestamp_ns)
                taken = True
        if not taken:
            device.counters.rx_dropped += 1
        handler = self.protocols.get(packet.protocol)
        if handler is not None:
            packet.pull((packet.network or 0) - packet.offset)
            handler(device, packet)

    @staticmethod
    def _place(device: EmulatedInterface, packet: Packet) -> None:
        packet.device, packet.hatype = device, device.hatype
        packet.ifindex = packet.ingress_ifindex = device.index

    def carry_out(self, device: EmulatedInterface, buff: XdpBuff, action: int) -> Packet | None:
        """Do what an XDP program has decided on a frame that no driver has brought (`xdp_test_run_batch`).

        Gives the packet that is to `enter`, where it passes.
        """
        start = buff.data - buff.meta
        packet = Packet(buffer=buff.whole(), offset=start, mac=start, network=start + device.header)
        packet.metadata, packet.timestamp_ns = start, environment.real_clock()
        self._place(device, packet)
        if action == XDP_PASS:
            hooks.classify(device, packet, None)
            return packet
        packet.metadata = 0
        if action == XDP_TX and backlog.count_redirect():
            self._xdp_transmit(device, packet, native=True)
        elif action == XDP_REDIRECT:
            self._xdp_redirect(device, packet, buff, native=True)
        return None

    # What programs make of a packet.

    def _xdp(self, device: EmulatedInterface, packet: Packet, program: Program, native: bool) -> bool:
        """Run an XDP program and carry its action out; whether the packet goes on here."""
        action, buff = hooks.run_xdp(program, packet, device)
        if action == XDP_PASS:
            return True
        packet.metadata = 0
        if action == XDP_TX and backlog.count_redirect():
            if not self._xdp_transmit(device, packet, native) and native and device.peer is not None:
                device.counters.tx_dropped += 1
                device.peer.counters.rx_dropped += 1
        elif action == XDP_REDIRECT and not self._xdp_redirect(device, packet, buff, native) and native:
            device.counters.rx_dropped += 1
        return False

    def _xdp_redirect(self, device: EmulatedInterface, packet: Packet, buff: XdpBuff, native: bool) -> bool:
        """Send a frame to where the program has said (`xdp_do_redirect`); False if it cannot go there."""
        if not backlog.count_redirect():
            return False
        if buff.redirect is not None:
            target = self._by_index(buff.redirect.ifindex)
            return target is not None and self._xdp_transmit(target, packet, native)
        if buff.redirected_by is not None:
            map, index, flags = buff.redirected_by
            for target, program in map.devices(index, flags, device):
                copy = packet.copy()
                if program is None or hooks.run_xdp(program, copy, device, target.index)[0] == XDP_PASS:
                    copy.metadata = 0
                    self._xdp_transmit(target, copy, native)
            for program in map.processors(index):
                backlog.put(partial(self._from_processor, device, packet, program, native))
        return buff.redirected_by is not None

    def _xdp_transmit(self, device: EmulatedInterface, packet: Packet, native: bool) -> bool:
        """Straight into the cable, past traffic control and packet sockets (`generic_xdp_tx`, `veth_xdp_xmit`)."""
        if packet.length > device.mtu + device.header + _VLAN_HEADER:
            return False
        if not native:
            return self._cross(device, packet) == _SENT
        # Another end without XDP in its driver does not take frames.
        taker = device.peer
        if device.loopback or (taker is not None and taker.xdp_native is None):
            return False
        device.counters.tx_packets += 1
        device.counters.tx_bytes += packet.length
        _show(device, SentFrame(packet.data, packet.timestamp_ns))
        if taker is not None:
            _receive_later(taker, _bare(packet))
        return True

    def _from_processor(self, device: EmulatedInterface, packet: Packet, program: Program | None, native: bool) -> None:
        """A processor of a cpumap takes a packet, and a program of its own may have a look first."""
        if native:
            packet = _bare(packet)
            packet.mac, packet.network = 0, device.header
            hooks.classify(device, packet)
        packet.redirected = not native
        if program is not None:
            action, buff = hooks.run_xdp(program, packet, device)
            if action == XDP_REDIRECT:
                self._xdp_redirect(device, packet, buff, native)
            if action != XDP_PASS:
                return
        self.enter(device, packet)

    def _redirect(self, packet: Packet, ingress: bool) -> None:
        """What bpf_redirect and its kin have noted down (`skb_do_redirect`)."""
        noted, packet.redirect = packet.redirect or Redirect(0), None
        target = self._by_index(noted.ifindex)
        if target is None or not backlog.count_redirect():
            return
        if noted.peer:
            other = target.peer
            if not ingress or other is None or other.network is target.network or other.network is None:
                return
            other.counters.rx_packets += 1
            other.counters.rx_bytes += packet.length
            _scrub(packet, other)
            other.network.path.enter(other, packet)
            return
        if noted.neighbour is not None and not address_packet(packet, target, noted.neighbour):
            return
        self.send_on(packet, target, noted.flags)

    def send_on(self, packet: Packet, target: EmulatedInterface, flags: int) -> int:
        """Send a packet out of a device, or with BPF_F_INGRESS have it received there (`__bpf_redirect`).

        Gives what bpf_clone_redirect returns.
        """
        if not _fit_header(packet, target):
            return -errno.ERANGE
        if flags & BPF_F_INGRESS:
            # The driver has no part in it: it counts nothing, and XDP in it sees nothing.
            _scrub(packet, target)
            packet.priority = 0
            return _SENT if _receive_later(target, packet, by_driver=False) else _DROPPED
        if backlog.nested > _DEEPEST:
            return -errno.ENETDOWN
        packet.redirected, packet.tstamp = True, 0
        backlog.nested += 1
        try:
            return self.transmit(target, packet)
        finally:
            backlog.nested -= 1


def _show(device: EmulatedInterface, frame: SentFrame) -> None:
    for frames in device.captures:
        frames.append(frame)


def _bare(packet: Packet) -> Packet:
    """An XDP frame: the bytes, and nothing that was known of them."""
    return Packet(buffer=packet.data, timestamp_ns=packet.timestamp_ns, is_frame=True)


def _counted(device: EmulatedInterface, packet: Packet) -> int:
    """A packet's bytes as drivers count them: loopback, and veth with XDP at the receiving end, without the header."""
    return packet.length - (device.header if device.loopback or device.xdp_native is not None else 0)


def _receive_later(device: EmulatedInterface, packet: Packet, by_driver: bool = True) -> bool:
    """`netif_rx`; False if the backlog is full."""

    def receive() -> None:
        if device.network is not None:
            path = device.network.path
            (path.receive if by_driver else path.inject)(device, packet)

    if backlog.put(receive):
        return True
    device.counters.rx_dropped += 1
    return False


def _scrub(packet: Packet, target: EmulatedInterface) -> None:
    """Forget what is of the way up to here, and more where a packet enters another network (`skb_scrub_packet`)."""
    packet.pkt_type, packet.ingress_ifindex, packet.socket = ethernet.PACKET_HOST, 0, None
    if packet.device is not None and packet.device.network is not target.network:
        packet.mark = packet.tstamp = 0


def _fit_header(packet: Packet, target: EmulatedInterface) -> bool:
    """Take the link header off for a device that has none; False where one is missing."""
    network = packet.network or 0
    if not target.header:
        packet.pull(max(network - packet.offset, 0))
        return True
    # It may lie before offset 0, where tunnels' programs begin.
    return packet.mac is not None and packet.mac < network and packet.length > 0


def _packet(frame: Frame, network: int, protocol: int) -> Packet:
    packet = Packet(
        buffer=frame.data,
        mac=0,
        network=network,
        length=frame.wirelen,
        protocol=protocol,
        mark=frame.mark,
        priority=frame.priority,
        timestamp_ns=frame.timestamp_ns,
    )
    if frame.tag is not None:
        packet.vlan_tci, packet.vlan_proto = frame.tag
    return packet


def _untag(packet: Packet) -> bool:
    """Take the tag of a received frame out of its bytes; False for a frame that Linux throws away."""
    if packet.network == packet.mac:
        return True
    bare = ethernet.untag(packet.data)
    if bare is None:
        return False
    data, tag = bare
    if tag is not None:
        packet.length -= len(packet.buffer) - packet.offset - len(data)
        packet.buffer = bytes(packet.buffer[: packet.offset]) + data
        packet.vlan_tci, packet.vlan_proto = tag
        packet.protocol = ethernet.received_protocol(data)
    return True
