"""Programs and maps on the kernel and in the emulator, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kbpf.backend import Backend
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.specs import ProgramSpec

#: Where `__sk_buff.cb` starts: five words that a socket filter may write and user space reads back.
CB = 48
#: An IPv4 frame, for BPF_PROG_TEST_RUN.
FRAME = (
    bytes(12)
    + b"\x08\x00"
    + bytes.fromhex("45000028123440004006000001020304050607080102030400000000")
    + bytes(range(64))
)


class Outcome(NamedTuple):
    """What became of a program: refused with an errno, or run with a value and a context."""

    refused: int = 0
    value: int = 0
    context: bytes = b""


class Side:
    """One backend, and what a test does with it."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def run(self, instructions: Sequence[Instruction], data: bytes = FRAME, context: bytes = bytes(192)) -> Outcome:
        """Load and run once."""
        try:
            fd = self.backend.program_load(ProgramSpec(instructions=tuple(instructions)), [])
        except OSError as error:
            return Outcome(refused=error.errno or -1)
        try:
            result = self.backend.program_run(fd, data, context)
        finally:
            self.backend.close(fd)
        return Outcome(value=result.value, context=result.context)


def with_result(body: Sequence[Instruction], register: int = 0) -> list[Instruction]:
    """The body, with all 64 bits of a register put into ``cb`` before it ends. The body must leave R9 alone."""
    return [
        Instruction(ebpf.ALU64 | ebpf.MOV | ebpf.X, 9, 1),
        *body,
        Instruction(ebpf.STX | ebpf.MEM | ebpf.DW, 9, register, CB),
        Instruction(ebpf.ALU64 | ebpf.MOV | ebpf.K, 0, 0, 0, 1),
        Instruction(ebpf.JMP | ebpf.EXIT),
    ]
