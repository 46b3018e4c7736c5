"""Values in words, as bpf_snprintf_btf puts them (kernel/bpf/btf.c, the functions called ``btf_*_show``).

Values of 0 are left out unless BTF_F_ZERO asks for them, and so is a struct, union or array that has nothing else:
each is gone through once to see that, and again to show it. Linux copies what it shows in pieces; where one cannot be
read, the rest of the text is as if the values were not there, and the result is the error.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable

from kbpf.elf import btf
from kbpf.elf.btf import Btf, Member, Record
from kbpf.errors import EmulationFault, ObjectError
from kbpf.uapi import constants as uapi

FLAGS = uapi.BTF_F_COMPACT | uapi.BTF_F_NONAME | uapi.BTF_F_PTR_RAW | uapi.BTF_F_ZERO

#: How much is copied at once, and how much of it must be left for the next value (BTF_SHOW_OBJ_*).
_PIECE, _LARGEST_NUMBER = 32, 16
#: BTF_SHOW_MAX_ITER, BTF_SHOW_NAME_SIZE, and the widest indentation.
_MOST_SUFFIXES, _LONGEST_NAME, _WIDEST = 10, 79, 32
#: As deep as Linux resolves types (MAX_RESOLVE_DEPTH).
_MOST_QUALIFIERS = 32
_SIZED = (btf.INT, btf.STRUCT, btf.UNION, btf.ENUM, btf.ENUM64, btf.FLOAT)
_SIGNED, _CHAR = 1, 2
#: What Linux takes for letters and signs (lib/ctype.c): those of Latin-1.
_PRINTABLE = frozenset((*range(0x20, 0x7F), *range(0xA0, 0x100)))


class Show:
    """One text. `read` gives memory by address and size, or raises `OSError`; `charge` is called for each value."""

    def __init__(
        self, types: Btf, flags: int, read: Callable[[int, int], bytes], charge: Callable[[], None] = lambda: None
    ) -> None:
        self.types = types
        self.compact = bool(flags & uapi.BTF_F_COMPACT)
        self.nameless = bool(flags & uapi.BTF_F_NONAME)
        self.zeroes = bool(flags & uapi.BTF_F_ZERO)
        #: Minus an errno if something could not be read.
        self.status = 0
        self._read = read
        self._charge = charge
        self._out: list[str] = []
        # How deep it is, how deep it was when it began to look for what is not 0 (and 1), how deep that was found.
        self._depth = self._looking = self._found = 0
        # What is shown: the type by which it is named, the kind of type that it is, and which member.
        self._type, self._kind = 0, 0
        self._member: Member | None = None
        self._in_array = self._of_characters = self._terminated = False
        self._start, self._end = 0, 0
        self._piece_at, self._piece = 0, b""

    @property
    def began(self) -> bool:
        """Whether there is a text, if an empty one."""
        return bool(self._out)

    def text(self) -> bytes:
        return "".join(self._out).encode(errors="surrogateescape")

    def value(self, id: int, address: int) -> None:
        """Show the value of a type at an address."""
        record = self.types.strip(id)
        self._charge()
        show = _SHOW.get(record.kind)
        if show is not None:
            show(self, record, id, address)
        elif record.kind == btf.DATASEC:
            self.status = -errno.EINVAL
        elif record.kind in (0, btf.VAR):
            raise EmulationFault("Linux has no way to show a variable, or nothing")
        else:
            self._put(f"<unsupported kind:{record.kind}>")

    # Numbers.

    def _integer(self, record: Record, id: int, address: int) -> None:
        encoding, offset, bits = record.data[0] >> 24, record.data[0] >> 16 & 0xFF, record.data[0] & 0xFF
        data = self._begin_value(record, id, address)
        if data is None:
            return
        if offset or bits not in (8, 16, 32, 64, 128):
            self._bits(data[offset // 8 :], offset % 8, bits)
        elif bits == 128:
            self._hexadecimal(_number(data[:16]))
        elif bits != 8 or not self._character(data[0]):
            self._number(_number(data[: bits // 8], bool(encoding & _SIGNED)))
        self._type = self._kind = 0

    def _character(self, byte: int) -> bool:
        """Whether that was all of an element of a text: it ends with NUL."""
        if not self._of_characters:
            return False
        if self._terminated or not byte:
            self._terminated = True
            return True
        if byte in _PRINTABLE:
            self._entry(f"'{bytes((byte,)).decode(errors='surrogateescape')}'")
            return True
        return False

    def _bits(self, data: bytes, offset: int, bits: int) -> None:
        self._hexadecimal(_number(data[: -(-(offset + bits) // 8)]) >> offset & (1 << bits) - 1)

    def _hexadecimal(self, number: int) -> None:
        self._number(number, f"0x{number:x}")

    def _pointer(self, record: Record, id: int, address: int) -> None:
        """The address as it is; without BTF_F_PTR_RAW, Linux shows a digest of it."""
        data = self._begin_value(record, id, address)
        if data is not None:
            number = _number(data[:8])
            self._number(number, f"0x{number:016x}")
            self._type = self._kind = 0

    def _enumerator(self, record: Record, id: int, address: int) -> None:
        size = 8 if record.kind == btf.ENUM64 else 4
        data = self._begin_value(record, id, address)
        if data is None:
            return
        number = _number(data[:size])
        names = (item.name for item in record.items if item.value & (1 << 8 * size) - 1 == number)
        name = next(names, None)
        if name is None:
            self._number(_number(data[:size], record.flag))
        else:
            self._entry(name)
        self._type = self._kind = 0

    def _number(self, number: int, text: str = "") -> None:
        if number or self.zeroes or not self._depth:
            self._entry(text or str(number))

    # What has parts.

    def _whole(self, record: Record, id: int, address: int) -> None:
        """A struct, union or array, if there is something in it to show."""
        show = self._elements if record.kind == btf.ARRAY else self._members
        member = self._member
        if self._depth and not self.zeroes:
            if not self._looking:
                self._looking, self._found = self._depth + 1, 0
            show(record, id, address)
            self._member = member
            if self._looking != self._depth + 1:
                return
            self._looking = 0
            if self._found <= self._depth:
                return
        show(record, id, address)

    def _members(self, record: Record, id: int, address: int) -> None:
        if not self._begin(record, id, address):
            return
        for member in record.items:
            self._member = member
            at = address + member.bit_offset // 8
            if member.bit_size:
                self._charge()
                data = self._begin_value(self.types[member.type], member.type, at)
                if data is not None:
                    self._bits(data, member.bit_offset % 8, member.bit_size)
                self._type = self._kind = 0
            else:
                self.value(member.type, at)
            self._member = None
        self._finish("}")

    def _elements(self, record: Record, id: int, address: int) -> None:
        element, _, count = record.data
        type = self.types.strip(element)
        size = type.word if type.kind in _SIZED else 0
        self._of_characters = type.kind == btf.INT and (size == 1 or type.data[0] >> 24 == _CHAR)
        self._terminated = False
        if not self._begin(record, id, address):
            return
        for _ in range(count):
            self._in_array, self._member = True, None
            self.value(element, address)
            address += size
            self._in_array, self._member = False, None
            if self._terminated:
                break
        self._of_characters = self._terminated = False
        self._finish("]")

    def _begin(self, record: Record, id: int, address: int) -> bool:
        if self._begin_value(record, id, address) is None:
            return False
        self._put(self._indent() + self._name() + self._newline())
        self._depth += 1
        return True

    def _finish(self, bracket: str) -> None:
        self._depth -= 1
        self._put(self._indent() + bracket + self._delimiter() + self._newline())
        self._type = self._kind = 0

    # Memory.

    def _begin_value(self, record: Record, id: int, address: int) -> bytes | None:
        self._type, self._kind = id, record.kind
        return self._data(record, address)

    def _data(self, record: Record, address: int) -> bytes | None:
        """Memory from the address on, as much as there is of the piece; None if it cannot be read."""
        try:
            size = self._size(record)
        except ObjectError:
            self.status = -errno.EINVAL
            return None
        if not self._depth:
            self._start, self._end = address, address + size
        elif self._piece_at <= address and address + min(size, _LARGEST_NUMBER) < self._piece_at + _PIECE:
            return self._piece[address - self._piece_at :].ljust(_LARGEST_NUMBER, b"\0")
        try:
            piece = self._read(address, max(0, min(self._end - address, _PIECE)))
        except OSError as error:
            self.status = -(error.errno or 0)
            return None
        self.status = 0
        self._piece_at, self._piece = address, piece.ljust(_PIECE, b"\0")
        return self._piece

    def _size(self, record: Record) -> int:
        if record.kind in _SIZED:
            return record.word
        if record.kind == btf.PTR:
            return 8
        if record.kind == btf.ARRAY:
            size = record.data[2] * self._size(self.types.strip(record.data[0]))
            if size >> 32:
                raise ObjectError("the array is too large")
            return size
        if record.kind in btf.MODIFIERS:
            return self._size(self.types.strip(record.id))
        raise ObjectError("no size")

    # Text.

    def _put(self, text: str) -> None:
        if not self._looking:
            self._out.append(text)

    def _entry(self, text: str) -> None:
        self._put(self._indent() + self._name() + text + self._delimiter() + self._newline())
        self._found = max(self._found, self._depth)

    def _indent(self) -> str:
        return "" if self.compact else " " * min(self._depth, _WIDEST)

    def _newline(self) -> str:
        return "" if self.compact else "\n"

    def _delimiter(self) -> str:
        if not self._depth:
            return ""
        return "|" if self.compact and self._kind == btf.UNION else ","

    def _name(self) -> str:
        """``.member = (type)``, with the bracket that opens what has parts."""
        if self._in_array:
            return ""
        member, id, name, stars, brackets, parts = self._member, self._type, "", "", "", ""
        named = array = False
        if member is not None:
            id = member.type
        record = self.types[id]
        for _ in range(_MOST_SUFFIXES):
            if record.kind == btf.TYPEDEF:
                name, named = name or record.name, True
                id = record.word
            elif record.kind == btf.ARRAY:
                array, parts = True, "["
                brackets += "[]"
                id = record.data[0]
            elif record.kind == btf.PTR:
                stars += "*"
                id = record.word
            else:
                break
            if not id:
                break
            record = self._unqualified(id)
        else:
            return ""
        # Nothing has no name, here.
        name = name or (record.name if record.id else "")
        prefix = {btf.STRUCT: "struct", btf.UNION: "union", btf.ENUM: "enum", btf.ENUM64: "enum"}.get(record.kind, "")
        if record.kind in (btf.STRUCT, btf.UNION) and not array:
            parts = "{"
        if stars:
            parts = ""
        if named:
            prefix = ""
        if self.nameless:
            return parts
        first = f".{member.name} = " if member is not None and member.name else ""
        space = " " if prefix and name else ""
        return f"{first}({prefix}{space}{name}{' ' if stars else ''}{stars}{brackets}){parts}"[:_LONGEST_NAME]

    def _unqualified(self, id: int) -> Record:
        record = self.types[id]
        for _ in range(_MOST_QUALIFIERS):
            if record.kind not in btf.MODIFIERS or record.kind == btf.TYPEDEF:
                return record
            record = self.types[record.word]
        raise ObjectError("too many qualifiers")


_SHOW: dict[int, Callable[[Show, Record, int, int], None]] = {
    btf.INT: Show._integer,
    btf.PTR: Show._pointer,
    btf.ENUM: Show._enumerator,
    btf.ENUM64: Show._enumerator,
    btf.STRUCT: Show._whole,
    btf.UNION: Show._whole,
    btf.ARRAY: Show._whole,
}


def _number(data: bytes, signed: bool = False) -> int:
    return int.from_bytes(data, sys.byteorder, signed=signed)
