"""The sockets' part of the emulator: what setsockopt(2) does on the kernel's."""

from __future__ import annotations

import errno
from typing import Any, Literal

from kbpf.backend import SocketLike
from kbpf.emulator import sockets
from kbpf.emulator.descriptor_table import DescriptorTable
from kbpf.emulator.maps.base import refused
from kbpf.emulator.program import ClassicProgram, Program
from kbpf.errors import FilterError
from kbpf.isa import cbpf
from kbpf.specs import Layout


class SocketCalls(DescriptorTable):
    """The sockets' part of the backend."""

    def socket_layout(self, socket: SocketLike) -> Layout:
        return sockets.layout_of(socket)

    def socket_attach_filter(self, socket: SocketLike, program: bytes) -> None:
        sockets.attach(socket, self._classic(socket, program), program)

    def socket_attach_bpf(self, socket: SocketLike, program: int) -> None:
        sockets.attach(socket, self._socket_filter(socket, program), None)

    def _classic(self, socket: SocketLike, program: bytes) -> ClassicProgram:
        """A filter for a socket, which must not be locked: that comes before the filter is looked at."""
        sockets.refuse_if_locked(socket)
        try:
            return ClassicProgram(cbpf.decode(program))
        except FilterError:
            raise refused(errno.EINVAL) from None

    def _socket_filter(self, socket: SocketLike, program: int) -> Program:
        sockets.refuse_if_locked(socket)
        found = self.program(program)
        if found.type != "socket_filter":
            raise refused(errno.EINVAL)
        return found

    def socket_detach(self, socket: SocketLike) -> None:
        sockets.detach(socket)

    def socket_get_filter(self, socket: SocketLike) -> bytes:
        return sockets.get_filter(socket)

    def socket_lock(self, socket: SocketLike) -> None:
        sockets.lock(socket)

    def socket_drain(self, socket: SocketLike) -> int:
        return sockets.drain(socket)

    def socket_drainable(self, socket: SocketLike) -> bool:
        return sockets.drainable(socket)

    def socket_attach_reuseport_filter(self, socket: SocketLike, program: bytes) -> None:
        sockets.attach_reuseport(socket, self._classic(socket, program))

    def socket_attach_reuseport_bpf(self, socket: SocketLike, program: int) -> None:
        if self.program(program).type == "sk_reuseport":
            sockets.refuse_if_locked(socket)
            sockets.attach_sk_reuseport(socket, self.program(program))
        else:
            sockets.attach_reuseport(socket, self._socket_filter(socket, program))

    def socket_detach_reuseport(self, socket: SocketLike) -> None:
        sockets.detach_reuseport(socket)

    def packet_socket(self, interface: str | None, *, type: Literal["raw", "dgram"] = "raw", protocol: int = 3) -> Any:
        return sockets.open_packet_socket(interface, type=type, protocol=protocol)
