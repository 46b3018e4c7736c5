"""Classic instructions as tcpdump lists them: ``tcpdump -d``, ``-dd`` and ``-ddd``.

The text is that of libpcap on Linux (bpf_image(3PCAP)), to the space: offsets and most
operands are signed decimals, jump targets are absolute, ancillary loads go by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from kbpf.isa.cbpf import (
    ABS,
    AD_OFF,
    ADD,
    ALU,
    ANCILLARY,
    AND,
    DIV,
    IMM,
    IND,
    JA,
    JEQ,
    JGE,
    JGT,
    JMP,
    JSET,
    LD,
    LDX,
    LEN,
    LSH,
    MEM,
    MISC,
    MOD,
    MSH,
    MUL,
    NEG,
    OR,
    RET,
    RSH,
    ST,
    STX,
    SUB,
    TAX,
    TXA,
    XOR,
    A,
    B,
    H,
    Instruction,
    K,
    W,
    X,
)

Style = Literal["d", "dd", "ddd"]

# libpcap names one ancillary word otherwise than the kernel's tools do.
_ANCILLARY = {offset: word.asm for offset, word in ANCILLARY.items()} | {48: "vlanp", 56: "random"}


def _signed(k: int) -> int:
    return k - (1 << 32) if k & 0x80000000 else k


def _absolute(k: int) -> str:
    name = _ANCILLARY.get(k - AD_OFF)
    return f"[{_signed(k) if name is None else name}]"


def _decimal(k: int) -> str:
    return f"#{_signed(k)}"


def _hexadecimal(k: int) -> str:
    return f"#{k:#x}"


def _scratch(k: int) -> str:
    return f"M[{_signed(k)}]"


def _constant(text: str) -> Callable[[int], str]:
    return lambda k: text


_NOTHING = _constant("")
_SIZES = {W: "ld", H: "ldh", B: "ldb"}
_JUMPS = {JEQ: "jeq", JGT: "jgt", JGE: "jge", JSET: "jset"}
_ARITHMETIC = {ADD: "add", SUB: "sub", MUL: "mul", DIV: "div", MOD: "mod", LSH: "lsh", RSH: "rsh"}
_LOGIC = {AND: "and", OR: "or", XOR: "xor"}

# By opcode: the mnemonic, and the operand from k.
_FORMS: dict[int, tuple[str, Callable[[int], str]]] = {
    **{LD | size | ABS: (name, _absolute) for size, name in _SIZES.items()},
    **{LD | size | IND: (name, lambda k: f"[x + {_signed(k)}]") for size, name in _SIZES.items()},
    LD | IMM: ("ld", _hexadecimal),
    LDX | IMM: ("ldx", _hexadecimal),
    LD | LEN: ("ld", _constant("#pktlen")),
    LDX | B | MSH: ("ldxb", lambda k: f"4*([{_signed(k)}]&0xf)"),
    LD | MEM: ("ld", _scratch),
    LDX | MEM: ("ldx", _scratch),
    ST: ("st", _scratch),
    STX: ("stx", _scratch),
    **{JMP | op | K: (name, _hexadecimal) for op, name in _JUMPS.items()},
    **{JMP | op | X: (name, _constant("x")) for op, name in _JUMPS.items()},
    **{ALU | op | K: (name, _decimal) for op, name in _ARITHMETIC.items()},
    **{ALU | op | K: (name, _hexadecimal) for op, name in _LOGIC.items()},
    **{ALU | op | X: (name, _constant("x")) for op, name in (_ARITHMETIC | _LOGIC).items()},
    ALU | NEG: ("neg", _NOTHING),
    RET | K: ("ret", _decimal),
    RET | A: ("ret", _NOTHING),
    MISC | TAX: ("tax", _NOTHING),
    MISC | TXA: ("txa", _NOTHING),
}


def line(pc: int, instruction: Sequence[int]) -> str:
    """One instruction as ``tcpdump -d`` prints it; opcodes that libpcap has no name for are ``unimp``."""
    code, jt, jf, k = instruction
    if code == JMP | JA:
        return f"({pc:03d}) {'ja':8} {_signed((pc + 1 + k) & 0xFFFFFFFF)}"
    name, operand = _FORMS.get(code, ("unimp", _constant(f"{code:#x}")))
    if code & 7 == JMP and code & 0xF0 != JA:
        return f"({pc:03d}) {name:8} {operand(k):16} jt {pc + 1 + jt}\tjf {pc + 1 + jf}"
    return f"({pc:03d}) {name:8} {operand(k)}"


def listing(instructions: Iterable[Sequence[int]], style: Style = "d") -> str:
    """The instructions as ``tcpdump -d`` (assembler), ``-dd`` (C initialisers) or ``-ddd`` (numbers) prints them.

    Lines end with a newline, the last one too.
    """
    program = [Instruction(*i) for i in instructions]
    if style == "d":
        lines = [line(pc, instruction) for pc, instruction in enumerate(program)]
    elif style == "dd":
        lines = [f"{{ {code:#x}, {jt}, {jf}, {k:#010x} }}," for code, jt, jf, k in program]
    elif style == "ddd":
        lines = [str(len(program)), *(f"{code} {jt} {jf} {k}" for code, jt, jf, k in program)]
    else:
        raise ValueError(f"no listing style {style!r}: d, dd or ddd")
    return "".join(f"{text}\n" for text in lines)
