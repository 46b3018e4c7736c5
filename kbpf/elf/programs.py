"""The programs of an object: functions found, references resolved, subprograms appended, line information moved along.

A program is a function outside ``.text``; what it calls, directly or through a function pointer, is appended to it,
each function once, in the order in which the calls are met.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from kbpf.elf.btf import Ext, Info
from kbpf.elf.file import ElfFile, Relocation, Section
from kbpf.elf.maps import DefinedMap
from kbpf.elf.sections import classify
from kbpf.errors import ObjectError
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.specs import MapSpec, ProgramSpec

# Relocation types (Documentation/bpf/llvm_reloc.rst).
R_BPF_64_64 = 1
R_BPF_64_32 = 10

_CALL = ebpf.JMP | ebpf.CALL


@dataclass(frozen=True, eq=False)
class Function:
    """A function of an executable section: `count` instructions from the section's instruction `start` on."""

    name: str
    section: Section
    start: int
    count: int
    local: bool


@dataclass(frozen=True)
class Reference:
    """What an instruction refers to: a function, or a map and for data the offset in its value (else None)."""

    function: Function | None = None
    map: DefinedMap | None = None
    offset: int | None = None


class Linker:
    """Makes programs of the functions of one object."""

    def __init__(self, elf: ElfFile, maps: Sequence[DefinedMap], ext: Ext | None) -> None:
        self._elf = elf
        self._ext = ext
        self._maps = {(defined.section, defined.offset): defined for defined in maps}
        self._data = {defined.section: defined for defined in maps if defined.key == elf.sections[defined.section].name}
        self._code: dict[int, tuple[Instruction, ...]] = {}
        self._functions: dict[int, dict[int, Function]] = {}
        for section in elf.sections:
            if section.executable and section.size:
                self._add_section(section)
        self._references: dict[int, dict[int, Reference]] = {}

    def _add_section(self, section: Section) -> None:
        if section.size % 8:
            raise ObjectError(f"section {section.name}: {section.size} bytes are no whole number of instructions")
        functions: dict[int, Function] = {}
        for symbol in self._elf.symbols:
            if symbol.section != section.index or symbol.type != "STT_FUNC":
                continue
            if symbol.value % 8 or symbol.size % 8 or not symbol.size or symbol.value + symbol.size > section.size:
                raise ObjectError(f"section {section.name}: function {symbol.name!r} lies outside it")
            start = symbol.value // 8
            functions[start] = Function(symbol.name, section, start, symbol.size // 8, symbol.local)
        end = 0
        for start in sorted(functions):
            if start != end:
                break
            end += functions[start].count
        if end * 8 != section.size:
            raise ObjectError(f"section {section.name}: instruction {end} does not begin the one function it is in")
        self._functions[section.index] = functions
        self._code[section.index] = ebpf.decode(section.data)

    def programs(self) -> list[Function]:
        """The functions that are programs, in the order of the file."""
        found = []
        for functions in self._functions.values():
            for function in sorted(functions.values(), key=lambda function: function.start):
                if function.section.name == ".text":
                    continue
                if function.local:
                    raise ObjectError(f"section {function.section.name}: program {function.name!r} is static")
                found.append(function)
        return found

    def link(self, main: Function, license: str, blob: bytes) -> ProgramSpec:
        """`main` and the functions it needs as one program."""
        layout: dict[Function, int] = {main: 0}
        order = [main]
        length = main.count
        code: list[Instruction] = []
        maps: dict[str, int] = {}
        specs: list[MapSpec] = []
        for function in order:
            for reference in self._uses(function).values():
                target = reference.function
                if target is not None and target not in layout:
                    layout[target] = length
                    length += target.count
                    order.append(target)
                if reference.map is not None and reference.map.key not in maps:
                    maps[reference.map.key] = len(specs)
                    specs.append(reference.map.spec)
        for function in order:
            code += self._placed(function, layout, maps)
        kind, attach_to = classify(main.section.name)
        func_info, line_info = self._info(layout) if blob else (b"", b"")
        return ProgramSpec(
            type=kind.type,
            instructions=tuple(code),
            license=license,
            maps=tuple(specs),
            expected_attach_type=kind.attach,
            name=main.name,
            flags=kind.flags,
            section=main.section.name,
            attach_to=attach_to,
            btf=blob if func_info else b"",
            func_info=func_info,
            line_info=line_info,
        )

    def _placed(self, function: Function, layout: dict[Function, int], maps: dict[str, int]) -> list[Instruction]:
        """The instructions of a function with what they refer to filled in."""
        at = layout[function]
        code = list(self._code[function.section.index][function.start : function.start + function.count])
        for pc, reference in self._uses(function).items():
            old = code[pc]
            if reference.function is not None:
                distance = layout[reference.function] - (at + pc) - 1
                source = ebpf.PSEUDO_CALL if old.opcode == _CALL else ebpf.PSEUDO_FUNC
                code[pc] = old._replace(src=source, imm=distance)
                if old.opcode != _CALL:
                    code[pc + 1] = code[pc + 1]._replace(imm=0)
            elif reference.map is not None:
                data = reference.offset is not None
                source = ebpf.PSEUDO_MAP_IDX_VALUE if data else ebpf.PSEUDO_MAP_IDX
                code[pc] = old._replace(src=source, imm=maps[reference.map.key])
                code[pc + 1] = code[pc + 1]._replace(imm=ebpf.signed32(reference.offset or 0))
        return code

    def _uses(self, function: Function) -> dict[int, Reference]:
        """What a function refers to, by the index of the instruction in it, ascending."""
        section = function.section
        if section.index not in self._references:
            self._references[section.index] = self._resolve_section(section)
        end = function.start + function.count
        return {
            pc - function.start: reference
            for pc, reference in self._references[section.index].items()
            if function.start <= pc < end
        }

    def _resolve_section(self, section: Section) -> dict[int, Reference]:
        code = self._code[section.index]
        found: dict[int, Reference] = {}
        for relocation in self._elf.relocations.get(section.index, ()):
            pc = relocation.offset // 8
            if relocation.offset % 8 or pc >= len(code):
                raise ObjectError(f"section {section.name}: a relocation at byte {relocation.offset}, outside the code")
            found[pc] = self._resolve(section, pc, relocation)
        for pc, instruction in enumerate(code):
            # Calls within a section may come without a relocation.
            if instruction.opcode == _CALL and instruction.src == ebpf.PSEUDO_CALL and pc not in found:
                found[pc] = Reference(function=self._function(section.index, pc + instruction.imm + 1, section, pc))
        return dict(sorted(found.items()))

    def _resolve(self, section: Section, pc: int, relocation: Relocation) -> Reference:
        symbol = relocation.symbol
        code = self._code[section.index]
        instruction = code[pc]
        where = f"section {section.name}: instruction {pc}"
        what = self._elf.describe(symbol)
        if symbol.section is None:
            raise ObjectError(f"{where} refers to {what}, which is not defined in this object")
        if relocation.type == R_BPF_64_32 and instruction.opcode == _CALL:
            if instruction.src != ebpf.PSEUDO_CALL:
                raise ObjectError(f"{where}: the call of {what} is none of a function in this object")
            return Reference(
                function=self._function(symbol.section, symbol.value // 8 + instruction.imm + 1, section, pc)
            )
        if relocation.type != R_BPF_64_64 or instruction.opcode != ebpf.LD_IMM64 or pc + 1 >= len(code):
            raise ObjectError(f"{where}: relocation of type {relocation.type} for {what} fits no such instruction")
        if symbol.section in self._code:
            return Reference(
                function=self._function(symbol.section, (symbol.value + instruction.imm) // 8, section, pc)
            )
        data = self._data.get(symbol.section)
        if data is not None:
            offset = symbol.value + (instruction.imm & 0xFFFFFFFF)
            if offset >= data.size:
                raise ObjectError(f"{where} refers to byte {offset} of {data.key}, which has {data.size}")
            return Reference(map=data, offset=offset)
        offset = symbol.value + (instruction.imm if symbol.type == "STT_SECTION" else 0)
        defined = self._maps.get((symbol.section, offset))
        if defined is None:
            raise ObjectError(f"{where} refers to {what} in section {self._elf.sections[symbol.section].name}: no map")
        return Reference(map=defined)

    def _function(self, index: int, start: int, section: Section, pc: int) -> Function:
        function = self._functions.get(index, {}).get(start)
        if function is None:
            target = self._elf.sections[index].name
            raise ObjectError(
                f"section {section.name}: instruction {pc} refers to instruction {start} of section {target}, "
                "where no function begins"
            )
        return function

    def _info(self, layout: dict[Function, int]) -> tuple[bytes, bytes]:
        """Function and line records for the program as it is laid out; empty unless every function has them.

        The kernel wants all or none: a record where each function begins.
        """
        if self._ext is None:
            return b"", b""
        functions, lines = bytearray(), bytearray()
        complete = True
        for function, at in layout.items():
            name, first = function.section.name, function.start * 8
            record = next((i for i in self._ext.functions.get(name, ()) if i.offset == first), None)
            if record is None:
                return b"", b""
            functions += struct.pack("=2I", at, record.words[0])
            inside = [i for i in self._ext.lines.get(name, ()) if first <= i.offset < first + function.count * 8]
            complete &= bool(inside) and inside[0].offset == first and _ascending(inside)
            for info in inside:
                lines += struct.pack("=4I", at + info.offset // 8 - function.start, *info.words)
        return bytes(functions), bytes(lines) if complete else b""


def _ascending(infos: Sequence[Info]) -> bool:
    return all(a.offset < b.offset for a, b in itertools.pairwise(infos))
