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
import threading
import time
from collections import deque
from dataclasses import replace
from types import TracebackType
from typing import Any, NamedTuple, TypeAlias

from kbpf.emulator import ethernet
from kbpf.emulator.datapath import Frame
from kbpf.emulator.interface import EmulatedInterface
from kbpf.emulator.network import Network, current
from kbpf.emulator.packet import Packet
from kbpf.emulator.slot import Slot, error
from kbpf.uapi.constants import (
    PACKET_AUXDATA,
    PACKET_STATISTICS,
    SO_DETACH_FILTER,
    SO_DOMAIN,
    SO_ERROR,
    SO_LOCK_FILTER,
    SO_MARK,
    SO_PROTOCOL,
    SO_RCVBUF,
    SO_TYPE,
    SOL_PACKET,
    SOL_SOCKET,
)

Address: TypeAlias = "tuple[str, int, int, int, bytes]"

# Linux's numbers, which Python has on Linux only (linux/socket.h, asm-generic/socket.h).
AF_PACKET = 17
SOCK_DGRAM, SOCK_RAW = 2, 3
MSG_PEEK, MSG_TRUNC, MSG_DONTWAIT = 0x02, 0x20, 0x40
SO_TIMESTAMPNS = 35
_TIMESPEC = struct.Struct("=qq")
_AUXDATA = struct.Struct("=IIIHHHH")
_TP_STATUS_USER, _TP_STATUS_VLAN = 0x01, 0x10 | 0x40

# net.core.rmem_default and rmem_max, and the least that SO_RCVBUF gives (sock.h, SOCK_MIN_RCVBUF).
_RCVBUF_DEFAULT, _RCVBUF_MAX, _RCVBUF_MIN = 212992, 212992, 2304
# What a queued packet takes beside its bytes: struct sk_buff, and headroom and shared info beside the data; and the
# buffer that small packets come in.
_SKB, _SKB_DATA, _SKB_SMALL = 256, 16 + 320, 576

_serials = itertools.count()


class Statistics(NamedTuple):
    """PACKET_STATISTICS: packets that passed the filter, and those of them that found no room."""

    packets: int
    drops: int


class _Queued(NamedTuple):
    data: bytes
    #: Length before the filter cut it, and after.
    length: int
    snaplen: int
    address: Address
    auxdata: bytes
    size: int
    timestamp_ns: int


def _truesize(length: int) -> int:
    """What a packet counts for against SO_RCVBUF: its buffer comes in powers of two, large ones in pages."""
    need = length + _SKB_DATA
    if need <= _SKB_SMALL:
        return _SKB + _SKB_SMALL
    return _SKB + (1 << (need - 1).bit_length() if need <= 8192 else need + -need % 4096)


class EmulatedPacketSocket:
    """An emulated AF_PACKET socket. `protocol` is an ETH_P_* number in host order; 0 receives nothing."""

    def __init__(
        self,
        interface: str | None = None,
        type: int = SOCK_RAW,
        protocol: int = ethernet.ETH_P_ALL,
        *,
        network: Network | None = None,
    ) -> None:
        if type not in (SOCK_RAW, SOCK_DGRAM):
            raise OSError(errno.ESOCKTNOSUPPORT, os.strerror(errno.ESOCKTNOSUPPORT))
        self.network = network or current()
        self.family, self.type, self.proto = AF_PACKET, type, 0
        self.protocol = protocol
        self.slot = Slot()
        self.serial = next(_serials)
        self.closed = False
        self.interface: EmulatedInterface | None = self.network.bindable(interface)
        self._arrived = threading.Condition(self.network.lock)
        self._queue: deque[_Queued] = deque()
        self._queued_size = 0
        self._rcvbuf = _RCVBUF_DEFAULT
        self._timeout = _socket.getdefaulttimeout()
        self._auxdata = self._timestamps = False
        self._mark = 0
        self._packets = self._drops = 0
        # The readable end and the one that is written to; made when somebody asks for a descriptor.
        self._wake: tuple[_socket.socket, _socket.socket] | None = None
        self._signalled = False
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
            self._drops += 1
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
        size = _truesize(length)
        data = packet.data[:snaplen]
        self._queue.append(_Queued(data, length, snaplen, address, auxdata, size, timestamp_ns))
        self._queued_size += size
        self._arrived.notify_all()
        self._signal()

    # Receiving.

    def recv(self, bufsize: int, flags: int = 0) -> bytes:
        """The next packet, at most `bufsize` bytes of it; the rest is lost. With MSG_TRUNC the result is padded."""
        return self.recvfrom(bufsize, flags)[0]

    def recvfrom(self, bufsize: int, flags: int = 0) -> tuple[bytes, Address]:
        """`recv`, and the sender as (interface, protocol, PACKET_* type, ARPHRD_* type, link address)."""
        if bufsize < 0:
            raise ValueError("negative buffersize in recvfrom")
        got = self._take(flags)
        data = got.data[:bufsize]
        # The kernel returns the whole length with MSG_TRUNC, and Python makes its result that long.
        return (data.ljust(got.snaplen, b"\0") if flags & MSG_TRUNC else data), got.address

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """Fill a buffer; returns the bytes stored, or the packet's length with MSG_TRUNC."""
        return self.recvfrom_into(buffer, nbytes, flags)[0]

    def recvfrom_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> tuple[int, Address]:
        """`recv_into`, and the sender."""
        view = memoryview(buffer).cast("B")
        if not 0 <= nbytes <= len(view):
            raise ValueError("nbytes is greater than the length of the buffer, or negative")
        got = self._take(flags)
        data = got.data[: nbytes or len(view)]
        view[: len(data)] = data
        return (got.snaplen if flags & MSG_TRUNC else len(data)), got.address

    def recvmsg(
        self, bufsize: int, ancbufsize: int = 0, flags: int = 0
    ) -> tuple[bytes, list[tuple[int, int, bytes]], int, Address]:
        """`recvfrom` with ancillary data, where it was asked for and there is room: SO_TIMESTAMPNS, PACKET_AUXDATA."""
        got = self._take(flags)
        ancillary = []
        if self._timestamps:
            stamp = _TIMESPEC.pack(*divmod(got.timestamp_ns, 1_000_000_000))
            ancillary.append((SOL_SOCKET, SO_TIMESTAMPNS, stamp))
        if self._auxdata:
            ancillary.append((SOL_PACKET, PACKET_AUXDATA, got.auxdata))
        while sum(_socket.CMSG_SPACE(len(data)) for _, _, data in ancillary) > ancbufsize:
            ancillary.pop()
        msg_flags = MSG_TRUNC if got.snaplen > bufsize else 0
        return got.data[:bufsize], ancillary, msg_flags, got.address

    def _take(self, flags: int) -> _Queued:
        with self._arrived:
            self._open()
            # As in Python, whose sockets with a timeout wait whatever the flag says.
            self._wait(0.0 if flags & MSG_DONTWAIT and self._timeout is None else self._timeout)
            if flags & MSG_PEEK:
                return self._queue[0]
            got = self._queue.popleft()
            self._queued_size -= got.size
            self._signal()
            return got

    def _wait(self, timeout: float | None) -> None:
        """Until there is a packet; time does not pass for captures, which bring their frames at once."""
        while not self._queue and self.network.advance(self.interface):
            pass
        if self._queue:
            return
        if timeout == 0.0:
            self._signal()
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        if self.network.fed(self.interface):
            self._signal()
            raise TimeoutError("timed out: the emulated capture is at its end")
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._queue:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError("timed out")
            self._arrived.wait(left)
            self._open()

    def drain(self) -> int:
        """Throw away what is queued; frames that a capture has yet to bring were never queued, and stay."""
        with self._arrived:
            self._open()
            count = len(self._queue)
            self._queue.clear()
            self._queued_size = 0
            self._signal()
            return count

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
        self.network.transmit(device, Frame(frame, len(frame), time.time_ns(), self._mark), self)
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
            counted = Statistics(self._packets, self._drops)
            self._packets = self._drops = 0
            return counted

    def getsockopt(self, level: int, option: int, buflen: int = 0) -> int | bytes:
        """The options that matter to filters and captures; `OSError` ENOPROTOOPT for others."""
        self._open()
        if (level, option) == (SOL_PACKET, PACKET_STATISTICS):
            counted = struct.pack("=II", *self.statistics())
            return counted[:buflen] if buflen else int.from_bytes(counted[:4], "little")
        numbers = {
            (SOL_SOCKET, SO_TYPE): self.type,
            (SOL_SOCKET, SO_ERROR): 0,
            (SOL_SOCKET, SO_RCVBUF): self._rcvbuf,
            (SOL_SOCKET, SO_MARK): self._mark,
            (SOL_SOCKET, SO_PROTOCOL): _socket.htons(self.protocol),
            (SOL_SOCKET, SO_DOMAIN): self.family,
            (SOL_SOCKET, SO_LOCK_FILTER): int(self.slot.locked),
            (SOL_SOCKET, SO_TIMESTAMPNS): int(self._timestamps),
            (SOL_PACKET, PACKET_AUXDATA): int(self._auxdata),
        }
        if (level, option) not in numbers:
            raise error(errno.ENOPROTOOPT)
        value = numbers[level, option]
        return struct.pack("=I", value)[:buflen] if buflen else value

    def setsockopt(self, level: int, option: int, value: int | bytes) -> None:
        """The options that matter to filters and captures; `OSError` ENOPROTOOPT for others.

        Filters are attached through `kbpf.attach`: SO_ATTACH_FILTER takes a pointer, which means nothing here.
        """
        self._open()
        if isinstance(value, int):
            number = value
        elif len(value) < 4:
            raise error(errno.EINVAL)
        else:
            number = int(struct.unpack_from("=i", value)[0])
        if (level, option) == (SOL_SOCKET, SO_RCVBUF):
            self._rcvbuf = max(2 * min(number & 0xFFFFFFFF, _RCVBUF_MAX), _RCVBUF_MIN)
        elif (level, option) == (SOL_SOCKET, SO_MARK):
            self._mark = number & 0xFFFFFFFF
        elif (level, option) == (SOL_SOCKET, SO_DETACH_FILTER):
            self.slot.detach()
        elif (level, option) == (SOL_SOCKET, SO_LOCK_FILTER):
            if not number:
                self.slot.refuse_if_locked()
            else:
                self.slot.lock()
        elif (level, option) == (SOL_SOCKET, SO_TIMESTAMPNS):
            self._timestamps = bool(number)
        elif (level, option) == (SOL_PACKET, PACKET_AUXDATA):
            self._auxdata = bool(number)
        else:
            raise error(errno.ENOPROTOOPT)

    def settimeout(self, value: float | None) -> None:
        if value is not None and value < 0:
            raise ValueError("Timeout value out of range")
        self._timeout = None if value is None else float(value)

    def gettimeout(self) -> float | None:
        return self._timeout

    @property
    def timeout(self) -> float | None:
        return self._timeout

    def setblocking(self, flag: bool) -> None:
        self._timeout = None if flag else 0.0

    def getblocking(self) -> bool:
        return self._timeout != 0.0

    def fileno(self) -> int:
        """A descriptor for select and its kin: readable while packets are queued or a capture has more to bring.

        It is good for nothing else; -1 once the socket is closed.
        """
        with self._arrived:
            if self.closed:
                return -1
            if self._wake is None:
                self._wake = _socket.socketpair()
                self._signal()
            return self._wake[0].fileno()

    def _signal(self) -> None:
        """Keep the descriptor's readability equal to whether there is something to read."""
        if self._wake is None:
            return
        device = self.interface
        ready = bool(self._queue) or (device is not None and device.feed is not None)
        if ready and not self._signalled:
            self._wake[1].send(b"\0")
        elif self._signalled and not ready:
            self._wake[0].recv(1)
        self._signalled = ready

    def close(self) -> None:
        with self._arrived:
            if self.closed:
                return
            self.closed = True
            self._queue.clear()
            self.network.unregister(self)
            if self._wake is not None:
                for end in self._wake:
                    end.close()
            self._arrived.notify_all()

    def _open(self) -> None:
        if self.closed:
            raise error(errno.EBADF)

    def __enter__(self) -> EmulatedPacketSocket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"on {self.interface.name if self.interface else 'all interfaces'}"
        kind = "raw" if self.type == SOCK_RAW else "dgram"
        return f"<EmulatedPacketSocket {kind} {state}, protocol={self.protocol:#06x}>"
