"""Read an eBPF object file into specs: the same file gives the same specs on every machine.

Objects are those that clang, gcc and libbpf's conventions make. Not supported, and refused by name: CO-RE relocations,
``extern`` kernel symbols and configuration, initial contents of maps, pointers in data.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

from kbpf.elf import btf
from kbpf.elf.btf import Btf, Record
from kbpf.elf.file import ElfFile, Section, read
from kbpf.elf.maps import find_maps
from kbpf.elf.programs import Linker
from kbpf.errors import ObjectError
from kbpf.specs import CollectionSpec, ProgramSpec

# Linkage of VAR and FUNC (linux/btf.h).
_STATIC, _EXTERN = 0, 2


def read_object(source: str | os.PathLike[str] | bytes) -> CollectionSpec:
    """Read an object, given its path or its bytes.

    Maps are keyed by their names, data sections by theirs (``.rodata``); programs by their functions' names. Raises
    `ObjectError` naming section and symbol for whatever is wrong with the file, `OSError` if it cannot be opened.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _collect(bytes(source), "")
    path = Path(source)
    try:
        return _collect(path.read_bytes(), path.name.partition(".")[0])
    except ObjectError as error:
        raise ObjectError(f"{path}: {error}") from error


def _collect(data: bytes, object_name: str) -> CollectionSpec:
    elf = read(data)
    described = elf.section(".BTF")
    info = Btf(described.data) if described is not None else None
    blob = b""
    if info is not None:
        blob = _loadable(elf, info)
        if blob:
            info = Btf(blob)
    section = elf.section(".BTF.ext")
    ext = btf.parse_ext(section.data, info) if section is not None and info is not None else None
    maps = find_maps(elf, info, blob, object_name)
    linker = Linker(elf, maps, ext)
    mains = linker.programs()
    license = _license(elf) if mains else ""
    programs: dict[str, ProgramSpec] = {}
    for main in mains:
        if main.name in programs:
            raise ObjectError(f"section {main.section.name}: a second program named {main.name!r}")
        if ext is not None and (ext.core.get(main.section.name) or ext.core.get(".text")):
            raise ObjectError(f"section {main.section.name}: {main.name!r} needs CO-RE relocations: not supported")
        programs[main.name] = linker.link(main, license, blob)
    return CollectionSpec(maps={defined.key: defined.spec for defined in maps}, programs=programs)


def _license(elf: ElfFile) -> str:
    section = elf.section("license")
    if section is None:
        raise ObjectError("section license is missing: the kernel decides by it which helpers a program may call")
    text = section.data.partition(b"\0")[0]
    if not text or not text.isascii():
        raise ObjectError(f"section license: {text!r} is no license")
    return text.decode()


def _loadable(elf: ElfFile, info: Btf) -> bytes:
    """The BTF as the kernel takes it, empty if it never will.

    The compiler leaves the sizes of sections and the places of variables to whoever reads the symbol table. It also
    lists constants in ``.rodata`` that it then puts elsewhere, such as ``.rodata.cst32``: these are taken out.
    """
    types = bytearray()
    done = start = info.records[1].position if len(info.records) > 1 else 0
    for record in info.records:
        if record.kind == btf.FUNC and record.data[0] == _EXTERN:
            return b""
        if record.kind != btf.DATASEC:
            continue
        section = elf.section(record.name)
        if section is None:
            return b""
        entries = sorted(_places(elf, info, record, section))
        types += info.data[done : record.position]
        name, head = struct.unpack_from("=II", info.data, record.position)
        types += struct.pack("=III", name, head & ~0xFFFF | len(entries), section.size)
        for offset, type, size in entries:
            types += struct.pack("=III", type, offset & 0xFFFFFFFF, size)
        done = record.position + 12 + 12 * len(record.items)
    types += info.data[done : start + info.types_size]
    return info.rebuilt(bytes(types))


def _places(elf: ElfFile, info: Btf, record: Record, section: Section) -> Iterator[tuple[int, int, int]]:
    """(offset, type, size) of the variables that lie in the section which the DATASEC is named after."""
    described = elf.section(".BTF")
    relocations = elf.relocations.get(described.index, ()) if described is not None else ()
    moved = {relocation.offset: relocation.symbol for relocation in relocations}
    named = {symbol.name: symbol for symbol in elf.symbols if symbol.type == "STT_OBJECT"}
    for index, variable in enumerate(record.items):
        var = info[variable.type]
        if var.kind != btf.VAR:
            raise ObjectError(f".BTF: section {record.name} has type {var.id}, which is no variable")
        offset = variable.offset
        symbol = moved.get(record.position + 12 + 12 * index + 4)
        if symbol is not None:
            offset += symbol.value
        elif var.data[0] != _STATIC:
            # Relocations of BTF may have been stripped.
            symbol = named.get(var.name)
            if symbol is None:
                raise ObjectError(f"section {record.name}: no symbol {var.name!r}, which .BTF describes")
            offset = symbol.value
        if symbol is None or symbol.section == section.index:
            yield offset, variable.type, variable.size
