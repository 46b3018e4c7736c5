"""Packet bytes in native code: a block looks once at what it reaches from a register, and faults where it should."""

from __future__ import annotations

from random import Random

import pytest

import kbpf
from kbpf.backend import Engine
from kbpf.errors import EmulationFault
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.specs import ProgramSpec
from kbpf.uapi.enums import HELPERS
from kbpf.uapi.structs import STRUCTS

pytestmark = pytest.mark.requires("llvmlite")

I = Instruction  # noqa: E741
A64, X, EXIT = ebpf.ALU64, ebpf.X, I(ebpf.JMP | ebpf.EXIT)
FIELDS = STRUCTS["__sk_buff"].fields
FRAME = bytes(range(64))
SIZES = {1: ebpf.B, 2: ebpf.H, 4: ebpf.W, 8: ebpf.DW}


def outcome(instructions: tuple[Instruction, ...], engine: Engine) -> object:
    """The value and the packet, or the fault."""
    spec = ProgramSpec(type="sched_cls", instructions=instructions)
    with kbpf.load_program(spec, backend="emulator", engine=engine) as program:
        try:
            run = program.run(FRAME)
        except EmulationFault as fault:
            return str(fault)
        return run.value, run.data


def reaching(start: str, shift: int, steps: list[Instruction]) -> tuple[Instruction, ...]:
    """R7 is `start` and so many bytes; what steps load into R3 is added up."""
    added = [each for step in steps for each in (step, I(A64 | ebpf.ADD | X, 0, 3))]
    return (
        I(A64 | ebpf.MOV, 0), I(A64 | ebpf.MOV, 3), I(ebpf.LDX | ebpf.MEM | ebpf.W, 7, 1, FIELDS[start].offset),
        I(A64 | ebpf.ADD, 7, 0, 0, shift), *added, EXIT,
    )  # fmt: skip


def load(size: int, off: int) -> Instruction:
    return I(ebpf.LDX | ebpf.MEM | SIZES[size], 3, 7, off)


def store(size: int, off: int) -> Instruction:
    return I(ebpf.ST | ebpf.MEM | SIZES[size], 7, 0, off, 0x5A5A5A5A)


@pytest.mark.parametrize(
    ("start", "shift", "steps"),
    [
        ("data", 0, [load(1, 0), load(8, 56), store(4, 60), load(4, 60)]),
        ("data", 0, [load(1, 0), load(8, 57)]),
        ("data", 0, [store(1, 0), load(1, 64)]),
        ("data", 0, [load(1, 3), load(1, -1), load(1, 4)]),
        ("data", -8, [load(8, 8), load(2, 40)]),
        ("data", 100, [load(8, -40), load(2, -100)]),
        ("data_end", 0, [load(1, -1), load(8, -64), store(2, -2)]),
        ("data_end", 0, [load(1, -1), load(1, 0)]),
        ("data_end", 0, [store(1, -64), store(1, -65)]),
        ("data", -(1 << 31), [load(1, 0), load(1, 0x7FFF)]),
        ("data", (1 << 31) - 1, [load(8, -0x8000), load(8, 0x7FFF)]),
        # A copy, and a register that changes between.
        ("data", 0, [load(1, 0), I(A64 | ebpf.MOV | X, 7, 7), load(1, 63), I(A64 | ebpf.ADD, 7, 0, 0, 60), load(4, 0)]),
        ("data", 0, [load(1, 0), I(A64 | ebpf.ADD, 7, 0, 0, 60), load(8, 0)]),
        ("data", 0, [load(1, 63), I(ebpf.LDX | ebpf.MEM | ebpf.B, 7, 7), load(1, 0)]),
    ],
)
def test_native_code_does_what_the_interpreter_does(start: str, shift: int, steps: list[Instruction]) -> None:
    program = reaching(start, shift, steps)
    assert outcome(program, "jit") == outcome(program, "interpreter")


def test_random_places() -> None:
    rng = Random("packets")
    faults = 0
    for _ in range(60):
        steps = [
            rng.choice((load, store))(rng.choice((1, 2, 4, 8)), rng.choice((rng.randrange(60), rng.randrange(-4, 70))))
            for _ in range(rng.randrange(1, 7))
        ]
        program = reaching("data", rng.choice((0, 0, 0, -2, 3)), steps)
        expected = outcome(program, "interpreter")
        faults += isinstance(expected, str)
        assert outcome(program, "jit") == expected
    assert 5 < faults < 55


def test_a_helper_that_moves_the_packet_ends_what_was_found() -> None:
    """The packet is shorter after it: what was inside is no longer."""
    program = (
        I(A64 | ebpf.MOV | X, 6, 1),
        I(ebpf.LDX | ebpf.MEM | ebpf.W, 7, 1, FIELDS["data"].offset),
        I(ebpf.LDX | ebpf.MEM | ebpf.B, 8, 7, 50),
        I(A64 | ebpf.MOV, 2, 0, 0, 40), I(A64 | ebpf.MOV, 3),
        I(ebpf.JMP | ebpf.CALL, 0, 0, 0, HELPERS["skb_change_tail"]),
        I(ebpf.LDX | ebpf.MEM | ebpf.B, 0, 7, 50),
        EXIT,
    )  # fmt: skip
    expected = outcome(program, "interpreter")
    assert isinstance(expected, str)
    assert outcome(program, "jit") == expected
