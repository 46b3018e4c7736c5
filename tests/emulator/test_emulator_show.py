"""bpf_snprintf_btf against the kernel: random bytes as types of the running kernel's BTF, and what is refused."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import NamedTuple

import pytest
from mapcode import EXIT, Code, call, copy, get, made, mov, stack
from sides import FRAME, Side

from kbpf.elf import btf
from kbpf.emulator import environment
from kbpf.emulator.ksyms import kernel_types
from kbpf.errors import EmulationFault, ObjectError
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction, ld_imm64
from kbpf.specs import MapSpec, ProgramSpec

pytestmark = pytest.mark.requires("kernel")

I = Instruction  # noqa: E741
FULL = os.environ.get("KBPF_FUZZ") == "full"
VALUES = 20000 if FULL else 250
DATA, ROOM = 4080, 16384
GIVEN = MapSpec(type="array", key_size=4, value_size=16 + DATA, max_entries=1)
TEXT = MapSpec(type="array", key_size=4, value_size=8 + ROOM, max_entries=1)
RAW = 4
#: Types that Linux has no way to show are not asked for: it follows a pointer that is not there.
SHOWN = (btf.INT, btf.PTR, btf.ARRAY, btf.STRUCT, btf.UNION, btf.ENUM, btf.ENUM64, *btf.MODIFIERS)
WITHOUT_SIZE = (btf.FWD, btf.FUNC, btf.FUNC_PROTO)


def show(size: int, pointer_size: int, address: int | None) -> Code:
    """Map 0 has the type's id, the flags and the data, unless there is another address; map 1 gets R0 and the text."""
    data = [*copy(1, 7), I(ebpf.ALU64 | ebpf.ADD, 1, 0, 0, 16)] if address is None else [*ld_imm64(1, address)]
    return [
        *ld_imm64(6, 1, ebpf.PSEUDO_MAP_IDX_VALUE),
        *ld_imm64(7, 0, ebpf.PSEUDO_MAP_IDX_VALUE),
        *data,
        I(ebpf.STX | ebpf.MEM | ebpf.DW, 10, 1, -16),
        *get(1, 7, 0),
        I(ebpf.STX | ebpf.MEM | ebpf.DW, 10, 1, -8),
        *get(5, 7, 8),
        *copy(1, 6),
        I(ebpf.ALU64 | ebpf.ADD, 1, 0, 0, 8),
        *mov(2, size),
        *stack(3, -16),
        *mov(4, pointer_size),
        *call("snprintf_btf"),
        I(ebpf.STX | ebpf.MEM | ebpf.DW, 6, 0),
        *mov(0, 0),
        EXIT,
    ]


class Shower(NamedTuple):
    """One side with the program loaded."""

    side: Side
    program: int
    maps: tuple[int, ...]

    def show(self, id: int, flags: int, data: bytes = b"") -> bytes:
        """The result, and the text with all that is behind it."""
        backend = self.side.backend
        backend.map_update(self.maps[0], bytes(4), struct.pack("=QQ", id & 0xFFFFFFFF, flags) + data.ljust(DATA, b"\0"))
        backend.map_update(self.maps[1], bytes(4), b"\xee" * (8 + ROOM))
        backend.program_run(self.program, FRAME, bytes(192))
        return backend.map_lookup(self.maps[1], bytes(4), 8 + ROOM)


@contextmanager
def shower(side: Side, size: int = ROOM, pointer_size: int = 16, address: int | None = None) -> Iterator[Shower]:
    with made(side, GIVEN, TEXT) as maps:
        spec = ProgramSpec(instructions=tuple(show(size, pointer_size, address)))
        program = side.backend.program_load(spec, maps)
        try:
            yield Shower(side, program, maps)
        finally:
            side.backend.close(program)


def types() -> btf.Btf:
    found = kernel_types()
    assert found is not None
    return found


def named(name: str, kind: int = btf.STRUCT) -> int:
    record = types().find(name, kind)
    assert record is not None
    return record.id


def showable(record: btf.Record) -> bool:
    kind = types().strip(record.id).kind
    try:
        return record.kind in WITHOUT_SIZE or (kind in SHOWN and types().resolve(record.id).size <= DATA)
    except ObjectError:
        return kind in WITHOUT_SIZE


def some_data(rng: Random) -> bytes:
    """Mostly zeroes, which are left out, or none."""
    often = rng.choice((0, 1, 5, 60))
    return bytes(rng.choice((0,) * often + (1, 65, 0x9F, 200)) for _ in range(DATA)) if often else rng.randbytes(DATA)


def test_random_values_of_the_kernels_types(kernel: Side, emulator: Side) -> None:
    rng = Random(1)
    with shower(kernel) as one, shower(emulator) as other:
        for _ in range(VALUES):
            record = rng.choice(types().records[1:])
            if not showable(record):
                continue
            data, flags = some_data(rng), RAW | rng.choice((0, 1, 2, 3, 8, 9, 10, 11))
            assert other.show(record.id, flags, data) == one.show(record.id, flags, data), (record, flags)


@pytest.mark.parametrize("size", (1, 2, 5, 16, 17, 18, 30))
def test_what_has_no_room_is_cut(kernel: Side, emulator: Side, size: int) -> None:
    """The result is the length of all of it."""
    with shower(kernel, size) as one, shower(emulator, size) as other:
        for id in (named("int", btf.INT), named("iphdr")):
            assert other.show(id, RAW, b"\x45" * 64) == one.show(id, RAW, b"\x45" * 64)


@pytest.mark.parametrize("pointer_size", (1, 8, 15, 16))
def test_the_pointer_has_its_size(kernel: Side, emulator: Side, pointer_size: int) -> None:
    with shower(kernel, pointer_size=pointer_size) as one, shower(emulator, pointer_size=pointer_size) as other:
        assert other.show(named("iphdr"), RAW) == one.show(named("iphdr"), RAW)


def test_types_and_flags_that_are_not_there(kernel: Side, emulator: Side) -> None:
    last = len(types().records)
    with shower(kernel) as one, shower(emulator) as other:
        for id, flags in ((0, 0), (-1, 0), (1 << 31, 0), (last, 0), (1, 16), (1, 1 << 32), (1, 1 << 63)):
            assert other.show(id, flags) == one.show(id, flags), (id, flags)


@pytest.mark.parametrize("address", (0, 4096, 1 << 46, 0xFFFF << 48))
def test_memory_that_is_not_there(kernel: Side, emulator: Side, address: int) -> None:
    with shower(kernel, address=address) as one, shower(emulator, address=address) as other:
        for name in ("iphdr", "sk_buff"):
            assert other.show(named(name), RAW) == one.show(named(name), RAW)


def test_without_the_raw_flag_pointers_are_digests(kernel: Side, emulator: Side) -> None:
    """Of which the width is the same."""
    data = b"\1" * 64
    with shower(kernel) as one, shower(emulator) as other:
        results = [each.show(named("list_head"), 0, data) for each in (one, other)]
    assert results[0][:8] == results[1][:8]
    assert results[0] != results[1]


def test_what_linux_cannot_show_faults(emulator: Side) -> None:
    """A variable: Linux would follow a pointer that the BTF of its own image does not have."""
    with shower(emulator) as other, pytest.raises(EmulationFault):
        other.show(next(record.id for record in types().records if record.kind == btf.VAR), 0)


def test_long_arrays_use_up_the_budget(emulator: Side) -> None:
    """However many elements BTF says there are."""
    from kbpf.testing.btf_bytes import ARRAY, BtfBytes

    described = BtfBytes()
    array = described.add("", ARRAY, 0, 0, struct.pack("=III", described.int, described.int, 1 << 29))
    environment.kernel_btf = described.bytes()
    try:
        with shower(emulator) as other, pytest.raises(EmulationFault, match="budget"):
            other.show(array, 0)
    finally:
        environment.kernel_btf = None
