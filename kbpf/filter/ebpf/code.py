"""eBPF code being written: instructions with labels, and its stack frame."""

from __future__ import annotations

from collections.abc import Hashable

from kbpf.errors import FilterError
from kbpf.isa import ebpf
from kbpf.isa.ebpf import FP, Instruction, ld_imm64, signed32
from kbpf.uapi.enums import HELPERS

#: Widths of loads and stores by bytes.
WIDTHS = {1: ebpf.B, 2: ebpf.H, 4: ebpf.W, 8: ebpf.DW}
_MOST_DISTANCE = 0x7FFF
# Branches that the verifier keeps in mind to come back to (BPF_COMPLEXITY_LIMIT_JMP_SEQ).
_MOST_BRANCHES = 8192


#: Where a graph's verdicts lead.
ACCEPT, REJECT = "accept", "reject"


class Code:
    """Instructions in order; jumps name labels, which are any hashable things and are put down once in each `scope`."""

    def __init__(self) -> None:
        #: The graph that is being written, where a program is made of several.
        self.scope = 0
        self._out: list[Instruction] = []
        self._labels: dict[Hashable, int] = {}
        self._jumps: list[tuple[int, Hashable]] = []
        self._stack = 0

    def instructions(self) -> tuple[Instruction, ...]:
        """The code with its jumps resolved. Raises `FilterError` where it is larger than Linux takes."""
        out = list(self._out)
        for at, label in self._jumps:
            distance = self._labels[label] - at - 1
            if not -_MOST_DISTANCE <= distance <= _MOST_DISTANCE:
                raise FilterError(f"the expression is too large for eBPF: a jump over {abs(distance)} instructions")
            out[at] = out[at]._replace(off=distance)
        if len(self._jumps) > _MOST_BRANCHES and _branches(out) > _MOST_BRANCHES:
            raise FilterError(f"the expression is too large for eBPF: more than {_MOST_BRANCHES} branches in a row")
        return tuple(out)

    def reserve(self, size: int, align: int = 8) -> int:
        """Bytes of the stack frame, as a negative offset from its top. Raises `FilterError` when it is full."""
        self._stack = -(-(self._stack + size) // align) * align
        if self._stack > ebpf.STACK_SIZE:
            raise FilterError("the expression needs more than the 512 bytes of an eBPF stack")
        return -self._stack

    def left(self) -> int:
        """Bytes of the stack that nothing has reserved."""
        return ebpf.STACK_SIZE - self._stack

    def add(self, *instructions: Instruction) -> None:
        self._out.extend(instructions)

    def label(self, label: Hashable) -> None:
        self._labels[(label, self.scope)] = len(self._out)

    def jumps_to(self, label: Hashable) -> bool:
        return any(target == (label, self.scope) for _, target in self._jumps)

    def goto(self, label: Hashable) -> None:
        self._jumps.append((len(self._out), (label, self.scope)))
        self._out.append(Instruction(ebpf.JMP | ebpf.JA))

    def jump(self, operation: int, dst: int, k: int, label: Hashable, *, wide: bool = False) -> None:
        """Compare a register with a constant: its lower half, or all of it where `wide`."""
        self._jumps.append((len(self._out), (label, self.scope)))
        kind = ebpf.JMP if wide else ebpf.JMP32
        self._out.append(Instruction(kind | operation | ebpf.K, dst, 0, 0, signed32(k)))

    def jump_register(self, operation: int, dst: int, src: int, label: Hashable, *, wide: bool = False) -> None:
        self._jumps.append((len(self._out), (label, self.scope)))
        self._out.append(Instruction((ebpf.JMP if wide else ebpf.JMP32) | operation | ebpf.X, dst, src))

    def move(self, dst: int, src: int) -> None:
        self.add(Instruction(ebpf.ALU64 | ebpf.MOV | ebpf.X, dst, src))

    def constant(self, dst: int, k: int) -> None:
        """A 32-bit constant."""
        self.add(Instruction(ebpf.ALU | ebpf.MOV | ebpf.K, dst, 0, 0, signed32(k)))

    def alu(self, operation: int, dst: int, k: int) -> None:
        """32-bit arithmetic with a constant."""
        self.add(Instruction(ebpf.ALU | operation | ebpf.K, dst, 0, 0, signed32(k)))

    def alu_register(self, operation: int, dst: int, src: int) -> None:
        self.add(Instruction(ebpf.ALU | operation | ebpf.X, dst, src))

    def add_to(self, dst: int, k: int) -> None:
        """64-bit addition, also to pointers."""
        self.add(Instruction(ebpf.ALU64 | ebpf.ADD | ebpf.K, dst, 0, 0, k))

    def load(self, size: int, dst: int, src: int, off: int) -> None:
        self.add(Instruction(ebpf.LDX | ebpf.MEM | WIDTHS[size], dst, src, off))

    def store(self, size: int, off: int, src: int) -> None:
        """A register to the stack."""
        self.add(Instruction(ebpf.STX | ebpf.MEM | WIDTHS[size], FP, src, off))

    def store_constant(self, size: int, off: int, k: int) -> None:
        self.add(Instruction(ebpf.ST | ebpf.MEM | WIDTHS[size], FP, 0, off, signed32(k)))

    def address(self, dst: int, off: int) -> None:
        """The address of something on the stack."""
        self.move(dst, FP)
        self.add_to(dst, off)

    def network_order(self, register: int, size: int) -> None:
        """Between the host's byte order and the network's; one byte has none."""
        if size > 1:
            self.add(Instruction(ebpf.ALU | ebpf.END | ebpf.X, register, 0, 0, 8 * size))

    def map(self, dst: int, index: int) -> None:
        """The map at `index` of the program's."""
        self.add(*ld_imm64(dst, index, ebpf.PSEUDO_MAP_IDX))

    def call(self, helper: str) -> None:
        self.add(Instruction(ebpf.JMP | ebpf.CALL, 0, 0, 0, HELPERS[helper]))

    def exit(self) -> None:
        self.add(Instruction(ebpf.JMP | ebpf.EXIT))


def _branches(instructions: list[Instruction]) -> int:
    """How many conditional jumps the verifier passes before it comes to an end: it follows what does not jump first."""
    at = count = 0
    while True:
        opcode, _, _, off, _ = instructions[at]
        operation = opcode & 0xF0 if opcode & 7 in (ebpf.JMP, ebpf.JMP32) else ebpf.CALL
        if operation == ebpf.EXIT:
            return count
        count += operation not in (ebpf.JA, ebpf.CALL)
        at += 1 + (off if operation == ebpf.JA else opcode == ebpf.LD_IMM64)
