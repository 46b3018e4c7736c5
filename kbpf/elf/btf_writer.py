"""BTF written from types, so that the kernel and its tools know what is in a map that no compiler has described.

The format is that of Documentation/bpf/btf.rst: types are numbered from 1, each after those that it refers to.
"""

from __future__ import annotations

import struct

from kbpf import types
from kbpf.elf import btf

_SIGNED, _CHAR, _BOOL = 1, 2, 4
_WORDS = struct.Struct("=III")
#: Set where the members of a struct may be bit fields, or the numbers of an enum negative.
_KIND_FLAG = 1 << 31


def btf_of(*roots: types.Type) -> tuple[bytes, tuple[int, ...]]:
    """The BTF of some types and what they are made of, and their numbers in it."""
    writer = _Writer()
    numbers = tuple(writer.add(root) for root in roots)
    return writer.whole(), numbers


class _Writer:
    def __init__(self) -> None:
        self._types = bytearray()
        self._strings = bytearray(1)
        self._numbers: dict[types.Type, int] = {}
        self._count = 0

    def add(self, type: types.Type) -> int:
        """The number of a type, which is written if it is not there."""
        if type not in self._numbers:
            self._numbers[type] = self._written(type)
        return self._numbers[type]

    def whole(self) -> bytes:
        sizes = len(self._types), len(self._types), len(self._strings)
        return btf._HEADER.pack(btf.MAGIC, 1, 0, btf._HEADER.size, 0, *sizes) + self._types + self._strings

    def _written(self, type: types.Type) -> int:
        if isinstance(type, types.Int):
            encoding = _SIGNED * type.signed | _CHAR * type.char | _BOOL * type.boolean
            return self._record(type.name, btf.INT, 0, type.size, struct.pack("=I", encoding << 24 | 8 * type.size))
        if isinstance(type, types.Float):
            return self._record(type.name, btf.FLOAT, 0, type.size)
        if isinstance(type, types.Pointer):
            return self._record("", btf.PTR, 0, 0)
        if isinstance(type, types.Array):
            element, index = self.add(type.element), self.add(types.Int(name="uint32_t", size=4))
            return self._record("", btf.ARRAY, 0, 0, _WORDS.pack(element, index, type.count))
        if isinstance(type, types.Enum):
            return self._enum(type)
        return self._struct(type)

    def _enum(self, type: types.Enum) -> int:
        wide = type.size == 8
        rest = b"".join(
            _WORDS.pack(self._string(name), number & 0xFFFFFFFF, number >> 32 & 0xFFFFFFFF)
            if wide
            else struct.pack("=II", self._string(name), number & 0xFFFFFFFF)
            for name, number in type.values
        )
        flag = _KIND_FLAG if type.signed else 0
        return self._record(type.name, btf.ENUM64 if wide else btf.ENUM, flag | len(type.values), type.size, rest)

    def _struct(self, type: types.Struct) -> int:
        fields = any(member.bit_size for member in type.members)
        rest = b"".join(
            _WORDS.pack(self._string(member.name), self.add(member.type), member.bit_size << 24 | member.bit_offset)
            for member in type.members
        )
        count = len(type.members) | (_KIND_FLAG if fields else 0)
        return self._record(type.name, btf.UNION if type.union else btf.STRUCT, count, type.size, rest)

    def _record(self, name: str, kind: int, count: int, size: int, rest: bytes = b"") -> int:
        self._types += _WORDS.pack(self._string(name), kind << 24 | count, size) + rest
        self._count += 1
        return self._count

    def _string(self, text: str) -> int:
        if not text:
            return 0
        at = len(self._strings)
        self._strings += text.encode() + b"\0"
        return at
