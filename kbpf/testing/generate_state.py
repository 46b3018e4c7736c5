"""What a generated eBPF program holds at a point: the verifier's view, as coarse as a generator needs it.

A register holds a scalar, a pointer with a range of offsets, or nothing that may be used. Where two ways meet, what
they do not agree on may not be used: so that no program depends on what the kernel leaves open, and few are refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

from kbpf.isa import ebpf


class Scalar(NamedTuple):
    """A number, known or not."""


class Pointer(NamedTuple):
    """A pointer into `region`, at an offset from `low` to `high`, that was reached by steps of `step` bytes.

    Stack offsets are from the frame's top and negative. `map` is the index of the map of a value, `size` the bytes of
    a value or of a caller's memory (window).
    """

    region: Literal["context", "stack", "value", "window"]
    low: int = 0
    high: int = 0
    step: int = 8
    map: int = -1
    size: int = 0


SCALAR = Scalar()
FRAME = Pointer("stack")
Held: TypeAlias = "Scalar | Pointer | None"
_NOTHING: tuple[Held, ...] = (None,) * ebpf.FP


def stack_bits(offset: int, size: int) -> int:
    """The bits of `State.ready` for `size` bytes of stack at `offset` (from the frame's top)."""
    return ((1 << size) - 1) << (ebpf.STACK_SIZE + offset)


@dataclass
class State:
    """Registers by number; which bytes of stack hold numbers, a bit each; pointers kept on the stack, by offset."""

    registers: list[Held] = field(default_factory=lambda: [*_NOTHING, FRAME])
    ready: int = 0
    spills: dict[int, Pointer] = field(default_factory=dict)

    def copy(self) -> State:
        return State(list(self.registers), self.ready, dict(self.spills))

    def scalars(self) -> list[int]:
        return [number for number, held in enumerate(self.registers) if isinstance(held, Scalar)]

    def pointers(self, *regions: str) -> list[int]:
        return [
            number for number, held in enumerate(self.registers) if isinstance(held, Pointer) and held.region in regions
        ]

    def is_ready(self, offset: int, size: int) -> bool:
        bits = stack_bits(offset, size)
        return self.ready & bits == bits

    def store(self, offset: int, size: int) -> None:
        """Numbers were stored on the stack."""
        self.forget(offset, size)
        self.ready |= stack_bits(offset, size)

    def forget(self, offset: int, size: int) -> None:
        """Bytes of the stack do not hold what they held: pointers that they were part of are gone."""
        for slot in [slot for slot in self.spills if slot < offset + size and offset < slot + 8]:
            del self.spills[slot]

    def spill(self, offset: int, pointer: Pointer) -> None:
        self.forget(offset, 8)
        self.ready &= ~stack_bits(offset, 8)
        self.spills[offset] = pointer

    def clobber(self) -> None:
        """What a call leaves of the registers: R0 is a number, the arguments are gone."""
        self.registers[0:6] = [SCALAR, None, None, None, None, None]

    def drop_values(self, maps: set[int]) -> None:
        """Pointers to elements of these maps may have become stale."""

        def stale(held: Held) -> bool:
            return isinstance(held, Pointer) and held.region == "value" and held.map in maps

        self.registers = [None if stale(held) else held for held in self.registers]
        self.spills = {slot: held for slot, held in self.spills.items() if not stale(held)}

    def weaken(self) -> None:
        """Keep what every turn of a loop finds again: numbers that calls save, the context, whole words of stack."""
        for number, held in enumerate(self.registers[: ebpf.FP]):
            if number < 6 or (isinstance(held, Pointer) and held.region != "context"):
                self.registers[number] = None
        self.spills.clear()
        for slot in range(-ebpf.STACK_SIZE, 0, 8):
            if not self.is_ready(slot, 8):
                self.ready &= ~stack_bits(slot, 8)


def merge(a: State | None, b: State | None) -> State | None:
    """What holds where two ways meet; None is a way that nobody comes."""
    if a is None or b is None:
        return (a or b).copy() if a or b else None  # type: ignore[union-attr]
    return State(
        [_common(x, y) for x, y in zip(a.registers, b.registers, strict=True)],
        a.ready & b.ready,
        {slot: held for slot, held in a.spills.items() if b.spills.get(slot) == held},
    )


def _common(a: Held, b: Held) -> Held:
    if a == b:
        return a
    if isinstance(a, Pointer) and isinstance(b, Pointer) and (a.region, a.map, a.size) == (b.region, b.map, b.size):
        return a._replace(low=min(a.low, b.low), high=max(a.high, b.high), step=min(a.step, b.step))
    return None
