"""Header fields by where they lie: what a load at an offset is called in words."""

from __future__ import annotations

from collections.abc import Mapping

#: (offset in the header, size in bytes) -> name.
Fields = Mapping[tuple[int, int], str]

ETHERNET: Fields = {
    (0, 4): "first four bytes of the destination address",
    (0, 1): "first byte of the destination address",
    (4, 2): "last two bytes of the destination address",
    (2, 4): "last four bytes of the destination address",
    (0, 2): "first two bytes of the destination address",
    (6, 4): "first four bytes of the source address",
    (6, 2): "first two bytes of the source address",
    (8, 4): "last four bytes of the source address",
    (10, 2): "last two bytes of the source address",
    (12, 2): "type",
}
IPV4: Fields = {
    (0, 1): "version and header length",
    (1, 1): "type of service",
    (2, 2): "total length",
    (4, 2): "identification",
    (6, 2): "flags and fragment offset",
    (8, 1): "time to live",
    (9, 1): "protocol",
    (10, 2): "checksum",
    (12, 4): "source address",
    (16, 4): "destination address",
}
IPV6: Fields = {
    (0, 1): "version",
    (0, 4): "version, class and flow label",
    (4, 2): "payload length",
    (6, 1): "next header",
    (7, 1): "hop limit",
    **{(8 + 4 * word, 4): f"source address, word {word}" for word in range(4)},
    **{(24 + 4 * word, 4): f"destination address, word {word}" for word in range(4)},
    (40, 1): "next header of the fragment header",
}
ARP: Fields = {
    (0, 2): "hardware type",
    (2, 2): "protocol type",
    (6, 2): "operation",
    (14, 4): "sender's address",
    (24, 4): "target's address",
}
PORTS: Fields = {(0, 2): "source port", (2, 2): "destination port", (0, 4): "both ports"}
TCP: Fields = {
    **PORTS,
    (4, 4): "sequence number",
    (8, 4): "acknowledgement number",
    (12, 1): "data offset",
    (13, 1): "flags",
    (14, 2): "window",
    (16, 2): "checksum",
}
UDP: Fields = {**PORTS, (4, 2): "length", (6, 2): "checksum"}
ICMP: Fields = {(0, 1): "type", (1, 1): "code", (2, 2): "checksum"}

#: IP protocol number -> (name of the header, its fields).
TRANSPORTS: dict[int, tuple[str, Fields]] = {
    1: ("icmp", ICMP),
    6: ("tcp", TCP),
    17: ("udp", UDP),
    58: ("icmp6", ICMP),
    132: ("sctp", PORTS),
}
#: EtherType -> (name of the header, its fields).
NETWORKS: dict[int, tuple[str, Fields]] = {
    0x0800: ("ip", IPV4),
    0x86DD: ("ip6", IPV6),
    0x0806: ("arp", ARP),
    0x8035: ("rarp", ARP),
}
#: What the numbers of types mean.
ETHERTYPES = {
    0x0800: "IPv4",
    0x0806: "ARP",
    0x8035: "RARP",
    0x86DD: "IPv6",
    0x8100: "802.1Q VLAN",
    0x88A8: "802.1ad VLAN",
    0x9100: "QinQ VLAN",
    0x8847: "MPLS",
    0x8848: "MPLS multicast",
    0x8863: "PPPoE discovery",
    0x8864: "PPPoE session",
}
PROTOCOLS = {
    0: "hop-by-hop options",
    1: "ICMP",
    2: "IGMP",
    6: "TCP",
    17: "UDP",
    43: "routing header",
    44: "fragment header",
    47: "GRE",
    50: "ESP",
    51: "AH",
    58: "ICMPv6",
    60: "destination options",
    89: "OSPF",
    103: "PIM",
    112: "VRRP",
    132: "SCTP",
}
TCP_FLAGS = ("FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR")
PACKET_TYPES = ("to this host", "broadcast", "multicast", "to another host", "outgoing")
