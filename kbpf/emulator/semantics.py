"""What each eBPF instruction means, written once.

The tables below say it: an expression for each arithmetic operation and each condition, over the operands ``{a}``
(destination) and ``{b}`` (source or immediate), unsigned and already cut to the operation's width. `factory` turns an
opcode into a function that binds one instruction's fields and gives its step: a function that takes the machine
state, does what the instruction does and returns the index of the next one. Steps are compiled from the tables on
first use, so that a step costs one Python call and nothing is decided at run time that is known at load time.

The state is a list: registers R0 to R10, then the slots named below. The semantics are RFC 9669's, and Linux's where it
leaves something open; loads from packets are Linux's (`bpf_skb_load_helper_*`, net/core/filter.c).
"""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

from kbpf.isa import ebpf

#: Slots of the state after the registers: the run, its regions' buffers (read, write), the packet from offset 0, the
#: budget.
RUN, READ, WRITE, DATA, FUEL = range(ebpf.REGISTERS, ebpf.REGISTERS + 5)

State: TypeAlias = "list[Any]"
Step: TypeAlias = Callable[[State], int]
#: Called with dst, src, off, imm, the index of the next instruction, of the jump's target, and of what ends the
#: program.
Factory: TypeAlias = Callable[[int, int, int, int, int, int, int], Step]

ARITHMETIC = {
    ebpf.ADD: "{a} + {b}",
    ebpf.SUB: "{a} - {b}",
    ebpf.MUL: "{a} * {b}",
    ebpf.DIV: "{a} // {b} if {b} else 0",
    ebpf.OR: "{a} | {b}",
    ebpf.AND: "{a} & {b}",
    ebpf.LSH: "{a} << ({b} & {shift})",
    ebpf.RSH: "{a} >> ({b} & {shift})",
    ebpf.NEG: "-{a}",
    ebpf.MOD: "{a} % {b} if {b} else {a}",
    ebpf.XOR: "{a} ^ {b}",
    ebpf.MOV: "{b}",
    ebpf.ARSH: "(({a} ^ {sign}) - {sign}) >> ({b} & {shift})",
}
#: With offset 1, division truncates toward zero and the remainder has the dividend's sign.
SIGNED_ARITHMETIC = {
    ebpf.DIV: "sdiv(({a} ^ {sign}) - {sign}, ({b} ^ {sign}) - {sign})",
    ebpf.MOD: "smod(({a} ^ {sign}) - {sign}, ({b} ^ {sign}) - {sign})",
}
CONDITIONS = {
    ebpf.JEQ: "{a} == {b}",
    ebpf.JNE: "{a} != {b}",
    ebpf.JGT: "{a} > {b}",
    ebpf.JGE: "{a} >= {b}",
    ebpf.JLT: "{a} < {b}",
    ebpf.JLE: "{a} <= {b}",
    ebpf.JSET: "{a} & {b}",
    ebpf.JSGT: "({a} ^ {sign}) > ({b} ^ {sign})",
    ebpf.JSGE: "({a} ^ {sign}) >= ({b} ^ {sign})",
    ebpf.JSLT: "({a} ^ {sign}) < ({b} ^ {sign})",
    ebpf.JSLE: "({a} ^ {sign}) <= ({b} ^ {sign})",
}
#: Read-modify-write operations, with or without FETCH: the new value of memory from the old one ``{a}`` and the
#: source ``{b}``.
ATOMICS = {ebpf.ADD: "{a} + {b}", ebpf.OR: "{a} | {b}", ebpf.AND: "{a} & {b}", ebpf.XOR: "{a} ^ {b}"}

# Results that stay within their operands' width need no cutting.
_NARROW = {ebpf.DIV, ebpf.OR, ebpf.AND, ebpf.RSH, ebpf.MOD, ebpf.XOR, ebpf.MOV}
_SIZES = {ebpf.B: 1, ebpf.H: 2, ebpf.W: 4, ebpf.DW: 8}


def sdiv(a: int, b: int) -> int:
    if b == 0:
        return 0
    return abs(a) // abs(b) if (a < 0) == (b < 0) else -(abs(a) // abs(b))


def smod(a: int, b: int) -> int:
    if b == 0:
        return a
    return -(abs(a) % abs(b)) if a < 0 else abs(a) % abs(b)


def swap(value: int, width: int) -> int:
    """The low `width` bits with their bytes reversed."""
    size = width // 8
    return int.from_bytes((value & ((1 << width) - 1)).to_bytes(size, "little"), "big")


_NAMES: dict[str, Any] = {
    "sdiv": sdiv,
    "smod": smod,
    "swap": swap,
    "bad_access": (KeyError, struct.error),
    **{f"get{size}": struct.Struct("=" + c).unpack_from for size, c in zip((1, 2, 4, 8), "BHIQ", strict=True)},
    **{f"sget{size}": struct.Struct("=" + c).unpack_from for size, c in zip((1, 2, 4), "bhi", strict=True)},
    **{f"put{size}": struct.Struct("=" + c).pack_into for size, c in zip((1, 2, 4, 8), "BHIQ", strict=True)},
    "missing": (IndexError, struct.error),
    "big4": struct.Struct(">I").unpack_from,
}
_CONSTANTS = {
    "RUN": RUN,
    "READ": READ,
    "WRITE": WRITE,
    "DATA": DATA,
    "FUEL": FUEL,
    "M32": 0xFFFFFFFF,
    "M64": 0xFFFFFFFFFFFFFFFF,
}
_CONSTANT = re.compile(r"\b(" + "|".join(_CONSTANTS) + r")\b")


def _compile(body: str) -> Factory:
    """The factory whose steps run `body`, over the state ``r`` and the factory's arguments."""
    lines = [f"        {line}\n" for line in body.splitlines()]
    source = f"def make(d, s, off, imm, next, target, end):\n    def step(r):\n{''.join(lines)}    return step\n"
    names = dict(_NAMES)
    exec(_CONSTANT.sub(lambda match: str(_CONSTANTS[match[0]]), source), names)
    made: Factory = names["make"]
    return made


@cache
def factory(opcode: int, off: int, imm: int, backward: bool) -> Factory | None:
    """What makes the steps of an instruction, or None if there is no such instruction.

    `off` and `imm` matter where they choose the operation (see `variant`). Calls, exits and 64-bit immediate loads
    belong to the interpreter, which knows what they refer to.
    """
    kind = opcode & 7
    if kind in (ebpf.ALU, ebpf.ALU64):
        body = _arithmetic(opcode, off, imm)
    elif kind in (ebpf.JMP, ebpf.JMP32):
        body = _jump(opcode, backward)
    elif kind == ebpf.LD:
        body = _packet_load(opcode, bool(imm))
    else:
        body = _memory(opcode, imm)
    return None if body is None else _compile(body)


def variant(instruction: ebpf.Instruction) -> tuple[int, int, int]:
    """An instruction's opcode with `off` and `imm` where they choose the operation: `factory`'s first arguments."""
    opcode, _, _, off, imm = instruction
    kind = opcode & 7
    if kind in (ebpf.ALU, ebpf.ALU64):
        return opcode, off, imm if opcode & 0xF0 == ebpf.END else 0
    if kind == ebpf.LD:
        # Offsets with the sign bit set are relative to the network or link header.
        return opcode, 0, int(opcode & 0xE0 == ebpf.ABS and imm < 0)
    return opcode, 0, imm if kind == ebpf.STX and opcode & 0xE0 == ebpf.ATOMIC else 0


def _operands(opcode: int, wide: bool) -> dict[str, str]:
    """How an expression names its operands; `imm` comes sign-extended and unsigned to the operation's width."""
    a, b = ("r[d]", "r[s]") if wide else ("(r[d] & M32)", "(r[s] & M32)")
    return {
        "a": a,
        "b": b if opcode & ebpf.X else "imm",
        "sign": str(1 << 63 if wide else 1 << 31),
        "shift": "63" if wide else "31",
    }


def _arithmetic(opcode: int, off: int, imm: int) -> str | None:
    op, wide = opcode & 0xF0, opcode & 7 == ebpf.ALU64
    if op == ebpf.END:
        return _byte_order(opcode, imm) if off == 0 else None
    if op == ebpf.NEG and opcode & ebpf.X:
        return None
    names = _operands(opcode, wide)
    mask = "M64" if wide else "M32"
    if off == 0:
        expression = ARITHMETIC.get(op)
    elif op == ebpf.MOV:
        if not opcode & ebpf.X or off not in ((8, 16, 32) if wide else (8, 16)):
            return None
        low, sign = (1 << off) - 1, 1 << off - 1
        expression = f"((r[s] & {low}) ^ {sign}) - {sign}"
        return f"r[d] = ({expression}) & {mask}\nreturn next"
    else:
        expression = SIGNED_ARITHMETIC.get(op) if off == 1 else None
    if expression is None:
        return None
    value = expression.format(**names)
    if off or op not in _NARROW:
        value = f"({value}) & {mask}"
    return f"r[d] = {value}\nreturn next"


def _byte_order(opcode: int, width: int) -> str | None:
    if width not in (16, 32, 64):
        return None
    if opcode & 7 == ebpf.ALU64:
        swaps = not opcode & ebpf.X
        if not swaps:
            return None
    else:
        swaps = bool(opcode & ebpf.X) == (sys.byteorder == "little")
    value = f"swap(r[d], {width})" if swaps else f"r[d] & {(1 << width) - 1}"
    return f"r[d] = {value}\nreturn next"


#: A jump back is charged with the instructions that it lets run again; without such, a run is bounded by the
#: program's length.
_CHARGE = "r[FUEL] -= next - target\nif r[FUEL] < 0: r[RUN].exhausted()\n"


def _jump(opcode: int, backward: bool) -> str | None:
    op, wide = opcode & 0xF0, opcode & 7 == ebpf.JMP
    taken = (_CHARGE if backward else "") + "return target"
    if op == ebpf.JA:
        return taken if not opcode & ebpf.X else None
    if op == ebpf.JCOND:
        # may_goto: Linux lets such a loop run for a quarter of a second; here, for half of the run's budget.
        condition = "r[FUEL] < r[RUN].subject.budget >> 1" if opcode == ebpf.JMP | ebpf.JCOND else None
    else:
        condition = CONDITIONS.get(op)
    if condition is None:
        return None
    block = "".join(f"    {line}\n" for line in taken.splitlines())
    return f"if {condition.format(**_operands(opcode, wide))}:\n{block}return next"


def _memory(opcode: int, imm: int) -> str | None:
    kind, mode, size = opcode & 7, opcode & 0xE0, _SIZES[opcode & 0x18]
    if kind == ebpf.LDX:
        if mode == ebpf.MEM:
            return _load(size)
        return _load_signed(size) if mode == ebpf.MEMSX and size < 8 else None
    if mode == ebpf.MEM:
        return _store(size, "imm" if kind == ebpf.ST else "r[s]")
    return _atomic(size, imm) if kind == ebpf.STX and mode == ebpf.ATOMIC else None


def _load(size: int) -> str:
    return (
        f"p = r[s] + off\n"
        f"try: r[d] = get{size}(r[READ][p >> 32], p & M32)[0]\n"
        f"except bad_access: r[d] = r[RUN].load(p, {size})\n"
        f"return next"
    )


def _load_signed(size: int) -> str:
    sign = 1 << 8 * size - 1
    return (
        f"p = r[s] + off\n"
        f"try: r[d] = sget{size}(r[READ][p >> 32], p & M32)[0] & M64\n"
        f"except bad_access: r[d] = ((r[RUN].load(p, {size}) & {2 * sign - 1} ^ {sign}) - {sign}) & M64\n"
        f"return next"
    )


def _store(size: int, value: str) -> str:
    cut = f"{value} & {(1 << 8 * size) - 1}"
    return (
        f"p = r[d] + off\n"
        f"try: put{size}(r[WRITE][p >> 32], p & M32, {cut})\n"
        f"except bad_access: r[RUN].store(p, {size}, {cut})\n"
        f"return next"
    )


def _atomic(size: int, imm: int) -> str | None:
    if imm == ebpf.LOAD_ACQ:
        return _load(size)
    if imm == ebpf.STORE_REL:
        return _store(size, "r[s]")
    if size < 4:
        return None
    mask = (1 << 8 * size) - 1
    start = f"run = r[RUN]\np = r[d] + off\nrun.check_writable(p, {size})\nold = run.load(p, {size})\n"
    if imm == ebpf.CMPXCHG:
        return start + f"if old == r[0] & {mask}: run.store(p, {size}, r[s])\nr[0] = old\nreturn next"
    if imm == ebpf.XCHG:
        return start + f"run.store(p, {size}, r[s])\nr[s] = old\nreturn next"
    expression = ATOMICS.get(imm & ~ebpf.FETCH)
    if expression is None:
        return None
    value = expression.format(a="old", b="r[s]")
    fetch = "r[s] = old\n" if imm & ebpf.FETCH else ""
    return start + f"run.store(p, {size}, ({value}) & {mask})\n{fetch}return next"


def _packet_load(opcode: int, relative: bool) -> str | None:
    """LD_ABS and LD_IND: big-endian, from the packet; where there is nothing the program ends with 0."""
    size, mode = _SIZES[opcode & 0x18], opcode & 0xE0
    if size == 8 or mode not in (ebpf.ABS, ebpf.IND):
        return None
    elsewhere = f"r[0] = r[RUN].load_relative(k, {size})\nif r[0] < 0:\n    r[0] = 0\n    return end\nreturn next"
    if relative:
        return f"k = imm\n{elsewhere}"
    index = "imm" if mode == ebpf.ABS else "(r[s] + imm) & M32"
    # Indexing is faster than unpacking up to two bytes.
    value = {1: "data[k]", 2: "data[k] << 8 | data[k + 1]", 4: "big4(data, k)[0]"}[size]
    block = elsewhere.replace("\n", "\n    ")
    return f"k = {index}\ndata = r[DATA]\ntry: r[0] = {value}\nexcept missing:\n    {block}\nreturn next"
