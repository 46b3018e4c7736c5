"""ICMP and ICMPv6 of the emulated network: a port that nobody has, and echo (net/ipv4/icmp.c, net/ipv6/icmp.c)."""

from __future__ import annotations

import errno
import struct

from kbpf.emulator import headers
from kbpf.emulator.headers import IPPROTO_ICMP, IPPROTO_ICMPV6, IPPROTO_UDP, IpHeader
from kbpf.emulator.inet import Inet, Sending
from kbpf.emulator.interface import EmulatedInterface
from kbpf.emulator.packet import Packet

# (type, code) by IP version.
_PORT_UNREACHABLE = {4: (3, 3), 6: (1, 4)}
ECHO, ECHO_REPLY = {4: 8, 6: 128}, {4: 0, 6: 129}
#: How much of the packet that it is about an error may carry: 576 and 1280 bytes in all, less the headers.
_QUOTED = {4: 576 - 28, 6: 1280 - 48}
#: RT_TOS of errors: they come before data (IPTOS_PREC_INTERNETCONTROL).
_ERROR_TOS = {4: 0xC0, 6: 0}
_PROTOCOL = {4: IPPROTO_ICMP, 6: IPPROTO_ICMPV6}


def install(inet: Inet) -> None:
    """Take what comes for ICMP and ICMPv6."""
    for protocol in (IPPROTO_ICMP, IPPROTO_ICMPV6):
        inet.transports[protocol] = lambda device, packet, header: _receive(inet, device, packet, header)


def port_unreachable(inet: Inet, packet: Packet, header: IpHeader) -> None:
    """Tell the sender of a packet, offset 0 its transport header, that nobody is there (`icmp_send`)."""
    if inet.is_broadcast(header.target) or not any(header.source):
        return
    quoted = bytes(packet.buffer[packet.offset - header.start :])[: _QUOTED[header.version]]
    _send(
        inet,
        header.target,
        header.source,
        _PORT_UNREACHABLE[header.version],
        bytes(4) + quoted,
        _ERROR_TOS[header.version],
    )


def _send(inet: Inet, source: bytes, target: bytes, kind: tuple[int, int], rest: bytes, tos: int = 0) -> None:
    version = 4 if len(target) == 4 else 6
    message = bytes((*kind, 0, 0)) + rest
    seed = headers.pseudo_sum(source, target, IPPROTO_ICMPV6, len(message)) if version == 6 else 0
    message = headers.with_checksum(message, _PROTOCOL[version], headers.ones_sum(message, seed) ^ 0xFFFF)
    try:
        inet.send(inet.path(target), source, target, _PROTOCOL[version], message, Sending(tos=tos, dont_fragment=False))
    except OSError:
        # There is no way back.
        return


def _receive(inet: Inet, device: EmulatedInterface, packet: Packet, header: IpHeader) -> None:
    data = packet.data
    if len(data) < 8 or header.protocol != _PROTOCOL[header.version] or not inet.checksum_good(packet, header):
        return
    if data[0] == ECHO[header.version]:
        if not inet.is_broadcast(header.target):
            _send(inet, header.target, header.source, (ECHO_REPLY[header.version], 0), data[4:])
    elif data[0] == ECHO_REPLY[header.version]:
        for socket in reversed(tuple(inet.pings)):
            hears = socket()
            if hears is not None and hears(device, packet, header):
                break
    elif (data[0], data[1]) == _PORT_UNREACHABLE[header.version]:
        _refused(inet, data[8:])


def _refused(inet: Inet, quoted: bytes) -> None:
    """Whoever sent the quoted packet learns of it."""
    version = quoted[0] >> 4 if quoted else 0
    size = headers.IPV6_SIZE if version == 6 else (quoted[0] & 15) * 4 if version == 4 else 0
    at = {4: 12, 6: 8}.get(version, 0)
    if not at or len(quoted) < size + 4 or quoted[9 if version == 4 else 6] != IPPROTO_UDP:
        return
    width = 4 if version == 4 else 16
    source, target = quoted[at : at + width], quoted[at + width : at + 2 * width]
    source_port, target_port = struct.unpack_from("!HH", quoted, size)
    inet.network.udp.refused(source, source_port, target, target_port, errno.ECONNREFUSED)
