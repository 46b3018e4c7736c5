"""Every instruction in the interpreter against the kernel."""

from __future__ import annotations

from itertools import product
from random import Random

import pytest
from sides import CB, FRAME, Outcome, Side, with_result

from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction, ld_imm64

pytestmark = pytest.mark.requires("kernel")

I = Instruction  # noqa: E741
VALUES = (
    0,
    1,
    2,
    7,
    31,
    32,
    63,
    64,
    0x7F,
    0x80,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1 << 32,
    0x0123456789ABCDEF,
    0x7FFFFFFFFFFFFFFF,
    1 << 63,
    0xFFFFFFFFFFFFFFFF,
)
IMMEDIATES = (1, 2, 7, 0x7F, 0x7FFFFFFF, -1, -2, -0x80000000)
ARITHMETIC = (ebpf.ADD, ebpf.SUB, ebpf.MUL, ebpf.DIV, ebpf.OR, ebpf.AND, ebpf.MOD, ebpf.XOR, ebpf.MOV)
SHIFTS = (ebpf.LSH, ebpf.RSH, ebpf.ARSH)
CONDITIONS = (
    ebpf.JEQ,
    ebpf.JNE,
    ebpf.JGT,
    ebpf.JGE,
    ebpf.JLT,
    ebpf.JLE,
    ebpf.JSET,
    ebpf.JSGT,
    ebpf.JSGE,
    ebpf.JSLT,
    ebpf.JSLE,
)
EXIT = I(ebpf.JMP | ebpf.EXIT)
MOV_X, MOV_K = ebpf.ALU64 | ebpf.MOV | ebpf.X, ebpf.ALU64 | ebpf.MOV | ebpf.K
ADD_X, ADD_K = ebpf.ALU64 | ebpf.ADD | ebpf.X, ebpf.ALU64 | ebpf.ADD | ebpf.K
MUL_X, MUL_K = ebpf.ALU64 | ebpf.MUL | ebpf.X, ebpf.ALU64 | ebpf.MUL | ebpf.K
LDX_DW, STX_DW, ST_DW = (kind | ebpf.MEM | ebpf.DW for kind in (ebpf.LDX, ebpf.STX, ebpf.ST))
SIZES = (ebpf.B, ebpf.H, ebpf.W, ebpf.DW)
ATOMICS = (*(op | fetch for op in (ebpf.ADD, ebpf.OR, ebpf.AND, ebpf.XOR) for fetch in (0, 1)), ebpf.XCHG, ebpf.CMPXCHG)


def same(kernel: Side, emulator: Side, program: list[Instruction], data: bytes = FRAME) -> Outcome:
    expected = kernel.run(program, data)
    assert emulator.run(program, data) == expected, program
    return expected


def chain(steps: list[list[Instruction]]) -> list[Instruction]:
    """Short computations that leave a result in R1 each, folded into R0 so that every bit counts."""
    out = [I(MOV_K, 0)]
    for step in steps:
        out += [
            *step,
            *ld_imm64(3, 0x9E3779B97F4A7C15),
            I(MUL_X, 0, 3),
            I(ADD_X, 0, 1),
        ]
    return with_result(out)


def operands(a: int, b: int) -> list[Instruction]:
    return [*ld_imm64(1, a), *ld_imm64(2, b)]


@pytest.mark.parametrize("wide", (ebpf.ALU, ebpf.ALU64))
@pytest.mark.parametrize("op", ARITHMETIC + SHIFTS)
def test_arithmetic_with_registers(kernel: Side, emulator: Side, wide: int, op: int) -> None:
    steps = [[*operands(a, b), I(wide | op | ebpf.X, 1, 2)] for a, b in product(VALUES, VALUES)]
    assert same(kernel, emulator, chain(steps)).value == 1


@pytest.mark.parametrize("wide", (ebpf.ALU, ebpf.ALU64))
@pytest.mark.parametrize("op", ARITHMETIC)
def test_arithmetic_with_immediates(kernel: Side, emulator: Side, wide: int, op: int) -> None:
    steps = [[*ld_imm64(1, a), I(wide | op, 1, 0, 0, b)] for a, b in product(VALUES, IMMEDIATES)]
    assert same(kernel, emulator, chain(steps)).value == 1


@pytest.mark.parametrize("wide", (ebpf.ALU, ebpf.ALU64))
@pytest.mark.parametrize("op", SHIFTS)
def test_shifts_by_immediates(kernel: Side, emulator: Side, wide: int, op: int) -> None:
    counts = (0, 1, 7, 31) if wide == ebpf.ALU else (0, 1, 31, 32, 63)
    steps = [[*ld_imm64(1, a), I(wide | op, 1, 0, 0, b)] for a, b in product(VALUES, counts)]
    assert same(kernel, emulator, chain(steps)).value == 1


@pytest.mark.parametrize("wide", (ebpf.ALU, ebpf.ALU64))
@pytest.mark.parametrize("op", (ebpf.DIV, ebpf.MOD))
def test_signed_division(kernel: Side, emulator: Side, wide: int, op: int) -> None:
    steps = [[*operands(a, b), I(wide | op | ebpf.X, 1, 2, 1)] for a, b in product(VALUES, VALUES)]
    steps += [[*ld_imm64(1, a), I(wide | op, 1, 0, 1, b)] for a, b in product(VALUES, IMMEDIATES)]
    assert same(kernel, emulator, chain(steps)).value == 1


def test_negation_and_sign_extension(kernel: Side, emulator: Side) -> None:
    steps = []
    for a in VALUES:
        steps += [[*ld_imm64(1, a), I(wide | ebpf.NEG, 1)] for wide in (ebpf.ALU, ebpf.ALU64)]
        steps += [[*ld_imm64(2, a), I(ebpf.ALU | ebpf.MOV | ebpf.X, 1, 2, width)] for width in (8, 16)]
        steps += [[*ld_imm64(2, a), I(MOV_X, 1, 2, width)] for width in (8, 16, 32)]
    assert same(kernel, emulator, chain(steps)).value == 1


def test_byte_order(kernel: Side, emulator: Side) -> None:
    codes = (ebpf.ALU | ebpf.END, ebpf.ALU | ebpf.END | ebpf.X, ebpf.ALU64 | ebpf.END)
    steps = [[*ld_imm64(1, a), I(code, 1, 0, 0, width)] for a, code, width in product(VALUES, codes, (16, 32, 64))]
    assert same(kernel, emulator, chain(steps)).value == 1


@pytest.mark.parametrize("wide", (ebpf.JMP, ebpf.JMP32))
@pytest.mark.parametrize("op", CONDITIONS)
def test_conditions(kernel: Side, emulator: Side, wide: int, op: int) -> None:
    decide = [
        I(MOV_K, 1, 0, 0, 5),
        I(ebpf.JMP | ebpf.JA, 0, 0, 1),
        I(MOV_K, 1, 0, 0, 9),
    ]
    steps = [[*operands(a, b), I(wide | op | ebpf.X, 1, 2, 2), *decide] for a, b in product(VALUES, VALUES)]
    steps += [[*ld_imm64(1, a), I(wide | op, 1, 0, 2, b), *decide] for a, b in product(VALUES, IMMEDIATES)]
    for part in range(0, len(steps), 40):
        outcome = same(kernel, emulator, chain(steps[part : part + 40]))
        assert outcome.value == 1


@pytest.mark.parametrize("size", SIZES)
def test_loads_and_stores_on_the_stack(kernel: Side, emulator: Side, size: int) -> None:
    steps = []
    for value in VALUES:
        steps.append(
            [
                *ld_imm64(2, 0xA5A5A5A5A5A5A5A5),
                I(STX_DW, 10, 2, -8),
                *ld_imm64(2, value),
                I(ebpf.STX | ebpf.MEM | size, 10, 2, -8),
                I(LDX_DW, 1, 10, -8),
            ]
        )
        steps.append([*steps[-1], I(ebpf.LDX | ebpf.MEM | size, 1, 10, -8)])
        if size != ebpf.DW:
            steps.append([*steps[-1], I(ebpf.LDX | ebpf.MEMSX | size, 1, 10, -8)])
    for value in IMMEDIATES:
        steps.append([I(ST_DW, 10, 0, -8, 0), I(ebpf.ST | ebpf.MEM | size, 10, 0, -8, value), I(LDX_DW, 1, 10, -8)])
    assert same(kernel, emulator, chain(steps)).value == 1


@pytest.mark.parametrize("size", (ebpf.W, ebpf.DW))
@pytest.mark.parametrize("op", ATOMICS)
def test_atomics(kernel: Side, emulator: Side, size: int, op: int) -> None:
    body = [I(MOV_K, 8)]
    for old, new in product(VALUES[::2], VALUES[::3]):
        body += [
            *ld_imm64(1, old),
            I(STX_DW, 10, 1, -8),
            *ld_imm64(2, new),
            *ld_imm64(0, old & 0xFFFFFFFF),
            I(ebpf.STX | ebpf.ATOMIC | size, 10, 2, -8, op),
            I(LDX_DW, 1, 10, -8),
        ]
        for register in (0, 1, 2):
            body += [
                I(MUL_K, 8, 0, 0, 0x1003F),
                I(ADD_X, 8, register),
            ]
    assert same(kernel, emulator, with_result(body, 8)).value == 1


@pytest.mark.parametrize("size", SIZES)
def test_load_acquire_and_store_release(kernel: Side, emulator: Side, size: int) -> None:
    steps = [
        [
            I(ST_DW, 10, 0, -8, -1),
            *ld_imm64(2, value),
            I(ebpf.STX | ebpf.ATOMIC | size, 10, 2, -8, ebpf.STORE_REL),
            I(ebpf.STX | ebpf.ATOMIC | size, 1, 10, -8, ebpf.LOAD_ACQ),
        ]
        for value in VALUES
    ]
    assert same(kernel, emulator, chain(steps)).value == 1


def packet_load(mode: int, size: int, k: int, x: int = 0) -> list[Instruction]:
    return [
        I(MOV_X, 6, 1),
        *ld_imm64(7, x),
        I(ebpf.LD | mode | size, 0, 7 if mode == ebpf.IND else 0, 0, k),
        I(ADD_K, 0, 0, 0, 1),
        EXIT,
    ]


NET_OFF, LL_OFF = -0x100000, -0x200000
LENGTH = len(FRAME) - 14


@pytest.mark.parametrize("size", (ebpf.B, ebpf.H, ebpf.W))
def test_packet_loads(kernel: Side, emulator: Side, size: int) -> None:
    edges = [0, 1, 8, *range(LENGTH - 5, LENGTH + 2), 0x7FFFFFFF, -1, -0x80000000, -0x1000]
    relative = [
        base + at for base in (NET_OFF, LL_OFF) for at in (-1, 0, 3, 12, 14, *range(LENGTH - 5, LENGTH + 16), 0x10000)
    ]
    for k in edges + relative:
        same(kernel, emulator, packet_load(ebpf.ABS, size, k))
        same(kernel, emulator, packet_load(ebpf.IND, size, k, 2))
        same(kernel, emulator, packet_load(ebpf.IND, size, 2, k & 0xFFFFFFFFFFFFFFFF))


def test_a_load_outside_the_packet_ends_with_zero(kernel: Side, emulator: Side) -> None:
    assert same(kernel, emulator, packet_load(ebpf.ABS, ebpf.W, LENGTH)).value == 0


def test_functions_have_frames_of_their_own(kernel: Side, emulator: Side) -> None:
    call = ebpf.JMP | ebpf.CALL
    program = with_result(
        [
            I(MOV_K, 6, 0, 0, 5),
            I(ST_DW, 10, 0, -8, 77),
            I(MOV_X, 1, 10),
            I(call, 0, ebpf.PSEUDO_CALL, 0, 6),
            I(MUL_X, 0, 6),
            I(LDX_DW, 2, 10, -8),
            I(ADD_X, 0, 2),
        ]
    )
    function = [
        I(MOV_K, 6, 0, 0, 100),
        I(ST_DW, 10, 0, -8, 3),
        I(LDX_DW, 0, 1, -8),
        I(ST_DW, 1, 0, -8, 1000),
        I(LDX_DW, 2, 10, -8),
        I(ADD_X, 0, 2),
        EXIT,
    ]
    outcome = same(kernel, emulator, program + function)
    assert int.from_bytes(outcome.context[CB : CB + 8], "little") == (77 + 3) * 5 + 1000


@pytest.mark.parametrize("depth", (7, 8))
def test_eight_frames_is_the_most(kernel: Side, emulator: Side, depth: int) -> None:
    program: list[Instruction] = []
    for _ in range(depth):
        program += [I(ebpf.JMP | ebpf.CALL, 0, ebpf.PSEUDO_CALL, 0, 1), EXIT]
    program += [I(MOV_K, 0, 0, 0, 42), EXIT]
    assert same(kernel, emulator, program) == (Outcome(value=42) if depth == 7 else Outcome(refused=7))._replace(
        context=emulator.run(program).context
    )


def test_loops_gotol_and_may_goto(kernel: Side, emulator: Side) -> None:
    loop = [
        I(MOV_K, 0),
        I(ebpf.JMP | ebpf.JCOND, 0, 0, 3),
        I(ADD_K, 0, 0, 0, 3),
        I(ebpf.JMP | ebpf.JGT | ebpf.K, 0, 0, 1, 1000),
        I(ebpf.JMP32 | ebpf.JA, 0, 0, 0, -4),
    ]
    outcome = same(kernel, emulator, with_result(loop))
    assert int.from_bytes(outcome.context[CB : CB + 8], "little") == 1002


def test_random_straight_line_programs(kernel: Side, emulator: Side) -> None:
    rng = Random(20)
    for _ in range(300):
        assert same(kernel, emulator, random_program(rng)).value == 1


def random_program(rng: Random) -> list[Instruction]:
    """Registers full of packet bytes, arithmetic, stack traffic and forward jumps."""
    body = [I(MOV_X, 6, 1)]
    for register in (7, 8, 2, 3, 4, 5):
        body += [
            I(ebpf.LD | ebpf.ABS | ebpf.W, 0, 0, 0, rng.randrange(60)),
            I(STX_DW, 10, 0, -8 * register),
        ]
    body += [I(LDX_DW, register, 10, -8 * register) for register in (7, 8, 2, 3, 4, 5)]
    registers = (0, 2, 3, 4, 5, 7, 8)
    for _ in range(rng.randrange(5, 60)):
        d, s, imm = rng.choice(registers), rng.choice(registers), rng.choice((*IMMEDIATES, rng.getrandbits(31)))
        wide, kind = rng.choice((ebpf.ALU, ebpf.ALU64)), rng.randrange(6)
        if kind < 3:
            op = rng.choice(ARITHMETIC + SHIFTS)
            off = int(op in (ebpf.DIV, ebpf.MOD) and rng.random() < 0.5)
            if rng.random() < 0.5:
                body.append(I(wide | op | ebpf.X, d, s, off))
            else:
                body.append(I(wide | op, d, 0, off, imm & 31 if op in SHIFTS else imm))
        elif kind == 3:
            # Over an instruction that changes a register.
            wide = rng.choice((ebpf.JMP, ebpf.JMP32))
            body += [
                I(wide | rng.choice(CONDITIONS) | ebpf.X, d, s, 1),
                I(ebpf.ALU64 | ebpf.XOR | ebpf.K, d, 0, 0, imm),
            ]
        else:
            size, slot = rng.choice(SIZES), -8 * rng.choice((7, 8, 2, 3, 4, 5))
            body.append(
                rng.choice((I(ebpf.STX | ebpf.MEM | size, 10, s, slot), I(ebpf.LDX | ebpf.MEM | size, d, 10, slot)))
            )
    for register in registers[1:]:
        body += [I(MUL_K, 0, 0, 0, 31), I(ADD_X, 0, register)]
    return with_result(body)
