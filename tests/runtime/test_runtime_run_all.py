"""run_all gives for each packet what run gives, on both backends and whatever runs it; maps count alike."""

from __future__ import annotations

import io
from contextlib import ExitStack
from random import Random

import pytest

import kbpf
from kbpf.backend import Backend, Engine
from kbpf.emulator.backend import EmulatorBackend
from kbpf.emulator.jit.testrun import NativeTestRuns
from kbpf.errors import BpfError, EmulationFault
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction, ld_imm64
from kbpf.pcapfile import PcapWriter, open_capture
from kbpf.specs import MapSpec, ProgramSpec
from kbpf.testing import differ, generate_direct, generate_ebpf
from kbpf.testing.generate_packets import frame
from kbpf.types import Int
from kbpf.uapi.structs import STRUCTS

pytestmark = pytest.mark.requires("llvmlite")

U32, U64 = Int(name="u32", size=4), Int(name="u64", size=8)
I = Instruction  # noqa: E741
EXIT = I(ebpf.JMP | ebpf.EXIT)
#: Counts packets by the byte behind the Ethernet header and nine more, as sockex1 does; returns that byte.
BY_PROTOCOL = ProgramSpec(
    type="socket_filter",
    instructions=(
        I(ebpf.ALU64 | ebpf.MOV | ebpf.X, 6, 1),
        I(ebpf.LD | ebpf.ABS | ebpf.B, 0, 0, 0, 9),
        I(ebpf.STX | ebpf.MEM | ebpf.W, 10, 0, -4),
        I(ebpf.ALU64 | ebpf.MOV | ebpf.X, 7, 0),
        I(ebpf.ALU64 | ebpf.MOV | ebpf.X, 2, 10),
        I(ebpf.ALU64 | ebpf.ADD, 2, 0, 0, -4),
        *ld_imm64(1, 0, ebpf.PSEUDO_MAP_IDX),
        I(ebpf.JMP | ebpf.CALL, 0, 0, 0, 1),
        I(ebpf.JMP | ebpf.JEQ, 0, 0, 3),
        I(ebpf.LDX | ebpf.MEM | ebpf.W, 1, 6, 0),
        I(ebpf.STX | ebpf.ATOMIC | ebpf.DW, 0, 1, 0, ebpf.ADD),
        I(ebpf.JMP | ebpf.JA),
        I(ebpf.ALU64 | ebpf.MOV | ebpf.X, 0, 7),
        EXIT,
    ),
    maps=(
        MapSpec(type="array", key_size=4, value_size=8, max_entries=256, name="bytes", key_type=U32, value_type=U64),
    ),
)


def frames(count: int, seed: object = 0) -> list[bytes]:
    rng = Random(f"run_all/{seed}")
    return [frame(rng, vlan=True) for _ in range(count)]


def outcome(backend: Backend, case: differ.EbpfCase, packets: list[bytes], together: bool) -> tuple[object, ...]:
    """The values, and what is in the maps then."""
    context = b"" if case.spec.type == "xdp" else bytes(192)
    with ExitStack() as stack:
        maps = [differ.CaseMap(backend, wanted, stack) for wanted in case.spec.maps]
        program = backend.program_load(case.spec, [made.fd for made in maps])
        stack.callback(backend.close, program)
        for made in maps:
            made.loaded(program)
        if together:
            values = list(backend.program_values(program, packets, context))
        else:
            values = [backend.program_run(program, packet, context).value for packet in packets]
        return values, [made.contents() for made in maps]


@pytest.mark.parametrize("type", ["ebpf", "sched_cls", "xdp", "cgroup_skb", "lwt_xmit"])
def test_many_packets_give_what_each_gives(type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    run = NativeTestRuns.run
    monkeypatch.setattr(NativeTestRuns, "run", lambda self, *a: done.append(len(got := run(self, *a))) or got)
    for number in range(60):
        rng = Random(f"run_all/{number}")
        case = generate_ebpf.generate(rng) if type == "ebpf" else generate_direct.generate(rng, type)
        packets = frames(12, number)
        with differ.one_processor():
            expected = outcome(EmulatorBackend("interpreter"), case, packets, together=False)
            assert outcome(EmulatorBackend("jit"), case, packets, together=True) == expected, number
    # Most that reach into packets call helpers that native code leaves to Python, packet by packet.
    assert sum(done) > 20 or type != "ebpf"


@pytest.mark.parametrize("backend", ["emulator", pytest.param("kernel", marks=pytest.mark.requires("kernel"))])
def test_counters_count_every_packet(backend: str) -> None:
    packets = frames(500)
    counted = []
    for engine in ("interpreter", "jit"):
        with kbpf.load_program(BY_PROTOCOL, backend=backend, engine=engine) as program:  # type: ignore[arg-type]
            values = list(program.run_all(packets))
            assert values == [program.run(packet).value for packet in packets]
            counted.append((values, program.maps[0].snapshot()))
    assert counted[0] == counted[1]
    assert sum(counted[0][1].values()) == 2 * sum(len(packet) - 14 for packet in packets if len(packet) >= 24)


def test_packets_in_a_buffer_and_in_a_capture() -> None:
    packets, file = frames(20), io.BytesIO()
    with PcapWriter(file) as writer:
        for packet in packets:
            writer.write(packet)
    offsets = [0]
    for packet in packets:
        offsets.append(offsets[-1] + len(packet))
    with kbpf.load_program(BY_PROTOCOL, backend="emulator", engine="jit") as program:
        expected = list(program.run_all(packets))
        assert list(program.run_all(kbpf.Packets(b"".join(packets), offsets))) == expected
        with open_capture(file.getvalue()) as capture:
            assert list(program.run_all(capture)) == expected
        assert list(program.run_all([])) == []


@pytest.mark.parametrize("engine", ["interpreter", "jit"])
def test_a_packet_that_is_refused_is_an_error_and_those_before_have_run(engine: str) -> None:
    packets = frames(30)
    for bad in (b"short", bytes(12) + b"\x08\x00" + bytes(10), bytes(4000)):
        with kbpf.load_program(BY_PROTOCOL, backend="emulator", engine=engine) as program:  # type: ignore[arg-type]
            with pytest.raises(BpfError, match="EINVAL"):
                program.run_all([*packets, bad, *packets])
            once = program.maps[0].snapshot()
            program.run_all(packets)
            assert program.maps[0].snapshot() == {key: 2 * value for key, value in once.items()}


def test_frames_of_every_length_are_those_of_a_run() -> None:
    """XDP frames that do not fit one piece, and the least that each type takes."""
    xdp = ProgramSpec(
        type="xdp",
        instructions=(
            I(ebpf.LDX | ebpf.MEM | ebpf.W, 2, 1, 0),
            I(ebpf.LDX | ebpf.MEM | ebpf.W, 3, 1, 4),
            I(ebpf.ALU64 | ebpf.MOV | ebpf.X, 0, 3),
            I(ebpf.ALU64 | ebpf.SUB | ebpf.X, 0, 2),
            EXIT,
        ),
    )
    packets = [bytes(size) for size in (14, 60, 3519, 3520, 3521, 4000, 9000)]
    with kbpf.load_program(xdp, backend="emulator", engine="jit") as program:
        assert list(program.run_all(packets)) == [14, 60, 3519, 3520, 3520, 3520, 3520]


def test_a_fault_is_raised_with_its_place() -> None:
    wild = ProgramSpec(instructions=(*ld_imm64(1, 0x1234_0000_0000), I(ebpf.LDX | ebpf.MEM | ebpf.W, 0, 1), EXIT))
    for engine in ("interpreter", "jit"):
        with (
            kbpf.load_program(wild, backend="emulator", engine=engine) as program,  # type: ignore[arg-type]
            pytest.raises(EmulationFault, match="invalid read of 4 bytes at instruction 2"),
        ):
            program.run_all(frames(3))


def digest(type: str, fields: list[str]) -> ProgramSpec:
    """A hash over fields of the context and all bytes that the program sees, some of which it turns round."""
    struct = "xdp_md" if type == "xdp" else "__sk_buff"
    layout = STRUCTS[struct].fields
    mix = [I(ebpf.ALU64 | ebpf.MUL, 0, 0, 0, 31), I(ebpf.ALU64 | ebpf.ADD | ebpf.X, 0, 2)]
    body = [I(ebpf.ALU64 | ebpf.MOV, 0, 0, 0, 7)]
    for name in fields:
        body += [I(ebpf.LDX | ebpf.MEM | ebpf.W, 2, 1, layout[name].offset), *mix]
    body += [
        I(ebpf.LDX | ebpf.MEM | ebpf.W, 3, 1, layout["data"].offset),
        I(ebpf.LDX | ebpf.MEM | ebpf.W, 4, 1, layout["data_end"].offset),
    ]
    for _ in range(60):
        one = [I(ebpf.LDX | ebpf.MEM | ebpf.B, 2, 3), *mix, I(ebpf.ALU64 | ebpf.XOR, 2, 0, 0, 0x55)]
        if type in ("xdp", "sched_cls"):
            one += [I(ebpf.STX | ebpf.MEM | ebpf.B, 3, 2), I(ebpf.LDX | ebpf.MEM | ebpf.B, 2, 3), *mix]
        one.append(I(ebpf.ALU64 | ebpf.ADD, 3, 0, 0, 1))
        body += [
            I(ebpf.ALU64 | ebpf.MOV | ebpf.X, 5, 3),
            I(ebpf.ALU64 | ebpf.ADD, 5, 0, 0, 1),
            I(ebpf.JMP | ebpf.JGT | ebpf.X, 5, 4, len(one)),
            *one,
        ]
    return ProgramSpec(type=type, instructions=(*body, EXIT))


@pytest.mark.requires("kernel")
@pytest.mark.parametrize(
    ("type", "fields"),
    [
        ("xdp", ["ingress_ifindex", "rx_queue_index"]),
        ("sched_cls", ["len", "protocol", "pkt_type", "ifindex", "wire_len", "mark", "tc_index", "gso_segs"]),
        ("lwt_out", ["len", "protocol", "pkt_type", "ifindex", "hash", "vlan_present", "cb"]),
    ],
)
def test_what_programs_see_of_many_frames_is_what_they_see_on_the_kernel(type: str, fields: list[str]) -> None:
    rng, packets = Random(type), []
    for packet in frames(300, type):
        first = rng.choice((packet[:1], b"\0", b"\1", b"\2"))
        kind = rng.choice((packet[12:14], packet[12:14], b"\x05\xff", b"\x06\x00", b"\0\x10"))
        packets.append(first + packet[1:12] + kind + rng.choice((b"", b"\xff\xff")) + packet[14:])
    packets = [p for p in packets if len(p) >= {b"\x08\x00": 34, b"\x86\xdd": 54}.get(p[12:14], 14)]
    values = []
    for backend, engine in (("kernel", "auto"), ("emulator", "interpreter"), ("emulator", "jit")):
        with kbpf.load_program(digest(type, fields), backend=backend, engine=engine) as program:  # type: ignore[arg-type]
            values.append(list(program.run_all(packets)))
    assert values[0] == values[1] == values[2]
    assert len(set(values[0])) > 200


@pytest.mark.parametrize("engine", ["interpreter", "jit"])
def test_packets_may_be_any_objects_of_bytes(engine: Engine) -> None:
    packets = frames(5)
    others = [bytearray(packets[0]), memoryview(packets[1]), *packets[2:]]
    with kbpf.load_program(BY_PROTOCOL, backend="emulator", engine=engine) as program:
        assert program.run_all(others) == program.run_all(packets)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            program.run_all([60])  # type: ignore[list-item]
