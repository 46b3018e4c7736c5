"""The emulated network: interfaces, frames on them, and the packet sockets that see them.

``lo`` is there from the start; `add_interface` and `add_pair` make others, `inject` puts a frame on one. What a packet
socket sees is Linux's: each frame twice on loopback (going out, then coming in), VLAN tags of received frames in
the metadata, outgoing frames only for sockets of ETH_P_ALL other than the sender.

With ``KBPF_EMULATED_CAPTURE=FILE`` every interface that a packet socket is opened on exists, and plays the file (pcap
or pcapng) once for all sockets that are open on it together. It plays when the program looks, so that no
frame comes before the filter: reading from a socket brings frames until one arrives there, and reading
a map while an eBPF program is attached (`settle`) brings all that are left. At the end, reading an empty
socket raises `TimeoutError` at once, whatever its timeout, because nothing can come any more.
"""

from __future__ import annotations

import errno
import itertools
import os
import threading
import time
import weakref
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from kbpf.emulator import ethernet
from kbpf.emulator.clock import run_due
from kbpf.emulator.ethernet import Tag
from kbpf.emulator.packet import Packet
from kbpf.emulator.replay import Replay
from kbpf.emulator.slot import error

if TYPE_CHECKING:
    from kbpf.emulator.packetsocket import EmulatedPacketSocket

CAPTURE_VARIABLE = "KBPF_EMULATED_CAPTURE"
_LOOPBACK_MTU, _ETHERNET_MTU = 65536, 1500
_NAME_SIZE = 15


@dataclass(eq=False)
class EmulatedInterface:
    """A network device. `hatype` is ARPHRD_*: Ethernet (1) and loopback (772) have a link header, others have none."""

    name: str
    index: int
    address: bytes
    hatype: int = ethernet.ARPHRD_ETHER
    mtu: int = _ETHERNET_MTU
    #: The other end of a pair.
    peer: EmulatedInterface | None = field(default=None, repr=False)
    #: Frames still to come from a capture file; None: not fed by one.
    feed: Replay | None = field(default=None, repr=False)
    fed: bool = False

    @property
    def loopback(self) -> bool:
        return self.hatype == ethernet.ARPHRD_LOOPBACK

    @property
    def header(self) -> int:
        """Bytes of link header."""
        return ethernet.HEADER if self.hatype in (ethernet.ARPHRD_ETHER, ethernet.ARPHRD_LOOPBACK) else 0


@dataclass(frozen=True)
class Frame:
    """A frame on its way, with what the kernel would know of it."""

    data: bytes
    wirelen: int
    timestamp_ns: int
    mark: int = 0
    tag: Tag | None = None


class Network:
    """Interfaces and the sockets on them. One lock serves all: delivery is a single order of events."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._interfaces: dict[str, EmulatedInterface] = {}
        self._indices = itertools.count(1)
        self._sockets: weakref.WeakSet[EmulatedPacketSocket] = weakref.WeakSet()
        self.add_interface("lo", address=bytes(6), hatype=ethernet.ARPHRD_LOOPBACK, mtu=_LOOPBACK_MTU)

    # Interfaces.

    def add_interface(
        self,
        name: str,
        *,
        address: bytes | None = None,
        hatype: int = ethernet.ARPHRD_ETHER,
        mtu: int = _ETHERNET_MTU,
    ) -> EmulatedInterface:
        """Make an interface, up and running; `address` is by default a local one made from its index.

        Raises `OSError` EEXIST for a name that is taken, EINVAL for one that Linux would not take.
        """
        with self.lock:
            if name in self._interfaces:
                raise error(errno.EEXIST)
            if not 1 <= len(name.encode()) <= _NAME_SIZE or "/" in name or name in (".", "..") or " " in name:
                raise error(errno.EINVAL)
            index = next(self._indices)
            given = b"\x02\0" + index.to_bytes(4, "big") if address is None else address
            interface = EmulatedInterface(name, index, given, hatype, mtu)
            self._interfaces[name] = interface
            return interface

    def add_pair(self, first: str, second: str) -> tuple[EmulatedInterface, EmulatedInterface]:
        """Make two interfaces that are the ends of one cable, like a veth pair."""
        one, other = self.add_interface(first), self.add_interface(second)
        one.peer, other.peer = other, one
        return one, other

    def remove_interface(self, name: str) -> None:
        """Take an interface away; ``lo`` stays. Sockets bound to it fall silent."""
        with self.lock:
            interface = self.interface(name)
            if interface.loopback:
                raise error(errno.EOPNOTSUPP)
            if interface.peer is not None:
                interface.peer.peer = None
            del self._interfaces[name]

    def interface(self, name: str) -> EmulatedInterface:
        """The interface of that name; `OSError` ENODEV if there is none."""
        try:
            return self._interfaces[name]
        except KeyError:
            raise error(errno.ENODEV) from None

    # Frames.

    def inject(
        self,
        interface: str,
        frame: bytes,
        *,
        timestamp: float | None = None,
        wirelen: int | None = None,
        pkt_type: int | None = None,
        mark: int = 0,
        vlan: int | tuple[int, int] | None = None,
    ) -> None:
        """Let a frame, with its link header, arrive on an interface.

        On loopback it goes out and comes in, and a packet socket sees it twice. `timestamp` is in seconds since 1970,
        by default now. `wirelen` is the frame's length where its end was cut off. `pkt_type` (PACKET_*) delivers it
        once, as that. `vlan` is the tag that the card took out, a TCI or (TCI, EtherType); a tag in the bytes of a
        received frame is taken out as Linux does.

        Raises `OSError` ENODEV for an unknown interface, `ValueError` for a frame without a whole link header.
        """
        device = self.interface(interface)
        if len(frame) < device.header:
            raise ValueError(f"a frame of {len(frame)} bytes has no link header of {device.header}")
        if wirelen is not None and wirelen < len(frame):
            raise ValueError(f"a frame of {len(frame)} bytes was not {wirelen} bytes on the wire")
        tag = None if vlan is None else Tag(vlan) if isinstance(vlan, int) else Tag(*vlan)
        stamp = time.time_ns() if timestamp is None else round(timestamp * 1_000_000_000)
        self._arrive(device, Frame(bytes(frame), wirelen or len(frame), stamp, mark, tag), pkt_type)

    def _arrive(self, device: EmulatedInterface, frame: Frame, pkt_type: int | None = None) -> None:
        with self.lock:
            if pkt_type == ethernet.PACKET_OUTGOING:
                self._tap(device, frame, None)
            elif pkt_type is None and device.loopback:
                self.transmit(device, frame, None)
            else:
                self._receive(device, frame, pkt_type)

    def transmit(self, device: EmulatedInterface, frame: Frame, sender: EmulatedPacketSocket | None) -> None:
        """Send a frame out of an interface, to where its cable ends."""
        with self.lock:
            self._tap(device, frame, sender)
            target = device if device.loopback else device.peer
            if target is not None:
                self._receive(target, frame, None)

    def _tap(self, device: EmulatedInterface, frame: Frame, sender: EmulatedPacketSocket | None) -> None:
        """Outgoing frames, with tags where they are in the bytes, go to all ETH_P_ALL sockets but the sender."""
        network, protocol = device.header, ethernet.ip_protocol(frame.data)
        if device.header:
            protocol = ethernet.ether_type(frame.data)
            if device.hatype == ethernet.ARPHRD_ETHER:
                network, _ = ethernet.behind_tags(frame.data)
        packet = self._packet(device, frame, network, protocol, ethernet.PACKET_OUTGOING)
        for socket in self._listening(device):
            if socket.protocol == ethernet.ETH_P_ALL and socket is not sender:
                socket.deliver(device, packet, frame.timestamp_ns)

    def _receive(self, device: EmulatedInterface, frame: Frame, pkt_type: int | None) -> None:
        """A frame comes in: ETH_P_ALL sockets see it first, then those of its protocol."""
        if device.header:
            broadcast = bytes(6) if device.loopback else ethernet.BROADCAST
            if pkt_type is None:
                pkt_type = ethernet.packet_type(frame.data, device.address, broadcast)
            if frame.tag is None:
                bare = ethernet.untag(frame.data)
                if bare is None:
                    return
                data, tag = bare
                frame = replace(frame, data=data, tag=tag, wirelen=frame.wirelen - len(frame.data) + len(data))
            protocol = ethernet.received_protocol(frame.data)
        else:
            protocol = ethernet.ip_protocol(frame.data)
        packet = self._packet(device, frame, device.header, protocol, pkt_type or 0)
        packet.ingress_ifindex = device.index
        everything: list[EmulatedPacketSocket] = []
        others: list[EmulatedPacketSocket] = []
        for socket in self._listening(device):
            (everything if socket.protocol == ethernet.ETH_P_ALL else others).append(socket)
        for socket in everything:
            socket.deliver(device, packet, frame.timestamp_ns)
        if packet.vlan_tci is not None:
            # No VLAN device claimed it: Linux marks it as somebody else's and forgets the tag.
            packet = replace(packet, vlan_tci=None, pkt_type=ethernet.PACKET_OTHERHOST)
        for socket in others:
            if socket.protocol == protocol:
                socket.deliver(device, packet, frame.timestamp_ns)

    def _packet(self, device: EmulatedInterface, frame: Frame, network: int, protocol: int, kind: int) -> Packet:
        packet = Packet(
            buffer=frame.data,
            mac=0,
            network=network,
            length=frame.wirelen,
            protocol=protocol,
            pkt_type=kind,
            ifindex=device.index,
            hatype=device.hatype,
            mark=frame.mark,
        )
        if frame.tag is not None:
            packet.vlan_tci, packet.vlan_proto = frame.tag
        return packet

    # Sockets.

    def register(self, socket: EmulatedPacketSocket) -> None:
        with self.lock:
            self._sockets.add(socket)

    def unregister(self, socket: EmulatedPacketSocket) -> None:
        with self.lock:
            self._sockets.discard(socket)
            for device in self._interfaces.values():
                if not self._listening(device):
                    self._silence(device)

    def _silence(self, device: EmulatedInterface) -> None:
        """End what plays on an interface: there is nobody left to hear it."""
        if device.feed is not None:
            device.feed.close()
        device.feed, device.fed = None, False

    def _listening(self, device: EmulatedInterface) -> list[EmulatedPacketSocket]:
        found = [s for s in self._sockets if s.interface in (None, device) and not s.closed]
        return sorted(found, key=lambda socket: socket.serial)

    def bindable(self, name: str | None) -> EmulatedInterface | None:
        """The interface that a socket is to be bound to; where a capture is played, any name will do.

        A socket on all interfaces hears the capture on ``lo``.
        """
        path = os.environ.get(CAPTURE_VARIABLE)
        with self.lock:
            if path:
                device = self._interfaces.get(name or "lo") or self.add_interface(name or "lo")
                if not device.fed:
                    self.play(device.name, path)
            return self.interface(name) if name is not None else None

    # Captures.

    def play(self, interface: str, source: str | os.PathLike[str] | bytes) -> None:
        """Play a capture on an interface, as ``KBPF_EMULATED_CAPTURE`` does."""
        device = self.interface(interface)
        with self.lock:
            self._silence(device)
            device.feed, device.fed = Replay(source), True

    def fed(self, interface: EmulatedInterface | None) -> bool:
        """Whether a capture plays, or has played, for sockets bound there."""
        return interface.fed if interface else any(i.fed for i in self._interfaces.values())

    def advance(self, interface: EmulatedInterface | None) -> bool:
        """Bring the next frame of a capture that plays there; False when there is none left."""
        with self.lock:
            for device in [interface] if interface else list(self._interfaces.values()):
                if device.feed is not None:
                    for data, wirelen, stamp in device.feed:
                        # Whose address the file's host had is unknown: unicast is taken as its own.
                        unicast = bool(device.header) and not device.loopback and not data[0] & 1
                        self._arrive(device, Frame(data, wirelen, stamp), ethernet.PACKET_HOST if unicast else None)
                        return True
                    device.feed = None
            return False

    def settle(self) -> None:
        """Bring all frames of the captures that sockets with an eBPF program wait for. Map reads call this first."""
        if not any(device.feed for device in self._interfaces.values()):
            return
        for socket in list(self._sockets):
            if socket.slot.program is not None and socket.slot.classic is None:
                while self.advance(socket.interface):
                    pass


_network = Network()


def current() -> Network:
    """The network that `kbpf.packet_socket` and the functions of this module use."""
    return _network


def reset() -> None:
    """Begin anew with nothing but ``lo``. Sockets that are open keep the network they were made on."""
    global _network
    _network = Network()


def inject(
    interface: str,
    frame: bytes,
    *,
    timestamp: float | None = None,
    wirelen: int | None = None,
    pkt_type: int | None = None,
    mark: int = 0,
    vlan: int | tuple[int, int] | None = None,
) -> None:
    """`Network.inject` on the current network: let a frame arrive on an emulated interface."""
    current().inject(interface, frame, timestamp=timestamp, wirelen=wirelen, pkt_type=pkt_type, mark=mark, vlan=vlan)


def add_interface(
    name: str, *, address: bytes | None = None, hatype: int = ethernet.ARPHRD_ETHER, mtu: int = _ETHERNET_MTU
) -> EmulatedInterface:
    """`Network.add_interface` on the current network."""
    return current().add_interface(name, address=address, hatype=hatype, mtu=mtu)


def add_pair(first: str, second: str) -> tuple[EmulatedInterface, EmulatedInterface]:
    """`Network.add_pair` on the current network."""
    return current().add_pair(first, second)


def settle() -> None:
    """`Network.settle` on the current network, and what is due by the clock."""
    run_due()
    current().settle()
