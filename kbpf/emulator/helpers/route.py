"""Helpers that ask where a packet would go: bpf_fib_lookup (Linux 4.18) and bpf_check_mtu (5.12).

The answers come from the emulated network's devices and routes, and from the environment's neighbours.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import sys
from typing import TYPE_CHECKING

from kbpf.emulator import network
from kbpf.emulator.environment import environment
from kbpf.emulator.helpers.packet import check_context
from kbpf.emulator.interface import EmulatedInterface
from kbpf.emulator.interpreter import HelperFunction, Run
from kbpf.emulator.memory import M32, M64
from kbpf.emulator.routes import RT_TABLE_MAIN, Route, find
from kbpf.emulator.xdp import XdpBuff
from kbpf.uapi import constants as uapi
from kbpf.uapi.structs import STRUCTS

if TYPE_CHECKING:
    from kbpf.emulator.network import Network

_LAYOUT = STRUCTS["bpf_fib_lookup"]
_FLAGS = (
    uapi.BPF_FIB_LOOKUP_DIRECT
    | uapi.BPF_FIB_LOOKUP_OUTPUT
    | uapi.BPF_FIB_LOOKUP_SKIP_NEIGH
    | uapi.BPF_FIB_LOOKUP_TBID
    | uapi.BPF_FIB_LOOKUP_SRC
    | uapi.BPF_FIB_LOOKUP_MARK
)
_RESULTS = {
    "blackhole": uapi.BPF_FIB_LKUP_RET_BLACKHOLE,
    "unreachable": uapi.BPF_FIB_LKUP_RET_UNREACHABLE,
    "prohibit": uapi.BPF_FIB_LKUP_RET_PROHIBIT,
}


class _Question:
    """The program's ``struct bpf_fib_lookup``, which takes the answer."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)

    def get(self, name: str) -> int:
        field = _LAYOUT.fields[name]
        return int.from_bytes(self.data[field.offset : field.offset + field.size], sys.byteorder)

    def put(self, name: str, value: int) -> None:
        field = _LAYOUT.fields[name]
        self.data[field.offset : field.offset + field.size] = value.to_bytes(field.size, sys.byteorder)

    def raw(self, name: str) -> bytes:
        field = _LAYOUT.fields[name]
        return bytes(self.data[field.offset : field.offset + field.size * field.count])

    def put_raw(self, name: str, value: bytes) -> None:
        offset = _LAYOUT.fields[name].offset
        self.data[offset : offset + len(value)] = value

    @property
    def version(self) -> str:
        return "ipv4" if self.get("family") == socket.AF_INET else "ipv6"


def fib_lookup(run: Run, context: int, address: int, size: int, flags: int, _: int) -> int:
    check_context(context)
    size = size & M32
    if size < _LAYOUT.size or size >> 31 or flags & M32 & ~_FLAGS:
        return -errno.EINVAL
    run.check_writable(address, _LAYOUT.size)
    question = _Question(run.read(address, _LAYOUT.size))
    if question.get("family") not in (socket.AF_INET, socket.AF_INET6):
        return -errno.EAFNOSUPPORT
    given_length = question.get("tot_len")
    check_mtu = isinstance(run.context, XdpBuff) or given_length != 0
    on = _network(run)
    result = _look_up(on, question, flags, check_mtu)
    if not result and not check_mtu:
        device = on.by_index(question.get("ifindex"))
        assert device is not None
        if not _forwardable(run, device):
            result = uapi.BPF_FIB_LKUP_RET_FRAG_NEEDED
        question.put("mtu_result", device.mtu & 0xFFFF)
    run.write(address, bytes(question.data))
    return result


def _network(run: Run) -> Network:
    """The one that the packet is on; test runs are on the current one."""
    device = run.packet.device
    return device.network if device is not None and device.network is not None else network.current()


def _forwardable(run: Run, device: EmulatedInterface) -> bool:
    """With room for a VLAN tag (`is_skb_forwardable`)."""
    return bool(run.packet.gso_size) or run.packet.length <= device.mtu + device.header + 4


def _look_up(on: Network, question: _Question, flags: int, check_mtu: bool) -> int:
    version = question.version
    destination = ipaddress.ip_address(question.raw(f"{version}_dst"))
    source = ipaddress.ip_address(question.raw(f"{version}_src"))
    if version == "ipv6" and any(a.is_link_local or a.is_multicast or a.is_loopback for a in (destination, source)):
        return uapi.BPF_FIB_LKUP_RET_NOT_FWDED
    index = question.get("ifindex")
    device = on.by_index(index)
    if device is None:
        return -errno.ENODEV
    if not (device.forwards if version == "ipv4" else device.forwards6):
        return uapi.BPF_FIB_LKUP_RET_FWD_DISABLED
    table = None
    if flags & uapi.BPF_FIB_LOOKUP_DIRECT:
        table = RT_TABLE_MAIN
        if flags & uapi.BPF_FIB_LOOKUP_TBID:
            table = question.get("tbid")
            question.put("tbid", 0)
    output = index if flags & uapi.BPF_FIB_LOOKUP_OUTPUT else None
    route = find(on.inet.routes(), destination, table, output)
    if route is None or route.kind != "unicast":
        return (
            uapi.BPF_FIB_LKUP_RET_NOT_FWDED
            if route is None
            else _RESULTS.get(route.kind, uapi.BPF_FIB_LKUP_RET_NOT_FWDED)
        )
    leaves = on.by_index(route.device)
    if leaves is None:
        return uapi.BPF_FIB_LKUP_RET_NOT_FWDED
    return _answer(question, route, leaves, flags, check_mtu)


def _answer(question: _Question, route: Route, device: EmulatedInterface, flags: int, check_mtu: bool) -> int:
    version = question.version
    mtu = route.mtu or device.mtu
    if check_mtu and question.get("tot_len") > mtu:
        question.put("mtu_result", mtu & 0xFFFF)
        return uapi.BPF_FIB_LKUP_RET_FRAG_NEEDED
    question.put("rt_metric", route.metric)
    question.put("ifindex", route.device)
    if flags & uapi.BPF_FIB_LOOKUP_SRC:
        if route.source is None:
            return uapi.BPF_FIB_LKUP_RET_NO_SRC_ADDR
        question.put_raw(f"{version}_src", ipaddress.ip_address(route.source).packed)
    if route.via is not None:
        hop = ipaddress.ip_address(route.via)
        if hop.version == 6:
            question.put("family", socket.AF_INET6)
        question.put_raw(f"ipv{hop.version}_dst", hop.packed)
        version = f"ipv{hop.version}"
    if not flags & uapi.BPF_FIB_LOOKUP_SKIP_NEIGH:
        neighbour = environment.neighbours.get(str(ipaddress.ip_address(question.raw(f"{version}_dst"))))
        if neighbour is None:
            return uapi.BPF_FIB_LKUP_RET_NO_NEIGH
        question.put_raw("dmac", neighbour)
        question.put_raw("smac", device.address)
    question.put("h_vlan_TCI", 0)
    question.put("h_vlan_proto", 0)
    if check_mtu:
        question.put("mtu_result", mtu & 0xFFFF)
    return uapi.BPF_FIB_LKUP_RET_SUCCESS


def check_mtu(run: Run, context: int, index: int, address: int, difference: int, flags: int) -> int:
    """Whether the packet, or one as long as is given, and longer by `difference`, may leave by a device."""
    check_context(context)
    index, difference = index & M32, (difference & M32 ^ 1 << 31) - (1 << 31)
    given = run.load(address, 4)
    frame = run.context if isinstance(run.context, XdpBuff) else None
    known = 0 if frame else uapi.BPF_MTU_CHK_SEGS
    device = _network(run).by_index(index or (frame.ingress_ifindex if frame else run.packet.ifindex or 0))
    if flags & ~known & M64 or (flags and (difference or given)):
        result = -errno.EINVAL
    elif device is None:
        result = -errno.ENODEV
    else:
        length = given + device.header if given else frame.end - frame.data if frame else run.packet.length
        fits = length + difference <= device.mtu + device.header
        if not fits and not frame and run.packet.gso_size:
            if flags and run.packet.transport is None:
                return -errno.EINVAL
            fits = True
        result = uapi.BPF_MTU_CHK_RET_SUCCESS if fits else uapi.BPF_MTU_CHK_RET_FRAG_NEEDED
    if device is not None and result >= 0:
        run.store(address, 4, device.mtu)
    return result


HELPERS: dict[str, HelperFunction] = {"fib_lookup": fib_lookup, "check_mtu": check_mtu}
