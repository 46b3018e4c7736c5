"""Bytes in the meaning that BTF gives them, as ``bpftool -j`` writes it: what `formatted` has in dumps of maps.

`kbpf.runtime.codecs` goes another way: what it gives can be a key of a dict, and so unions are bytes there.
"""

from __future__ import annotations

import struct
import sys
from typing import Any, cast

from kbpf.types import Array, Enum, Float, Int, Member, Pointer, Struct, Type

_PRINTABLE = range(0x20, 0x7F)


def formatted(type: Type, data: bytes) -> Any:
    """The JSON value of `data`, which has the type's size."""
    if isinstance(type, Struct):
        return _members(type, data)
    if isinstance(type, Array):
        text = _text(type, data)
        size = type.element.size
        return (
            [formatted(type.element, data[at : at + size]) for at in range(0, type.size, size)]
            if text is None
            else text
        )
    if isinstance(type, Float):
        return struct.unpack("=f" if type.size == 4 else "=d", data)[0]
    number = int.from_bytes(data, sys.byteorder, signed=getattr(type, "signed", False))
    if isinstance(type, Enum):
        return next((name for name, value in type.values if value == number), number)
    if isinstance(type, Int) and type.boolean:
        return bool(number)
    # More than JSON's readers take for an integer.
    return number if type.size <= 8 or isinstance(type, Pointer) else hex(number)


def global_data(type: Struct, data: bytes) -> dict[str, Any]:
    """The variables of a section such as ``.data``, one by one. The type has its name without the dot."""
    return {f".{type.name}": [{name: value} for name, value in _members(type, data).items()]}


def _members(type: Struct, data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for index, member in enumerate(type.members):
        at = member.bit_offset // 8
        # Several that have no name are told apart, as bpftool does not.
        name = f"_{index}" if member.name in found else member.name
        found[name] = (
            _bits(member, data) if member.bit_size else formatted(member.type, data[at : at + member.type.size])
        )
    return found


def _bits(member: Member, data: bytes) -> str:
    first, shift = divmod(member.bit_offset, 8)
    length = (shift + member.bit_size + 7) // 8
    number = int.from_bytes(data[first : first + length], sys.byteorder)
    if sys.byteorder == "big":
        shift = 8 * length - shift - member.bit_size
    return hex(number >> shift & (1 << member.bit_size) - 1)


def _text(type: Array, data: bytes) -> str | None:
    """The text in an array of ``char``, if it ends there and can be printed."""
    element = type.element
    if not isinstance(element, Int) or not (element.char or element.name == "char") or 0 not in data:
        return None
    text = data[: data.index(0)]
    return text.decode("ascii") if all(byte in _PRINTABLE for byte in text) else None


def is_of_btf(type: Any, size: int) -> bool:
    """Whether a map's key or value type is one of BTF, and of its size."""
    return isinstance(type, (Int, Float, Enum, Pointer, Array, Struct)) and cast(Any, type).size == size
