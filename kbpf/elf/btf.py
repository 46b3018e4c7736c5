"""BTF: the types in an object file or in the kernel, parsed into records.

The format is Documentation/bpf/btf.rst's (Linux 4.18; DATASEC 5.2, FLOAT 5.13, tags 5.16 and 5.17,
ENUM64 6.0), in native byte order, since that is the only one a kernel takes. `Btf` keeps what the
bytes say; `Btf.resolve` makes the values of `kbpf.types` of it. The trap: type ids start at 1, 0 is ``void``.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from kbpf import types
from kbpf.errors import ObjectError

MAGIC = 0xEB9F

(INT, PTR, ARRAY, STRUCT, UNION, ENUM, FWD, TYPEDEF, VOLATILE, CONST) = range(1, 11)
(RESTRICT, FUNC, FUNC_PROTO, VAR, DATASEC, FLOAT, DECL_TAG, TYPE_TAG, ENUM64) = range(11, 20)

#: Kinds that only say something about the type they refer to.
MODIFIERS = frozenset((TYPEDEF, VOLATILE, CONST, RESTRICT, TYPE_TAG))

# Sizes that kinds of numbers may have, in bytes.
_SCALAR_SIZES = {INT: (1, 2, 4, 8, 16), FLOAT: (4, 8), ENUM: (1, 2, 4, 8), ENUM64: (1, 2, 4, 8)}

# How deep types may nest, as in the kernel (MAX_RESOLVE_DEPTH).
_MAX_DEPTH = 32

_HEADER = struct.Struct("=HBBIIIII")
_TYPE = struct.Struct("=III")
_WORD = struct.Struct("=I")
_PAIR = struct.Struct("=Ii")
_TRIPLE = struct.Struct("=III")


class Member(NamedTuple):
    """A member of a struct or union; `bit_size` is 0 unless it is a bit field."""

    name: str
    type: int
    bit_offset: int
    bit_size: int


class Enumerator(NamedTuple):
    name: str
    value: int


class Parameter(NamedTuple):
    name: str
    type: int


class Variable(NamedTuple):
    """Where a DATASEC has a variable; `type` is the id of its VAR."""

    type: int
    offset: int
    size: int


class Record(NamedTuple):
    """One type. `word` is a size in bytes or the id of another type, as the kind has it.

    `items` are the members, enumerators, parameters or variables; `data` is what else there is: an INT's
    encoding, a VAR's or FUNC's linkage, a DECL_TAG's component, an ARRAY's (element type, index type, count).
    `position` is the byte offset of the record in the BTF.
    """

    id: int
    kind: int
    name: str
    flag: bool
    word: int
    items: tuple[Any, ...]
    data: tuple[int, ...]
    position: int


class Btf:
    """Parsed BTF. Raises `ObjectError` if the bytes are no BTF in native byte order."""

    def __init__(self, data: bytes, name: str = ".BTF") -> None:
        self.data = data
        self.name = name
        self._resolved: dict[int, types.Type] = {}
        try:
            self._parse()
        except struct.error as error:
            raise ObjectError(f"{name}: cut short: {error}") from None

    def _parse(self) -> None:
        magic, _, _, header, type_off, type_len, str_off, str_len = _HEADER.unpack_from(self.data)
        if magic != MAGIC:
            raise ObjectError(f"{self.name}: no BTF of this byte order (magic {magic:#x})")
        start, end = header + type_off, header + type_off + type_len
        if end > len(self.data) or header + str_off + str_len > len(self.data):
            raise ObjectError(f"{self.name}: cut short: {len(self.data)} bytes")
        #: Bytes of all types together.
        self.types_size = type_len
        self._strings = self.data[header + str_off : header + str_off + str_len]
        self.records: list[Record] = [Record(0, 0, "void", False, 0, (), (), 0)]
        while start < end:
            record, start = self._record(len(self.records), start)
            self.records.append(record)

    def string(self, offset: int) -> str:
        """The string at an offset of the string section."""
        end = self._strings.find(b"\0", offset)
        if end < 0 or offset >= len(self._strings):
            raise ObjectError(f"{self.name}: no string at offset {offset}")
        return self._strings[offset:end].decode(errors="replace")

    def rebuilt(self, types: bytes) -> bytes:
        """This BTF with other types over the same strings."""
        size = len(types)
        return _HEADER.pack(MAGIC, 1, 0, _HEADER.size, 0, size, size, len(self._strings)) + types + self._strings

    def _record(self, id: int, start: int) -> tuple[Record, int]:
        data, string = self.data, self.string
        name, info, word = _TYPE.unpack_from(data, start)
        kind, count, flag = info >> 24 & 0x1F, info & 0xFFFF, bool(info >> 31)
        at = start + 12
        items: tuple[Any, ...] = ()
        more: tuple[int, ...] = ()
        if kind in (STRUCT, UNION):
            triples = _TRIPLE.iter_unpack(self._slice(at, count * 12))
            items = tuple(
                Member(string(n), t, offset & 0xFFFFFF if flag else offset, offset >> 24 if flag else 0)
                for n, t, offset in triples
            )
            at += count * 12
        elif kind == ENUM:
            items = tuple(
                Enumerator(string(n), value if flag else value & 0xFFFFFFFF)
                for n, value in _PAIR.iter_unpack(self._slice(at, count * 8))
            )
            at += count * 8
        elif kind == ENUM64:
            items = tuple(
                Enumerator(string(n), low | (high - (1 << 32) if flag and high >> 31 else high) << 32)
                for n, low, high in _TRIPLE.iter_unpack(self._slice(at, count * 12))
            )
            at += count * 12
        elif kind == FUNC_PROTO:
            pairs = _PAIR.iter_unpack(self._slice(at, count * 8))
            items = tuple(Parameter(string(n), t & 0xFFFFFFFF) for n, t in pairs)
            at += count * 8
        elif kind == DATASEC:
            items = tuple(Variable(*triple) for triple in _TRIPLE.iter_unpack(self._slice(at, count * 12)))
            at += count * 12
        elif kind == ARRAY:
            more = _TRIPLE.unpack_from(data, at)
            at += 12
        elif kind in (INT, VAR, DECL_TAG):
            more = _WORD.unpack_from(data, at)
            at += 4
        elif kind == FUNC:
            more = (count,)
        elif not (kind in MODIFIERS or kind in (PTR, FWD, FLOAT)):
            raise ObjectError(f"{self.name}: type {id} is of unknown kind {kind}")
        return Record(id, kind, string(name), flag, word, items, more, start), at

    def _slice(self, start: int, size: int) -> bytes:
        if start + size > len(self.data):
            raise ObjectError(f"{self.name}: cut short: {len(self.data)} bytes")
        return self.data[start : start + size]

    def __getitem__(self, id: int) -> Record:
        if not 0 <= id < len(self.records):
            raise ObjectError(f"{self.name}: no type {id}, the last is {len(self.records) - 1}")
        return self.records[id]

    def find(self, name: str, kind: int) -> Record | None:
        """The first type of that name and kind."""
        return next((r for r in self.records if r.kind == kind and r.name == name), None)

    def strip(self, id: int) -> Record:
        """The type below typedefs, const, volatile, restrict and type tags."""
        record = self[id]
        for _ in range(_MAX_DEPTH):
            if record.kind not in MODIFIERS:
                return record
            record = self[record.word]
        raise ObjectError(f"{self.name}: type {id}: more than {_MAX_DEPTH} typedefs and qualifiers")

    def pointee(self, id: int) -> Record:
        """What the pointer `id` points to, modifiers stripped."""
        record = self.strip(id)
        if record.kind != PTR:
            raise ObjectError(f"{self.name}: type {id} ({record.name!r}) should be a pointer")
        return self.strip(record.word)

    def resolve(self, id: int) -> types.Type:
        """The type as a value of `kbpf.types`; a section of variables is a struct of them.

        Raises `ObjectError` for what has no size, such as functions.
        """
        return self._resolve(id, 0)

    def _resolve(self, id: int, depth: int) -> types.Type:
        known = self._resolved.get(id)
        if known is not None:
            return known
        if depth > _MAX_DEPTH:
            raise ObjectError(f"{self.name}: type {id} is nested more than {_MAX_DEPTH} deep")
        made = self._make(self.strip(id), depth + 1)
        self._resolved[id] = made
        return made

    def _make(self, record: Record, depth: int) -> types.Type:
        kind, name, size = record.kind, record.name, record.word
        if size not in _SCALAR_SIZES.get(kind, (size,)):
            raise ObjectError(f"{self.name}: type {record.id} ({name!r}) has {size} bytes")
        if kind == INT:
            encoding = record.data[0] >> 24
            return types.Int(
                name=name,
                size=size,
                signed=bool(encoding & 1),
                # clang marks `char` only as a signed int of one byte, the kernel's own BTF has the flag.
                char=bool(encoding & 2) or name == "char",
                boolean=bool(encoding & 4),
            )
        if kind == FLOAT:
            return types.Float(name=name, size=size)
        if kind == PTR:
            return types.Pointer(target=self.strip(size).name or "void")
        if kind in (ENUM, ENUM64):
            values = tuple((item.name, item.value) for item in record.items)
            signed = record.flag or any(value < 0 for _, value in values)
            return types.Enum(name=name, size=size, signed=signed, values=values)
        if kind == ARRAY:
            element, _, count = record.data
            return types.Array(element=self._resolve(element, depth), count=count)
        if kind in (STRUCT, UNION):
            members = tuple(self._member(record, member, depth) for member in record.items)
            return types.Struct(name=name, size=size, members=members, union=kind == UNION)
        if kind == DATASEC:
            # A section of variables, as maps of .data and its like have it; named as a C struct could be.
            variables = sorted((self._variable(record, variable, depth) for variable in record.items), key=_place)
            return types.Struct(name=re.sub(r"\W", "_", name.strip(".")), size=size, members=tuple(variables))
        raise ObjectError(f"{self.name}: type {record.id} ({name!r}) has no size")

    def _variable(self, record: Record, variable: Variable, depth: int) -> types.Member:
        var = self[variable.type]
        if var.kind != VAR:
            raise ObjectError(f"{self.name}: section {record.name} has type {var.id}, which is no variable")
        type = self._resolve(var.word, depth)
        if variable.offset + type.size > record.word:
            raise ObjectError(f"{self.name}: variable {var.name!r} lies outside {record.name}")
        return types.Member(name=var.name, type=type, bit_offset=variable.offset * 8)

    def _member(self, record: Record, member: Member, depth: int) -> types.Member:
        type = self._resolve(member.type, depth)
        bits = member.bit_size
        if not bits and isinstance(type, types.Int):
            # Without the kind flag a bit field is an INT that is narrower than its bytes.
            encoding = self.strip(member.type).data[0]
            narrow = encoding & 0xFF
            bits = narrow if narrow != type.size * 8 else 0
        # Codecs may then rely on it: members lie within their struct, and only whole numbers have bits.
        if bits:
            proper = isinstance(type, (types.Int, types.Enum)) and bits <= type.size * 8
        else:
            proper = member.bit_offset % 8 == 0
        if not proper or member.bit_offset + (bits or type.size * 8) > record.word * 8:
            raise ObjectError(f"{self.name}: {record.name}.{member.name} lies outside its {record.word} bytes")
        return types.Member(name=member.name, type=type, bit_offset=member.bit_offset, bit_size=bits)


def _place(member: types.Member) -> int:
    return member.bit_offset


class Info(NamedTuple):
    """One func_info or line_info record: its byte offset in its section, then the rest of its words."""

    offset: int
    words: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Ext:
    """What .BTF.ext says, by section name: function and line records in order, and how many CO-RE relocations."""

    functions: dict[str, tuple[Info, ...]]
    lines: dict[str, tuple[Info, ...]]
    core: dict[str, int]


def parse_ext(data: bytes, btf: Btf) -> Ext:
    """Parse a .BTF.ext section. Raises `ObjectError` if it is malformed."""
    try:
        magic, _, _, header, func_off, func_len, line_off, line_len = _HEADER.unpack_from(data)
        core_off, core_len = struct.unpack_from("=II", data, _HEADER.size) if header >= _HEADER.size + 8 else (0, 0)
        if magic != MAGIC:
            raise ObjectError(f".BTF.ext: no BTF of this byte order (magic {magic:#x})")
        functions = dict(_info(data, header + func_off, func_len, 8, btf))
        lines = dict(_info(data, header + line_off, line_len, 16, btf))
        core = {name: len(infos) for name, infos in _info(data, header + core_off, core_len, 16, btf)}
    except struct.error as error:
        raise ObjectError(f".BTF.ext: cut short: {error}") from None
    return Ext(functions=functions, lines=lines, core=core)


def _info(data: bytes, start: int, length: int, wanted: int, btf: Btf) -> Iterator[tuple[str, tuple[Info, ...]]]:
    """Records of `wanted` bytes each; longer ones, of a newer compiler, lose their tail."""
    if not length:
        return
    end = start + length
    (size,) = _WORD.unpack_from(data, start)
    if size < wanted or size % 4 or end > len(data):
        raise ObjectError(f".BTF.ext: records of {size} bytes, {len(data)} bytes in all")
    at = start + 4
    unpack = struct.Struct(f"={wanted // 4}I").unpack_from
    while at < end:
        name, count = struct.unpack_from("=II", data, at)
        at += 8
        if at + count * size > end:
            raise ObjectError(f".BTF.ext: {count} records do not fit")
        words = [unpack(data, at + i * size) for i in range(count)]
        yield btf.string(name), tuple(Info(word[0], word[1:]) for word in words)
        at += count * size
