"""Which registers hold an address that is known when a program is compiled.

A register that comes from R1 or R10 (or a map's handle) by moves and additions of constants holds a known address
whatever happened before, so that accesses through it need no check at run time. Of some others it can be guessed which
region they point into, which is checked first; everything else is unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from kbpf.emulator.checks import jump_target
from kbpf.emulator.memory import PACKET
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction

CONTEXT, STACK, HANDLE, GUESS = "context", "stack", "handle", "guess"


class Pointer(NamedTuple):
    """`offset` counts from the context's start or the function's frame pointer.

    None: the register may point there, or hold something else. Of a handle, it is its address; of a guess, the number
    of the region.
    """

    kind: str
    offset: int | None


#: A pointer or None for each register.
Registers: TypeAlias = "tuple[Pointer | None, ...]"

_UNKNOWN: Registers = (None,) * ebpf.REGISTERS
_SOMEWHERE = Pointer(STACK, None)
#: What is read from a context as four bytes is a number, or an address in the packet.
_IN_PACKET = Pointer(GUESS, PACKET)
_MOVE = ebpf.ALU64 | ebpf.MOV | ebpf.X
_EXACT = (CONTEXT, STACK)
_ADD, _SUB = ebpf.ALU64 | ebpf.ADD | ebpf.K, ebpf.ALU64 | ebpf.SUB | ebpf.K
#: Far more than any region holds.
_FAR = 1 << 20


def follow(
    instructions: Sequence[Instruction],
    start: int,
    end: int,
    constants: Mapping[int, Pointer],
    results: Callable[[Instruction, Registers], Pointer | None],
    main: bool,
) -> dict[int, Registers]:
    """The registers before each instruction of one function that can be reached.

    `constants` are what 64-bit immediate loads give, by index, and `results` what is known of a call's. `main` says
    that R1 is the context.
    """
    first = list(_UNKNOWN)
    first[ebpf.FP] = Pointer(STACK, 0)
    if main:
        first[1] = Pointer(CONTEXT, 0)
    known: dict[int, Registers] = {}
    todo: list[tuple[int, Registers]] = [(start, tuple(first))]
    while todo:
        pc, registers = todo.pop()
        before = known.get(pc)
        if before is not None:
            merged = tuple(map(_merged, before, registers))
            if merged == before:
                continue
            registers = merged
        known[pc] = registers
        instruction = instructions[pc]
        if instruction.opcode == ebpf.JMP | ebpf.CALL:
            after = _with(registers, 0, results(instruction, registers))
        elif instruction.opcode == ebpf.LD_IMM64:
            after = _with(registers, instruction.dst, constants.get(pc))
        else:
            after = _after(instruction, registers)
        if instruction.opcode == ebpf.JMP | ebpf.EXIT:
            continue
        target = jump_target(pc, instruction)
        if target is not None:
            todo.append((target, after))
        if instruction.opcode not in (ebpf.JMP | ebpf.JA, ebpf.JMP32 | ebpf.JA):
            following = pc + (2 if instruction.opcode == ebpf.LD_IMM64 else 1)
            if following < end:
                todo.append((following, after))
    return known


def _merged(one: Pointer | None, other: Pointer | None) -> Pointer | None:
    if one == other:
        return one
    return _SOMEWHERE if STACK in (one and one.kind, other and other.kind) else None


def _after(instruction: Instruction, registers: Registers) -> Registers:
    opcode, dst, src, off, imm = instruction
    kind = opcode & 7
    held: Pointer | None = None
    if kind in (ebpf.ALU, ebpf.ALU64):
        base = registers[dst]
        if opcode == _MOVE and not off:
            held = registers[src]
        elif opcode in (_ADD, _SUB) and base is not None and base.kind in _EXACT and base.offset is not None:
            moved = base.offset + (imm if opcode == _ADD else -imm)
            held = base._replace(offset=moved if abs(moved) < _FAR else None)
        elif (points_to_stack(base) and opcode & 0xF0 != ebpf.MOV) or (
            opcode & ebpf.X and points_to_stack(registers[src])
        ):
            held = _SOMEWHERE
        elif opcode & 0xF0 != ebpf.MOV:
            held = next((p for p in (base, registers[src] if opcode & ebpf.X else None) if p and p.kind == GUESS), None)
        return _with(registers, dst, held)
    if kind == ebpf.LDX:
        base = registers[src]
        return _with(registers, dst, _IN_PACKET if base and base.kind == CONTEXT and size_of(opcode) == 4 else None)
    if kind == ebpf.LD:
        return _with(registers, 0, None)
    if kind == ebpf.STX and opcode & 0xE0 == ebpf.ATOMIC:
        if imm == ebpf.LOAD_ACQ:
            return _with(registers, dst, None)
        if imm == ebpf.CMPXCHG:
            return _with(registers, 0, None)
        if imm & ebpf.FETCH:
            return _with(registers, src, None)
    return registers


def _with(registers: Registers, number: int, held: Pointer | None) -> Registers:
    return (*registers[:number], held, *registers[number + 1 :])


def points_to_stack(held: Pointer | None) -> bool:
    """Whether it points there, or may."""
    return held is not None and held.kind == STACK


def at_frame(held: Pointer | None, off: int, size: int) -> int | None:
    """Where in its frame, of `ebpf.STACK_SIZE` bytes, an access lies; None where that is not known, or is outside."""
    if held is None or held.kind != STACK or held.offset is None:
        return None
    at = ebpf.STACK_SIZE + held.offset + off
    return at if 0 <= at <= ebpf.STACK_SIZE - size else None


def stack_escapes(instructions: Sequence[Instruction], known: Mapping[int, Registers], key_reads: set[int]) -> bool:
    """Whether a function's frame may be reached other than by accesses at known places within it.

    `key_reads` are the calls that do nothing with a frame but read four bytes at R2.
    """
    for pc, registers in known.items():
        opcode, dst, src, off, imm = instructions[pc]
        kind = opcode & 7
        if kind in (ebpf.LDX, ebpf.ST, ebpf.STX):
            acquires = kind == ebpf.STX and opcode & 0xE0 == ebpf.ATOMIC and imm == ebpf.LOAD_ACQ
            base = registers[src if kind == ebpf.LDX or acquires else dst]
            if points_to_stack(base) and at_frame(base, off, size_of(opcode)) is None:
                return True
            stored = (src, 0) if imm == ebpf.CMPXCHG else (src,)
            if kind == ebpf.STX and not acquires and any(points_to_stack(registers[number]) for number in stored):
                return True
        elif opcode == ebpf.JMP | ebpf.CALL:
            if pc in key_reads:
                if points_to_stack(registers[2]) and at_frame(registers[2], 0, 4) is None:
                    return True
            elif any(map(points_to_stack, registers[1:6])):
                return True
        elif opcode == ebpf.JMP | ebpf.EXIT and points_to_stack(registers[0]):
            return True
    return False


def reached(
    instructions: Sequence[Instruction], known: Mapping[int, Registers], leaders: set[int], pc: int, register: int
) -> list[tuple[int, int]]:
    """From where to where, counted from a register, memory is gone to: by an instruction, and by those behind it to
    where the block ends (`leaders` begin others), the register changes, or something is called.
    """
    found: list[tuple[int, int]] = []
    while True:
        opcode, dst, src, off, _ = instructions[pc]
        kind = opcode & 7
        plain = kind in (ebpf.LDX, ebpf.ST) or (kind == ebpf.STX and opcode & 0xE0 != ebpf.ATOMIC)
        if not plain and kind not in (ebpf.ALU, ebpf.ALU64) and opcode != ebpf.LD_IMM64:
            return found
        if plain and register == (src if kind == ebpf.LDX else dst):
            found.append((off, off + size_of(opcode)))
        if dst == register and kind not in (ebpf.ST, ebpf.STX):
            return found
        pc += 2 if opcode == ebpf.LD_IMM64 else 1
        if pc in leaders or pc not in known:
            return found


def size_of(opcode: int) -> int:
    """Bytes that a load or store moves."""
    return {ebpf.B: 1, ebpf.H: 2, ebpf.W: 4, ebpf.DW: 8}[opcode & 0x18]
