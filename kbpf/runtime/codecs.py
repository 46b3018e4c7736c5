"""Map keys and values between bytes and Python.

| C | Python |
| --- | --- |
| integers, enums, pointers | ``int`` (``bool`` for ``_Bool``) |
| float, double | ``float`` |
| arrays of one-byte integers | ``bytes`` |
| other arrays | ``tuple`` |
| structs | a named tuple of the members' values |
| unions, and structs with bit fields or members without a name | ``bytes`` |
| no type known | ``bytes`` |

Everything decodes to something hashable, so that any key can be a key of a ``dict``.
Encoding takes the same and whatever is close to it: bytes of the right length for
anything, an ``int`` for bytes of 1, 2, 4 or 8, a mapping or any sequence for a struct.
"""

from __future__ import annotations

import struct
import sys
from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from keyword import iskeyword
from operator import itemgetter
from typing import Any, NamedTuple

from kbpf.types import Array, Enum, Float, Int, Pointer, Struct, Type

_INTEGER = {(1, False): "B", (1, True): "b", (2, False): "H", (2, True): "h", (4, False): "I", (4, True): "i"}
_INTEGER |= {(8, False): "Q", (8, True): "q"}
_SIZES = (1, 2, 4, 8)


class Codec(NamedTuple):
    """How one type goes to bytes and back; `decode_many` takes values back to back."""

    size: int
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]
    decode_many: Callable[[bytes], list[Any]]
    #: Where one ``struct`` format reads the whole: that, and what makes a value of its fields (None: a tuple).
    flat: struct.Struct | None = None
    make: Callable[[tuple[Any, ...]], Any] | None = None


def codec(type: Type | None, size: int) -> Codec:
    """The codec for a key or value of `size` bytes; of bytes where `type` is None or is not that size."""
    if type is None or type.size != size:
        return _bytes_codec(size)
    if isinstance(type, Float):
        return _scalar_codec("f" if size == 4 else "d", size)
    if isinstance(type, Int) and type.boolean and size == 1:
        return _scalar_codec("?", size)
    if isinstance(type, (Int, Enum, Pointer)) and size in _SIZES:
        return _scalar_codec(_INTEGER[size, getattr(type, "signed", False)], size)
    if isinstance(type, Array):
        return _bytes_codec(size, _is_char(type.element)) if _is_byte(type.element) else _array_codec(type)
    if isinstance(type, Struct) and _is_plain(type):
        return _struct_codec(type)
    return _bytes_codec(size)


def _is_byte(type: Type) -> bool:
    return isinstance(type, Int) and type.size == 1 and not type.boolean


def _is_char(type: Type) -> bool:
    return isinstance(type, Int) and type.char


def _is_plain(type: Struct) -> bool:
    names = [member.name for member in type.members]
    return (
        not type.union
        and bool(names)
        and all(names)
        and len(set(names)) == len(names)
        and not any(member.bit_size or member.bit_offset % 8 for member in type.members)
    )


def _bytes_codec(size: int, text: bool = False) -> Codec:
    """Where it is `text`, what is shorter ends in zeroes, as strings do in C."""

    def encode(value: Any) -> bytes:
        if isinstance(value, int) and size in _SIZES:
            return _from_int(value, size)
        data = bytes(memoryview(value).cast("B"))
        if text:
            data = data.ljust(size, b"\0")
        if len(data) != size:
            raise ValueError(f"{len(data)} bytes where {size} are wanted")
        return data

    def decode_many(data: bytes) -> list[Any]:
        return [data[at : at + size] for at in range(0, len(data), size)]

    return Codec(size, encode, bytes, decode_many)


def _from_int(value: int, size: int) -> bytes:
    try:
        return value.to_bytes(size, sys.byteorder, signed=value < 0)
    except OverflowError:
        raise ValueError(f"{value} does not fit {size} bytes") from None


def _scalar_codec(letter: str, size: int) -> Codec:
    packer = struct.Struct("=" + letter)
    # Only known as a str here; memoryview wants one of its literals.
    form: Any = letter
    pack, unpack = packer.pack, packer.unpack

    def encode(value: Any) -> bytes:
        try:
            return pack(value)
        except struct.error:
            if isinstance(value, (bytes, bytearray, memoryview)) and len(value) == size:
                return bytes(value)
            raise ValueError(f"{value!r} does not fit {size} bytes ({letter!r})") from None

    def decode(data: bytes) -> Any:
        return unpack(data)[0]

    def decode_many(data: bytes) -> list[Any]:
        values: list[Any] = memoryview(data).cast(form).tolist()
        return values

    return Codec(size, encode, decode, decode_many, packer, itemgetter(0))


def _array_codec(type: Array) -> Codec:
    element = codec(type.element, type.element.size)

    def encode(value: Any) -> bytes:
        if isinstance(value, (bytes, bytearray, memoryview)):
            return whole.encode(value)
        if len(value) != type.count:
            raise ValueError(f"{len(value)} elements where {type.count} are wanted")
        return b"".join(map(element.encode, value))

    def decode(data: bytes) -> tuple[Any, ...]:
        return tuple(element.decode_many(data))

    whole = _bytes_codec(type.size)
    return Codec(type.size, encode, decode, lambda data: [decode(part) for part in whole.decode_many(data)])


@cache
def _record_class(name: str, fields: tuple[str, ...]) -> Any:
    """A named tuple that goes from process to process, though its class is in no module."""
    made: Any = namedtuple(name, fields, rename=True)  # type: ignore[misc]
    made.__reduce__ = _reduced  # type: ignore[method-assign, assignment]
    return made


def _reduced(record: Any) -> tuple[Any, ...]:
    return _record, (type(record).__name__, record._fields, tuple(record))


def _record(name: str, fields: tuple[str, ...], values: tuple[Any, ...]) -> Any:
    return _record_class(name, fields)(*values)


def _struct_codec(type: Struct) -> Codec:
    names = [member.name for member in type.members]
    # C may call a struct what Python cannot, such as "class".
    usable = type.name.isidentifier() and not iskeyword(type.name)
    record = _record_class(type.name if usable else "anonymous", tuple(names))
    members = [(member.bit_offset // 8, codec(member.type, member.type.size)) for member in type.members]
    whole = _bytes_codec(type.size)
    flat = _flat_format(type)

    def encode(value: Any) -> bytes:
        if isinstance(value, (bytes, bytearray, memoryview)):
            return whole.encode(value)
        data = bytearray(type.size)
        for (at, member), part in zip(members, _parts(value, names), strict=True):
            data[at : at + member.size] = member.encode(part)
        return bytes(data)

    if flat is not None:
        unpack, iterate, make = flat.unpack, flat.iter_unpack, record._make
        return Codec(
            type.size,
            encode,
            lambda data: make(unpack(data)),
            lambda data: list(map(make, iterate(data))),
            flat,
            make,
        )

    def decode(data: bytes) -> Any:
        return record._make(member.decode(data[at : at + member.size]) for at, member in members)

    return Codec(type.size, encode, decode, lambda data: [decode(part) for part in whole.decode_many(data)])


def _parts(value: Any, names: list[str]) -> Sequence[Any]:
    """The members' values in order, from a mapping, a sequence or an object with such attributes."""
    if isinstance(value, Mapping):
        unknown = set(value) - set(names)
        if unknown:
            raise ValueError(f"no member {', '.join(sorted(map(str, unknown)))}; there are {', '.join(names)}")
        return [value.get(name, 0) for name in names]
    if not isinstance(value, Sequence):
        return [getattr(value, name) for name in names]
    if len(value) != len(names):
        raise ValueError(f"{len(value)} values where {len(names)} are wanted: {', '.join(names)}")
    return value


def _flat_format(type: Struct) -> struct.Struct | None:
    """One ``struct`` format for the whole, where every member is a scalar or bytes."""
    letters, at = "=", 0
    for member in type.members:
        offset, size = member.bit_offset // 8, member.type.size
        if offset < at:
            return None
        letters += f"{offset - at}x" if offset > at else ""
        if isinstance(member.type, Array) and _is_byte(member.type.element):
            letters += f"{size}s"
        elif isinstance(member.type, Int) and member.type.boolean and size == 1:
            letters += "?"
        elif isinstance(member.type, (Int, Enum, Pointer)) and size in _SIZES:
            letters += _INTEGER[size, getattr(member.type, "signed", False)]
        elif isinstance(member.type, Float):
            letters += "f" if size == 4 else "d"
        else:
            return None
        at = offset + size
    return struct.Struct(letters + (f"{type.size - at}x" if type.size > at else ""))


class PerCpu(tuple[Any, ...]):
    """One value for each possible CPU, in CPU order."""

    def sum(self) -> Any:
        """The total: of numbers, or member by member of named tuples and element by element of arrays.

        Raises `TypeError` where the values are bytes.
        """
        return total(self)


def total(values: Sequence[Any]) -> Any:
    """The sum of values of one type: of numbers, or member by member, also of one processor after the other."""
    first = values[0]
    if isinstance(first, (int, float)):
        return sum(values)
    if isinstance(first, tuple):
        columns = [total(column) for column in zip(*values, strict=True)]
        return first._make(columns) if hasattr(first, "_make") else type(first)(columns)
    raise TypeError("the values have no type to sum by: they are bytes")


def per_cpu_codec(one: Codec, cpus: int) -> Codec:
    """The codec for `cpus` slots of a value, each rounded up to 8 bytes as the kernel lays them out."""
    slot = (one.size + 7) & ~7
    whole = slot * cpus

    def encode(value: Any) -> bytes:
        if isinstance(value, (bytes, bytearray, memoryview)) and len(value) == whole:
            return bytes(value)
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or len(value) != cpus:
            raise ValueError(f"a per-CPU value is a sequence of {cpus} values, one for each possible CPU")
        return b"".join(one.encode(part).ljust(slot, b"\0") for part in value)

    def decode(data: bytes) -> PerCpu:
        return PerCpu(one.decode(data[at : at + one.size]) for at in range(0, whole, slot))

    def decode_many(data: bytes) -> list[Any]:
        return [decode(data[at : at + whole]) for at in range(0, len(data), whole)]

    return Codec(whole, encode, decode, decode_many)
