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
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from kbpf.emulator import ethernet, icmp
from kbpf.emulator.clock import run_due, wall_time
from kbpf.emulator.datapath import Datapath, Frame, ProtocolHandler, backlog
from kbpf.emulator.environment import environment
from kbpf.emulator.ethernet import Tag
from kbpf.emulator.inet import Inet
from kbpf.emulator.interface import ETHERNET_MTU, LOOPBACK_MTU, EmulatedInterface, SentFrame
from kbpf.emulator.links import detach_all
from kbpf.emulator.packet import Packet
from kbpf.emulator.replay import Replay
from kbpf.emulator.slot import error
from kbpf.emulator.socket_table import SocketTable
from kbpf.emulator.tcp import TcpLayer
from kbpf.emulator.udp import UdpLayer

if TYPE_CHECKING:
    from kbpf.emulator.netlink import NetlinkSocket
    from kbpf.emulator.packetsocket import EmulatedPacketSocket
    from kbpf.emulator.unix import UnixEndpoint

CAPTURE_VARIABLE = "KBPF_EMULATED_CAPTURE"
_NAME_SIZE = 15


class Network:
    """Interfaces and the sockets on them. One lock serves all: delivery is a single order of events."""

    def __init__(self) -> None:
        self.lock = backlog.lock
        self.path = Datapath(self._listening, self.by_index)
        self._interfaces: dict[str, EmulatedInterface] = {}
        self._indices = itertools.count(1)
        self._sockets: weakref.WeakSet[EmulatedPacketSocket] = weakref.WeakSet()
        #: Sockets that packets find; those of the current network are `environment.sockets`.
        self.sockets = SocketTable()
        #: UNIX sockets by their names, and types where those matter.
        self.unix: weakref.WeakValueDictionary[tuple[bytes, int], UnixEndpoint] = weakref.WeakValueDictionary()
        #: Netlink sockets by their port ids.
        self.netlink: weakref.WeakValueDictionary[int, NetlinkSocket] = weakref.WeakValueDictionary()
        self.inet = Inet(self)
        self.udp = UdpLayer(self.inet)
        self.tcp = TcpLayer(self.inet)
        icmp.install(self.inet)
        self.add_interface("lo", address=bytes(6), hatype=ethernet.ARPHRD_LOOPBACK, mtu=LOOPBACK_MTU)
        for address in ("127.0.0.1/8", "::1/128"):
            self.add_address("lo", address)

    # Interfaces.

    def add_interface(
        self,
        name: str,
        *,
        address: bytes | None = None,
        hatype: int = ethernet.ARPHRD_ETHER,
        mtu: int = ETHERNET_MTU,
        index: int | None = None,
    ) -> EmulatedInterface:
        """Make an interface, up and running; `address` is by default a local one made from its index.

        `index` is by default one that is free. Raises `OSError` EEXIST for a name that is taken, EINVAL for one that
        Linux would not take, EBUSY for an index that is taken.
        """
        with self.lock:
            if name in self._interfaces:
                raise error(errno.EEXIST)
            if not 1 <= len(name.encode()) <= _NAME_SIZE or "/" in name or name in (".", "..") or " " in name:
                raise error(errno.EINVAL)
            if index is None:
                index = next(free for free in self._indices if self.by_index(free) is None)
            elif self.by_index(index) is not None:
                raise error(errno.EBUSY)
            given = b"\x02\0" + index.to_bytes(4, "big") if address is None else address
            interface = EmulatedInterface(name, index, given, hatype, mtu, self)
            self._interfaces[name] = interface
            return interface

    def add_pair(
        self, first: str, second: str, other: Network | None = None
    ) -> tuple[EmulatedInterface, EmulatedInterface]:
        """Make two interfaces that are the ends of a cable, like a veth pair; the second may be in another network."""
        one, two = self.add_interface(first), (other or self).add_interface(second)
        one.peer, two.peer = two, one
        return one, two

    def remove_interface(self, name: str) -> None:
        """Take an interface away; ``lo`` stays. Sockets bound to it fall silent, and links to it are detached."""
        with self.lock:
            interface = self.interface(name)
            if interface.loopback:
                raise error(errno.EOPNOTSUPP)
            if interface.peer is not None:
                interface.peer.peer = None
            interface.peer = None
            detach_all(interface)
            interface.network = None
            self.inet.forget(interface)
            del self._interfaces[name]

    def interface(self, name: str) -> EmulatedInterface:
        """The interface of that name; `OSError` ENODEV if there is none."""
        try:
            return self._interfaces[name]
        except KeyError:
            raise error(errno.ENODEV) from None

    def by_index(self, index: int) -> EmulatedInterface | None:
        """The interface with that index; None if there is none."""
        return next((i for i in self._interfaces.values() if i.index == index), None)

    def add_address(self, interface: str, address: str) -> None:
        """Give an interface an IP address, with the length of its prefix: ``"10.0.0.1/24"``.

        ``lo`` has 127.0.0.1/8 and ::1. Packets to this host's own addresses go through ``lo``, as Linux has it.
        Raises `OSError` ENODEV for an unknown interface, EEXIST for an address that is there.
        """
        with self.lock:
            self.inet.add_address(self.interface(interface), address)

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
        by default now, or the time of a `ManualClock`. `wirelen` is the frame's length where its end was cut off.
        `pkt_type` (PACKET_*) delivers it once, as that. `vlan` is the tag that the card took out, a TCI or
        (TCI, EtherType); a tag in the bytes of a received frame is taken out as Linux does.

        Raises `OSError` ENODEV for an unknown interface, `ValueError` for a frame without a whole link header.
        """
        device = self.interface(interface)
        if len(frame) < device.header:
            raise ValueError(f"a frame of {len(frame)} bytes has no link header of {device.header}")
        if wirelen is not None and wirelen < len(frame):
            raise ValueError(f"a frame of {len(frame)} bytes was not {wirelen} bytes on the wire")
        tag = None if vlan is None else Tag(vlan) if isinstance(vlan, int) else Tag(*vlan)
        stamp = wall_time() if timestamp is None else round(timestamp * 1_000_000_000)
        self._arrive(device, Frame(bytes(frame), wirelen or len(frame), stamp, mark, tag), pkt_type)

    def _arrive(self, device: EmulatedInterface, frame: Frame, pkt_type: int | None = None) -> None:
        with backlog.event():
            if pkt_type == ethernet.PACKET_OUTGOING:
                packet = self.path.outgoing(device, frame)
                packet.ifindex, packet.hatype = device.index, device.hatype
                self.path.tap(device, packet, None)
            elif pkt_type is None and device.loopback:
                self.transmit(device, frame, None)
            else:
                self.path.receive(device, self.path.incoming(device, frame), pkt_type)

    def transmit(self, device: EmulatedInterface, frame: Frame, sender: EmulatedPacketSocket | None) -> int:
        """Send a frame out of an interface, to where its cable ends; see `send`."""
        return self.send(device, self.path.outgoing(device, frame), sender)

    def send(self, device: EmulatedInterface, packet: Packet, sender: EmulatedPacketSocket | None = None) -> int:
        """Send a packet, offset 0 its link header, out of an interface (`dev_queue_xmit`).

        Gives NET_XMIT_SUCCESS (0), or NET_XMIT_DROP (1) where it was thrown away on the way to the cable.

        ETH_P_ALL sockets other than `sender` see it. What it leads to has happened when this returns, or, from within a
        protocol's handler, when that has returned.
        """
        return self.path.transmit(device, packet, sender)

    def handle(self, protocol: int, handler: ProtocolHandler) -> None:
        """Have received packets of an EtherType given to `handler`, offset 0 their network header (`dev_add_pack`)."""
        self.path.protocols[protocol] = handler

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

    @contextmanager
    def capture(self, interface: str) -> Iterator[list[SentFrame]]:
        """The frames that leave an interface while ``with`` lasts, in a list that grows.

        What programs throw away is not among them, and what XDP sends past the packet sockets is.
        """
        device = self.interface(interface)
        frames: list[SentFrame] = []
        with self.lock:
            device.captures.append(frames)
        try:
            yield frames
        finally:
            with self.lock:
                device.captures.remove(frames)

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
        """Bring all frames of the captures that sockets and interfaces with an eBPF program wait for.

        Map reads call this first.
        """
        if not any(device.feed for device in self._interfaces.values()):
            return
        for socket in list(self._sockets):
            if socket.slot.program is not None and socket.slot.classic is None:
                while self.advance(socket.interface):
                    pass
        for device in list(self._interfaces.values()):
            while (device.watched or self.inet.netfilter.used) and self.advance(device):
                pass


_network = Network()
environment.sockets = _network.sockets


def current() -> Network:
    """The network that `kbpf.packet_socket` and the functions of this module use."""
    return _network


def reset() -> None:
    """Begin anew with nothing but ``lo``. Sockets that are open keep the network they were made on."""
    global _network
    _network = Network()
    environment.sockets = _network.sockets


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
    name: str,
    *,
    address: bytes | None = None,
    hatype: int = ethernet.ARPHRD_ETHER,
    mtu: int = ETHERNET_MTU,
    index: int | None = None,
) -> EmulatedInterface:
    """`Network.add_interface` on the current network."""
    return current().add_interface(name, address=address, hatype=hatype, mtu=mtu, index=index)


def add_pair(first: str, second: str) -> tuple[EmulatedInterface, EmulatedInterface]:
    """`Network.add_pair` on the current network."""
    return current().add_pair(first, second)


def capture(interface: str) -> AbstractContextManager[list[SentFrame]]:
    """`Network.capture` on the current network: what leaves an interface, with its times."""
    return current().capture(interface)


def play(interface: str, source: str | os.PathLike[str] | bytes) -> None:
    """`Network.play` on the current network: frames from a capture file, or its bytes."""
    current().play(interface, source)


def add_address(interface: str, address: str) -> None:
    """`Network.add_address` on the current network."""
    current().add_address(interface, address)


def settle() -> None:
    """`Network.settle` on the current network, and what is due by the clock."""
    run_due()
    current().settle()
