"""What a program's bytes are, said in Python: formats of `struct`, ctypes types, dataclasses, types of BTF.

| given | decodes to |
| --- | --- |
| ``"IQ16s"``, a `struct.Struct` | a ``tuple``, or the value itself where there is one field |
| a `kbpf.types` type, as BTF says it | see `kbpf.runtime.codecs` |
| a ctypes type | an instance; of the simple types ``int``, ``float``, ``bytes`` |
| a dataclass | an instance |
| None | ``bytes`` |

The fields of a dataclass say their sizes as the letters of `struct`: ``pid: Annotated[int, "I"]``,
``comm: Annotated[bytes, "16s"]``, ``times: Annotated[tuple[int, ...], "4Q"]``. ``float`` is a double and ``bool`` a
byte where nothing else is said, and a field may be another such dataclass or a ctypes type. They are laid out as C
lays out a struct.
"""

from __future__ import annotations

import ctypes
import re
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from operator import itemgetter
from typing import Any, get_type_hints

from kbpf.runtime.codecs import Codec, codec
from kbpf.types import Array, Enum, Float, Int, Member, Pointer, Struct, Type

_LETTERS: dict[str, Type] = {
    "?": Int(name="_Bool", size=1, boolean=True),
    "c": Int(name="char", size=1, char=True),
    "f": Float(name="float", size=4),
    "d": Float(name="double", size=8),
    **{
        letter: Int(name=f"{'' if letter.islower() else 'u'}int{8 * size}_t", size=size, signed=letter.islower())
        for letters, size in (("bB", 1), ("hH", 2), ("iI", 4), ("qQ", 8), ("lL", struct.calcsize("l")))
        for letter in letters
    },
}
_FIELD = re.compile(r"(\d*)([?cbBhHiIlLqQfds])")


def codec_for(spec: Any, size: int | None = None) -> Codec:
    """The codec for what `spec` says, of `size` bytes where the map says how many.

    Raises `ValueError` where the two sizes differ (bytes at the end that only align the next element are no
    difference), `TypeError` for what says no layout.
    """
    if isinstance(spec, Codec):
        made = spec
    elif spec is None:
        if size is None:
            raise TypeError("bytes of what size?")
        return codec(None, size)
    elif isinstance(spec, (str, struct.Struct)):
        made = _of_format(spec, size)
    elif isinstance(spec, (Int, Float, Enum, Pointer, Array, Struct)):
        made = codec(spec, spec.size)
    elif isinstance(spec, type) and issubclass(spec, _CTYPES):
        made = _of_ctypes(spec)
    elif isinstance(spec, type) and is_dataclass(spec):
        made = _of_dataclass(spec)
    else:
        raise TypeError(f"{spec!r} is no format, ctypes type, dataclass or type of BTF")
    if size is not None and made.size != size:
        raise ValueError(f"{_named(spec)} has {made.size} bytes where there are {size}")
    return made


def type_for(spec: Any) -> Type:
    """The type of BTF that a dataclass, or a ctypes type without bit fields, is laid out as. `TypeError` for others."""
    if isinstance(spec, (Int, Float, Enum, Pointer, Array, Struct)):
        return spec
    if isinstance(spec, type) and issubclass(spec, _CTYPES):
        return _type_of_ctypes(spec)
    if isinstance(spec, type) and is_dataclass(spec):
        return _type_of_dataclass(spec)
    raise TypeError(f"{spec!r} is no ctypes type, dataclass or type of BTF")


def described(spec: Any) -> Type | None:
    """The type of BTF for what `codec_for` takes; None where there is none, as for several numbers without names."""
    if isinstance(spec, (str, struct.Struct)):
        packer = struct.Struct(spec) if isinstance(spec, str) else spec
        letter = number_letter(packer)
        return None if letter is None else _LETTERS[letter]
    try:
        return type_for(spec)
    except TypeError:
        return None


def _named(spec: Any) -> str:
    return getattr(spec, "__name__", None) or getattr(spec, "name", None) or repr(spec)


# Formats of `struct`.


def _of_format(spec: str | struct.Struct, size: int | None) -> Codec:
    text = spec if isinstance(spec, str) else spec.format
    try:
        packer = struct.Struct(text)
    except struct.error as error:
        raise ValueError(f"{text!r} is no format of struct: {error}") from None
    if not packer.size:
        raise ValueError(f"{text!r} is a format of no bytes")
    # As in C, a format with native alignment may end in bytes that align the next element.
    if size == _whole(text) and size > packer.size:
        packer = struct.Struct(f"{text}{size - packer.size}x")
    pack, unpack, iterate = packer.pack, packer.unpack, packer.iter_unpack
    single = len(unpack(bytes(packer.size))) == 1

    def encode(value: Any) -> bytes:
        if isinstance(value, (bytes, bytearray, memoryview)) and not single and len(value) == packer.size:
            return bytes(value)
        try:
            return pack(value) if single else pack(*value)
        except (struct.error, TypeError) as error:
            raise ValueError(f"{value!r} does not fit {text!r}: {error}") from None

    if single:
        letter = number_letter(packer)
        form: Any = letter

        def decode_many(data: bytes) -> list[Any]:
            if letter is None:
                return [value for (value,) in iterate(data)]
            values: list[Any] = memoryview(data).cast(form).tolist()
            return values

        return Codec(packer.size, encode, lambda data: unpack(data)[0], decode_many, packer, itemgetter(0))
    return Codec(packer.size, encode, unpack, lambda data: list(iterate(data)), packer, None)


def _whole(text: str) -> int:
    """The size of a struct of C with a format's fields: where the alignment is native, a multiple of the widest."""
    if text[:1] in ("=", "<", ">", "!"):
        return struct.calcsize(text)
    return max((struct.calcsize(f"{text}0{letter}") for letter in text if letter.isalpha()), default=0)


def number_letter(packer: struct.Struct) -> str | None:
    """The letter under which a memoryview has the same numbers as a format of `struct`; None where there is none."""
    order, letter = packer.format[:-1], packer.format[-1:]
    native = {"": True, "@": True, "=": True, "<": sys.byteorder == "little", ">": sys.byteorder == "big"}
    same = letter in "bBhHiIlLqQfd?" and native.get(order, False) and struct.calcsize(letter) == packer.size
    return letter if same else None


# ctypes.

_CTYPES = (ctypes.Structure, ctypes.Union, ctypes.Array, ctypes._SimpleCData)


def _of_ctypes(spec: Any) -> Codec:
    size = ctypes.sizeof(spec)
    simple = issubclass(spec, ctypes._SimpleCData)
    read = spec.from_buffer_copy

    def encode(value: Any) -> bytes:
        if isinstance(value, (bytes, bytearray, memoryview)) and len(value) == size and not simple:
            return bytes(value)
        if isinstance(value, spec):
            return bytes(value)
        try:
            made = spec(value) if simple else spec(*value)
        except TypeError as error:
            raise ValueError(f"{value!r} is no {spec.__name__}: {error}") from None
        if simple and made.value != value:
            raise ValueError(f"{value!r} does not fit {spec.__name__}")
        return bytes(made)

    def decode(data: bytes) -> Any:
        return read(data).value if simple else read(data)

    def decode_many(data: bytes) -> list[Any]:
        return [decode(data[at : at + size]) for at in range(0, len(data), size)]

    return Codec(size, encode, decode, decode_many)


def _type_of_ctypes(spec: Any) -> Type:
    size, name = ctypes.sizeof(spec), spec.__name__
    if issubclass(spec, ctypes.Array):
        return Array(element=_type_of_ctypes(spec._type_), count=spec._length_)
    if issubclass(spec, (ctypes.Structure, ctypes.Union)):
        if any(len(field) > 2 for field in spec._fields_):
            raise TypeError(f"{name} has bit fields")
        members = tuple(
            Member(name=field, type=_type_of_ctypes(kind), bit_offset=8 * getattr(spec, field).offset)
            for field, kind in spec._fields_
        )
        return Struct(name=name, size=size, members=members, union=issubclass(spec, ctypes.Union))
    letter = spec._type_
    if letter in ("P", "z", "Z", "O"):
        return Pointer(size=size)
    if letter not in _LETTERS:
        raise TypeError(f"{name} has no type of C that a program could share")
    return _LETTERS[letter]


# Dataclasses.


def _of_dataclass(spec: Any) -> Codec:
    inner = codec(_type_of_dataclass(spec), _type_of_dataclass(spec).size)
    if inner.flat is not None:
        unpack, iterate, make = inner.flat.unpack, inner.flat.iter_unpack, _maker(spec)
        return Codec(
            inner.size,
            inner.encode,
            lambda data: make(unpack(data)),
            lambda data: [make(values) for values in iterate(data)],
            inner.flat,
            make,
        )
    rebuilt = _rebuilt(spec)

    def decode(data: bytes) -> Any:
        return rebuilt(inner.decode(data))

    def decode_many(data: bytes) -> list[Any]:
        return [decode(data[at : at + inner.size]) for at in range(0, len(data), inner.size)]

    return Codec(inner.size, inner.encode, decode, decode_many)


def _nested(spec: Any) -> dict[str, Callable[[Any], Any]]:
    """What makes the fields that are dataclasses themselves, out of named tuples."""
    hints = get_type_hints(spec)
    return {name: _rebuilt(hint) for name, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)}


def _rebuilt(spec: Any) -> Callable[[Any], Any]:
    names = [field.name for field in fields(spec)]
    nested, make_of = _nested(spec), _maker(spec)

    def make(values: Any) -> Any:
        return make_of(
            [nested[name](part) if name in nested else part for name, part in zip(names, values, strict=True)]
        )

    return make


def by_position(spec: Any) -> bool:
    """Whether a dataclass takes all its fields in order, none by its name alone."""
    return not any(field.kw_only for field in fields(spec))


def _maker(spec: Any) -> Callable[[Sequence[Any]], Any]:
    """What makes an instance of its fields' values in order."""
    if by_position(spec):
        return lambda values: spec(*values)
    names = [field.name for field in fields(spec)]
    return lambda values: spec(**dict(zip(names, values, strict=True)))


@cache
def _type_of_dataclass(spec: Any) -> Struct:
    hints = get_type_hints(spec, include_extras=True)
    members, at, most = [], 0, 1
    for field in fields(spec):
        if not field.init:
            raise TypeError(f"{spec.__name__}.{field.name} is not given when one is made")
        type = _type_of_hint(f"{spec.__name__}.{field.name}", hints[field.name])
        align = _alignment(type)
        at = -(-at // align) * align
        members.append(Member(name=field.name, type=type, bit_offset=8 * at))
        at, most = at + type.size, max(most, align)
    return Struct(name=spec.__name__, size=-(-at // most) * most, members=tuple(members))


def _type_of_hint(where: str, hint: Any) -> Type:
    for said in getattr(hint, "__metadata__", ()):
        if isinstance(said, str):
            return _type_of_letters(where, said)
        if isinstance(said, (Int, Float, Enum, Pointer, Array, Struct)):
            return said
    if isinstance(hint, type):
        if is_dataclass(hint):
            return _type_of_dataclass(hint)
        if issubclass(hint, _CTYPES):
            return _type_of_ctypes(hint)
        if hint in (bool, float):
            return _LETTERS["?" if hint is bool else "d"]
    raise TypeError(f'{where} does not say how many bytes it has: write Annotated[int, "I"] or the like')


def _type_of_letters(where: str, text: str) -> Type:
    found = _FIELD.fullmatch(text)
    if found is None:
        raise TypeError(f"{where}: {text!r} is no letter of struct with a number before it")
    count, letter = found.groups()
    if letter == "s":
        return Array(element=_LETTERS["c"], count=int(count or 1))
    return Array(element=_LETTERS[letter], count=int(count)) if count else _LETTERS[letter]


def _alignment(type: Type) -> int:
    if isinstance(type, Array):
        return _alignment(type.element)
    if isinstance(type, Struct):
        return max((_alignment(member.type) for member in type.members), default=1)
    return type.size
