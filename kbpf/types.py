"""C types as data: what BTF says of a map's keys and values.

Pure values, comparable and printable. `kbpf.elf` makes them from BTF, `kbpf.runtime`
turns them into codecs. Sizes are bytes, offsets within a struct are bits, as in BTF.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, kw_only=True)
class Int:
    """An integer of 1 to 16 bytes; `boolean` for ``_Bool``, `char` for ``char``."""

    name: str
    size: int
    signed: bool = False
    boolean: bool = False
    char: bool = False


@dataclass(frozen=True, kw_only=True)
class Float:
    """A float of 4 or 8 bytes."""

    name: str
    size: int


@dataclass(frozen=True, kw_only=True)
class Enum:
    """An enum; `values` are (name, number) pairs. Values decode as plain integers."""

    name: str
    size: int
    signed: bool = False
    values: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Pointer:
    """A pointer; decodes as the 64-bit address."""

    target: str = "void"
    size: int = 8


@dataclass(frozen=True, kw_only=True)
class Array:
    """`count` elements of `element`."""

    element: Type
    count: int

    @property
    def size(self) -> int:
        return self.element.size * self.count


@dataclass(frozen=True, kw_only=True)
class Member:
    """A member of a struct or union; `bit_size` is 0 unless it is a bit field; anonymous members have no name."""

    name: str
    type: Type
    bit_offset: int = 0
    bit_size: int = 0


@dataclass(frozen=True, kw_only=True)
class Struct:
    """A struct, or a union where `union` is true."""

    name: str
    size: int
    members: tuple[Member, ...]
    union: bool = False


Type: TypeAlias = "Int | Float | Enum | Pointer | Array | Struct"
