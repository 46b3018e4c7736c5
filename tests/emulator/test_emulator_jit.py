"""Native code gives what the interpreter gives: values, packets, contexts, maps, and faults word for word."""

from __future__ import annotations

from random import Random

import pytest

from kbpf.emulator.backend import EmulatorBackend
from kbpf.emulator.classic import ClassicProgram
from kbpf.emulator.program import Program
from kbpf.errors import EmulationFault
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction, ld_imm64
from kbpf.specs import MapSpec, ProgramSpec
from kbpf.testing import carriers, differ, generate_direct, generate_ebpf
from tests.emulator.sides import FRAME

pytestmark = pytest.mark.requires("llvmlite")

I = Instruction  # noqa: E741
EXIT = I(ebpf.JMP | ebpf.EXIT)
MOV, ADD, MOV_X = ebpf.ALU64 | ebpf.MOV, ebpf.ALU64 | ebpf.ADD, ebpf.ALU64 | ebpf.MOV | ebpf.X
CALL = ebpf.JMP | ebpf.CALL


def outcome(engine: str, instructions: list[Instruction], **spec: object) -> tuple[object, ...]:
    """What a run gives, or its fault."""
    backend = EmulatorBackend(engine)  # type: ignore[arg-type]
    program = ProgramSpec(instructions=tuple(instructions), **spec)  # type: ignore[arg-type]
    loaded = Program(program, [], backend.map, budget=5000, engine=engine)  # type: ignore[arg-type]
    try:
        fd = backend._open(loaded)
        return tuple(backend.program_run(fd, FRAME, bytes(192)))[:3]
    except EmulationFault as fault:
        return fault.message, fault.pc, fault.address


def agree(instructions: list[Instruction], **spec: object) -> tuple[object, ...]:
    expected = outcome("interpreter", instructions, **spec)
    assert outcome("jit", instructions, **spec) == expected
    return expected


@pytest.mark.parametrize("first", range(0, 300, 100))
def test_programs_agree(first: int) -> None:
    interpreter, native = EmulatorBackend("interpreter"), EmulatorBackend("jit")
    with differ.one_processor():
        for number in range(first, first + 100):
            case = generate_ebpf.generate(Random(f"jit/{number}"))
            assert differ.run_ebpf(native, case) == differ.run_ebpf(interpreter, case), number


@pytest.mark.parametrize("type", generate_direct.TYPES)
def test_programs_that_reach_into_packets_agree(type: str) -> None:
    interpreter, native = EmulatorBackend("interpreter"), EmulatorBackend("jit")
    with differ.one_processor():
        for number in range(25):
            case = generate_direct.generate(Random(f"jit/{number}"), type)
            assert differ.run_ebpf(native, case) == differ.run_ebpf(interpreter, case), number


@pytest.mark.parametrize("name", carriers.NAMES)
def test_classic_filters_agree(name: str) -> None:
    with (
        carriers.emulated(lambda program: ClassicProgram(program, engine="interpreter")) as interpreted,
        carriers.emulated(lambda program: ClassicProgram(program, engine="jit")) as native,
    ):
        for number in range(60):
            case = differ.classic_case(Random(f"jit/{number}"), name)
            assert differ.run_classic(native, case) == differ.run_classic(interpreted, case), number


@pytest.mark.parametrize(
    "address",
    [
        0,
        1,
        8,
        1 << 32,
        (1 << 32) + 3,
        (2 << 32) + 512,
        (2 << 32) + 511,
        3 << 32,
        0xFFFF << 32,
        (1 << 64) - 1,
        (1 << 64) - 8,
    ],
)
@pytest.mark.parametrize("size", [ebpf.B, ebpf.H, ebpf.W, ebpf.DW])
def test_wild_addresses_fault_alike(address: int, size: int) -> None:
    agree([*ld_imm64(1, address), I(ebpf.LDX | ebpf.MEM | size, 0, 1), EXIT])
    agree([*ld_imm64(1, address), I(ebpf.STX | ebpf.MEM | size, 1, 1), I(MOV, 0), EXIT])
    if size in (ebpf.W, ebpf.DW):
        atomic = I(ebpf.STX | ebpf.ATOMIC | size, 1, 2, 0, ebpf.ADD | ebpf.FETCH)
        agree([*ld_imm64(1, address), I(MOV, 2, 0, 0, 1), atomic, I(MOV, 0), EXIT])


def test_a_frame_ends_where_it_ends() -> None:
    for offset in (-513, -512, -8, -7, 0, 8, 0x7FFF):
        agree(
            [I(ebpf.ST | ebpf.MEM | ebpf.DW, 10, 0, offset, 7), I(ebpf.LDX | ebpf.MEM | ebpf.DW, 0, 10, offset), EXIT]
        )
        moved = [I(MOV_X, 1, 10), I(ADD, 1, 0, 0, offset)]
        agree([*moved, I(ebpf.LDX | ebpf.MEM | ebpf.B, 0, 1), EXIT])


def test_an_address_from_two_ways_is_followed_at_run_time() -> None:
    """Which of two places in its frame a function writes to is not known when it is compiled."""
    two_ways = [
        I(ebpf.ST | ebpf.MEM | ebpf.DW, 10, 0, -8, 1),
        I(ebpf.ST | ebpf.MEM | ebpf.DW, 10, 0, -16, 2),
        I(MOV_X, 2, 10),
        I(ADD, 2, 0, 0, -8),
        I(ebpf.LDX | ebpf.MEM | ebpf.W, 3, 1, 0),
        I(ebpf.JMP | ebpf.JEQ | ebpf.K, 3, 0, 1, 1),
        I(ADD, 2, 0, 0, -8),
        I(ebpf.LDX | ebpf.MEM | ebpf.DW, 0, 2),
        EXIT,
    ]
    assert agree(two_ways)[0] == 2


def test_an_endless_loop_ends() -> None:
    assert "budget" in str(agree([I(MOV, 0), I(ebpf.JMP | ebpf.JEQ | ebpf.K, 0, 0, -2, 0), EXIT])[0])


def test_tail_calls_are_counted() -> None:
    results = []
    for backend in (EmulatorBackend("interpreter"), EmulatorBackend("jit")):
        table = backend.map_create(MapSpec(type="prog_array", key_size=4, value_size=4, max_entries=1))
        chain = (
            I(ebpf.LDX | ebpf.MEM | ebpf.W, 3, 1, 48),
            I(ADD, 3, 0, 0, 1),
            I(ebpf.STX | ebpf.MEM | ebpf.W, 1, 3, 48),
            *ld_imm64(2, table, ebpf.PSEUDO_MAP_FD),
            I(MOV, 3),
            I(CALL, 0, 0, 0, 12),
            I(MOV, 0, 0, 0, 5),
            EXIT,
        )
        fd = backend.program_load(ProgramSpec(instructions=chain), [])
        backend.map_update(table, bytes(4), fd.to_bytes(4, "little"))
        done = backend.program_run(fd, FRAME, bytes(192))
        results.append((done.value, done.context[48:52]))
        backend.close(fd)
        backend.close(table)
    assert results[0] == results[1] == (5, (34).to_bytes(4, "little"))


def test_a_fault_in_a_helper_names_the_call() -> None:
    """The key of a lookup that lies nowhere."""
    backend = EmulatorBackend("jit")
    array = backend.map_create(MapSpec(type="array", key_size=4, value_size=8, max_entries=2))
    for map_type in ("array", "hash"):
        fd = (
            array
            if map_type == "array"
            else backend.map_create(MapSpec(type="hash", key_size=4, value_size=8, max_entries=2))
        )
        program = (*ld_imm64(1, fd, ebpf.PSEUDO_MAP_FD), I(MOV, 2, 0, 0, 16), I(CALL, 0, 0, 0, 1), I(MOV, 0), EXIT)
        loaded = backend.program_load(ProgramSpec(instructions=program), [])
        with pytest.raises(EmulationFault, match="invalid read of 4 bytes at instruction 3") as caught:
            backend.program_run(loaded, FRAME, b"")
        assert caught.value.address == 16
        backend.close(loaded)
        if fd != array:
            backend.close(fd)
    backend.close(array)
