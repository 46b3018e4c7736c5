"""Pieces of programs that use maps, and maps of which there is one on each side."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from sides import CB, FRAME, Side

from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction, ld_imm64
from kbpf.specs import MapSpec, ProgramSpec
from kbpf.testing.btf_bytes import GLOBAL, BtfBytes
from kbpf.uapi.enums import HELPERS

Code = list[Instruction]
EXIT = Instruction(ebpf.JMP | ebpf.EXIT)


def mov(register: int, value: int) -> Code:
    return [Instruction(ebpf.ALU64 | ebpf.MOV, register, 0, 0, value)]


def copy(register: int, source: int) -> Code:
    return [Instruction(ebpf.ALU64 | ebpf.MOV | ebpf.X, register, source)]


def stack(register: int, offset: int) -> Code:
    """The address of a place on the stack."""
    return [*copy(register, ebpf.FP), Instruction(ebpf.ALU64 | ebpf.ADD, register, 0, 0, offset)]


def put(offset: int, value: int, register: int = ebpf.FP) -> Code:
    """Store 64 bits, on the stack or where `register` points."""
    return [Instruction(ebpf.ST | ebpf.MEM | ebpf.DW, register, 0, offset, value)]


def get(register: int, source: int, offset: int = 0) -> Code:
    """Load 64 bits."""
    return [Instruction(ebpf.LDX | ebpf.MEM | ebpf.DW, register, source, offset)]


def the_map(register: int, index: int = 0) -> Code:
    return [*ld_imm64(register, index, ebpf.PSEUDO_MAP_IDX)]


def call(helper: str) -> Code:
    return [Instruction(ebpf.JMP | ebpf.CALL, 0, 0, 0, HELPERS[helper])]


def unless_null(register: int, body: Sequence[Instruction]) -> Code:
    return [Instruction(ebpf.JMP | ebpf.JEQ, register, 0, len(body)), *body]


def main(*body: Code) -> Code:
    """A program that keeps the context in R9, and R0 of the body in ``cb``."""
    flat = [instruction for piece in body for instruction in piece]
    return [*copy(9, 1), *flat, Instruction(ebpf.STX | ebpf.MEM | ebpf.DW, 9, 0, CB), *mov(0, 0), EXIT]


def attempt(action: Callable[[], Any]) -> Any:
    """What an action gives, or the name of its errno and how far it came."""
    try:
        return action()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, error.errno), getattr(error, "done", None)


def create(side: Side, spec: MapSpec) -> int:
    """Create a map, with a template for the maps in it."""
    if spec.inner is None:
        return side.backend.map_create(spec)
    template = create(side, spec.inner)
    try:
        return side.backend.map_create(spec, template)
    finally:
        side.backend.close(template)


@contextmanager
def made(side: Side, *specs: MapSpec) -> Iterator[tuple[int, ...]]:
    """Maps on one side."""
    fds: list[int] = []
    try:
        for spec in specs:
            fds.append(create(side, spec))
        yield tuple(fds)
    finally:
        for fd in fds:
            side.backend.close(fd)


def run(side: Side, program: Code, maps: Sequence[int], data: bytes = FRAME, **spec: Any) -> int:
    """Load and run once; returns what `main` kept of R0."""
    fd = side.backend.program_load(ProgramSpec(instructions=tuple(program), **spec), maps)
    try:
        context = side.backend.program_run(fd, data, bytes(192)).context
    finally:
        side.backend.close(fd)
    return int.from_bytes(context[CB : CB + 8], "little")


def link_functions(*functions: Code) -> tuple[Code, list[int]]:
    """Functions one after the other, the main one first; calls and function addresses hold a function's number.

    Returns the program and where its functions start.
    """
    starts = [sum(len(f) for f in functions[:number]) for number in range(len(functions))]
    flat = [instruction for function in functions for instruction in function]
    for pc, (opcode, dst, src, off, imm) in enumerate(flat):
        if (opcode == ebpf.JMP | ebpf.CALL and src == ebpf.PSEUDO_CALL) or (
            opcode == ebpf.LD_IMM64 and src == ebpf.PSEUDO_FUNC
        ):
            flat[pc] = Instruction(opcode, dst, src, off, starts[imm] - pc - 1)
    return flat, starts


def call_function(number: int) -> Code:
    return [Instruction(ebpf.JMP | ebpf.CALL, 0, ebpf.PSEUDO_CALL, 0, number)]


def function_address(register: int, number: int) -> Code:
    return [*ld_imm64(register, number, ebpf.PSEUDO_FUNC)]


def described(starts: Sequence[int], **function: Any) -> dict[str, bytes]:
    """BTF and function info for `ProgramSpec`: a global main function, and others as `BtfBytes.function` says."""
    btf = BtfBytes()
    ids = [btf.function("main", GLOBAL, parameters=1)]
    ids += [btf.function(f"f{start}", **{"parameters": 2, **function}) for start in starts[1:]]
    info = b"".join(struct.pack("=II", *pair) for pair in zip(starts, ids, strict=True))
    return {"btf": btf.bytes(), "func_info": info}


def described_value(type: Literal["int", "u64"]) -> dict[str, Any]:
    """BTF for `MapSpec`, with an int as the key."""
    btf = BtfBytes()
    return {"btf": btf.bytes(), "btf_key_type_id": btf.int, "btf_value_type_id": getattr(btf, type)}
