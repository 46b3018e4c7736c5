"""An ELF object as plain values: sections, symbols, relocations.

The parsing is pyelftools'; what is checked here is that the file is a relocatable eBPF object of this machine's byte
order, and that all it refers to lies within it.
"""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

from kbpf.errors import ObjectError

_SECTION_HEADER = 64
_SYMBOL = 24
_RELOCATION = 16


@dataclass(frozen=True)
class Section:
    """`size` is in bytes; `data` is empty where the file has none (``.bss``)."""

    index: int
    name: str
    type: str
    size: int
    executable: bool
    data: bytes


class Symbol(NamedTuple):
    """`section` is the index of the section it is defined in, None for undefined and common ones."""

    name: str
    section: int | None
    value: int
    size: int
    #: ``"STT_FUNC"``, ``"STT_OBJECT"``, ``"STT_SECTION"``, ...
    type: str
    local: bool


class Relocation(NamedTuple):
    """What to put `offset` bytes into the section; `type` is R_BPF_*."""

    offset: int
    type: int
    symbol: Symbol


@dataclass(frozen=True)
class ElfFile:
    """`relocations` are by the index of the section that they change."""

    sections: tuple[Section, ...]
    symbols: tuple[Symbol, ...]
    relocations: dict[int, tuple[Relocation, ...]]

    def section(self, name: str) -> Section | None:
        """The first section of that name."""
        return next((section for section in self.sections if section.name == name), None)

    def describe(self, symbol: Symbol) -> str:
        """A symbol's name for people; the symbol of a section has none of its own."""
        if symbol.name or symbol.section is None:
            return repr(symbol.name)
        return f"section {self.sections[symbol.section].name}"


def read(data: bytes) -> ElfFile:
    """Read an object. Raises `ObjectError` if it is cut short, not ELF, not eBPF, or of the other byte order."""
    from elftools.elf.elffile import ELFFile

    if data[:4] != b"\x7fELF":
        raise ObjectError("not an ELF file")
    native, other = ("little", "big") if sys.byteorder == "little" else ("big", "little")
    if data[4:6] != (b"\x02\x01" if native == "little" else b"\x02\x02"):
        wrong = f"{other}-endian" if data[4:5] == b"\x02" else "32-bit"
        raise ObjectError(f"a {wrong} object; this machine runs 64-bit {native}-endian eBPF")
    try:
        return _read(ELFFile(io.BytesIO(data)), data)
    except ObjectError:
        raise
    except Exception as error:
        # What pyelftools raises over damaged headers is not documented: struct, construct, lookup errors and others.
        raise ObjectError(f"damaged or cut short ELF file: {error or type(error).__name__}") from error


def _read(elf: Any, data: bytes) -> ElfFile:
    if elf["e_machine"] != "EM_BPF":
        raise ObjectError(f"an object for {elf['e_machine']}, not for eBPF")
    if elf["e_type"] != "ET_REL":
        raise ObjectError(f"an ELF file of type {elf['e_type']}, not a relocatable object")
    if elf["e_shentsize"] != _SECTION_HEADER or elf["e_shoff"] + elf.num_sections() * _SECTION_HEADER > len(data):
        raise ObjectError("the section headers lie outside the file")
    parsed = list(elf.iter_sections())
    sections = tuple(_section(index, section, data) for index, section in enumerate(parsed))
    symbols: tuple[Symbol, ...] = ()
    table = next((index for index, section in enumerate(sections) if section.type == "SHT_SYMTAB"), None)
    if table is not None:
        if parsed[table]["sh_entsize"] != _SYMBOL:
            raise ObjectError(f"section {sections[table].name}: entries of {parsed[table]['sh_entsize']} bytes")
        symbols = tuple(_symbol(symbol, len(sections)) for symbol in parsed[table].iter_symbols())
    relocations: dict[int, tuple[Relocation, ...]] = {}
    for section, header in zip(sections, parsed, strict=True):
        if section.type == "SHT_RELA":
            raise ObjectError(f"section {section.name}: eBPF has no relocations with addends")
        if section.type != "SHT_REL":
            continue
        if header["sh_entsize"] != _RELOCATION or header["sh_link"] != table:
            raise ObjectError(f"section {section.name}: malformed relocations")
        if header["sh_info"] >= len(sections):
            raise ObjectError(f"section {section.name}: relocates section {header['sh_info']}, which is missing")
        entries = [
            Relocation(entry["r_offset"], entry["r_info_type"], _at(symbols, entry["r_info_sym"], section.name))
            for entry in header.iter_relocations()
        ]
        relocations[header["sh_info"]] = relocations.get(header["sh_info"], ()) + tuple(entries)
    return ElfFile(sections, symbols, relocations)


def _section(index: int, header: Any, data: bytes) -> Section:
    kind, start, size = str(header["sh_type"]), header["sh_offset"], header["sh_size"]
    body = b""
    if size > 0xFFFFFFFF:
        raise ObjectError(f"section {header.name}: {size} bytes are more than a map or program can have")
    if kind not in ("SHT_NOBITS", "SHT_NULL"):
        body = data[start : start + size]
        if len(body) != size:
            raise ObjectError(f"section {header.name}: lies outside the file")
    executable = kind == "SHT_PROGBITS" and bool(header["sh_flags"] & 4)
    return Section(index, header.name, kind, size, executable, body)


def _symbol(symbol: Any, sections: int) -> Symbol:
    index = symbol["st_shndx"]
    if isinstance(index, int) and index >= sections:
        raise ObjectError(f"symbol {symbol.name!r}: in section {index}, which is missing")
    return Symbol(
        name=symbol.name,
        section=index if isinstance(index, int) and index else None,
        value=symbol["st_value"],
        size=symbol["st_size"],
        type=str(symbol["st_info"]["type"]),
        local=symbol["st_info"]["bind"] == "STB_LOCAL",
    )


def _at(symbols: tuple[Symbol, ...], index: int, section: str) -> Symbol:
    if index >= len(symbols):
        raise ObjectError(f"section {section}: refers to symbol {index}, which is missing")
    return symbols[index]
