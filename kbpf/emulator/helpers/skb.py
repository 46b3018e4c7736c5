"""Helpers over a socket buffer's metadata: its hash, its socket, its control group."""

from __future__ import annotations

import errno

from kbpf.emulator.environment import environment
from kbpf.emulator.ethernet import HEADER, VLAN_PROTOCOLS
from kbpf.emulator.helpers.packet import check_context, overwrite
from kbpf.emulator.helpers.sock import ancestor_cgroup_id, cgroup_id
from kbpf.emulator.interpreter import HelperFunction, Run
from kbpf.emulator.memory import M32
from kbpf.emulator.packet import Packet
from kbpf.emulator.xfrm import SIZE as XFRM_SIZE
from kbpf.uapi.constants import (
    BPF_SKB_CLOCK_MONOTONIC,
    BPF_SKB_CLOCK_REALTIME,
    BPF_SKB_CLOCK_TAI,
    ETH_P_IP,
    ETH_P_IPV6,
)

_CONGESTION = 3
_CLOCKS = (BPF_SKB_CLOCK_REALTIME, BPF_SKB_CLOCK_MONOTONIC, BPF_SKB_CLOCK_TAI)
#: Whose a packet without a socket is (kernel.overflowuid).
_NOBODY = 65534


def get_hash_recalc(run: Run, skb: int, *_: int) -> int:
    check_context(skb)
    packet = run.packet
    if not packet.hash_known:
        packet.hash, packet.hash_known = environment.flow_hash(packet.data) & M32, True
    return packet.hash


def set_hash_invalid(run: Run, skb: int, *_: int) -> int:
    check_context(skb)
    run.packet.hash, run.packet.hash_known = 0, False
    return 0


def set_hash(run: Run, skb: int, value: int, *_: int) -> int:
    check_context(skb)
    run.packet.hash, run.packet.hash_known = value & M32, True
    return 0


def _network_protocol(packet: Packet) -> int:
    """The protocol behind VLAN tags in the bytes; 0 if one is cut off."""
    protocol, at, data = packet.protocol, HEADER, packet.data
    while protocol in VLAN_PROTOCOLS:
        if len(data) < at + 4:
            return 0
        protocol, at = int.from_bytes(data[at + 2 : at + 4], "big"), at + 4
    return protocol


def skb_ecn_set_ce(run: Run, skb: int, *_: int) -> int:
    """Mark congestion experienced in the IP header (RFC 3168), where the sender takes part; 1 if it is marked."""
    check_context(skb)
    packet = run.packet
    at = (packet.network or 0) - packet.offset
    data, protocol = packet.data[at:], _network_protocol(packet)
    if protocol == ETH_P_IP and len(data) >= 20:
        seen = data[1] & _CONGESTION
        if seen in (0, _CONGESTION):
            return int(seen == _CONGESTION)
        total = int.from_bytes(data[10:12], "big") + 0xFFFB + (seen + 1 & _CONGESTION)
        overwrite(run, at + 1, bytes([data[1] | _CONGESTION]))
        overwrite(run, at + 10, ((total & 0xFFFF) + (total >> 16)).to_bytes(2, "big"))
        return 1
    if protocol == ETH_P_IPV6 and len(data) >= 40:
        if not data[1] >> 4 & _CONGESTION:
            return 0
        marked = bytes([data[1] | _CONGESTION << 4])
        packet.sum_out(data[:4])
        packet.sum_in(data[:1] + marked + data[2:4])
        overwrite(run, at + 1, marked)
        return 1
    return 0


def skb_set_tstamp(run: Run, skb: int, stamp: int, kind: int, *_: int) -> int:
    """Set the time of delivery and its clock, of which only CLOCK_REALTIME may stand at 0."""
    check_context(skb)
    packet, kind = run.packet, kind & M32
    if packet.protocol not in (ETH_P_IP, ETH_P_IPV6):
        return -errno.EOPNOTSUPP
    if kind not in _CLOCKS or (kind != BPF_SKB_CLOCK_REALTIME and not stamp):
        return -errno.EINVAL
    packet.tstamp, packet.tstamp_type = stamp, kind
    return 0


def skb_get_xfrm_state(run: Run, skb: int, index: int, to: int, size: int, flags: int) -> int:
    check_context(skb)
    index, size = index & M32, size & M32
    run.check_writable(to, size)
    if flags or index >= len(environment.xfrm_states) or size != XFRM_SIZE:
        run.write(to, bytes(size))
        return -errno.EINVAL
    run.write(to, environment.xfrm_states[index].packed())
    return 0


def _of_packet(name: str) -> HelperFunction:
    """A helper that gives what the environment says of the packet."""

    def helper(run: Run, skb: int, *_: int) -> int:
        check_context(skb)
        return int(getattr(environment, name))

    return helper


def get_socket_cookie(run: Run, skb: int, *_: int) -> int:
    check_context(skb)
    sock = run.packet.socket
    return 0 if sock is None else sock.cookie


def get_socket_uid(run: Run, skb: int, *_: int) -> int:
    check_context(skb)
    sock = run.packet.socket
    return sock.uid if sock is not None and sock.full else _NOBODY


def skb_cgroup_id(run: Run, skb: int, *_: int) -> int:
    check_context(skb)
    return cgroup_id(run.packet.socket)


def skb_ancestor_cgroup_id(run: Run, skb: int, level: int, *_: int) -> int:
    check_context(skb)
    return ancestor_cgroup_id(run.packet.socket, level)


HELPERS: dict[str, HelperFunction] = {
    "get_hash_recalc": get_hash_recalc,
    "set_hash_invalid": set_hash_invalid,
    "set_hash": set_hash,
    "skb_ecn_set_ce": skb_ecn_set_ce,
    "skb_set_tstamp": skb_set_tstamp,
    "skb_get_xfrm_state": skb_get_xfrm_state,
    "get_socket_cookie": get_socket_cookie,
    "get_socket_uid": get_socket_uid,
    "get_cgroup_classid": _of_packet("cgroup_classid"),
    "skb_cgroup_classid": _of_packet("cgroup_classid"),
    "skb_cgroup_id": skb_cgroup_id,
    "skb_ancestor_cgroup_id": skb_ancestor_cgroup_id,
    "get_route_realm": _of_packet("route_realm"),
}
