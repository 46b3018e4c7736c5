"""What directly written programs are made of: pieces, each a few instructions that begin from the same registers.

R6 holds the context and R7 a number that whatever happened is mixed into; the other registers are a piece's own. The
stack has three parts: numbers that pieces read and overwrite, room for keys, and room for dynptrs.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from random import Random
from typing import Any, TypeAlias

from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.specs import MapSpec
from kbpf.testing.btf_bytes import GLOBAL, BtfBytes
from kbpf.testing.generate_maps import MAPS, RESULTS
from kbpf.uapi.enums import HELPERS

CONTEXT, MIX = 6, 7
#: Bytes of numbers at the top of the stack; a key of up to 16 bytes, with its value behind it; two dynptrs.
NUMBERS = 64
KEY, VALUE = -128, -112
FILLED = 128
DYNPTRS = -160, -144

SIZES = {1: ebpf.B, 2: ebpf.H, 4: ebpf.W, 8: ebpf.DW}
MOV, MOV_X = ebpf.ALU64 | ebpf.MOV, ebpf.ALU64 | ebpf.MOV | ebpf.X
ADD, ADD_X = ebpf.ALU64 | ebpf.ADD, ebpf.ALU64 | ebpf.ADD | ebpf.X
EXIT = Instruction(ebpf.JMP | ebpf.EXIT)

Piece: TypeAlias = "list[Instruction]"


def mix(register: int) -> Piece:
    return [
        Instruction(ebpf.ALU64 | ebpf.MUL, MIX, 0, 0, 0x1E3779B1),
        Instruction(ebpf.ALU64 | ebpf.XOR | ebpf.X, MIX, register),
    ]


def move(register: int, value: int) -> Piece:
    return [Instruction(MOV, register, 0, 0, ebpf.signed32(value))]


def copy(register: int, source: int) -> Piece:
    return [Instruction(MOV_X, register, source)]


def stack(register: int, offset: int) -> Piece:
    """The address of a place on the stack."""
    return [Instruction(MOV_X, register, ebpf.FP), Instruction(ADD, register, 0, 0, offset)]


def put(offset: int, value: int, size: int = 8, register: int = ebpf.FP) -> Piece:
    """Store a number, on the stack or where a register points."""
    return [Instruction(ebpf.ST | ebpf.MEM | SIZES[size], register, 0, offset, ebpf.signed32(value))]


def put_bytes(offset: int, data: bytes) -> Piece:
    """Bytes on the stack, in whole words."""
    data += bytes(-len(data) % 4)
    return [i for n, (word,) in enumerate(struct.iter_unpack("=i", data)) for i in put(offset + 4 * n, word, 4)]


def store(base: int, source: int, offset: int = 0) -> Piece:
    return [Instruction(ebpf.STX | ebpf.MEM | ebpf.DW, base, source, offset)]


def load(register: int, base: int, offset: int = 0, size: int = 8) -> Piece:
    return [Instruction(ebpf.LDX | ebpf.MEM | SIZES[size], register, base, offset)]


def call(helper: str) -> Piece:
    return [Instruction(ebpf.JMP | ebpf.CALL, 0, 0, 0, HELPERS[helper])]


def the_map(register: int, index: int) -> Piece:
    return [*ebpf.ld_imm64(register, index, ebpf.PSEUDO_MAP_IDX)]


def the_value(register: int, index: int, offset: int = 0) -> Piece:
    """The address of the only element of an array."""
    return [*ebpf.ld_imm64(register, index | offset << 32, ebpf.PSEUDO_MAP_IDX_VALUE)]


def function(register: int, number: int) -> Piece:
    """The address of one of `Draft.functions`."""
    return [*ebpf.ld_imm64(register, number, ebpf.PSEUDO_FUNC)]


def unless(register: int, *pieces: Piece, op: int = ebpf.JEQ, value: int = 0) -> Piece:
    """Skip the pieces where a comparison holds: mostly, where a pointer is null."""
    body = join(*pieces)
    return [Instruction(ebpf.JMP | op | ebpf.K, register, 0, len(body), value), *body]


def join(*pieces: Iterable[Instruction]) -> Piece:
    return [instruction for piece in pieces for instruction in piece]


class Draft:
    """A program of a type that is being written: the maps that its pieces ask for, and the functions they pass on."""

    def __init__(self, rng: Random, program_type: str) -> None:
        self.rng = rng
        self.type = program_type
        self.maps: list[MapSpec] = [RESULTS]
        self.functions: list[Piece] = []
        self._indices: dict[str, int] = {}

    def map(self, name: str) -> int:
        """The index of the program's map of that name (`generate_maps.MAPS`)."""
        if name not in self._indices:
            self._indices[name] = len(self.maps)
            self.maps.append(MAPS[name](self.rng))
        return self._indices[name]

    @property
    def names(self) -> list[str]:
        """The names of the maps, by index; the first has none."""
        return ["", *self._indices]

    def function(self, *pieces: Piece) -> int:
        """A callback, which begins with its arguments in R1 to R5; gives its number for `function`."""
        self.functions.append(join(*pieces))
        return len(self.functions) - 1

    def linked(self, main: Piece) -> dict[str, Any]:
        """Instructions, and BTF for the functions, as `ProgramSpec` takes them."""
        out, starts = list(main), []
        for body in self.functions:
            starts.append(len(out))
            out += body
        for pc, instruction in enumerate(out):
            if instruction.opcode == ebpf.LD_IMM64 and instruction.src == ebpf.PSEUDO_FUNC:
                out[pc] = instruction._replace(imm=starts[instruction.imm] - pc - 1)
        if not starts:
            return {"instructions": tuple(out)}
        btf = BtfBytes()
        ids = [btf.function("main", GLOBAL, parameters=1)]
        ids += [btf.function(f"callback{number}", parameters=2) for number in range(len(starts))]
        info = b"".join(struct.pack("=II", *pair) for pair in zip((0, *starts), ids, strict=True))
        return {"instructions": tuple(out), "btf": btf.bytes(), "func_info": info}
