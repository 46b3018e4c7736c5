"""How far into its context a program reaches: what the verifier keeps as `max_ctx_offset`.

Linux refuses to run or to attach a program that reaches beyond the context that it would get. The verifier follows
values; here copies of the context's address are followed, through registers, the stack and calls of functions, on all
ways that the program can take. There is nothing else to follow: no other address in the context may be used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

from kbpf.emulator.checks import is_call, is_function_address, jump_target
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction

#: Where the context's address is: registers by number, stack slots by their (negative) offset.
Known: TypeAlias = frozenset[int]

_SIZES = {ebpf.B: 1, ebpf.H: 2, ebpf.W: 4, ebpf.DW: 8}
_CALL, _EXIT = ebpf.JMP | ebpf.CALL, ebpf.JMP | ebpf.EXIT
_GOTO = (ebpf.JMP | ebpf.JA, ebpf.JMP32 | ebpf.JA)
_MOV = ebpf.ALU64 | ebpf.MOV | ebpf.X
_SPILL, _FILL = ebpf.STX | ebpf.MEM | ebpf.DW, ebpf.LDX | ebpf.MEM | ebpf.DW
_ARGUMENTS, _LOST_IN_CALLS = frozenset(range(1, 6)), frozenset(range(6))


def context_end(instructions: Sequence[Instruction]) -> int:
    """The end of what the program loads and stores of its context, from 0; 0 if nothing."""
    end = 0
    known: dict[int, Known] = {}
    todo: list[tuple[int, Known]] = [(0, frozenset((1,)))]
    while todo:
        pc, now = todo.pop()
        before = known.get(pc)
        # What two ways that meet do not agree on is not known any more.
        if before is not None:
            now &= before
        if now == before:
            continue
        known[pc] = now
        instruction = instructions[pc]
        end = max(end, _touched(instruction, now))
        todo += _onward(pc, instruction, now)
    return end


def _touched(instruction: Instruction, known: Known) -> int:
    opcode, dst, src, off, _ = instruction
    kind = opcode & 7
    if kind not in (ebpf.LDX, ebpf.ST, ebpf.STX) or (src if kind == ebpf.LDX else dst) not in known:
        return 0
    return off + _SIZES[opcode & 0x18]


def _onward(pc: int, instruction: Instruction, known: Known) -> Iterator[tuple[int, Known]]:
    opcode = instruction.opcode
    if opcode == _EXIT:
        return
    if is_call(instruction) or is_function_address(instruction):
        yield pc + 1 + instruction.imm, known & _ARGUMENTS
    if opcode not in _GOTO:
        yield pc + (2 if opcode == ebpf.LD_IMM64 else 1), _after(instruction, known)
    target = jump_target(pc, instruction)
    if target is not None:
        yield target, known


def _after(instruction: Instruction, known: Known) -> Known:
    """Where the address is when the instruction has been carried out."""
    opcode, dst, src, off, _ = instruction
    kind = opcode & 7
    if opcode == _CALL:
        return known - _LOST_IN_CALLS
    if kind in (ebpf.JMP, ebpf.JMP32, ebpf.ST):
        return known
    if kind == ebpf.STX:
        if dst != ebpf.FP:
            return known
        return known | {off} if opcode == _SPILL and src in known else known - {off}
    copied = (opcode == _MOV and not off and src in known) or (opcode == _FILL and src == ebpf.FP and off in known)
    return known | {dst} if copied else known - {dst}
