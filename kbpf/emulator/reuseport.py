"""Programs that choose among sockets that share a port: SO_ATTACH_REUSEPORT_CBPF and _EBPF (Linux 4.5).

A socket filter sees what follows the transport header, and returns the socket's place in the group; for a place that is
not there, the flow's hash decides (net/core/sock_reuseport.c). An sk_reuseport program (4.19) sees the transport header
too, chooses a socket with a helper, and lets the packet pass or not.
"""

from __future__ import annotations

from dataclasses import replace
from socket import IPPROTO_UDP

from kbpf.emulator import headers
from kbpf.emulator.packet import Packet
from kbpf.emulator.program import Program
from kbpf.emulator.sk_reuseport import ReuseportContext
from kbpf.emulator.slot import Runnable
from kbpf.emulator.sock import Sock
from kbpf.emulator.socket_table import GroupRefusesError, Selector

#: The only value of an sk_reuseport program that lets a packet pass.
_SK_PASS = 1


def selector_of(program: Runnable | Program) -> Selector:
    """What asks a socket filter, classic or not, for the place, or an sk_reuseport program for a socket."""
    if isinstance(program, Program) and program.type == "sk_reuseport":
        return _chooser(program)

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


def _chooser(program: Program) -> Selector:
    def select(sock: Sock, packet: Packet, hash: int) -> Sock | None:
        seen = replace(packet)
        context = ReuseportContext(sock, seen, hash, bind_inany=not any(sock.local))
        if program.execute(seen, seen.data, context) != _SK_PASS:
            raise GroupRefusesError
        return context.selected

    return select
