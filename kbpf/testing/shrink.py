"""Make a failing program small: take instructions out, as long as it still fails.

Works on both instruction sets: taking out means a jump to the next instruction first, and the jumps themselves at the
end, with the distances over them made shorter.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import TypeVar

from kbpf.isa import cbpf, ebpf

T = TypeVar("T")

CLASSIC_NOP = cbpf.jump(cbpf.JMP | cbpf.JA, 0, 0, 0)
#: struct bpf_func_info: where a function starts, and its type.
_FUNCTION = struct.Struct("=II")
EBPF_NOP = ebpf.Instruction(ebpf.JMP | ebpf.JA)


def _chunks(count: int) -> list[tuple[int, int]]:
    """Ranges to try: halves, quarters, ..., single ones; the last ones first."""
    ranges = []
    size = max(count // 2, 1)
    while True:
        ranges += [(start, min(start + size, count)) for start in range(0, count, size)][::-1]
        if size == 1:
            return ranges
        size //= 2


def fills_stack(instruction: ebpf.Instruction) -> bool:
    """Whether this may be what a later load from the stack relies on: without it, that load gives what nobody knows."""
    return instruction.opcode & 7 in (ebpf.ST, ebpf.STX) and instruction.dst == ebpf.FP


def blank(
    program: Sequence[T], nop: T, fails: Callable[[Sequence[T]], bool], keep: Callable[[T], bool] = lambda _: False
) -> list[T]:
    """Replace by `nop` whatever the failure does not need, and may not be kept."""
    program = list(program)
    changed = True
    while changed:
        changed = False
        for start, end in _chunks(len(program)):
            trial = program[:start] + [i if keep(i) else nop for i in program[start:end]] + program[end:]
            if trial != program and fails(trial):
                program, changed = trial, True
    return program


def fewer(items: Sequence[T], fails: Callable[[Sequence[T]], bool]) -> list[T]:
    """Leave out items (packets, runs) that the failure does not need."""
    items = list(items)
    for index in reversed(range(len(items))):
        trial = items[:index] + items[index + 1 :]
        if fails(trial):
            items = trial
    return items


def shorter(data: bytes, fails: Callable[[bytes], bool]) -> bytes:
    """Cut bytes off the end, and make zero those that do not matter."""
    step = len(data)
    while step:
        while len(data) >= step and fails(data[:-step]):
            data = data[:-step]
        step //= 2
    for index in range(min(len(data), 256)):
        trial = data[:index] + b"\0" + data[index + 1 :]
        if data[index] and fails(trial):
            data = trial
    return data


def without_classic(program: Sequence[cbpf.Instruction], index: int) -> list[cbpf.Instruction]:
    """The program without one instruction: jumps over it become shorter."""
    out = []
    for pc, (code, jt, jf, k) in enumerate(program):
        if pc == index:
            continue
        if code & 7 == cbpf.JMP and pc < index:
            if code == cbpf.JMP | cbpf.JA:
                k -= pc + 1 + k > index
            else:
                jt -= pc + 1 + jt > index
                jf -= pc + 1 + jf > index
        out.append(cbpf.Instruction(code, jt, jf, k))
    return out


def without_ebpf(program: Sequence[ebpf.Instruction], index: int) -> list[ebpf.Instruction]:
    """The program without one slot: jumps and calls over it become shorter."""
    out = []
    for pc, instruction in enumerate(program):
        if pc == index:
            continue
        opcode, _, src, off, imm = instruction
        if opcode in (ebpf.JMP32 | ebpf.JA, ebpf.JMP | ebpf.CALL):
            if opcode & 7 == ebpf.JMP32 or src == ebpf.PSEUDO_CALL:
                instruction = instruction._replace(imm=_over(pc, imm, index))
        elif opcode == ebpf.LD_IMM64:
            if src == ebpf.PSEUDO_FUNC:
                instruction = instruction._replace(imm=_over(pc, imm, index))
        elif opcode & 7 in (ebpf.JMP, ebpf.JMP32) and opcode != ebpf.JMP | ebpf.EXIT:
            instruction = instruction._replace(off=_over(pc, off, index))
        out.append(instruction)
    return out


def moved_functions(func_info: bytes, program: Sequence[ebpf.Instruction]) -> bytes:
    """``struct bpf_func_info`` for a program whose functions start elsewhere than they did, or are fewer."""
    records = list(_FUNCTION.iter_unpack(func_info))
    starts = sorted({0, *(pc + 1 + i.imm for pc, i in enumerate(program) if _refers_to_function(i))})
    return b"".join(_FUNCTION.pack(start, type) for start, (_, type) in zip(starts, records, strict=False))


def _refers_to_function(instruction: ebpf.Instruction) -> bool:
    opcode, _, src, _, _ = instruction
    return (opcode, src) in ((ebpf.LD_IMM64, ebpf.PSEUDO_FUNC), (ebpf.JMP | ebpf.CALL, ebpf.PSEUDO_CALL))


def _over(pc: int, distance: int, index: int) -> int:
    """A jump's distance after the instruction at `index` is gone."""
    target = pc + 1 + distance
    return distance - (target > index) + (pc > index)


def drop(
    program: Sequence[T],
    without: Callable[[Sequence[T], int], list[T]],
    fails: Callable[[Sequence[T]], bool],
    keep: Callable[[T], bool] = lambda _: False,
) -> list[T]:
    """Take out, one by one, the instructions that the failure does not need."""
    program = list(program)
    for index in reversed(range(len(program))):
        if keep(program[index]):
            continue
        trial = without(program, index)
        if trial and fails(trial):
            program = trial
    return program
