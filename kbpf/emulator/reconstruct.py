"""The packet that a filter would have seen, from what a socket of the operating system gave.

Exact for UNIX, netlink and packet sockets, and for raw IPv4 but for the link header. UDP, ping and raw IPv6 sockets
give the payload only: their IP and UDP headers are made again from the addresses, the time to live, the traffic
class and the interface, which the kernel tells beside it. What it does not tell is made up: identification and
fragment fields are 0, there are no options or extension headers, the UDP checksum is 0, and the link header's
addresses are zeros. Metadata that user space cannot see (mark, hash, queue) is 0.
"""

from __future__ import annotations

import ipaddress
import socket as sockets
import struct
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from kbpf.emulator import ethernet
from kbpf.emulator.packet import Packet
from kbpf.uapi.constants import PACKET_AUXDATA, SOL_PACKET

#: As recvmsg gives them: (level, type, data).
Ancillary: TypeAlias = "Sequence[tuple[int, int, bytes]]"

# Linux's numbers that Python does not have, or not before 3.12 (linux/in.h, linux/in6.h).
SOL_IP, SOL_IPV6 = 0, 41
IP_TOS, IP_TTL, IP_PKTINFO, IP_RECVTTL, IP_RECVTOS = 1, 2, 8, 12, 13
IPV6_FLOWINFO, IPV6_RECVPKTINFO, IPV6_PKTINFO, IPV6_RECVHOPLIMIT, IPV6_HOPLIMIT = 11, 49, 50, 51, 52
_AUXDATA = struct.Struct("=IIIHHHH")
_TP_STATUS_VLAN_VALID = 0x10
_NLM_F_MULTI = 2


class Kind(NamedTuple):
    """What a socket is, as far as that decides what its filter sees."""

    family: int
    type: int
    protocol: int

    @property
    def udp(self) -> bool:
        """Not a raw socket for UDP, which is given the UDP header."""
        inet = self.family in (sockets.AF_INET, sockets.AF_INET6)
        return inet and self.type == sockets.SOCK_DGRAM and self.protocol == sockets.IPPROTO_UDP


#: Socket options that have the kernel tell what the payload does not, and what it then tells: (level, option, type).
WANTED: dict[int, tuple[tuple[int, int, int], ...]] = {
    sockets.AF_INET: (
        (SOL_IP, IP_PKTINFO, IP_PKTINFO),
        (SOL_IP, IP_RECVTTL, IP_TTL),
        (SOL_IP, IP_RECVTOS, IP_TOS),
    ),
    sockets.AF_INET6: (
        (SOL_IPV6, IPV6_RECVPKTINFO, IPV6_PKTINFO),
        (SOL_IPV6, IPV6_RECVHOPLIMIT, IPV6_HOPLIMIT),
        (SOL_IPV6, IPV6_FLOWINFO, IPV6_FLOWINFO),
        # For the IPv4 packets that such a socket gets too.
        (SOL_IP, IP_RECVTTL, IP_TTL),
        (SOL_IP, IP_RECVTOS, IP_TOS),
    ),
    17: ((SOL_PACKET, PACKET_AUXDATA, PACKET_AUXDATA),),
}


def packet_of(kind: Kind, data: bytes, ancillary: Ancillary, address: Any, local: Any) -> Packet:
    """The packet for a filter on a socket of this kind; `local` is the socket's own address."""
    if kind.family == sockets.AF_UNIX:
        return Packet(buffer=data, network=0)
    if kind.family == 16:
        return Packet(buffer=data, network=0, mac=0 if _is_dump(data, address) else None)
    told = {(level, number): value for level, number, value in ancillary}
    if kind.family == 17:
        return _link_packet(kind, data, told, address)
    return _ip_packet(kind, data, told, address, local)


def _is_dump(data: bytes, address: Any) -> bool:
    """A kernel's dump, the only netlink data whose link header's position is set (to the start)."""
    return (
        isinstance(address, tuple)
        and tuple(address) == (0, 0)
        and len(data) >= 16
        and bool(struct.unpack_from("=H", data, 6)[0] & _NLM_F_MULTI)
    )


def _link_packet(kind: Kind, data: bytes, told: dict[tuple[int, int], bytes], address: Any) -> Packet:
    name, protocol, pkt_type, hatype, source = address
    status, length, _, _, network, tci, tpid = _AUXDATA.unpack(
        told.get((SOL_PACKET, PACKET_AUXDATA), bytes(_AUXDATA.size))
    )
    header = b""
    if kind.type == sockets.SOCK_DGRAM:
        if hatype in (ethernet.ARPHRD_ETHER, ethernet.ARPHRD_LOOPBACK):
            header = bytes(6) + bytes(source[:6]).ljust(6, b"\0") + protocol.to_bytes(2, "big")
        network = 0
        if pkt_type == ethernet.PACKET_OUTGOING and status & _TP_STATUS_VLAN_VALID:
            # Linux tells of a tag that is in the bytes as if it were in the metadata; the filter saw neither.
            status, protocol = 0, tpid
    index = _index(name)
    return Packet(
        buffer=header + data,
        offset=len(header),
        mac=0,
        network=len(header) + network,
        length=max(length, len(data)),
        protocol=protocol,
        pkt_type=pkt_type,
        ifindex=index,
        hatype=hatype,
        ingress_ifindex=0 if pkt_type == ethernet.PACKET_OUTGOING else index,
        vlan_tci=tci if status & _TP_STATUS_VLAN_VALID else None,
        vlan_proto=tpid or ethernet.ETH_P_8021Q,
    )


def _ip_packet(kind: Kind, data: bytes, told: dict[tuple[int, int], bytes], address: Any, local: Any) -> Packet:
    ifindex, target = 0, local[0]
    if (SOL_IP, IP_PKTINFO) in told:
        ifindex, _, destination = struct.unpack("=i4s4s", told[SOL_IP, IP_PKTINFO])
        target = ipaddress.IPv4Address(destination)
    elif (SOL_IPV6, IPV6_PKTINFO) in told:
        destination, ifindex = struct.unpack("=16si", told[SOL_IPV6, IPV6_PKTINFO])
        target = ipaddress.IPv6Address(destination)
    source, target = _unmapped(address[0]), _unmapped(target)
    ports = (address[1], local[1]) if kind.udp else None
    if source.version == 4:
        protocol = ethernet.ETH_P_IP
        ip = b""
        if kind.family == sockets.AF_INET6 or kind.type != sockets.SOCK_RAW:
            ttl = _number(told.get((SOL_IP, IP_TTL)), 64)
            tos = _number(told.get((SOL_IP, IP_TOS)), 0)
            ip = _ipv4_header(source.packed, target.packed, kind.protocol, len(data) + (8 if ports else 0), ttl, tos)
        at_network = kind.type == sockets.SOCK_RAW and kind.family == sockets.AF_INET
    else:
        protocol = ethernet.ETH_P_IPV6
        hops = _number(told.get((SOL_IPV6, IPV6_HOPLIMIT)), 64)
        flow = int.from_bytes(told.get((SOL_IPV6, IPV6_FLOWINFO), b""), "big")
        size = len(data) + (8 if ports else 0)
        ip = struct.pack("!IHBB", 6 << 28 | flow, size, kind.protocol, hops) + source.packed + target.packed
        at_network = False
    udp = struct.pack("!HHHH", *ports, len(data) + 8, 0) if ports else b""
    link = bytes(12) + protocol.to_bytes(2, "big")
    return Packet(
        buffer=link + ip + udp + data,
        offset=len(link) + (0 if at_network else len(ip)),
        mac=0,
        network=len(link),
        protocol=protocol,
        pkt_type=ethernet.PACKET_MULTICAST if target.is_multicast else ethernet.PACKET_HOST,
        ifindex=ifindex or None,
        ingress_ifindex=ifindex,
        hatype=_hatype(ifindex),
    )


def _ipv4_header(source: bytes, target: bytes, protocol: int, size: int, ttl: int, tos: int) -> bytes:
    head = struct.pack("!BBHHHBBH4s4s", 0x45, tos, 20 + size, 0, 0, ttl, protocol, 0, source, target)
    total = sum(struct.unpack("!10H", head))
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return head[:10] + struct.pack("!H", ~total & 0xFFFF) + head[12:]


def _unmapped(address: Any) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """An address, with IPv4 in IPv6's clothes undressed and the scope taken off."""
    parsed = ipaddress.ip_address(address.partition("%")[0] if isinstance(address, str) else address)
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        return parsed.ipv4_mapped
    return parsed


def _number(value: bytes | None, otherwise: int) -> int:
    return otherwise if value is None else int.from_bytes(value[:1], "little")


def _index(name: str) -> int:
    try:
        return sockets.if_nametoindex(name)
    except OSError:  # The interface has gone since.
        return 0


@lru_cache(maxsize=64)
def _hatype(index: int) -> int:
    """ARPHRD_* of a device of the operating system."""
    try:
        return int(Path("/sys/class/net", sockets.if_indextoname(index), "type").read_text(encoding="ascii"))
    except OSError:
        return ethernet.ARPHRD_LOOPBACK if index == 1 else ethernet.ARPHRD_ETHER
