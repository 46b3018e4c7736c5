"""Ways to bring a packet to a classic filter on a live socket and see what is left of it, on kernel and emulator alike.

`unix` carries plain bytes, the others Ethernet frames: `packet` and `packet_dgram` are packet sockets, `udp` is a UDP
socket that gets the datagrams among them. The kernel's network carriers live in a network namespace of their own,
fed through a tap device, so that each frame is what the generator made: nothing answers, nothing is lost, and delivery
is over when the write returns. They need root, iproute2 and /dev/net/tun.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Protocol, TypeAlias

from kbpf.emulator.classic import ClassicProgram
from kbpf.emulator.network import Network
from kbpf.emulator.packet import Packet
from kbpf.emulator.packetsocket import EmulatedPacketSocket
from kbpf.isa import cbpf
from kbpf.kernel.backend import kernel_backend
from kbpf.testing.network import NetworkNamespace

NAMES = ("unix", "packet", "packet_dgram", "udp")

#: Who the tap device is, in the kernel and in the emulator.
TAP_MAC = bytes.fromhex("024b42504601")
TAP_INDEX = 2
TAP_ADDRESS = "192.0.2.1"
UDP_PORT = 7070

_ETH_P_ALL = 3
_ROOM = 1 << 16
# linux/if_tun.h.
_TUNSETIFF, _TUNSETIFINDEX = 0x400454CA, 0x400454DA
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000
_UDP_HEADER = 8


Prepare: TypeAlias = "Callable[[tuple[cbpf.Instruction, ...]], ClassicProgram]"


class Carrier(Protocol):
    def attach(self, program: bytes) -> None:
        """Put the filter in place of the last; raises the kernel's `OSError`."""
        ...

    def deliver(self, packet: bytes) -> bytes | None:
        """What a reader of the socket gets of the packet; None if the filter dropped it."""
        ...


class _KernelCarrier:
    def __init__(self, receiver: socket.socket, send: Callable[[bytes], object]) -> None:
        self._backend = kernel_backend()
        self._receiver = receiver
        self._send = send
        receiver.setblocking(False)

    def attach(self, program: bytes) -> None:
        # Replacing needs room for both in the socket's option memory.
        with suppress(FileNotFoundError):
            self._backend.socket_detach(self._receiver)
        self._backend.socket_attach_filter(self._receiver, program)

    def deliver(self, packet: bytes) -> bytes | None:
        self._send(packet)
        try:
            return self._receiver.recv(_ROOM)
        except BlockingIOError:
            return None


def _tap() -> int:
    """A tap device in the namespace of the calling thread; it lives as long as the descriptor."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _TUNSETIFINDEX, struct.pack("=I", TAP_INDEX))
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("=16sH22x", b"tap0", _IFF_TAP | _IFF_NO_PI))
    except BaseException:
        os.close(fd)
        raise
    return fd


@contextmanager
def kernel(names: tuple[str, ...] = NAMES) -> Iterator[dict[str, Carrier]]:
    """The kernel's carriers of those names."""
    with ExitStack() as stack:
        carriers: dict[str, Carrier] = {}
        if "unix" in names:
            sender, receiver = map(stack.enter_context, socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM))
            carriers["unix"] = _KernelCarrier(receiver, sender.send)
        for name in set(names) - {"unix"}:
            # A namespace each: what is queued at one of the sockets is no concern of the others.
            namespace = stack.enter_context(NetworkNamespace())
            tap = namespace.call(_tap)
            stack.callback(os.close, tap)
            namespace.run("sysctl", "-qw", "net.ipv6.conf.tap0.disable_ipv6=1")
            namespace.run("ip", "link", "set", "tap0", "address", TAP_MAC.hex(":"), "up")
            if name == "udp":
                namespace.run("ip", "address", "add", f"{TAP_ADDRESS}/24", "dev", "tap0")
                receiver = stack.enter_context(namespace.socket(socket.AF_INET, socket.SOCK_DGRAM))
                receiver.bind((TAP_ADDRESS, UDP_PORT))
            else:
                kind = socket.SOCK_RAW if name == "packet" else socket.SOCK_DGRAM
                receiver = stack.enter_context(namespace.socket(socket.AF_PACKET, kind, 0))
                receiver.bind(("tap0", _ETH_P_ALL))
            carriers[name] = _KernelCarrier(receiver, partial(os.write, tap))
        yield carriers


class _EmulatedCarrier:
    """Runs the filter over the packet that `packet_of` makes; a reader gets what is kept behind `header` bytes."""

    def __init__(self, prepare: Prepare, packet_of: Callable[[bytes], Packet], header: int = 0) -> None:
        self._prepare = prepare
        self._packet_of = packet_of
        self._header = header

    def attach(self, program: bytes) -> None:
        self._program = self._prepare(cbpf.decode(program))

    def deliver(self, packet: bytes) -> bytes | None:
        seen = self._packet_of(packet)
        kept = self._program.run_packet(seen)
        return seen.data[self._header : max(kept, self._header)] if kept else None


#: A tap device records the queue that a frame came in by, counted from 1.
_TAP_QUEUE = 1


class _EmulatedTap:
    """A packet socket on an emulated network."""

    def __init__(self, prepare: Prepare, kind: int, stack: ExitStack) -> None:
        self._prepare = prepare
        self._network = Network()
        tap = self._network.add_interface("tap0", address=TAP_MAC)
        assert tap.index == TAP_INDEX
        tap.queue = _TAP_QUEUE
        self._receiver = stack.enter_context(EmulatedPacketSocket("tap0", kind, network=self._network))
        self._receiver.setblocking(False)

    def attach(self, program: bytes) -> None:
        self._receiver.slot.attach(self._prepare(cbpf.decode(program)), program)

    def deliver(self, packet: bytes) -> bytes | None:
        self._network.inject("tap0", packet)
        try:
            return self._receiver.recv(_ROOM)
        except BlockingIOError:
            return None


def _datagram(frame: bytes) -> Packet:
    """What a UDP socket's filter sees of a frame without options and tags: offset 0 is the UDP header."""
    return Packet(
        buffer=frame,
        offset=34,
        mac=0,
        network=14,
        protocol=0x0800,
        ifindex=TAP_INDEX,
        ingress_ifindex=TAP_INDEX,
        queue=_TAP_QUEUE,
    )


@contextmanager
def emulated(prepare: Prepare = ClassicProgram) -> Iterator[dict[str, Carrier]]:
    """The emulator's carriers; `prepare` makes a program of instructions."""
    with ExitStack() as stack:
        yield {
            "unix": _EmulatedCarrier(prepare, lambda data: Packet(buffer=data, network=0)),
            "packet": _EmulatedTap(prepare, socket.SOCK_RAW, stack),
            "packet_dgram": _EmulatedTap(prepare, socket.SOCK_DGRAM, stack),
            "udp": _EmulatedCarrier(prepare, _datagram, _UDP_HEADER),
        }
