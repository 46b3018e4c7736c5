"""Frames of the emulated network in and out: from capture files, into lists, with the times of the machine's clock."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

import kbpf
from kbpf import emulator
from kbpf.emulator import headers
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction, ld_imm64
from kbpf.pcapfile import PcapWriter, open_capture
from kbpf.specs import MapSpec, ProgramSpec
from kbpf.uapi.enums import HELPERS

FRAME = b"\x02\0\0\0\0\x09\x02\0\0\0\0\x01\x08\0" + bytes.fromhex("4500001c00000000401100007f0000017f000001") + bytes(8)
XDP_PASS, XDP_TX = 2, 3
NF_DROP = 0
I = Instruction  # noqa: E741


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    before = emulator.environment.clock
    emulator.reset()
    yield
    emulator.environment.clock = before
    emulator.reset()


def counting(action: int, type: str = "xdp") -> ProgramSpec:
    """Counts frames in its map, and ends with `action`."""
    code = [
        I(ebpf.ST | ebpf.MEM | ebpf.W, ebpf.FP, 0, -4, 0),
        *ld_imm64(1, 0, ebpf.PSEUDO_MAP_IDX),
        I(ebpf.ALU64 | ebpf.MOV | ebpf.X, 2, ebpf.FP),
        I(ebpf.ALU64 | ebpf.ADD, 2, 0, 0, -4),
        I(ebpf.JMP | ebpf.CALL, 0, 0, 0, HELPERS["map_lookup_elem"]),
        I(ebpf.JMP | ebpf.JEQ, 0, 0, 3, 0),
        I(ebpf.LDX | ebpf.MEM | ebpf.DW, 1, 0, 0),
        I(ebpf.ALU64 | ebpf.ADD, 1, 0, 0, 1),
        I(ebpf.STX | ebpf.MEM | ebpf.DW, 0, 1, 0),
        I(ebpf.ALU64 | ebpf.MOV, 0, 0, 0, action),
        I(ebpf.JMP | ebpf.EXIT),
    ]
    count = MapSpec(type="array", key_size=4, value_size=8, max_entries=1, name="count")
    return ProgramSpec(type=type, instructions=tuple(code), maps=(count,), expected_attach_type=type)


def count(program: kbpf.Program) -> int:
    return int.from_bytes(program.maps[0][0], "little")


@pytest.mark.parametrize("mode", ["generic", "native"])
def test_what_leaves_an_interface_is_collected_with_its_time(mode: str) -> None:
    emulator.environment.clock = clock = emulator.ManualClock(1_000_000_000)
    emulator.add_interface("eth0")
    with (
        kbpf.load_program(counting(XDP_TX), backend="emulator") as program,
        program.attach("eth0", mode=mode),
        emulator.capture("eth0") as frames,
    ):
        emulator.inject("eth0", FRAME)
        clock.advance(500)
        emulator.inject("eth0", FRAME)
    emulator.inject("eth0", FRAME)
    assert frames == [(FRAME, 1_000_000_000), (FRAME, 1_000_000_500)]


def test_a_capture_file_is_played_for_programs_on_interfaces(tmp_path: Path) -> None:
    given, taken = tmp_path / "given.pcap", tmp_path / "taken.pcap"
    with PcapWriter(given) as writer:
        for number in range(3):
            writer.write(FRAME + bytes([number]), timestamp_ns=10**18 + number * 1000)
    emulator.add_interface("eth0")
    with (
        kbpf.load_program(counting(XDP_TX), backend="emulator") as program,
        program.attach("eth0"),
        emulator.capture("eth0") as frames,
    ):
        emulator.play("eth0", given)
        assert count(program) == 3
    with PcapWriter(taken) as writer:
        for frame in frames:
            writer.write(frame.data, timestamp_ns=frame.timestamp_ns)
    with open_capture(given) as one, open_capture(taken) as other:
        assert list(one) == list(other)


def test_a_capture_file_is_played_for_netfilter_programs(tmp_path: Path) -> None:
    given, own = tmp_path / "given.pcap", socket.inet_aton("192.0.2.1")
    packet = headers.ipv4(socket.inet_aton("192.0.2.2"), own, 17, headers.UDP_SIZE) + headers.udp(9, 53, 0)
    with PcapWriter(given) as writer:
        writer.write(FRAME[:14] + packet, timestamp_ns=10**18)
    emulator.add_interface("eth0", address=FRAME[:6])
    hook = kbpf.Netfilter(family="ipv4", hook="prerouting", priority=0)
    with kbpf.load_program(counting(NF_DROP, "netfilter"), backend="emulator") as program, program.attach(hook):
        emulator.play("eth0", given)
        assert count(program) == 1


def test_the_named_capture_is_played_for_programs_on_any_interface(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tmp_path / "given.pcap"
    with PcapWriter(given) as writer:
        writer.write(FRAME, timestamp_ns=10**18)
    monkeypatch.setenv("KBPF_EMULATED_CAPTURE", str(given))
    with kbpf.load_program(counting(XDP_PASS), backend="emulator") as program, program.attach("eth7"):
        assert count(program) == 1


def test_times_of_packet_sockets_are_the_clock_of_the_machine() -> None:
    emulator.environment.clock = emulator.ManualClock(3_000_000_042)
    one, _ = emulator.add_pair("v0", "v1")
    with (
        kbpf.packet_socket("v1", backend="emulator") as receiver,
        kbpf.packet_socket("v0", backend="emulator") as sender,
    ):
        receiver.setsockopt(1, 35, 1)  # SO_TIMESTAMPNS
        sender.send(FRAME)
        _, ((_, _, stamp),), _, _ = receiver.recvmsg(100, 100)
    assert stamp == (3).to_bytes(8, "little") + (42).to_bytes(8, "little")
    assert one.counters.tx_packets == 1


def test_a_loop_of_redirects_ends() -> None:
    """Linux goes on until the program is taken off."""
    one, other = emulator.add_pair("v0", "v1")
    code = (
        I(ebpf.ALU64 | ebpf.MOV, 1, 0, 0, other.index),
        I(ebpf.ALU64 | ebpf.MOV, 2, 0, 0, 1),
        I(ebpf.JMP | ebpf.CALL, 0, 0, 0, HELPERS["redirect"]),
        I(ebpf.JMP | ebpf.EXIT),
    )
    spec = ProgramSpec(type="sched_cls", instructions=code)
    with kbpf.load_program(spec, backend="emulator") as program, program.attach("v1", "tcx_ingress"):
        emulator.inject("v1", FRAME)
        emulator.inject("v1", FRAME)
    assert other.counters.rx_packets == 2
    assert one.counters.rx_packets == 0
