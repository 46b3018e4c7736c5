"""What Linux finds in a frame before any program runs: the protocol, for whom it is, and VLAN tags.

Measured on Linux 6.18; the functions named are the kernel's (net/ethernet/eth.c, net/core/skbuff.c, net/packet).
"""

from __future__ import annotations

from typing import NamedTuple

HEADER = 14
#: ARPHRD_* of devices whose frames have an Ethernet header.
ARPHRD_ETHER, ARPHRD_LOOPBACK = 1, 772
BROADCAST = b"\xff" * 6

ETH_P_802_3, ETH_P_ALL, ETH_P_802_2 = 0x0001, 0x0003, 0x0004
ETH_P_IP, ETH_P_IPV6, ETH_P_8021Q, ETH_P_8021AD = 0x0800, 0x86DD, 0x8100, 0x88A8
VLAN_PROTOCOLS = (ETH_P_8021Q, ETH_P_8021AD)
_ETH_P_802_3_MIN = 0x0600
_TAG = 4

PACKET_HOST, PACKET_BROADCAST, PACKET_MULTICAST, PACKET_OTHERHOST, PACKET_OUTGOING = range(5)


class Tag(NamedTuple):
    """A VLAN tag in the metadata: the tag control information (VLAN id, DEI, priority) and its EtherType."""

    tci: int
    protocol: int = ETH_P_8021Q


def ether_type(frame: bytes) -> int:
    """The two bytes after the addresses, whatever they mean."""
    return int.from_bytes(frame[12:14], "big")


def received_protocol(frame: bytes) -> int:
    """``skb->protocol`` of a received frame (`eth_type_trans`): lengths become ETH_P_802_2 or ETH_P_802_3."""
    number = ether_type(frame)
    if number >= _ETH_P_802_3_MIN:
        return number
    return ETH_P_802_3 if frame[14:16] == b"\xff\xff" else ETH_P_802_2


def packet_type(frame: bytes, address: bytes, broadcast: bytes) -> int:
    """PACKET_HOST, BROADCAST, MULTICAST or OTHERHOST, by the destination and the device's own addresses."""
    target = frame[:6]
    if target == address:
        return PACKET_HOST
    if not target[0] & 1:
        return PACKET_OTHERHOST
    return PACKET_BROADCAST if target == broadcast else PACKET_MULTICAST


def untag(frame: bytes) -> tuple[bytes, Tag | None] | None:
    """Take the outer VLAN tag of a received frame out of its bytes (`skb_vlan_untag`).

    None for a frame that is too short for its tag and the two bytes behind it: the kernel throws it away.
    """
    protocol = ether_type(frame)
    if protocol not in VLAN_PROTOCOLS:
        return frame, None
    if len(frame) < HEADER + _TAG + 2:
        return None
    return frame[:12] + frame[16:], Tag(int.from_bytes(frame[14:16], "big"), protocol)


def behind_tags(frame: bytes) -> tuple[int, int]:
    """Where the network header starts behind in-band tags, and its protocol; (14, 0) if a tag is cut off."""
    position, protocol = HEADER, ether_type(frame)
    while protocol in VLAN_PROTOCOLS:
        if len(frame) < position + _TAG:
            return HEADER, 0
        protocol = int.from_bytes(frame[position + 2 : position + 4], "big")
        position += _TAG
    return position, protocol


def ip_protocol(packet: bytes) -> int:
    """The EtherType of a bare IP packet, by its version; 0 for neither."""
    return {4: ETH_P_IP, 6: ETH_P_IPV6}.get(packet[0] >> 4 if packet else 0, 0)
