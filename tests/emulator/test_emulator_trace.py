"""`Program.trace`: a run, step by step."""

from __future__ import annotations

import pytest
from mapcode import described
from sides import FRAME

import kbpf
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction, ld_imm64
from kbpf.runs import MemoryAccess
from kbpf.specs import MapSpec, ProgramSpec

I = Instruction  # noqa: E741
EXIT = I(ebpf.JMP | ebpf.EXIT)
PROGRAM = (
    I(ebpf.LDX | ebpf.MEM | ebpf.W, 2, 1, 0),
    I(ebpf.STX | ebpf.MEM | ebpf.DW, 10, 2, -8),
    I(ebpf.ALU64 | ebpf.MOV, 3, 0, 0, 5),
    I(ebpf.STX | ebpf.ATOMIC | ebpf.DW, 10, 3, -8, ebpf.FETCH),
    I(ebpf.ALU64 | ebpf.MOV | ebpf.X, 0, 3),
    EXIT,
)


def test_each_step_shows_registers_and_memory() -> None:
    length = len(FRAME) - 14
    with kbpf.load_program(ProgramSpec(instructions=PROGRAM), backend="emulator") as program:
        steps = list(program.trace(FRAME))
    assert [step.pc for step in steps] == [0, 1, 2, 3, 4, 5]
    assert [step.instruction for step in steps] == list(PROGRAM)
    assert [step.registers for step in steps] == [{2: length}, {}, {3: 5}, {3: length}, {0: length}, {}]
    assert [step.memory for step in steps] == [
        (MemoryAccess("context", 0, 4, False),),
        (MemoryAccess("stack", 504, 8, True),),
        (),
        (MemoryAccess("stack", 504, 8, False), MemoryAccess("stack", 504, 8, True)),
        (),
        (),
    ]


def test_packet_accesses_are_told_apart() -> None:
    program = (
        I(ebpf.LDX | ebpf.MEM | ebpf.W, 2, 1, 76),
        I(ebpf.LDX | ebpf.MEM | ebpf.W, 3, 1, 80),
        I(ebpf.ALU64 | ebpf.MOV | ebpf.X, 4, 2),
        I(ebpf.ALU64 | ebpf.ADD, 4, 0, 0, 14),
        I(ebpf.JMP | ebpf.JGT | ebpf.X, 4, 3, 1),
        I(ebpf.LDX | ebpf.MEM | ebpf.H, 0, 2, 12),
        I(ebpf.ALU64 | ebpf.MOV, 0),
        EXIT,
    )
    with kbpf.load_program(ProgramSpec(type="sched_cls", instructions=program), backend="emulator") as loaded:
        steps = {step.pc: step for step in loaded.trace(FRAME)}
    assert steps[5].memory == (MemoryAccess("packet", 12, 2, False),)
    assert steps[5].registers == {0: 8}


def test_a_fault_comes_after_the_steps_that_led_to_it() -> None:
    program = (I(ebpf.ALU64 | ebpf.MOV, 0), I(ebpf.LDX | ebpf.MEM | ebpf.W, 2, 0, 0), EXIT)
    with kbpf.load_program(ProgramSpec(instructions=program), backend="emulator") as loaded:
        steps = loaded.trace(FRAME)
        assert next(steps).pc == 0
        with pytest.raises(kbpf.EmulationFault):
            next(steps)


def test_what_a_run_refuses_a_trace_refuses() -> None:
    with (
        kbpf.load_program(ProgramSpec(instructions=PROGRAM), backend="emulator") as loaded,
        pytest.raises(kbpf.BpfError),
    ):
        loaded.trace(b"short")


def test_functions_and_tail_called_programs_are_told_apart() -> None:
    """A function of the first program tail calls the second one, which has a function too."""
    ret = I(ebpf.ALU64 | ebpf.MOV, 0, 0, 0, 7)
    second = (I(ebpf.JMP | ebpf.CALL, 0, ebpf.PSEUDO_CALL, 0, 1), EXIT, ret, EXIT)
    first = (
        I(ebpf.JMP | ebpf.CALL, 0, ebpf.PSEUDO_CALL, 0, 2),
        I(ebpf.ALU64 | ebpf.ADD, 0, 0, 0, 1),
        EXIT,
        *ld_imm64(2, 0, ebpf.PSEUDO_MAP_IDX),
        I(ebpf.ALU64 | ebpf.MOV, 3),
        I(ebpf.JMP | ebpf.CALL, 0, 0, 0, 12),
        I(ebpf.ALU64 | ebpf.MOV, 0),
        EXIT,
    )
    described_first = described([0, 3])
    array = MapSpec(type="prog_array", key_size=4, value_size=4, max_entries=1)
    with (
        kbpf.load_program(ProgramSpec(instructions=second), backend="emulator") as other,
        kbpf.load_program(
            ProgramSpec(instructions=first, maps=(array,), **described_first), backend="emulator"
        ) as program,
    ):
        program.maps[0][0] = other
        steps = list(program.trace(FRAME))
        one, two = program.id, other.id
    assert [(step.program, step.pc, step.depth) for step in steps] == [
        (one, 0, 0), (one, 3, 1), (one, 5, 1), (one, 6, 1), (two, 0, 1), (two, 2, 2), (two, 3, 2), (two, 1, 1),
        (one, 1, 0), (one, 2, 0),
    ]  # fmt: skip
    assert steps[-2].registers == {0: 8}


def test_a_program_that_tail_calls_itself_is_shown_each_time() -> None:
    body = (
        *ld_imm64(2, 0, ebpf.PSEUDO_MAP_IDX),
        I(ebpf.ALU64 | ebpf.MOV, 3),
        I(ebpf.JMP | ebpf.CALL, 0, 0, 0, 12),
        I(ebpf.ALU64 | ebpf.MOV, 0),
        EXIT,
    )
    array = MapSpec(type="prog_array", key_size=4, value_size=4, max_entries=1)
    with kbpf.load_program(ProgramSpec(instructions=body, maps=(array,)), backend="emulator") as program:
        program.maps[0][0] = program
        steps = list(program.trace(FRAME))
        del program.maps[0][0]
    assert sum(step.pc == 0 for step in steps) == 34


@pytest.mark.requires("kernel")
def test_the_kernel_shows_no_steps() -> None:
    with (
        kbpf.load_program(ProgramSpec(instructions=PROGRAM), backend="kernel") as loaded,
        pytest.raises(kbpf.NotSupportedError, match="emulator"),
    ):
        loaded.trace(FRAME)
