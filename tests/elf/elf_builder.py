"""A small eBPF object, written byte by byte: for objects that no compiler would make."""

from __future__ import annotations

import struct

FUNC, OBJECT, SECTION, NOTYPE = 2, 1, 3, 0
EXIT = bytes.fromhex("b700000000000000 9500000000000000")
LD_MAP = bytes.fromhex("1801000000000000 0000000000000000")
CALL = bytes.fromhex("8510000000000000")


class Object:
    """Sections, symbols and relocations in the order they are added; `build` gives the file."""

    def __init__(self, license: bytes | None = b"GPL\0") -> None:
        self.sections: list[tuple[str, int, int, bytes, int, int, int]] = [("", 0, 0, b"", 0, 0, 0)]
        self.symbols: list[tuple[str, int, int, int, int, bool]] = [("", 0, 0, 0, 0, True)]
        self.relocations: dict[int, list[tuple[int, int, int]]] = {}
        self.machine, self.type, self.ident = 247, 1, b"\x7fELF\x02\x01\x01"
        if license is not None:
            self.section("license", license)

    def section(self, name: str, data: bytes, *, code: bool = False, kind: int = 1, size: int | None = None) -> int:
        self.sections.append((name, kind, 6 if code else 3, data, len(data) if size is None else size, 0, 0))
        return len(self.sections) - 1

    def symbol(self, name: str, section: int, value: int = 0, size: int = 0, type: int = NOTYPE, local=False) -> int:
        self.symbols.append((name, section, value, size, type, local))
        return len(self.symbols) - 1

    def program(self, section: str, name: str, code: bytes) -> int:
        index = self.section(section, code, code=True)
        self.symbol(name, index, 0, len(code), FUNC)
        return index

    def relocate(self, section: int, offset: int, symbol: int, type: int) -> None:
        self.relocations.setdefault(section, []).append((offset, symbol, type))

    def build(self) -> bytes:
        strings = bytearray(b"\0")

        def text(name: str) -> int:
            strings.extend(name.encode() + b"\0")
            return len(strings) - len(name.encode()) - 1

        sections = list(self.sections)
        table = b"".join(
            struct.pack("<IBBHQQ", text(name) if name else 0, (0 if local else 1) << 4 | type, 0, index, value, size)
            for name, index, value, size, type, local in self.symbols
        )
        symtab = len(sections)
        sections.append((".symtab", 2, 0, table, len(table), symtab + 1, 24))
        for target, entries in self.relocations.items():
            body = b"".join(struct.pack("<QQ", offset, symbol << 32 | type) for offset, symbol, type in entries)
            sections.append((".rel" + self.sections[target][0], 9, target, body, len(body), symtab, 16))
        names = [text(section[0]) for section in sections] + [text(".strtab")]
        sections.insert(symtab + 1, (".strtab", 3, 0, bytes(strings), len(strings), 0, 0))
        names.insert(symtab + 1, names.pop())
        offset, bodies, headers = 64, [], []
        for name, (_, kind, extra, data, size, link, entry) in zip(names, sections, strict=True):
            flags, info = (0, extra) if kind in (2, 9) else (extra, 0)
            headers.append(struct.pack("<IIQQQQIIQQ", name, kind, flags, 0, offset, size, link, info, 8, entry))
            bodies.append(data)
            offset += len(data)
        head = struct.pack(
            "<16sHHIQQQIHHHHHH",
            self.ident, self.type, self.machine, 1, 0, 0, offset, 0, 64, 0, 0, 64, len(sections), symtab + 1,
        )  # fmt: skip
        return head + b"".join(bodies) + b"".join(headers)
