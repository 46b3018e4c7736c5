"""A function of a generated eBPF program while it is written: instructions, labels, and what is held where.

Code is written in one pass from top to bottom. Jumps go forward to labels, and what is held at a label is what all
the ways to it agree on; loops keep what they change out of what they rely on.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Literal

from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.specs import MapSpec
from kbpf.testing.generate_state import SCALAR, Pointer, Scalar, State, merge

SIZES = {ebpf.B: 1, ebpf.H: 2, ebpf.W: 4, ebpf.DW: 8}
#: Where the program's context is, as long as it runs.
CONTEXT_REGISTER = 6

_WORDS = (
    0,
    1,
    2,
    3,
    7,
    8,
    15,
    31,
    32,
    63,
    64,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFFFFFF,
    -1,
    -2,
    -0x80000000,
)
_LONG = (
    0x80000000,
    0xFFFFFFFF,
    0x100000000,
    0x7FFFFFFFFFFFFFFF,
    0x8000000000000000,
    0xFFFFFFFF00000000,
    0xFFFFFFFF80000000,
)


class Code:
    """One function. `depth` is how much stack it uses, `maps` what the program may use."""

    def __init__(self, rng: Random, maps: Sequence[MapSpec], state: State, depth: int, main: bool) -> None:
        self.rng = rng
        self.maps = maps
        self.state: State | None = state
        self.depth = depth
        self.main = main
        self.out: list[Instruction] = []
        #: Registers that may not be written now.
        self.reserved: set[int] = set()
        #: Labels that code here may jump to, the nearest first.
        self.ahead: list[int] = []
        self.nesting = 0
        self._places: dict[int, int] = {}
        self._arriving: dict[int, State] = {}
        self._fixups: list[tuple[int, int, Literal["off", "imm"]]] = []
        self._labels = 0

    # Writing.

    def emit(self, opcode: int, dst: int = 0, src: int = 0, off: int = 0, imm: int = 0) -> None:
        self.out.append(Instruction(opcode, dst, src, off, ebpf.signed32(imm)))

    def label(self) -> int:
        self._labels += 1
        return self._labels

    def place(self, label: int) -> None:
        """The label is here: what is held is what also those bring who jumped to it."""
        self._places[label] = len(self.out)
        self.state = merge(self.state, self._arriving.pop(label, None))

    def jump(self, label: int, opcode: int, dst: int = 0, src: int = 0, imm: int = 0) -> None:
        """A jump to a label that is ahead. What is held goes there too."""
        self._fixups.append((len(self.out), label, "imm" if opcode == ebpf.JMP32 | ebpf.JA else "off"))
        self.emit(opcode, dst, src, 0, imm)
        arriving = merge(self.state, self._arriving.get(label))
        if arriving is not None:
            self._arriving[label] = arriving

    def jump_back(self, label: int, opcode: int, dst: int = 0, src: int = 0, imm: int = 0) -> None:
        self._fixups.append((len(self.out), label, "imm" if opcode == ebpf.JMP32 | ebpf.JA else "off"))
        self.emit(opcode, dst, src, 0, imm)

    def finish(self) -> list[Instruction]:
        """The instructions, with distances for labels."""
        for pc, label, name in self._fixups:
            distance = self._places[label] - pc - 1
            instruction = self.out[pc]
            self.out[pc] = instruction._replace(off=distance) if name == "off" else instruction._replace(imm=distance)
        return self.out

    def move(self, dst: int, imm: int) -> None:
        """dst = imm, in one of the ways."""
        rng = self.rng
        if rng.random() < 0.25 or not -0x80000000 <= imm <= 0xFFFFFFFF:
            self.out += ebpf.ld_imm64(dst, imm)
        elif imm > 0x7FFFFFFF:
            self.emit(ebpf.ALU | ebpf.MOV | ebpf.K, dst, 0, 0, imm)
        else:
            self.emit(rng.choice((ebpf.ALU64, ebpf.ALU64, ebpf.ALU)) | ebpf.MOV | ebpf.K, dst, 0, 0, imm)
        self.set(dst, SCALAR)

    def load_map(self, dst: int, index: int) -> None:
        """dst = the map itself."""
        self.out += ebpf.ld_imm64(dst, index, ebpf.PSEUDO_MAP_IDX)
        self.set(dst, None)

    def load_value(self, dst: int, index: int, offset: int = 0) -> None:
        """dst = the address of the only element of an array."""
        self.out += ebpf.ld_imm64(dst, index | offset << 32, ebpf.PSEUDO_MAP_IDX_VALUE)
        self.set(dst, Pointer("value", offset, offset, map=index, size=self.maps[index].value_size))

    # What is held.

    @property
    def now(self) -> State:
        assert self.state is not None
        return self.state

    def set(self, register: int, held: Scalar | Pointer | None) -> None:
        self.now.registers[register] = held

    # Choosing.

    def word(self) -> int:
        """A signed number of up to 32 bits."""
        rng = self.rng
        if rng.random() < 0.5:
            return rng.choice(_WORDS)
        bits = rng.choice((3, 8, 16, 32))
        return rng.getrandbits(bits) - (1 << bits - 1 if rng.random() < 0.5 or bits == 32 else 0)

    def long(self) -> int:
        """A number of up to 64 bits."""
        dice = self.rng.random()
        if dice < 0.3:
            return self.word()
        return self.rng.choice(_LONG) if dice < 0.6 else self.rng.getrandbits(64)

    def scalar(self) -> int:
        """A register that holds a number; one is made if there is none.

        Not a loop's counter: what a comparison teaches the verifier of it, or of a copy, may keep the loop from ending.
        """
        return self.changeable()

    def target(self) -> int:
        """A register to write, rather not one that holds a pointer."""
        free = [number for number in range(ebpf.FP) if number not in self.reserved]
        plain = [number for number in free if not isinstance(self.now.registers[number], Pointer)]
        return self.rng.choice(plain if plain and self.rng.random() < 0.9 else free)

    def changeable(self) -> int:
        """A register that holds a number and may be written."""
        held = [number for number in self.now.scalars() if number not in self.reserved]
        if held:
            return self.rng.choice(held)
        register = self.target()
        self.move(register, self.long())
        return register

    def small(self, mask: int) -> int:
        """A register with a number from 0 to `mask`, as far as its bits go."""
        register = self.changeable()
        self.emit(self.rng.choice((ebpf.ALU, ebpf.ALU64)) | ebpf.AND | ebpf.K, register, 0, 0, mask)
        return register

    def slot(self, size: int, align: int = 8) -> int:
        """A place on the stack for `size` bytes."""
        least = -self.depth
        return self.rng.randrange(least, -size + 1) // align * align if size < self.depth else least

    def ready_slot(self, size: int) -> int:
        """A place on the stack with `size` bytes of numbers; they are stored if there is none."""
        found = [o for o in range(-self.depth, -size + 1, 8) if self.now.is_ready(o, size)]
        if found:
            return self.rng.choice(found)
        slot = self.slot(size)
        for offset in range(slot, slot + size, 8):
            self.emit(ebpf.ST | ebpf.MEM | ebpf.DW, ebpf.FP, 0, offset, self.word())
            self.now.store(offset, 8)
        return slot

    def memory(self, size: int, *, read: bool, aligned: bool = False) -> tuple[int, int, Pointer] | None:
        """A register, an offset and the pointer for an access of `size` bytes that the verifier allows; or None."""
        rng, state = self.rng, self.now
        register = rng.choice(state.pointers("stack", "value", "window"))
        pointer = state.registers[register]
        assert isinstance(pointer, Pointer)
        bottom, top = (-self.depth, 0) if pointer.region == "stack" else (0, pointer.size)
        first, last = bottom - pointer.low, top - size - pointer.high
        if first > last:
            return None
        off = rng.randrange(first, last + 1)
        if aligned or pointer.region != "value":
            if pointer.low != pointer.high and (pointer.step % size or aligned):
                return None
            off -= (pointer.low + off) % size
            if off < first:
                return None
        if (
            read
            and pointer.region == "stack"
            and not state.is_ready(pointer.low + off, pointer.high - pointer.low + size)
        ):
            return None
        return register, off, pointer

    def stored(self, pointer: Pointer, off: int, size: int) -> None:
        """Numbers were stored through a pointer."""
        if pointer.region != "stack":
            return
        if pointer.low == pointer.high:
            self.now.store(pointer.low + off, size)
        else:
            # Somewhere in this range: what was ready stays so, pointers may be gone.
            self.now.forget(pointer.low + off, pointer.high - pointer.low + size)
