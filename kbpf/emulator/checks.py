"""What the kernel checks of a program before it looks at values: opcodes, reserved fields, control flow.

With the errnos and close to the words of kernel/bpf/verifier.c, in its order: functions and jumps first, then each
instruction, then reachability. That a program passes here does not make it safe: the emulator's memory does that.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence

from kbpf.backend import LoadRefused
from kbpf.emulator.semantics import factory, variant
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction

#: BPF_COMPLEXITY_LIMIT_INSNS: the longest program that a privileged process may load.
MOST_INSTRUCTIONS = 1_000_000

_CALL, _EXIT = ebpf.JMP | ebpf.CALL, ebpf.JMP | ebpf.EXIT
_JUMPS = (ebpf.JMP | ebpf.JA, ebpf.JMP32 | ebpf.JA)


def invalid(message: str, number: int = errno.EINVAL) -> LoadRefused:
    return LoadRefused(number, message + "\n")


def check_length(instructions: Sequence[Instruction]) -> None:
    """Raise `LoadRefused` (E2BIG) for no instructions at all, or too many."""
    if not 1 <= len(instructions) <= MOST_INSTRUCTIONS:
        raise LoadRefused(errno.E2BIG, "")


def check(instructions: Sequence[Instruction], may_load_packet: bool = True) -> None:
    """Raise `LoadRefused` where the kernel would, for what shows without following values.

    `may_load_packet` says that the program's type has LD_ABS and LD_IND.
    """
    check_length(instructions)
    starts, seconds = check_layout(instructions)
    for pc, instruction in enumerate(instructions):
        if pc not in seconds:
            _check_fields(pc, instruction, may_load_packet)
    _check_reachable(instructions, starts, seconds)


def check_layout(instructions: Sequence[Instruction]) -> tuple[list[int], frozenset[int]]:
    """Where functions start, out of which no jump goes, and the second slots of 64-bit immediate loads."""
    starts = _function_starts(instructions)
    _check_jumps(instructions, starts)
    return starts, _check_wide_loads(instructions)


def is_call(instruction: Instruction) -> bool:
    return instruction.opcode == _CALL and instruction.src == ebpf.PSEUDO_CALL


def is_function_address(instruction: Instruction) -> bool:
    return instruction.opcode == ebpf.LD_IMM64 and instruction.src == ebpf.PSEUDO_FUNC


def _function_starts(instructions: Sequence[Instruction]) -> list[int]:
    starts = {0}
    for pc, instruction in enumerate(instructions):
        if is_call(instruction) or is_function_address(instruction):
            start = pc + 1 + instruction.imm
            if not 0 <= start < len(instructions):
                raise invalid("call to invalid destination")
            starts.add(start)
    return sorted(starts)


def jump_target(pc: int, instruction: Instruction) -> int | None:
    """Where a jump goes; None if the instruction does not jump."""
    opcode, _, _, off, imm = instruction
    if opcode & 7 not in (ebpf.JMP, ebpf.JMP32) or opcode & 0xF0 in (ebpf.CALL, ebpf.EXIT):
        return None
    return pc + 1 + (imm if opcode == ebpf.JMP32 | ebpf.JA else off)


def _check_jumps(instructions: Sequence[Instruction], starts: Sequence[int]) -> None:
    for start, end in zip(starts, [*starts[1:], len(instructions)], strict=True):
        for pc in range(start, end):
            target = jump_target(pc, instructions[pc])
            if target is not None and not start <= target < end:
                raise invalid(f"jump out of range from insn {pc} to {target}")
        if instructions[end - 1].opcode not in (_EXIT, *_JUMPS):
            raise invalid("last insn is not an exit or jmp")


def _check_wide_loads(instructions: Sequence[Instruction]) -> frozenset[int]:
    """The indices of the second slots of 64-bit immediate loads."""
    seconds = set()
    for pc, (opcode, _, src, off, _) in enumerate(instructions):
        if opcode != ebpf.LD_IMM64 or pc in seconds:
            continue
        if pc + 1 == len(instructions) or instructions[pc + 1][:4] != (0, 0, 0, 0):
            raise invalid("invalid bpf_ld_imm64 insn")
        if off:
            raise invalid("BPF_LD_IMM64 uses reserved fields")
        if src > ebpf.PSEUDO_MAP_IDX_VALUE:
            raise invalid("unrecognized bpf_ld_imm64 insn")
        seconds.add(pc + 1)
    return frozenset(seconds)


def _check_fields(pc: int, instruction: Instruction, may_load_packet: bool) -> None:
    opcode, dst, src, off, imm = instruction
    for register in (dst, src):
        if register >= ebpf.REGISTERS:
            raise invalid(f"R{register} is invalid")
    kind, op, by_register = opcode & 7, opcode & 0xF0, bool(opcode & ebpf.X)
    if opcode == ebpf.LD_IMM64:
        reserved = ""
    elif kind in (ebpf.ALU, ebpf.ALU64):
        reserved = _reserved_in_arithmetic(instruction)
        if not reserved and not by_register:
            if op in (ebpf.DIV, ebpf.MOD) and imm == 0:
                raise invalid("div by zero")
            if op in (ebpf.LSH, ebpf.RSH, ebpf.ARSH) and not 0 <= imm < (64 if kind == ebpf.ALU64 else 32):
                raise invalid(f"invalid shift {imm}")
    elif kind in (ebpf.JMP, ebpf.JMP32):
        reserved = _reserved_in_jump(instruction)
    elif kind == ebpf.LDX:
        reserved = "BPF_LDX" if imm else ""
    elif kind == ebpf.ST:
        reserved = "BPF_ST" if src else ""
    elif kind == ebpf.STX:
        reserved = "BPF_STX" if imm and opcode & 0xE0 != ebpf.ATOMIC else ""
    else:
        if not may_load_packet:
            raise invalid("BPF_LD_[ABS|IND] instructions not allowed for this program type")
        reserved = "BPF_LD_[ABS|IND]" if dst or off or (src and opcode & 0xE0 == ebpf.ABS) else ""
    if reserved:
        raise invalid(f"{reserved} uses reserved fields")
    if opcode not in (ebpf.LD_IMM64, _CALL, _EXIT) and factory(*variant(instruction), False) is None:
        if opcode & 0xE7 == ebpf.STX | ebpf.ATOMIC and opcode & 0x18 in (ebpf.W, ebpf.DW):
            raise invalid(f"BPF_ATOMIC uses invalid atomic opcode {imm & 0xFF:02x}")
        raise invalid(f"unknown opcode {opcode:02x}")
    if dst == ebpf.FP and (kind in (ebpf.LDX, ebpf.ALU, ebpf.ALU64) or opcode == ebpf.LD_IMM64):
        raise invalid("frame pointer is read only", errno.EACCES)


def _reserved_in_arithmetic(instruction: Instruction) -> str:
    opcode, _, src, off, imm = instruction
    op, by_register = opcode & 0xF0, bool(opcode & ebpf.X)
    if op == ebpf.END:
        bad = src or off or imm not in (16, 32, 64) or (by_register and opcode & 7 == ebpf.ALU64)
        return "BPF_END" if bad else ""
    if op == ebpf.NEG:
        return "BPF_NEG" if by_register or src or off or imm else ""
    if op == ebpf.MOV:
        widths = (0, 8, 16, 32) if opcode & 7 == ebpf.ALU64 else (0, 8, 16)
        return "BPF_MOV" if (imm or off not in widths if by_register else src or off) else ""
    widest = 1 if op in (ebpf.DIV, ebpf.MOD) else 0
    return "BPF_ALU" if (imm if by_register else src) or not 0 <= off <= widest else ""


def _reserved_in_jump(instruction: Instruction) -> str:
    opcode, dst, src, off, imm = instruction
    op, by_register, narrow = opcode & 0xF0, bool(opcode & ebpf.X), opcode & 7 == ebpf.JMP32
    if op == ebpf.CALL:
        if src == ebpf.PSEUDO_KFUNC_CALL:
            raise invalid("calling kernel function is not allowed")
        return "BPF_CALL" if by_register or narrow or off or dst or src > ebpf.PSEUDO_CALL else ""
    if op == ebpf.EXIT:
        return "BPF_EXIT" if by_register or narrow or imm or src or dst else ""
    if op == ebpf.JA:
        return "BPF_JA" if by_register or src or dst or (off if narrow else imm) else ""
    if op == ebpf.JCOND:
        if not narrow and (src or dst or imm):
            raise invalid(f"invalid may_goto imm {imm}")
        return ""
    return "BPF_JMP/JMP32" if (imm if by_register else src) else ""


def _successors(pc: int, instruction: Instruction) -> Iterator[int]:
    opcode = instruction.opcode
    if opcode == ebpf.LD_IMM64:
        yield pc + 2
    elif opcode != _EXIT:
        if opcode not in _JUMPS:
            yield pc + 1
        target = jump_target(pc, instruction)
        if target is not None:
            yield target


def _check_reachable(instructions: Sequence[Instruction], starts: Sequence[int], seconds: frozenset[int]) -> None:
    """Every instruction must be reached, functions from where they are called."""
    reached = [False] * len(instructions)
    todo = [0]
    while todo:
        pc = todo.pop()
        if reached[pc]:
            continue
        if pc in seconds:
            raise invalid(f"jump into the middle of ldimm64 insn {pc}")
        reached[pc] = True
        instruction = instructions[pc]
        if is_call(instruction) or is_function_address(instruction):
            todo.append(pc + 1 + instruction.imm)
        for target in _successors(pc, instruction):
            if target >= len(instructions):
                raise invalid(f"jump out of range from insn {pc} to {target}")
            todo.append(target)
    for pc, done in enumerate(reached):
        if not done and pc not in seconds:
            raise invalid(f"unreachable insn {pc}")
