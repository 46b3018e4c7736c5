"""What sk_reuseport programs see of a packet and its group, against the kernel's over loopback."""

from __future__ import annotations

import socket
import struct
from typing import Any, NamedTuple

import pytest
from hooks import Recorder, call, direct_bytes, load, on_stack, parts, whole
from hosts import Host, outcome, received, same_on_both
from sides import Side

from kbpf.emulator import events
from kbpf.emulator.packet import Packet
from kbpf.emulator.sock import Sock
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction, ld_imm64
from kbpf.specs import MapSpec, ProgramSpec
from kbpf.testing.network import NetworkNamespace
from kbpf.uapi import constants as uapi
from kbpf.uapi.enums import HELPERS
from kbpf.uapi.structs import STRUCTS

pytestmark = pytest.mark.requires("kernel")

I = Instruction  # noqa: E741
FIELDS = STRUCTS["sk_reuseport_md"].fields
PAYLOAD = b"a datagram's payload"
HEADER = 8
REFUSED, PASSED = 0, 1


def loaded(name: str, offset: int, size: int, *rest: int) -> list[list[Instruction]]:
    """A helper that copies bytes of the packet; what it gives and has written."""
    first = [*on_stack(b"\xee" * 64, -64), *call(name, "context", offset, (10, -64), size, *rest)]
    return [first, *([I(ebpf.LDX | ebpf.MEM | ebpf.DW, 0, 10, at)] for at in range(-64, 0, 8))]


class Seen(NamedTuple):
    """What the kernel's program recorded, and how the datagram was sent."""

    recorded: tuple[int, ...]
    arrived: bool
    local_port: int
    cookie: int


def on_kernel(recorder: Recorder, address: str, family: int) -> Seen:
    with socket.socket(family, socket.SOCK_DGRAM) as end, socket.socket(family, socket.SOCK_DGRAM) as sender:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        end.bind((address, 0))
        end.setsockopt(socket.SOL_SOCKET, uapi.SO_ATTACH_REUSEPORT_EBPF, recorder.fd)
        port = end.getsockname()[1]
        sender.sendto(PAYLOAD, ("127.0.0.1" if family == socket.AF_INET else "::1", port))
        end.settimeout(0.2)
        try:
            arrived = end.recv(100) == PAYLOAD
        except TimeoutError:
            arrived = False
        cookie = struct.unpack("=Q", end.getsockopt(socket.SOL_SOCKET, uapi.SO_COOKIE, 8))[0]
        return Seen(recorder.recorded(), arrived, port, cookie)


@pytest.mark.parametrize(
    ("family", "address", "any"),
    [(socket.AF_INET, "127.0.0.1", False), (socket.AF_INET, "", True), (socket.AF_INET6, "::1", False)],
)
@pytest.mark.parametrize("value", [PASSED, REFUSED])
def test_packets(kernel: Side, emulator: Side, family: int, address: str, any: bool, value: int) -> None:
    narrow = family == socket.AF_INET
    header = 20 if narrow else 40
    steps = direct_bytes("sk_reuseport_md", "data", "data_end", 40)
    steps += parts("sk_reuseport_md", "len", "ip_protocol", "bind_inany")
    protocol = FIELDS["eth_protocol"].offset
    steps += [load(protocol, 4), load(protocol, 2), load(protocol + 2, 2)]
    for offset, size in ((0, 8), (8, 20), (8, 21), (28, 1), (0x7FFFFFFF, 1), (-1, 1)):
        steps += loaded("skb_load_bytes", offset, size)
    for offset, size, start in (
        (0, 1, 0),
        (0, header, 1),
        (header, 28, 1),
        (header, 29, 1),
        (0x10000, 1, 1),
        (0, 1, 7),
    ):
        steps += loaded("skb_load_bytes_relative", offset, size, start)
    steps += [[*load(FIELDS["migrating_sk"].offset, 8)]]
    whole_bytes = loaded("skb_load_bytes_relative", 0, header, 1)[1:]
    at = len(direct_bytes("sk_reuseport_md", "data", "data_end", 40))
    with Recorder(kernel, "sk_reuseport", "sk_reuseport_select", steps, value) as recorder:
        truth = on_kernel(recorder, address, family)
    assert truth.arrived == (value == PASSED)
    transport = bytes(byte - 256 for byte in truth.recorded[1 : 1 + at] if byte)
    # The network header as the kernel's program has read it, which is right behind its step.
    first = 1 + steps.index(loaded("skb_load_bytes_relative", 0, header, 1)[0])
    network = struct.pack(f"={len(whole_bytes)}Q", *truth.recorded[first + 1 : first + 1 + len(whole_bytes)])[:header]
    packet = Packet(
        buffer=bytes(14) + network + transport,
        offset=14 + header,
        mac=0,
        network=14,
        protocol=0x0800 if narrow else 0x86DD,
    )
    sock = Sock(family=family, type=2, protocol=17, local=socket.inet_pton(family, address) if address else b"")
    with Recorder(emulator, "sk_reuseport", "sk_reuseport_select", steps, value) as recorder:
        program = emulator.backend.program(recorder.fd)  # type: ignore[attr-defined]
        result = events.run_event(program, {"bind_inany": int(any)}, sock=sock, packet=packet)
        ours = recorder.recorded()
    link_header = 1 + steps.index(loaded("skb_load_bytes_relative", 0, 1, 0)[0])
    assert ours[:link_header] == truth.recorded[:link_header]
    assert ours[link_header + 2 :] == truth.recorded[link_header + 2 :]
    assert result.value == value


def test_cookies(kernel: Side, emulator: Side) -> None:
    cookie = [
        I(ebpf.LDX | ebpf.MEM | ebpf.DW, 1, 6, FIELDS["sk"].offset),
        I(ebpf.JMP | ebpf.CALL, 0, 0, 0, 46),
    ]
    steps = [cookie, cookie, *whole("sk_reuseport_md", "hash")]
    with Recorder(kernel, "sk_reuseport", "sk_reuseport_select", steps) as recorder:
        truth = on_kernel(recorder, "127.0.0.1", socket.AF_INET)
    assert truth.recorded[1:3] == (truth.cookie, truth.cookie)
    sock = Sock(family=2, type=2, protocol=17)
    with Recorder(emulator, "sk_reuseport", "sk_reuseport_select", steps) as recorder:
        program = emulator.backend.program(recorder.fd)  # type: ignore[attr-defined]
        events.run_event(program, {"hash": 0x12345678}, sock=sock)
        assert recorder.recorded() == (1, sock.cookie, sock.cookie, 0x12345678)


def choice(map_fd: int) -> tuple[Instruction, ...]:
    """Choose by the first byte of the data: the place in the map; what is not there leaves it to the hash; 9 drops."""
    return (
        I(ebpf.ALU64 | ebpf.MOV | ebpf.X, 6, 1),
        I(ebpf.ST | ebpf.MEM | ebpf.DW, 10, 0, -8),
        *call_with(6, HEADER, -8),
        I(ebpf.LDX | ebpf.MEM | ebpf.B, 7, 10, -8),
        I(ebpf.ALU64 | ebpf.MOV, 0, 0, 0, 0),
        I(ebpf.JMP | ebpf.JEQ, 7, 0, 8, 9),
        I(ebpf.ALU64 | ebpf.MOV | ebpf.X, 1, 6),
        *ld_imm64(2, map_fd, ebpf.PSEUDO_MAP_FD),
        I(ebpf.ALU64 | ebpf.MOV | ebpf.X, 3, 10),
        I(ebpf.ALU64 | ebpf.ADD, 3, 0, 0, -8),
        I(ebpf.ALU64 | ebpf.MOV, 4, 0, 0, 0),
        I(ebpf.JMP | ebpf.CALL, 0, 0, 0, HELPERS["sk_select_reuseport"]),
        I(ebpf.ALU64 | ebpf.MOV, 0, 0, 0, 1),
        I(ebpf.JMP | ebpf.EXIT),
    )


def call_with(context: int, offset: int, at: int) -> list[Instruction]:
    """Load a byte of the packet to the stack."""
    return [
        I(ebpf.ALU64 | ebpf.MOV | ebpf.X, 1, context),
        I(ebpf.ALU64 | ebpf.MOV, 2, 0, 0, offset),
        I(ebpf.ALU64 | ebpf.MOV | ebpf.X, 3, 10),
        I(ebpf.ALU64 | ebpf.ADD, 3, 0, 0, at),
        I(ebpf.ALU64 | ebpf.MOV, 4, 0, 0, 1),
        I(ebpf.JMP | ebpf.CALL, 0, 0, 0, HELPERS["skb_load_bytes"]),
    ]


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_program_chooses(netns: NetworkNamespace, address: str) -> None:
    def scenario(host: Host) -> Any:
        backend, family = host.backend, socket.AF_INET6 if ":" in address else socket.AF_INET
        group = [host.open(family) for _ in range(3)]
        for one in group:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            one.bind((address, 7000))
        map_fd = backend.map_create(MapSpec(type="reuseport_sockarray", key_size=4, value_size=8, max_entries=3))
        # The second is not in the map.
        for place in (0, 2):
            backend.map_update(map_fd, struct.pack("=I", place), struct.pack("=Q", group[place].fileno()))
        spec = ProgramSpec(type="sk_reuseport", instructions=choice(map_fd), expected_attach_type="sk_reuseport_select")
        program = backend.program_load(spec, [])
        backend.socket_attach_reuseport_bpf(group[1], program)
        sender = host.udp(address, 7001)

        def heard() -> list[list[bytes]]:
            return [received(one) for one in group]

        for data in (b"\0", b"\2", b"\0again", b"\2again"):
            sender.sendto(data, (address, 7000))
        found: list[Any] = [heard()]
        for data in (b"\1", b"\7"):
            # Left to the hash, which is not the same on both.
            sender.sendto(data, (address, 7000))
        found.append(sum(map(len, heard())))
        sender.sendto(b"\x09", (address, 7000))
        found.append(heard())
        backend.socket_detach_reuseport(group[0])
        sender.sendto(b"\x09", (address, 7000))
        found.append(sum(map(len, heard())))
        for fd in (program, map_fd):
            backend.close(fd)
        return found

    same_on_both(netns, scenario)


def test_sockets_that_share_no_port_refuse_programs(netns: NetworkNamespace) -> None:
    def scenario(host: Host) -> Any:
        spec = ProgramSpec(
            type="sk_reuseport",
            instructions=(I(ebpf.ALU64 | ebpf.MOV, 0, 0, 0, 1), I(ebpf.JMP | ebpf.EXIT)),
            expected_attach_type="sk_reuseport_select",
        )
        program = host.backend.program_load(spec, [])
        udp = host.open()
        unix, _ = host.pair()
        answers = [outcome(host.backend.socket_attach_reuseport_bpf, one, program) for one in (udp, unix)]
        host.backend.close(program)
        return answers

    same_on_both(netns, scenario)
