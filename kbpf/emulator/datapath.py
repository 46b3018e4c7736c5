"""The way of a packet through the emulated kernel, from a device's driver to the protocols and back.

Out: `transmit` (`__dev_queue_xmit`), the packet sockets, the cable. In: `receive` (`__netif_receive_skb_core`): the
packet sockets of ETH_P_ALL, then those of the packet's protocol and the protocol itself. As in Linux, what goes into a
cable or is looped back is received only when whoever sent it is done: it waits in the backlog.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from kbpf.emulator import ethernet
from kbpf.emulator.ethernet import Tag
from kbpf.emulator.interface import EmulatedInterface
from kbpf.emulator.packet import Packet

if TYPE_CHECKING:
    from kbpf.emulator.packetsocket import EmulatedPacketSocket

#: net.core.netdev_max_backlog: packets that wait to be received.
_MOST_WAITING = 1000

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
    """Packets that wait to be received: one order of events for the whole emulated machine."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._waiting: deque[tuple[EmulatedInterface, Packet, int | None]] = deque()
        self._depth = 0

    def put(self, device: EmulatedInterface, packet: Packet, pkt_type: int | None = None) -> None:
        """Have a packet received on a device (`netif_rx`); a full backlog drops it."""
        if len(self._waiting) >= _MOST_WAITING:
            device.counters.rx_dropped += 1
        else:
            self._waiting.append((device, packet, pkt_type))

    @contextmanager
    def event(self) -> Iterator[None]:
        """Something happens; when the outermost event is over, what it has put into the backlog is received."""
        with self.lock:
            self._depth += 1
            try:
                yield
                while self._depth == 1 and self._waiting:
                    device, packet, pkt_type = self._waiting.popleft()
                    if device.network is not None:
                        device.network.path.receive(device, packet, pkt_type)
            except BaseException:
                # Left from a program's fault: nobody would come for it.
                self._waiting.clear()
                raise
            finally:
                self._depth -= 1


#: The one of the emulated machine.
backlog = Backlog()


class Datapath:
    """The way of packets on one network. `listening` gives the packet sockets on a device, in order."""

    def __init__(self, listening: Callable[[EmulatedInterface], list[EmulatedPacketSocket]]) -> None:
        self._listening = listening
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

    def transmit(self, device: EmulatedInterface, packet: Packet, sender: EmulatedPacketSocket | None = None) -> None:
        """Send a packet, offset 0 its link header, out of a device, to where its cable ends."""
        with backlog.event():
            packet.ifindex, packet.hatype = device.index, device.hatype
            self.tap(device, packet, sender)
            self._cross(device, packet)

    def tap(self, device: EmulatedInterface, packet: Packet, sender: EmulatedPacketSocket | None) -> None:
        """Outgoing packets go to all ETH_P_ALL sockets but the sender (`dev_queue_xmit_nit`)."""
        seen = replace(packet, pkt_type=ethernet.PACKET_OUTGOING)
        for socket in self._listening(device):
            if socket.protocol == ethernet.ETH_P_ALL and socket is not sender:
                socket.deliver(device, seen, packet.timestamp_ns)

    def _cross(self, device: EmulatedInterface, packet: Packet) -> None:
        """Into the cable (`veth_xmit`, `loopback_xmit`)."""
        device.counters.tx_packets += 1
        device.counters.tx_bytes += packet.length
        target = device if device.loopback else device.peer
        if target is None:
            return
        if not target.loopback:
            packet.priority = 0
        packet.ingress_ifindex = 0
        backlog.put(target, packet)

    def receive(self, device: EmulatedInterface, packet: Packet, pkt_type: int | None) -> None:
        """A packet comes in, offset 0 its link header: ETH_P_ALL sockets see it first, then those of its protocol."""
        device.counters.rx_packets += 1
        device.counters.rx_bytes += packet.length
        self._arrive(device, packet, pkt_type)
        if packet.vlan_tci is None and not _untag(packet):
            return
        everything: list[EmulatedPacketSocket] = []
        others: list[EmulatedPacketSocket] = []
        for socket in self._listening(device):
            (everything if socket.protocol == ethernet.ETH_P_ALL else others).append(socket)
        for socket in everything:
            socket.deliver(device, packet, packet.timestamp_ns)
        if packet.vlan_tci is not None:
            # No VLAN device claimed it: Linux marks it as somebody else's and forgets the tag.
            packet.vlan_tci, packet.pkt_type = None, ethernet.PACKET_OTHERHOST
        for socket in others:
            if socket.protocol == packet.protocol:
                socket.deliver(device, packet, packet.timestamp_ns)
        handler = self.protocols.get(packet.protocol)
        if handler is not None:
            packet.pull((packet.network or 0) - packet.offset)
            handler(device, packet)

    @staticmethod
    def _arrive(device: EmulatedInterface, packet: Packet, pkt_type: int | None) -> None:
        """What a driver finds in a frame (`eth_type_trans`)."""
        frame = packet.data
        packet.mac, packet.network = packet.offset, packet.offset + device.header
        packet.ifindex = packet.ingress_ifindex = device.index
        packet.hatype, packet.queue = device.hatype, device.queue
        if not device.header:
            packet.protocol, packet.pkt_type = ethernet.ip_protocol(frame), pkt_type or 0
            return
        packet.protocol = ethernet.received_protocol(frame)
        if pkt_type is None:
            broadcast = bytes(6) if device.loopback else ethernet.BROADCAST
            pkt_type = ethernet.packet_type(frame, device.address, broadcast)
        packet.pkt_type = pkt_type


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
