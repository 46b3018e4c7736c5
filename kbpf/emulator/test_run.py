"""BPF_PROG_TEST_RUN for programs over socket buffers (`bpf_prog_test_run_skb`, net/bpf/test_run.c).

The data begin with an Ethernet header, which is taken off before the program runs, except for traffic control: offset 0
is byte 14. The header is still there for loads relative to it, and all zeroes in the data that come out. The packet's
device is loopback. Repeated runs are over the same packet, as the last one left it.
"""

from __future__ import annotations

import errno
import socket
import sys
import time
from collections.abc import Callable

from kbpf.emulator.context import SkBuff
from kbpf.emulator.environment import environment
from kbpf.emulator.ethernet import received_protocol
from kbpf.emulator.internet_checksum import fold16, partial
from kbpf.emulator.maps.base import refused
from kbpf.emulator.packet import Packet
from kbpf.emulator.program import Program
from kbpf.emulator.sock import Sock
from kbpf.runs import RawRun, RunOptions
from kbpf.uapi.constants import (
    ARPHRD_LOOPBACK,
    BPF_F_TEST_SKB_CHECKSUM_COMPLETE,
    ETH_P_IP,
    ETH_P_IPV6,
    PACKET_HOST,
    PACKET_MULTICAST,
    PACKET_OTHERHOST,
)
from kbpf.uapi.structs import STRUCTS, Struct

ETH_HLEN = 14
#: A page less what the kernel keeps in it for an sk_buff (x86-64).
MOST_DATA = 3712
_PAGE = 4096
_FROM_LINK_HEADER = ("sched_cls", "sched_act")
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


def run(program: Program, data: bytes, context: bytes, options: RunOptions) -> RawRun:
    """Run as the command does; raises `OSError` with the kernel's errno, and `EmulationFault`.

    With BPF_F_TEST_SKB_CHECKSUM_COMPLETE the network card has summed the packet up, and EBADMSG says that the program
    has changed it without telling.
    """
    if options.flags & ~BPF_F_TEST_SKB_CHECKSUM_COMPLETE or options.cpu or options.batch_size:
        raise refused(errno.EINVAL)
    if not ETH_HLEN <= len(data) <= MOST_DATA:
        raise refused(errno.EINVAL)
    fields = decode(context, _LAYOUT)
    if fields["ifindex"] > _LOOPBACK:
        raise refused(errno.ENODEV)
    protocol = received_protocol(data)
    if len(data) < _SHORTEST.get(protocol, 0):
        raise refused(errno.EINVAL)
    with_header = program.type in _FROM_LINK_HEADER
    _check_settable(context, fields, len(data) - (0 if with_header else ETH_HLEN))
    packet = Packet(
        buffer=bytes(data),
        offset=0 if with_header else ETH_HLEN,
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
        tstamp=fields["tstamp"],
        hwtstamp=fields["hwtstamp"],
        wire_len=fields["wire_len"],
        socket=_socket(data, protocol),
    )
    buff = SkBuff(packet, program.type)
    cb = _LAYOUT.fields["cb"]
    buff.cb[:] = padded(context, _LAYOUT)[cb.offset : cb.offset + len(buff.cb)]
    summed = bool(options.flags & BPF_F_TEST_SKB_CHECKSUM_COMPLETE)
    if summed:
        packet.csum, packet.csum_complete = partial(data[ETH_HLEN:], 0), True
    value, duration = timed(options.repeat, lambda: program.execute(packet, packet.data, buff))
    if summed and fold16(packet.csum) != fold16(partial(bytes(packet.buffer[packet.network :]), 0)):
        raise refused(errno.EBADMSG)
    out = packet.data
    if not with_header:
        out = bytes(ETH_HLEN) + out
    return RawRun(value, out, _encode(fields, buff) if context else b"", duration)


def _socket(data: bytes, protocol: int) -> Sock:
    """The dummy socket of the packet, which has sent it, but no ports; it is made by the process that runs it."""
    sock = Sock(family=socket.AF_UNSPEC, cgroup_id=environment.cgroup_id, cgroup_ancestors=environment.cgroup_ancestors)
    if protocol == ETH_P_IP:
        sock.family, sock.local, sock.remote = socket.AF_INET, data[26:30], data[30:34]
    elif protocol == ETH_P_IPV6:
        sock.family, sock.local, sock.remote = socket.AF_INET6, data[22:38], data[38:54]
    return sock


def timed(repeat: int, once: Callable[[], int]) -> tuple[int, int]:
    """The last return value, and the mean of nanoseconds."""
    repeat = max(repeat, 1)
    start = time.perf_counter_ns()
    for _ in range(repeat):
        value = once()
    return value, (time.perf_counter_ns() - start) // repeat


def padded(context: bytes, layout: Struct) -> bytes:
    return context[: layout.size].ljust(layout.size, b"\0")


def decode(context: bytes, layout: Struct) -> dict[str, int]:
    """A context's fields, of arrays the first element; E2BIG where more than the structure is not zero."""
    if len(context) > _PAGE or any(context[layout.size :]):
        raise refused(errno.E2BIG)
    whole = padded(context, layout)
    return {
        name: int.from_bytes(whole[field.offset : field.offset + field.size], sys.byteorder)
        for name, field in layout.fields.items()
    }


def _check_settable(context: bytes, fields: dict[str, int], length: int) -> None:
    rest = bytearray(padded(context, _LAYOUT))
    for name in _SETTABLE:
        field = _LAYOUT.fields[name]
        rest[field.offset : field.offset + field.size * field.count] = bytes(field.size * field.count)
    if any(rest):
        raise refused(errno.EINVAL)
    if fields["wire_len"] and not length <= fields["wire_len"] <= _MOST_WIRE:
        raise refused(errno.EINVAL)
    if context and not fields["wire_len"]:
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
        # The size of segments is not given back, but left as it came in.
        value = fields[name] if name in ("cb", "gso_size") else getattr(buff.packet, name)
        out[field.offset : field.offset + field.size] = value.to_bytes(field.size, sys.byteorder)
    cb = _LAYOUT.fields["cb"]
    out[cb.offset : cb.offset + len(buff.cb)] = buff.cb
    return bytes(out)
