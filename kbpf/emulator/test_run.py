"""BPF_PROG_TEST_RUN for socket filters (`bpf_prog_test_run_skb`, net/bpf/test_run.c).

The data begin with an Ethernet header, which is taken off before the program runs: offset 0 is byte 14. The header is
still there for loads relative to it, and all zeroes in the data that come out. The packet's device is loopback.
"""

from __future__ import annotations

import errno
import sys
import time

from kbpf.backend import RawRun
from kbpf.emulator.context import SkBuff
from kbpf.emulator.ethernet import received_protocol
from kbpf.emulator.interpreter import Run
from kbpf.emulator.maps.base import refused
from kbpf.emulator.packet import Packet
from kbpf.emulator.program import Program
from kbpf.uapi.constants import (
    ARPHRD_LOOPBACK,
    ETH_P_IP,
    ETH_P_IPV6,
    PACKET_HOST,
    PACKET_MULTICAST,
    PACKET_OTHERHOST,
)
from kbpf.uapi.structs import STRUCTS

ETH_HLEN = 14
#: A page less what the kernel keeps in it for an sk_buff (x86-64).
MOST_DATA = 3712
_PAGE = 4096
_LOOPBACK = 1
_SHORTEST = {ETH_P_IP: ETH_HLEN + 20, ETH_P_IPV6: ETH_HLEN + 40}

_LAYOUT = STRUCTS["__sk_buff"]
#: What user space may set of the context; the rest must be zero.
_SETTABLE = (
    "mark",
    "priority",
    "ingress_ifindex",
    "ifindex",
    "cb",
    "tstamp",
    "wire_len",
    "gso_segs",
    "gso_size",
    "hwtstamp",
)
#: GSO_LEGACY_MAX_SIZE and GSO_MAX_SEGS (linux/netdevice.h).
_MOST_WIRE, _MOST_SEGMENTS = 65536, 65535


def run(program: Program, data: bytes, context: bytes, repeat: int) -> RawRun:
    """Run as the command does; raises `OSError` with the kernel's errno, and `EmulationFault`."""
    if not ETH_HLEN <= len(data) <= MOST_DATA:
        raise refused(errno.EINVAL)
    fields = _decode(context)
    if fields["ifindex"] > _LOOPBACK:
        raise refused(errno.ENODEV)
    protocol = received_protocol(data)
    if len(data) < _SHORTEST.get(protocol, 0):
        raise refused(errno.EINVAL)
    _check_settable(context, fields, len(data) - ETH_HLEN)
    packet = Packet(
        buffer=bytes(data),
        offset=ETH_HLEN,
        mac=0,
        network=ETH_HLEN,
        protocol=protocol,
        pkt_type=_packet_type(data),
        ifindex=_LOOPBACK,
        hatype=ARPHRD_LOOPBACK,
        ingress_ifindex=fields["ingress_ifindex"],
        mark=fields["mark"],
        priority=fields["priority"],
        gso_segs=fields["gso_segs"],
        gso_size=fields["gso_size"],
    )
    buff = SkBuff(packet)
    cb = _LAYOUT.fields["cb"]
    buff.cb[:] = _padded(context)[cb.offset : cb.offset + len(buff.cb)]
    repeat = max(repeat, 1)
    start = time.perf_counter_ns()
    for _ in range(repeat):
        value = Run(program, program.code, packet, packet.data, context=buff).execute()
    duration = (time.perf_counter_ns() - start) // repeat
    return RawRun(value, bytes(ETH_HLEN) + data[ETH_HLEN:], _encode(fields, buff) if context else b"", duration)


def _padded(context: bytes) -> bytes:
    return context[: _LAYOUT.size].ljust(_LAYOUT.size, b"\0")


def _decode(context: bytes) -> dict[str, int]:
    if len(context) > _PAGE or any(context[_LAYOUT.size :]):
        raise refused(errno.E2BIG)
    padded = _padded(context)
    return {
        name: int.from_bytes(padded[field.offset : field.offset + field.size], sys.byteorder)
        for name, field in _LAYOUT.fields.items()
    }


def _check_settable(context: bytes, fields: dict[str, int], length: int) -> None:
    rest = bytearray(_padded(context))
    for name in _SETTABLE:
        field = _LAYOUT.fields[name]
        rest[field.offset : field.offset + field.size * field.count] = bytes(field.size * field.count)
    if any(rest):
        raise refused(errno.EINVAL)
    if fields["wire_len"] and not length <= fields["wire_len"] <= _MOST_WIRE:
        raise refused(errno.EINVAL)
    if not fields["wire_len"]:
        fields["wire_len"] = length
    if fields["gso_segs"] > _MOST_SEGMENTS:
        raise refused(errno.EINVAL)


def _packet_type(data: bytes) -> int:
    """PACKET_HOST for the loopback device's own address, which is all zeroes, as its broadcast address is."""
    if data[0] & 1:
        return PACKET_MULTICAST
    return PACKET_OTHERHOST if any(data[:6]) else PACKET_HOST


def _encode(fields: dict[str, int], buff: SkBuff) -> bytes:
    out = bytearray(_LAYOUT.size)
    for name in _SETTABLE:
        field = _LAYOUT.fields[name]
        value = _LOOPBACK if name == "ifindex" else fields[name]
        out[field.offset : field.offset + field.size] = value.to_bytes(field.size, sys.byteorder)
    cb = _LAYOUT.fields["cb"]
    out[cb.offset : cb.offset + len(buff.cb)] = buff.cb
    return bytes(out)
