"""The plugin of bpf_conformance: its protocol, and results that the kernel gives, too, where it takes the program."""

from __future__ import annotations

import io
import struct
import subprocess
import sys

import pytest

import kbpf
from kbpf.backend import Engine
from kbpf.errors import EmulationFault
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction, ld_imm64
from kbpf.specs import ProgramSpec
from kbpf.testing import conformance

I = Instruction  # noqa: E741
A64, A32, K, X = ebpf.ALU64, ebpf.ALU, ebpf.K, ebpf.X
EXIT = I(ebpf.JMP | ebpf.EXIT)
ENGINES = pytest.mark.parametrize(
    "engine", ["interpreter", pytest.param("jit", marks=pytest.mark.requires("llvmlite"))]
)


def mov(dst: int, value: int) -> tuple[Instruction, Instruction]:
    return ld_imm64(dst, value)


def alu(op: int, wide: int = A64, off: int = 0) -> list[Instruction]:
    """R0 = R0 op R1."""
    return [I(wide | op | X, 0, 1, off)]


VALUES = [0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 63, (1 << 64) - 1, 0x0123456789ABCDEF]
OPERATIONS = {
    f"{name}{bits}": alu(op, wide)
    for bits, wide in ((64, A64), (32, A32))
    for name, op in {
        "add": ebpf.ADD, "sub": ebpf.SUB, "mul": ebpf.MUL, "div": ebpf.DIV, "or": ebpf.OR, "and": ebpf.AND,
        "lsh": ebpf.LSH, "rsh": ebpf.RSH, "mod": ebpf.MOD, "xor": ebpf.XOR, "mov": ebpf.MOV, "arsh": ebpf.ARSH,
    }.items()
}  # fmt: skip
OPERATIONS |= {
    "sdiv64": alu(ebpf.DIV, A64, 1),
    "smod64": alu(ebpf.MOD, A64, 1),
    "sdiv32": alu(ebpf.DIV, A32, 1),
    "smod32": alu(ebpf.MOD, A32, 1),
    "neg64": [I(A64 | ebpf.NEG, 0)],
    "neg32": [I(A32 | ebpf.NEG, 0)],
    **{f"movsx{size}": [I(A64 | ebpf.MOV | X, 0, 1, size)] for size in (8, 16, 32)},
    **{f"le{size}": [I(A32 | ebpf.END | K, 0, 0, 0, size)] for size in (16, 32, 64)},
    **{f"be{size}": [I(A32 | ebpf.END | X, 0, 0, 0, size)] for size in (16, 32, 64)},
    **{f"bswap{size}": [I(A64 | ebpf.END | K, 0, 0, 0, size)] for size in (16, 32, 64)},
    **{
        f"{name}{bits}": [I(kind | op | X, 0, 1, 3), *mov(0, 0), I(ebpf.JMP | ebpf.JA, 0, 0, 2), *mov(0, 1)]
        for bits, kind in ((64, ebpf.JMP), (32, ebpf.JMP32))
        for name, op in {
            "jeq": ebpf.JEQ, "jne": ebpf.JNE, "jgt": ebpf.JGT, "jge": ebpf.JGE, "jlt": ebpf.JLT, "jle": ebpf.JLE,
            "jset": ebpf.JSET, "jsgt": ebpf.JSGT, "jsge": ebpf.JSGE, "jslt": ebpf.JSLT, "jsle": ebpf.JSLE,
        }.items()
    },
}  # fmt: skip


def on_the_kernel(body: list[Instruction], a: int, b: int) -> int:
    """R0 of the body as a socket filter, kept in the context."""
    whole = (
        I(A64 | ebpf.MOV | X, 9, 1), *mov(0, a), *mov(1, b), *body,
        I(ebpf.STX | ebpf.MEM | ebpf.DW, 9, 0, 48), *mov(0, 1), EXIT,
    )  # fmt: skip
    with kbpf.load_program(ProgramSpec(instructions=whole), backend="kernel") as program:
        low, high = program.run(bytes(64)).context["cb"][:2]
    return int(high << 32 | low)


@ENGINES
@pytest.mark.requires("kernel")
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_leave_in_r0_what_the_kernel_leaves(engine: Engine, name: str) -> None:
    body = OPERATIONS[name]
    pairs = [(a, b) for a in VALUES for b in VALUES][:: 3 if len(body) > 1 else 2]
    for a, b in pairs:
        program = ebpf.encode([*mov(0, a), *mov(1, b), *body, EXIT])
        assert conformance.run(program, engine=engine) == on_the_kernel(body, a, b), (a, b)


@ENGINES
def test_memory_is_in_r1_and_its_length_in_r2(engine: Engine) -> None:
    length = ebpf.encode([I(A64 | ebpf.MOV | X, 0, 2), EXIT])
    assert conformance.run(length, bytes(37), engine) == 37
    assert conformance.run(length, b"", engine) == 0
    memory = bytes(range(1, 17))
    for size, count, form in ((ebpf.B, 1, "B"), (ebpf.H, 2, "H"), (ebpf.W, 4, "I"), (ebpf.DW, 8, "Q")):
        for at in range(16 - count + 1):
            load = ebpf.encode([I(ebpf.LDX | ebpf.MEM | size, 0, 1, at), EXIT])
            assert conformance.run(load, memory, engine) == struct.unpack_from("=" + form, memory, at)[0]
        for at in (-1, 16 - count + 1, 16, 0x7FFF):
            with pytest.raises(EmulationFault):
                conformance.run(ebpf.encode([I(ebpf.LDX | ebpf.MEM | size, 0, 1, at), EXIT]), memory, engine)
    signed = ebpf.encode([I(ebpf.LDX | ebpf.MEMSX | ebpf.B, 0, 1), EXIT])
    assert conformance.run(signed, b"\x80", engine) == (1 << 64) - 128


@ENGINES
def test_memory_can_be_written_and_is_a_copy(engine: Engine) -> None:
    memory = bytearray(16)
    body = [
        I(ebpf.ST | ebpf.MEM | ebpf.W, 1, 0, 4, -2),
        I(A64 | ebpf.MOV, 3, 0, 0, 5),
        I(ebpf.STX | ebpf.ATOMIC | ebpf.W, 1, 3, 4, ebpf.ADD | ebpf.FETCH),
        I(ebpf.LDX | ebpf.MEM | ebpf.W, 0, 1, 4),
        I(A64 | ebpf.LSH, 0, 0, 0, 32),
        I(A64 | ebpf.OR | X, 0, 3),
        EXIT,
    ]
    assert conformance.run(ebpf.encode(body), bytes(memory), engine) == 3 << 32 | 0xFFFFFFFE
    assert memory == bytes(16)


@ENGINES
def test_functions_loops_and_the_stack(engine: Engine) -> None:
    """The tenth Fibonacci number by recursion, as far as eight frames go, and the hundredth sum by a loop."""
    fib = [
        I(A64 | ebpf.MOV, 1, 0, 0, 5),
        I(ebpf.JMP | ebpf.CALL, 0, 1, 0, 1),
        EXIT,
        I(ebpf.JMP | ebpf.JGT, 1, 0, 2, 1),
        I(A64 | ebpf.MOV | X, 0, 1),
        EXIT,
        I(A64 | ebpf.MOV | X, 6, 1),
        I(A64 | ebpf.ADD, 1, 0, 0, -1),
        I(ebpf.JMP | ebpf.CALL, 0, 1, 0, -6),
        I(ebpf.STX | ebpf.MEM | ebpf.DW, 10, 0, -8),
        I(A64 | ebpf.MOV | X, 1, 6),
        I(A64 | ebpf.ADD, 1, 0, 0, -2),
        I(ebpf.JMP | ebpf.CALL, 0, 1, 0, -10),
        I(ebpf.LDX | ebpf.MEM | ebpf.DW, 1, 10, -8),
        I(A64 | ebpf.ADD | X, 0, 1),
        EXIT,
    ]
    assert conformance.run(ebpf.encode(fib), engine=engine) == 5
    total = [
        I(A64 | ebpf.MOV, 0),
        I(A64 | ebpf.MOV, 1),
        I(A64 | ebpf.ADD, 1, 0, 0, 1),
        I(A64 | ebpf.ADD | X, 0, 1),
        I(ebpf.JMP | ebpf.JLT, 1, 0, -3, 100),
    ]
    assert conformance.run(ebpf.encode(total), engine=engine) == 5050


@ENGINES
@pytest.mark.parametrize(
    ("program", "words"),
    [
        ([I(0xFF), EXIT], "unknown opcode 0xff"),
        ([I(ebpf.JMP | ebpf.JA, 0, 0, 5), EXIT], "out of the program"),
        ([I(ebpf.JMP | ebpf.CALL, 0, 0, 0, 4711), EXIT], "no helper 4711"),
        ([I(A64 | ebpf.MOV | X, 12, 1), EXIT], "no register R12"),
        ([ld_imm64(0, 0)[0]], "within an instruction"),
        ([*ld_imm64(0, 3, ebpf.PSEUDO_MAP_FD), EXIT], "nothing of the kernel's"),
        ([], "no program"),
        ([ld_imm64(0, 0)[0], I(A64 | ebpf.MOV), EXIT], "invalid bpf_ld_imm64"),
        # One function goes on into another, or jumps there.
        ([I(A64 | ebpf.MOV), I(ebpf.JMP | ebpf.CALL, 0, 1, 0, 0)], "last insn is not an exit or jmp"),
        ([I(ebpf.JMP | ebpf.CALL, 0, 1, 0, 1), EXIT, I(ebpf.JMP | ebpf.JA, 0, 0, -3)], "jump out of range"),
    ],
)
def test_what_cannot_be_run_is_said(engine: Engine, program: list[Instruction], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        conformance.run(ebpf.encode(program), engine=engine)


@ENGINES
def test_what_does_not_end_is_a_fault(engine: Engine) -> None:
    with pytest.raises(EmulationFault, match="budget"):
        conformance.run(ebpf.encode([I(ebpf.JMP | ebpf.JA, 0, 0, -1), EXIT]), engine=engine)


@pytest.mark.parametrize("options", [[], pytest.param(["--jit"], marks=pytest.mark.requires("llvmlite"))])
def test_the_protocol(options: list[str]) -> None:
    program = ebpf.encode([I(ebpf.LDX | ebpf.MEM | ebpf.DW, 0, 1), EXIT])
    spaced = " ".join(f"{byte:02x}" for byte in program) + "\n"
    command = [sys.executable, "-m", "kbpf.testing.conformance"]
    for arguments in (["ff 00 00 00 00 00 00 80", *options], [*options, "ff00000000000080"]):
        done = subprocess.run([*command, *arguments], input=spaced, capture_output=True, text=True, check=True)
        assert done.stdout == "80000000000000ff\n"


@pytest.mark.parametrize("arguments", [[], [""], ["", ""], ["", "--jit"]])
def test_there_may_be_no_memory_and_no_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("b7 00 00 00  2a 00 00 00  95 00 00 00 00 00 00 00 \n"))
    if "--jit" in arguments:
        pytest.importorskip("llvmlite")
    assert conformance.main(arguments) == 0
    assert capsys.readouterr().out == "2a\n"


def test_errors_are_a_line_and_a_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("95 00"))
    assert conformance.main([]) == 1
    assert capsys.readouterr().err.startswith("kbpf-conformance: ")


@pytest.mark.parametrize(("closed", "words"), [("<&-", "is closed"), ("0>/dev/null", "Bad file descriptor")])
def test_standard_input_that_cannot_be_read_is_a_line(closed: str, words: str) -> None:
    command = ["sh", "-c", f'exec "$0" -m kbpf.testing.conformance {closed}', sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("kbpf-conformance: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
