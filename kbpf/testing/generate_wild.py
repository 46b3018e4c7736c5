"""Programs that no verifier has accepted, and what to run them over: anything that can be loaded in the emulator.

Four kinds in turn: instructions at random; calls of helpers with whatever in the registers; random bytes; and programs
that would be right (`generate_direct`) with a few instructions changed, which get furthest before they go wrong.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cache
from random import Random
from typing import Any, NamedTuple

from kbpf.emulator import events, helpers, test_runs
from kbpf.emulator.attach_types import EXPECTED
from kbpf.emulator.helpers.allowed import SLEEPING, allowed
from kbpf.emulator.interpreter import TAIL_CALL_HELPER
from kbpf.emulator.memory import M32
from kbpf.emulator.program import LOADS_PACKET
from kbpf.emulator.semantics import factory
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction, ld_imm64
from kbpf.specs import ProgramSpec
from kbpf.testing import generate_direct, generate_packets
from kbpf.testing.btf_bytes import GLOBAL, BtfBytes
from kbpf.uapi.constants import BPF_F_SLEEPABLE
from kbpf.uapi.enums import ATTACH_TYPES

#: Instructions that a run may take: few, since nearly all that run long are loops.
BUDGET = 3000
#: Every opcode that the table knows, but atomics, calls and exits.
OPCODES = tuple(
    code for code in range(256) if code & 7 != ebpf.STX or code & 0xE0 != ebpf.ATOMIC if factory(code, 0, 16, False)
)
ATOMICS = (0, 1, 0x40, 0x41, 0x50, 0x51, 0xA0, 0xA1, ebpf.XCHG, ebpf.CMPXCHG, ebpf.LOAD_ACQ, ebpf.STORE_REL)
_WITHOUT_LOADS = tuple(code for code in OPCODES if code & 7 != ebpf.LD)
_NUMBERS = (0, 1, 2, 4, 8, 14, 16, 64, 255, 512, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, -1, -8)
_OFFSETS = (0, 0, -8, -4, 4, 8, -512, 48, 0x7FFF, -0x8000)
_CALL, _EXIT = ebpf.JMP | ebpf.CALL, Instruction(ebpf.JMP | ebpf.EXIT)
_MOV, _MOV_X, _ADD = ebpf.ALU64 | ebpf.MOV, ebpf.ALU64 | ebpf.MOV | ebpf.X, ebpf.ALU64 | ebpf.ADD


class Wild(NamedTuple):
    """A program, names of the maps that its indices mean (`generate_maps.MAPS`), and what it is run over."""

    spec: ProgramSpec
    maps: tuple[str, ...]
    data: bytes
    context: bytes


def generate(rng: Random, maps: Sequence[int]) -> Wild:
    """A program of any type. `maps` are descriptors."""
    if rng.random() < 0.63:
        return of_type(rng, rng.choice(_TYPES), maps)
    type = rng.choice(generate_direct.TYPES)
    writer = generate_direct.Writer(rng, type)
    linked = writer.linked(writer.program())
    program = _changed(rng, linked.pop("instructions"))
    attach_type = ATTACH_TYPES.get(generate_direct.ATTACH_TYPES.get(type, ""), 0)
    return _made(rng, type, attach_type, program, linked or _described(program), tuple(writer.names))


def of_type(rng: Random, type: str, maps: Sequence[int]) -> Wild:
    """A program of this type, of one of the first three kinds."""
    attach_type = rng.choice(ATTACH_TYPES_OF[type])
    dice = rng.random()
    if dice < 0.55:
        program = _instructions(rng, type, _callable(type, attach_type), maps)
    elif dice < 0.95:
        program = _calls(rng, _callable(type, attach_type), maps)
    else:
        program = [*ebpf.decode(rng.randbytes(8 * rng.randrange(1, 6))), _EXIT]
    return _made(rng, type, attach_type, program, _described(program))


def _made(
    rng: Random,
    type: str,
    attach_type: int,
    program: Sequence[Instruction],
    described: dict[str, Any],
    names: tuple[str, ...] = (),
) -> Wild:
    spec = ProgramSpec(
        type=type,
        instructions=tuple(program),
        expected_attach_type=attach_type,
        flags=BPF_F_SLEEPABLE if type == "syscall" else 0,
        **described,
    )
    data, context = run(rng, type)
    return Wild(spec, names, data, context)


#: All that something runs.
_TYPES = tuple(type for type in helpers.ALLOWED if type in test_runs.RUNNERS or type in events.TYPES)
#: Where programs may expect to be attached; of types that may say anything, nothing or what bears their name.
ATTACH_TYPES_OF = {
    type: sorted(EXPECTED.get(type) or {0, *(n for name, n in ATTACH_TYPES.items() if name.endswith(type))})
    for type in _TYPES
}


@cache
def _callable(type: str, attach_type: int) -> tuple[int, ...]:
    """The helpers that a program may call, by number."""
    numbers = allowed(type, attach_type) & {*helpers.functions(type), TAIL_CALL_HELPER}
    return tuple(sorted(numbers if type == "syscall" else numbers - SLEEPING))


def run(rng: Random, type: str) -> tuple[bytes, bytes]:
    """Data and context, mostly such as a test run takes, sometimes anything."""
    dice = rng.random()
    if dice < 0.1:
        return rng.randbytes(rng.randrange(100)), rng.randbytes(rng.choice((0, 8, 24, 64, 192, 200)))
    if type == "syscall":
        return b"", rng.randbytes(rng.choice((0, 8, 64)))
    make = generate_direct.RUNS.get(type)
    return make(rng) if make else (generate_packets.frame(rng), b"")


def _instructions(rng: Random, type: str, callable: Sequence[int], maps: Sequence[int]) -> list[Instruction]:
    """Instructions that exist, with registers, offsets and jumps at random, in one function or a few."""
    opcodes = OPCODES if type in LOADS_PACKET else _WITHOUT_LOADS
    sizes = [rng.randrange(2, 30), *(rng.randrange(1, 10) for _ in range(rng.choice((0, 0, 0, 1, 2))))]
    program: list[Instruction] = []
    if rng.random() < 0.5:
        reference = rng.choice((ebpf.PSEUDO_MAP_FD, ebpf.PSEUDO_MAP_FD, ebpf.PSEUDO_MAP_VALUE))
        # The first of the maps has a value that can be reached so.
        fd = maps[0] if reference == ebpf.PSEUDO_MAP_VALUE else rng.choice(maps)
        program += ld_imm64(rng.randrange(1, 10), fd, reference)
    starts: list[int] = []
    for size in sizes:
        start = len(program)
        starts.append(start)
        for pc in range(start, start + size):
            program.append(_instruction(rng, opcodes, callable, rng.randrange(start, start + size + 1) - pc - 1))
        program += [Instruction(_MOV), _EXIT]
    for start in starts[1:]:
        # Called from somewhere before it.
        pc = rng.randrange(starts[0], start - 2)
        if program[pc].opcode != ebpf.JMP | ebpf.EXIT:
            program[pc] = Instruction(_CALL, 0, ebpf.PSEUDO_CALL, 0, start - pc - 1)
    return program


def _instruction(rng: Random, opcodes: Sequence[int], callable: Sequence[int], jump: int) -> Instruction:
    kind = rng.random()
    dst, src, off = rng.randrange(10), rng.randrange(11), rng.choice(_OFFSETS)
    imm = rng.choice((*_NUMBERS, rng.getrandbits(31)))
    if kind < 0.1:
        return Instruction(_CALL, 0, 0, 0, rng.choice(callable))
    if kind < 0.17:
        size = rng.choice((ebpf.W, ebpf.DW))
        return Instruction(ebpf.STX | ebpf.ATOMIC | size, dst, src, off, rng.choice(ATOMICS))
    if kind < 0.19:
        size = rng.choice((ebpf.B, ebpf.H))
        return Instruction(ebpf.STX | ebpf.ATOMIC | size, dst, src, off, rng.choice((ebpf.LOAD_ACQ, ebpf.STORE_REL)))
    return _of(rng, rng.choice(opcodes), dst, src, off, imm, jump)


def _of(rng: Random, opcode: int, dst: int, src: int, off: int, imm: int, jump: int) -> Instruction:
    """An instruction with that opcode, and nothing where the kernel wants zeroes."""
    kind, by_register, op = opcode & 7, bool(opcode & ebpf.X), opcode & 0xF0
    if kind in (ebpf.JMP, ebpf.JMP32):
        if opcode == ebpf.JMP32 | ebpf.JA:
            return Instruction(opcode, 0, 0, 0, jump)
        if op in (ebpf.JA, ebpf.JCOND):
            return Instruction(opcode, 0, 0, jump)
        return Instruction(opcode, dst, src if by_register else 0, jump, 0 if by_register else imm)
    if kind in (ebpf.ALU, ebpf.ALU64):
        if op == ebpf.END:
            return Instruction(opcode, dst, 0, 0, rng.choice((16, 32, 64)))
        if op == ebpf.NEG:
            return Instruction(opcode, dst)
        return Instruction(opcode, dst, src if by_register else 0, 0, 0 if by_register else imm & 31 or 1)
    if kind == ebpf.LD:
        return Instruction(opcode, 0, src if opcode & 0xE0 == ebpf.IND else 0, 0, imm)
    return Instruction(opcode, dst, 0 if kind == ebpf.ST else src, off, imm if kind == ebpf.ST else 0)


def _calls(rng: Random, callable: Sequence[int], maps: Sequence[int]) -> list[Instruction]:
    """Calls, with pointers and numbers of all kinds as arguments; one may be of a function that calls on."""
    out = [Instruction(_MOV_X, 6, 1)]
    functions: list[int] = []
    for _ in range(rng.randrange(1, 6)):
        for register in range(1, 6):
            kind = rng.random()
            if kind < 0.3 or (register == 1 and kind < 0.6):
                out.append(Instruction(_MOV_X, register, rng.choice((6, 6, 0))))
            elif kind < 0.6:
                out.append(Instruction(_MOV_X, register, ebpf.FP))
                out.append(Instruction(_ADD, register, 0, 0, -rng.choice((8, 64, 500, 512))))
            elif kind < 0.7:
                out += ld_imm64(register, rng.choice(maps), ebpf.PSEUDO_MAP_FD)
            elif kind < 0.75:
                out += ld_imm64(register, rng.getrandbits(64))
            elif kind < 0.78:
                functions.append(len(out))
                out += ld_imm64(register, 0, ebpf.PSEUDO_FUNC)
            else:
                out.append(Instruction(_MOV, register, 0, 0, rng.choice((*_NUMBERS, *maps[:1]))))
        out.append(Instruction(_CALL, 0, 0, 0, rng.choice(callable)))
    out.append(_EXIT)
    if functions:
        start = len(out)
        out += [
            Instruction(_MOV_X, 6, 1),
            *_calls_on(rng, callable),
            Instruction(_MOV, 0, 0, 0, rng.choice((0, 1))),
            _EXIT,
        ]
        for pc in functions:
            out[pc] = out[pc]._replace(imm=start - pc - 1)
    return out


def _calls_on(rng: Random, callable: Sequence[int]) -> list[Instruction]:
    """A callback's calls, with the arguments that it has."""
    return [Instruction(_CALL, 0, 0, 0, rng.choice(callable)) for _ in range(rng.randrange(3))]


def _changed(rng: Random, program: Sequence[Instruction]) -> list[Instruction]:
    """The program with a few instructions changed."""
    out = list(program)
    for _ in range(rng.choice((1, 1, 2, 3, 5))):
        pc = rng.randrange(len(out))
        opcode, dst, src, off, imm = out[pc]
        dice = rng.random()
        if opcode == 0:
            continue
        if dice < 0.25:
            if opcode & 7 in (ebpf.ALU64, ebpf.LDX, ebpf.STX, ebpf.ST) or opcode == ebpf.LD_IMM64:
                out[pc] = out[pc]._replace(dst=rng.randrange(10))
        elif dice < 0.4 and opcode & 7 in (ebpf.LDX, ebpf.STX):
            out[pc] = out[pc]._replace(
                off=max(min(off + rng.choice((-512, -8, -1, 1, 4, 64, 0x1000)), 0x7FFF), -0x8000)
            )
        elif dice < 0.65:
            if opcode & 7 in (ebpf.LDX, ebpf.STX) or opcode == ebpf.JMP | ebpf.EXIT or opcode & ebpf.X:
                continue
            out[pc] = out[pc]._replace(imm=ebpf.signed32(rng.choice((imm + 1, imm - 1, -imm, *_NUMBERS))))
        elif dice < 0.8 and opcode & 7 in (ebpf.STX, ebpf.LDX, ebpf.ALU64):
            out[pc] = out[pc]._replace(src=rng.randrange(11)) if src else out[pc]
        elif dice < 0.9:
            out[pc] = Instruction(ebpf.JMP | ebpf.JA)
        else:
            jump = rng.randrange(-min(pc, 8) - 1, min(len(out) - pc - 1, 8))
            out[pc] = _of(rng, rng.choice(_WITHOUT_LOADS), dst, src, off, imm, jump)
    return out


def _described(program: Sequence[Instruction]) -> dict[str, bytes]:
    """BTF for functions whose address is taken, without which such a program is not loaded."""
    if not any(i.opcode == ebpf.LD_IMM64 and i.src == ebpf.PSEUDO_FUNC for i in program):
        return {}
    references = {(ebpf.LD_IMM64, ebpf.PSEUDO_FUNC), (_CALL, ebpf.PSEUDO_CALL)}
    starts = sorted({0, *(pc + 1 + i.imm & M32 for pc, i in enumerate(program) if (i.opcode, i.src) in references)})
    btf = BtfBytes()
    ids = [btf.function("main", GLOBAL, parameters=1)]
    ids += [btf.function(f"callback{start}", parameters=2) for start in starts[1:]]
    info = b"".join(struct.pack("=II", *pair) for pair in zip(starts, ids, strict=True))
    return {"btf": btf.bytes(), "func_info": info}
