"""Programs that choose among sockets that share a port: SO_ATTACH_REUSEPORT_CBPF and _EBPF (Linux 4.5).

The program sees what follows the transport header, and returns the socket's place in the group; for a place that is
not there, the flow's hash decides (net/core/sock_reuseport.c).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from socket import IPPROTO_UDP

from kbpf.emulator import headers
from kbpf.emulator.packet import Packet
from kbpf.emulator.slot import Runnable
from kbpf.emulator.sock import Sock


def selector_of(program: Runnable) -> Callable[[Sock, Packet, int], Sock | None]:
    """What asks a socket filter, classic or not, for the place."""

    def select(sock: Sock, packet: Packet, hash: int) -> Sock | None:
        size = headers.UDP_SIZE
        if sock.protocol != IPPROTO_UDP:
            found = headers.read_tcp(packet.data)
            size = packet.length + 1 if found is None else found.size
        if sock.reuseport is None or size > packet.length:
            return None
        seen = replace(packet, offset=packet.offset + size, length=packet.length - size)
        place = program.run_packet(seen)
        return sock.reuseport.socks[place] if place < len(sock.reuseport.socks) else None

    return select
