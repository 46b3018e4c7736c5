"""The maps of an object: BTF-defined ones, old ``struct bpf_map_def``, and the sections of variables.

As in libbpf 1.x. A BTF-defined map is a variable in ``.maps`` whose members' types say what it is: ``type``,
``max_entries`` and the like are array lengths, ``key`` and ``value`` pointers to types, ``values`` says what the map
holds. ``.rodata``, ``.data`` and ``.bss`` (and ``.rodata.x`` and so on) become arrays of one element.
"""

from __future__ import annotations

import re
import struct
from typing import Any, NamedTuple

from kbpf import types
from kbpf.elf import btf
from kbpf.elf.btf import Btf, Record
from kbpf.elf.file import ElfFile, Section, Symbol
from kbpf.errors import ObjectError
from kbpf.specs import MapSpec
from kbpf.uapi.constants import BPF_F_MMAPABLE, BPF_F_RDONLY_PROG, BPF_OBJ_NAME_LEN
from kbpf.uapi.enums import MAP_TYPES

_TYPE_NAMES = {number: name for name, number in MAP_TYPES.items()}

#: Map types whose keys and values the kernel lets nobody describe: BPF_MAP_CREATE with type ids fails there.
WITHOUT_BTF = frozenset(
    {
        "perf_event_array",
        "cgroup_array",
        "stack_trace",
        "array_of_maps",
        "hash_of_maps",
        "devmap",
        "devmap_hash",
        "sockmap",
        "sockhash",
        "cpumap",
        "xskmap",
        "queue",
        "stack",
        "ringbuf",
        "user_ringbuf",
        "arena",
    }
)

#: Members of a map's definition that are numbers, and the fields of MapSpec that they set.
_NUMBERS = {
    "key_size": "key_size",
    "value_size": "value_size",
    "max_entries": "max_entries",
    "map_flags": "flags",
    "map_extra": "map_extra",
    "numa_node": "numa_node",
}

_U32 = types.Int(name="unsigned int", size=4)
_DATA_SECTION = re.compile(r"\.(rodata|data|bss)(\..+)?")


class DefinedMap(NamedTuple):
    """A map and where its symbol is: `size` bytes at `offset` of the section."""

    key: str
    spec: MapSpec
    section: int
    offset: int
    size: int


def find_maps(elf: ElfFile, info: Btf | None, blob: bytes, object_name: str) -> list[DefinedMap]:
    """All maps, in the order of their sections and places. `blob` is the BTF to hand to the kernel, empty for none."""
    found: list[DefinedMap] = []
    for section in elf.sections:
        if section.name == "maps":
            found += _old_maps(elf, section)
        elif section.name == ".maps":
            found += _btf_maps(elf, section, info, blob)
        elif section.size and not section.executable and _DATA_SECTION.fullmatch(section.name):
            found.append(_data_map(elf, section, info, blob, object_name))
    seen: set[str] = set()
    for defined in found:
        if defined.key in seen:
            raise ObjectError(f"section {elf.sections[defined.section].name}: a second map named {defined.key!r}")
        seen.add(defined.key)
    return found


def _symbols(elf: ElfFile, section: Section) -> list[Symbol]:
    named = [s for s in elf.symbols if s.section == section.index and s.name and s.type != "STT_SECTION"]
    for symbol in named:
        if symbol.value + symbol.size > section.size:
            raise ObjectError(f"section {section.name}: symbol {symbol.name!r} lies outside it")
    return sorted(named, key=lambda symbol: symbol.value)


def _old_maps(elf: ElfFile, section: Section) -> list[DefinedMap]:
    symbols = _symbols(elf, section)
    if not symbols or section.size % len(symbols):
        raise ObjectError(f"section maps: {section.size} bytes for {len(symbols)} maps")
    size = section.size // len(symbols)
    found = []
    for symbol in symbols:
        definition = section.data[symbol.value : symbol.value + size]
        if len(definition) < size:
            raise ObjectError(f"section maps: the definition of {symbol.name!r} is cut short")
        # struct bpf_map_def: type, key_size, value_size, max_entries, map_flags. Shorter ones lack the last, longer
        # ones are of other loaders, and are the same as long as the rest is not used.
        if any(definition[20:]):
            raise ObjectError(f"section maps: {symbol.name!r} has a definition of {size} bytes with unknown fields")
        number, key, value, entries, flags = struct.unpack("=5I", definition[:20].ljust(20, b"\0"))
        spec = MapSpec(
            type=_type_name(number, f"section maps: {symbol.name!r}"),
            key_size=key,
            value_size=value,
            max_entries=entries,
            flags=flags,
            name=symbol.name,
        )
        found.append(DefinedMap(symbol.name, spec, section.index, symbol.value, size))
    return found


def _type_name(number: int, where: str) -> str:
    name = _TYPE_NAMES.get(number)
    if not name or not number:
        raise ObjectError(f"{where} is of unknown map type {number}")
    return name


def _btf_maps(elf: ElfFile, section: Section, info: Btf | None, blob: bytes) -> list[DefinedMap]:
    if info is None:
        raise ObjectError("section .maps: there is no .BTF section to describe its maps")
    variables = info.find(".maps", btf.DATASEC)
    if variables is None:
        raise ObjectError("section .maps: .BTF does not describe it")
    if elf.relocations.get(section.index):
        symbol = elf.relocations[section.index][0].symbol
        raise ObjectError(f"section .maps: initial contents ({elf.describe(symbol)}) are not supported")
    by_name = {info[variable.type].name: info[variable.type] for variable in variables.items}
    found = []
    for symbol in _symbols(elf, section):
        variable = by_name.get(symbol.name)
        if variable is None or variable.kind != btf.VAR:
            raise ObjectError(f"section .maps: .BTF does not describe {symbol.name!r}")
        where = f"section .maps: {symbol.name!r}"
        spec = _definition(info, info.strip(variable.word), blob, symbol.name, where)
        found.append(DefinedMap(symbol.name, spec, section.index, symbol.value, symbol.size))
    return found


def _definition(info: Btf, record: Record, blob: bytes, name: str, where: str, inner: bool = False) -> MapSpec:
    """The map that a struct's members describe."""
    if record.kind != btf.STRUCT:
        raise ObjectError(f"{where} is no struct")
    fields: dict[str, Any] = {}
    described: dict[str, tuple[int, types.Type]] = {}
    number, pinning, inner_spec = 0, 0, None
    for member in record.items:
        if member.name == "type":
            number = _length(info, member.type, where)
        elif member.name == "pinning":
            pinning = _length(info, member.type, where)
        elif member.name in _NUMBERS:
            fields[_NUMBERS[member.name]] = _length(info, member.type, where)
        elif member.name in ("key", "value"):
            id = info.strip(member.type)
            if id.kind != btf.PTR:
                raise ObjectError(f"{where}: {member.name} is no pointer")
            described[member.name] = (id.word, info.resolve(id.word))
        elif member.name == "values":
            if inner:
                raise ObjectError(f"{where}: a map of maps of maps")
            inner_spec = _values(info, member.type, blob, name, where)
        else:
            raise ObjectError(f"{where}: unknown member {member.name!r}")
    type = _type_name(number, where)
    if pinning not in (0, 1) or (pinning and inner):
        raise ObjectError(f"{where}: unknown pinning {pinning}")
    if inner_spec is not None and type not in ("array_of_maps", "hash_of_maps"):
        raise ObjectError(f"{where}: a map of type {type} holds no maps")
    if type in ("array_of_maps", "hash_of_maps") and inner_spec is None:
        raise ObjectError(f"{where}: the type of the inner maps is missing")
    if type in ("array_of_maps", "hash_of_maps", "prog_array"):
        fields.setdefault("value_size", 4)
        if type != "hash_of_maps":
            fields.setdefault("key_size", 4)
    for part, (_, what) in described.items():
        if fields.setdefault(f"{part}_size", what.size) != what.size:
            raise ObjectError(f"{where}: {part}_size is {fields[f'{part}_size']}, its type has {what.size} bytes")
        if what.size > 0xFFFFFFFF:
            raise ObjectError(f"{where}: a {part} of {what.size} bytes")
    known = bool(blob) and type not in WITHOUT_BTF and len(described) == 2
    return MapSpec(
        type=type,
        name=name,
        pinning="by_name" if pinning else "none",
        inner=inner_spec,
        key_type=described["key"][1] if "key" in described else None,
        value_type=described["value"][1] if "value" in described else None,
        btf=blob if known else b"",
        btf_key_type_id=described["key"][0] if known else 0,
        btf_value_type_id=described["value"][0] if known else 0,
        **fields,
    )


def _length(info: Btf, id: int, where: str) -> int:
    """The number that ``int (*name)[number]`` stands for."""
    array = info.pointee(id)
    if array.kind != btf.ARRAY:
        raise ObjectError(f"{where}: a member that should be a number is none")
    return array.data[2]


def _values(info: Btf, id: int, blob: bytes, name: str, where: str) -> MapSpec | None:
    """What ``__array(values, ...)`` says: the inner map, or None for the programs of a program array."""
    array = info.strip(id)
    if array.kind != btf.ARRAY:
        raise ObjectError(f"{where}: values is no array")
    target = info.pointee(array.data[0])
    if target.kind == btf.FUNC_PROTO:
        return None
    return _definition(info, target, blob, f"{name}.inner", f"{where}: values", inner=True)


def _data_map(elf: ElfFile, section: Section, info: Btf | None, blob: bytes, object_name: str) -> DefinedMap:
    """A section of variables as an array of one element; read-only data is frozen, ``.bss`` begins as zeros."""
    if elf.relocations.get(section.index):
        symbol = elf.relocations[section.index][0].symbol
        raise ObjectError(f"section {section.name}: pointers in data ({elf.describe(symbol)}) are not supported")
    read_only = section.name.startswith(".rodata")
    record = info.find(section.name, btf.DATASEC) if info is not None else None
    spec = MapSpec(
        type="array",
        key_size=4,
        value_size=section.size,
        max_entries=1,
        flags=BPF_F_MMAPABLE | (BPF_F_RDONLY_PROG if read_only else 0),
        name=_data_name(section.name, object_name),
        contents=((bytes(4), section.data),) if section.data else (),
        frozen=read_only,
        key_type=_U32,
        value_type=info.resolve(record.id) if info is not None and record is not None and blob else None,
        btf=blob if record is not None else b"",
        btf_value_type_id=record.id if record is not None and blob else 0,
    )
    return DefinedMap(section.name, spec, section.index, 0, section.size)


def _data_name(section: str, object_name: str) -> str:
    """The kernel's name: up to 8 bytes of the object's, then the section's; 15 bytes at most."""
    room = BPF_OBJ_NAME_LEN - 1
    prefix = "" if section.count(".") > 1 else object_name[: room - max(7, min(len(section), room))]
    return re.sub(r"[^A-Za-z0-9_.]", "_", (prefix + section)[:room])
