"""LLVM IR as text, for one function of a program: values, blocks, and registers kept in both.

Within a block a register is a value; between blocks it lives in a variable, which LLVM turns into values. Text is
built, not objects: that takes a tenth of the time.
"""

from __future__ import annotations

from kbpf.emulator.jit.layout import WORD
from kbpf.isa import ebpf


class Body:
    """The text of a function, and what its blocks know of registers."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        #: Blocks that are taken rarely, behind all others.
        self.cold: list[str] = []
        self._count = 0
        self._values: dict[int, str] = {}
        self._changed: set[int] = set()

    def name(self) -> str:
        self._count += 1
        return f"%v{self._count}"

    def label(self) -> str:
        self._count += 1
        return f"b{self._count}"

    def emit(self, line: str) -> None:
        self.lines.append(line)

    def value(self, expression: str) -> str:
        """Compute something; returns its name."""
        name = self.name()
        self.lines.append(f"{name} = {expression}")
        return name

    def place(self, label: str) -> None:
        self.lines.append(f"{label}:")

    # Registers.

    def get(self, register: int) -> str:
        if register not in self._values:
            self._values[register] = self.value(f"load i64, ptr %r{register}")
        return self._values[register]

    def get32(self, register: int) -> str:
        return self.value(f"trunc i64 {self.get(register)} to i32")

    def set(self, register: int, value: str) -> None:
        self._values[register] = value
        self._changed.add(register)

    def set32(self, register: int, value: str) -> None:
        """The low half; the upper one is zero."""
        self.set(register, self.value(f"zext i32 {value} to i64"))

    def spill(self) -> None:
        """Put what the block has changed into the variables: before it ends, and before other code asks for them."""
        for register in sorted(self._changed):
            self.emit(f"store i64 {self._values[register]}, ptr %r{register}")
        self._changed.clear()

    def begin(self, label: str) -> None:
        """A block that others jump to: nothing is known."""
        self.place(label)
        self._values.clear()
        self._changed.clear()

    # The run's structure.

    def field(self, name: str) -> str:
        """The address of a field."""
        return self.value(f"getelementptr i64, ptr %run, i64 {WORD[name]}")

    def load_field(self, name: str) -> str:
        return self.value(f"load i64, ptr {self.field(name)}")

    def store_field(self, name: str, value: str) -> None:
        self.emit(f"store i64 {value}, ptr {self.field(name)}")

    def unlikely(self, condition: str) -> tuple[str, str]:
        """Branch to a block that is taken rarely if the condition does not hold; returns (that one, the usual one)."""
        bad, good = self.label(), self.label()
        self.emit(f"br i1 {condition}, label %{good}, label %{bad}, !prof !0")
        return bad, good

    def aside(self, label: str) -> Aside:
        """Write a block that is taken rarely, where it is out of the way."""
        return Aside(self, label)


class Aside:
    """Lines emitted meanwhile go to the cold end of the function."""

    def __init__(self, body: Body, label: str) -> None:
        self._body = body
        self._label = label

    def __enter__(self) -> None:
        self._lines = self._body.lines
        self._body.lines = self._body.cold
        self._body.place(self._label)

    def __exit__(self, *_: object) -> None:
        self._body.lines = self._lines


def variables() -> list[str]:
    return [f"%r{number} = alloca i64" for number in range(ebpf.REGISTERS)]
