"""AF_PACKET sockets on the emulated network, with the methods and results of Python's `socket.socket`.

What a filter sees, what is cut, counted and thrown away is as measured on Linux 6.18 (packet_rcv and packet_recvmsg in
net/packet/af_packet.c). One difference is on purpose: at the end of a capture that plays on
the interface (`kbpf.emulator.network`), reading an empty socket raises `TimeoutError` at once.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket as _socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, TypeAlias

from kbpf.emulator import ethernet
from kbpf.emulator.clock import wall_time
from kbpf.emulator.datapath import Frame
from kbpf.emulator.endpoint import Ancillary, DatagramEndpoint, Endpoint, Message, Option, flag, truesize
from kbpf.emulator.interface import EmulatedInterface
from kbpf.emulator.network import Network, current
from kbpf.emulator.packet import Packet
from kbpf.emulator.slot import error
from kbpf.emulator.sock import Sock
from kbpf.uapi.constants import PACKET_AUXDATA, PACKET_STATISTICS, SO_PROTOCOL, SOL_PACKET, SOL_SOCKET

Address: TypeAlias = "tuple[str, int, int, int, bytes]"

# Linux's numbers, which Python has on Linux only (linux/socket.h, asm-generic/socket.h).
AF_PACKET = 17
SOCK_DGRAM, SOCK_RAW = 2, 3
SO_TIMESTAMPNS = 35
_TIMESPEC = struct.Struct("=qq")
_AUXDATA = struct.Struct("=IIIHHHH")
_TP_STATUS_USER, _TP_STATUS_VLAN = 0x01, 0x10 | 0x40

# Headroom and shared info beside a packet's data.
_SKB_DATA = 16 + 320

_serials = itertools.count()


class Statistics(NamedTuple):
    """PACKET_STATISTICS: packets that passed the filter, and those of them that found no room."""

    packets: int
    drops: int


@dataclass(kw_only=True)
class _Received(Message):
    auxdata: bytes
    timestamp_ns: int


class EmulatedPacketSocket(DatagramEndpoint):
    """An emulated AF_PACKET socket. `protocol` is an ETH_P_* number in host order; 0 receives nothing."""

    OPTIONS: ClassVar[Mapping[tuple[int, int], Option]] = {
        **Endpoint.OPTIONS,
        (SOL_SOCKET, SO_PROTOCOL): Option(lambda end: _socket.htons(end.protocol)),
        (SOL_SOCKET, SO_TIMESTAMPNS): flag("_timestamps"),
        (SOL_PACKET, PACKET_AUXDATA): flag("_auxdata"),
    }

    def __init__(
        self,
        interface: str | None = None,
        type: int = SOCK_RAW,
        protocol: int = ethernet.ETH_P_ALL,
        *,
        network: Network | None = None,
    ) -> None:
        self.closed = True
        if type not in (SOCK_RAW, SOCK_DGRAM):
            raise OSError(errno.ESOCKTNOSUPPORT, os.strerror(errno.ESOCKTNOSUPPORT))
        self.network = network or current()
        self.interface: EmulatedInterface | None = self.network.bindable(interface)
        self.protocol = protocol
        self.sock = Sock(family=AF_PACKET, type=int(type))
        self.serial = next(_serials)
        self._auxdata = self._timestamps = False
        self._packets = 0
        self._overflows = 0
        super().__init__(AF_PACKET, type, 0)
        self.network.register(self)

    # Delivery.

    def deliver(self, device: EmulatedInterface, packet: Packet, timestamp_ns: int) -> None:
        """Filter a packet whose offset 0 is the link header, and queue what is kept (`packet_rcv`)."""
        network = packet.network or 0
        protocol, tag = packet.protocol, None if packet.vlan_tci is None else (packet.vlan_tci, packet.vlan_proto)
        source = bytes(packet.buffer[6:12]) if device.header else b""
        if self.type == SOCK_DGRAM:
            packet = replace(packet, offset=network, length=packet.length - network)
        length = packet.length
        kept = self.slot.run(packet)
        if not kept:
            return
        snaplen = min(kept, length)
        self._packets += 1
        if self._queued_size >= self._rcvbuf:
            self._overflows += 1
            return
        if self.type == SOCK_DGRAM and device.header and protocol in ethernet.VLAN_PROTOCOLS:
            # Linux 6.11: a tag in the bytes, as the filter left them, is reported like one in the metadata.
            left = bytes(packet.buffer[: packet.offset + snaplen])
            if tag is None:
                tag = (int.from_bytes(left[14:16], "big") if len(left) >= 18 else 0), protocol
            protocol = ethernet.behind_tags(left)[1]
        status = _TP_STATUS_USER | (0 if tag is None else _TP_STATUS_VLAN)
        auxdata = _AUXDATA.pack(status, length, snaplen, 0, network - packet.offset, *(tag or (0, 0)))
        address = (device.name, protocol, packet.pkt_type, device.hatype, source)
        size = truesize(length + _SKB_DATA)
        data = packet.data[:snaplen]
        self._enqueue(
            _Received(data=data, length=snaplen, address=address, size=size, auxdata=auxdata, timestamp_ns=timestamp_ns)
        )

    # Receiving.

    def _readable(self) -> bool:
        return self._ready() or (self.interface is not None and self.interface.feed is not None)

    def _ancillary(self, got: Message) -> list[Ancillary]:
        assert isinstance(got, _Received)
        told: list[Ancillary] = []
        if self._timestamps:
            told.append((SOL_SOCKET, SO_TIMESTAMPNS, _TIMESPEC.pack(*divmod(got.timestamp_ns, 1_000_000_000))))
        if self._auxdata:
            told.append((SOL_PACKET, PACKET_AUXDATA, got.auxdata))
        return told

    def _wait_for(self, ready: Callable[[], bool], timeout: float | None) -> None:
        """Time does not pass for captures, which bring their frames at once."""
        while not ready() and self.network.advance(self.interface):
            pass
        if timeout != 0.0 and not ready() and self.network.fed(self.interface):
            self._signal()
            raise TimeoutError("timed out: the emulated capture is at its end")
        super()._wait_for(ready, timeout)

    # Sending.

    def send(self, data: bytes, flags: int = 0) -> int:
        """Send a frame out of the interface that the socket is bound to; ``SOCK_DGRAM`` gets a link header of zeros."""
        if self.interface is None:
            self._open()
            raise error(errno.ENXIO)
        return self._transmit(self.interface, bytes(data), self.protocol, b"")

    def sendto(self, data: bytes, *arguments: Any) -> int:
        """``sendto(data, address)`` or ``sendto(data, flags, address)``: the address names interface and protocol."""
        address = arguments[-1]
        self._open()
        hardware = bytes(address[4]) if len(address) > 4 else b""
        return self._transmit(self.network.interface(address[0]), bytes(data), address[1], hardware)

    def _transmit(self, device: EmulatedInterface, data: bytes, protocol: int, target: bytes) -> int:
        self._open()
        if self.type == SOCK_RAW and len(data) < device.header:
            raise error(errno.EINVAL)
        frame = data
        if self.type == SOCK_DGRAM and device.header:
            frame = target[:6].ljust(6, b"\0") + device.address + protocol.to_bytes(2, "big") + data
        tagged = device.header and ethernet.ether_type(frame) == ethernet.ETH_P_8021Q
        if len(frame) > device.mtu + device.header + (4 if tagged else 0):
            raise error(errno.EMSGSIZE)
        if self.network.transmit(device, Frame(frame, len(frame), wall_time(), self._mark), self):
            raise error(errno.ENOBUFS)
        return len(data)

    # The socket itself.

    def bind(self, address: tuple[Any, ...]) -> None:
        """Bind to (interface, protocol in host order)."""
        with self._arrived:
            self._open()
            self.interface = self.network.bindable(address[0] or None)
            if address[1]:
                self.protocol = address[1]

    def getsockname(self) -> Address:
        self._open()
        device = self.interface
        if device is None:
            return ("", self.protocol, 0, 0, b"")
        return (device.name, self.protocol, 0, device.hatype, device.address if device.header else b"")

    def statistics(self) -> Statistics:
        """PACKET_STATISTICS since the last time it was asked for."""
        with self._arrived:
            counted = Statistics(self._packets, self._overflows)
            self._packets = self._overflows = 0
            return counted

    def getsockopt(self, level: int, option: int, buflen: int = 0) -> int | bytes:
        """The options that matter to filters and captures; `OSError` ENOPROTOOPT for others."""
        if (level, option) == (SOL_PACKET, PACKET_STATISTICS):
            self._open()
            counted = struct.pack("=II", *self.statistics())
            return counted[:buflen] if buflen else int.from_bytes(counted[:4], "little")
        return super().getsockopt(level, option, buflen)

    def _closed(self) -> None:
        self._queue.clear()
        self.network.unregister(self)

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"on {self.interface.name if self.interface else 'all interfaces'}"
        kind = "raw" if self.type == SOCK_RAW else "dgram"
        return f"<EmulatedPacketSocket {kind} {state}, protocol={self.protocol:#06x}>"
