"""eBPF: the instruction as a tuple, its opcodes as tables, encoding and decoding.

Names and numbers are those of RFC 9669 and linux/bpf.h. An instruction here is one
8-byte slot; the 64-bit immediate load takes two, the second with opcode 0, so that
jump offsets count elements of the sequence.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

# Instruction classes (RFC 9669 section 3).
LD, LDX, ST, STX, ALU, JMP, JMP32, ALU64 = range(8)
# Sizes and modes of loads and stores.
W, H, B, DW = 0x00, 0x08, 0x10, 0x18
IMM, ABS, IND, MEM, MEMSX, ATOMIC = 0x00, 0x20, 0x40, 0x60, 0x80, 0xC0
# Operand source; for END: K is to little endian, X to big endian, and in ALU64 the swap.
K, X = 0x00, 0x08
# Arithmetic operations.
ADD, SUB, MUL, DIV, OR, AND, LSH, RSH, NEG, MOD, XOR, MOV, ARSH, END = (n << 4 for n in range(14))
# Jump operations; JCOND is Linux's may_goto.
JA, JEQ, JGT, JGE, JSET, JNE, JSGT, JSGE, CALL, EXIT, JLT, JLE, JSLT, JSLE, JCOND = (n << 4 for n in range(15))

# Atomic operations in `imm` (RFC 9669 section 5.3; the last two are Linux 6.15's).
FETCH = 0x01
XCHG = 0xE0 | FETCH
CMPXCHG = 0xF0 | FETCH
LOAD_ACQ = 0x100
STORE_REL = 0x110

# What the `src` of a 64-bit immediate load says that `imm` is (linux/bpf.h).
PSEUDO_MAP_FD, PSEUDO_MAP_VALUE, PSEUDO_BTF_ID, PSEUDO_FUNC, PSEUDO_MAP_IDX, PSEUDO_MAP_IDX_VALUE = range(1, 7)
# What the `src` of a call says that `imm` is; 0 is a helper id.
PSEUDO_CALL, PSEUDO_KFUNC_CALL = 1, 2

#: Registers: R0 result, R1 to R5 arguments, R6 to R9 saved by the callee, R10 frame pointer (read-only).
REGISTERS = 11
FP = 10
#: Bytes of stack, of all frames together.
STACK_SIZE = 512
MAX_CALL_FRAMES = 8
#: Tail calls that one run may make.
MAX_TAIL_CALLS = 33

#: The opcode of the 64-bit immediate load.
LD_IMM64 = LD | IMM | DW


class Instruction(NamedTuple):
    """One 8-byte slot of a program: `opcode` 8 bits, `dst` and `src` 4 each, `off` and `imm` signed 16 and 32 bits."""

    opcode: int
    dst: int = 0
    src: int = 0
    off: int = 0
    imm: int = 0


_SLOT = struct.Struct("=BBhi")
_BIG = sys.byteorder == "big"


def encode(instructions: Iterable[Sequence[int]]) -> bytes:
    """The instructions as an array of ``struct bpf_insn`` in native byte order.

    `imm` may be given as unsigned. Raises `ValueError` where a field does not fit.
    """
    parts = []
    for index, (opcode, dst, src, off, imm) in enumerate(instructions):
        registers = dst << 4 | src if _BIG else src << 4 | dst
        try:
            parts.append(_SLOT.pack(opcode, registers, off, imm - (1 << 32) if imm > 0x7FFFFFFF else imm))
        except struct.error as error:
            raise ValueError(f"instruction {index}: {error}") from None
    return b"".join(parts)


def decode(data: bytes) -> tuple[Instruction, ...]:
    """The opposite of `encode`; raises `ValueError` if the length is no multiple of 8 bytes."""
    if len(data) % 8:
        raise ValueError(f"{len(data)} bytes are no whole number of 8-byte instructions")
    if _BIG:
        return tuple(Instruction(op, regs >> 4, regs & 15, off, imm) for op, regs, off, imm in _SLOT.iter_unpack(data))
    return tuple(Instruction(op, regs & 15, regs >> 4, off, imm) for op, regs, off, imm in _SLOT.iter_unpack(data))


def ld_imm64(dst: int, value: int, src: int = 0) -> tuple[Instruction, Instruction]:
    """The two slots of ``dst = value ll``; with a pseudo `src`, `value` is imm | next imm << 32."""
    return (
        Instruction(LD_IMM64, dst, src, 0, signed32(value)),
        Instruction(0, 0, 0, 0, signed32(value >> 32)),
    )


def spare_maps(instructions: Iterable[Instruction], count: int) -> list[int]:
    """Of so many maps, those that no instruction refers to by index."""
    by_index = (PSEUDO_MAP_IDX, PSEUDO_MAP_IDX_VALUE)
    named = {step.imm for step in instructions if step.opcode == LD_IMM64 and step.src in by_index}
    return [index for index in range(count) if index not in named]


def signed32(value: int) -> int:
    """The low 32 bits of `value` as `imm` holds them."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value > 0x7FFFFFFF else value
