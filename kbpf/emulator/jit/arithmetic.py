"""Arithmetic, byte order and conditions in LLVM IR, an operation a row, as `kbpf.emulator.semantics` means them."""

from __future__ import annotations

import sys

from kbpf.emulator.jit.code import Body
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction

_PLAIN = {
    ebpf.ADD: "add",
    ebpf.SUB: "sub",
    ebpf.MUL: "mul",
    ebpf.OR: "or",
    ebpf.AND: "and",
    ebpf.XOR: "xor",
}
_SHIFTS = {ebpf.LSH: "shl", ebpf.RSH: "lshr", ebpf.ARSH: "ashr"}
_CONDITIONS = {
    ebpf.JEQ: "eq",
    ebpf.JNE: "ne",
    ebpf.JGT: "ugt",
    ebpf.JGE: "uge",
    ebpf.JLT: "ult",
    ebpf.JLE: "ule",
    ebpf.JSGT: "sgt",
    ebpf.JSGE: "sge",
    ebpf.JSLT: "slt",
    ebpf.JSLE: "sle",
}


def _operands(body: Body, instruction: Instruction, wide: bool) -> tuple[str, str]:
    opcode, dst, src, _, imm = instruction
    get = body.get if wide else body.get32
    return get(dst), get(src) if opcode & ebpf.X else str(imm)


def arithmetic(body: Body, instruction: Instruction) -> None:
    """An instruction of class ALU or ALU64."""
    opcode, dst, src, off, imm = instruction
    op, wide = opcode & 0xF0, opcode & 7 == ebpf.ALU64
    kind = "i64" if wide else "i32"
    put = body.set if wide else body.set32
    if op == ebpf.END:
        _byte_order(body, instruction)
    elif op == ebpf.MOV:
        if not opcode & ebpf.X:
            body.set(dst, str(imm if wide else imm & 0xFFFFFFFF))
        elif off:
            narrow = body.value(f"trunc i64 {body.get(src)} to i{off}")
            put(dst, body.value(f"sext i{off} {narrow} to {kind}"))
        elif wide:
            body.set(dst, body.get(src))
        else:
            body.set32(dst, body.get32(src))
    elif op == ebpf.NEG:
        value = body.get(dst) if wide else body.get32(dst)
        put(dst, body.value(f"sub {kind} 0, {value}"))
    else:
        a, b = _operands(body, instruction, wide)
        if op in _PLAIN:
            result = body.value(f"{_PLAIN[op]} {kind} {a}, {b}")
        elif op in _SHIFTS:
            count = body.value(f"and {kind} {b}, {63 if wide else 31}")
            result = body.value(f"{_SHIFTS[op]} {kind} {a}, {count}")
        else:
            result = _division(body, op, kind, a, b, signed=off == 1)
        put(dst, result)


def _division(body: Body, op: int, kind: str, a: str, b: str, *, signed: bool) -> str:
    """By zero the quotient is 0 and the remainder the dividend. LLVM leaves the smallest number by -1 open, too."""
    zero = body.value(f"icmp eq {kind} {b}, 0")
    alone = zero
    if signed:
        minus = body.value(f"icmp eq {kind} {b}, -1")
        alone = body.value(f"or i1 {zero}, {minus}")
    by = body.value(f"select i1 {alone}, {kind} 1, {kind} {b}")
    name = ("s" if signed else "u") + ("div" if op == ebpf.DIV else "rem")
    result = body.value(f"{name} {kind} {a}, {by}")
    if signed:
        other = body.value(f"sub {kind} 0, {a}") if op == ebpf.DIV else "0"
        result = body.value(f"select i1 {minus}, {kind} {other}, {kind} {result}")
    return body.value(f"select i1 {zero}, {kind} {'0' if op == ebpf.DIV else a}, {kind} {result}")


def _byte_order(body: Body, instruction: Instruction) -> None:
    opcode, dst, _, _, width = instruction
    to_big = bool(opcode & ebpf.X)
    swaps = opcode & 7 == ebpf.ALU64 or to_big == (sys.byteorder == "little")
    value = body.get(dst)
    if width < 64:
        value = body.value(f"trunc i64 {value} to i{width}")
    if swaps:
        value = body.value(f"call i{width} @llvm.bswap.i{width}(i{width} {value})")
    if width < 64:
        value = body.value(f"zext i{width} {value} to i64")
    body.set(dst, value)


def condition(body: Body, instruction: Instruction) -> str:
    """Whether a conditional jump is taken."""
    opcode = instruction.opcode
    op, wide = opcode & 0xF0, opcode & 7 == ebpf.JMP
    kind = "i64" if wide else "i32"
    a, b = _operands(body, instruction, wide)
    if op == ebpf.JSET:
        return body.value(f"icmp ne {kind} {body.value(f'and {kind} {a}, {b}')}, 0")
    return body.value(f"icmp {_CONDITIONS[op]} {kind} {a}, {b}")
