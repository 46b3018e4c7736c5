"""Dynamic pointers and ring buffers of user space, against the kernel."""

from __future__ import annotations

import mmap
import struct

import pytest
from mapcode import (
    EXIT,
    Code,
    call,
    copy,
    described,
    function_address,
    get,
    link_functions,
    made,
    main,
    mov,
    put,
    run,
    stack,
    the_map,
    unless_null,
)
from sides import Side

from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.specs import MapSpec
from kbpf.uapi import constants as uapi

pytestmark = pytest.mark.requires("kernel")

PAGE = mmap.PAGESIZE
VALUE = MapSpec(type="array", key_size=4, value_size=16, max_entries=1)
RING = MapSpec(type="ringbuf", max_entries=PAGE)
ADD = Instruction(ebpf.ALU64 | ebpf.ADD | ebpf.X, 0, 1)


def over_a_value(*body: Code) -> Code:
    """A dynptr at -32 over a value of 16 bytes, then the body."""
    inside = [
        *copy(1, 0),
        *mov(2, 16),
        *mov(3, 0),
        *stack(4, -32),
        *call("dynptr_from_mem"),
        *(instruction for piece in body for instruction in piece),
    ]
    return main(put(-8, 0), the_map(1), stack(2, -8), call("map_lookup_elem"), unless_null(0, inside))


def transfer(offset: int, length: int, flags: int, write: bool) -> Code:
    there = [*stack(1, -64), *mov(2, length), *stack(3, -32), *mov(4, offset), *mov(5, flags), *call("dynptr_read")]
    back = [*stack(1, -32), *mov(2, offset), *stack(3, -64), *mov(4, length), *mov(5, flags), *call("dynptr_write")]
    return over_a_value(put(-64, 0x0102030405060708 & 0x7FFFFFFF), put(-56, 7), back if write else there, [
        *(() if write else [*get(1, 10, -64), ADD]),
    ])  # fmt: skip


@pytest.mark.parametrize("write", (False, True))
def test_what_may_be_read_and_written(kernel: Side, emulator: Side, write: bool) -> None:
    for offset in (0, 1, 8, 15, 16, 17, -1):
        for length in (1, 8, 16):
            for flags in (0, 1):
                results = []
                for side in (kernel, emulator):
                    with made(side, VALUE) as (fd,):
                        side.backend.map_update(fd, bytes(4), bytes(range(16)))
                        result = run(side, transfer(offset, length, flags, write), [fd])
                        results.append((result, side.backend.map_lookup(fd, bytes(4), 16)))
                assert results[1] == results[0], (offset, length, flags)


def test_data_slices(kernel: Side, emulator: Side) -> None:
    for offset in (0, 8, 9, 16, -1):
        read = unless_null(0, [*get(0, 0)])
        program = over_a_value(stack(1, -32), mov(2, offset), mov(3, 8), call("dynptr_data"), read)
        results = []
        for side in (kernel, emulator):
            with made(side, VALUE) as (fd,):
                side.backend.map_update(fd, bytes(4), bytes(range(16)))
                results.append(run(side, program, [fd]))
        assert results[1] == results[0], offset


@pytest.mark.parametrize("commit", ("ringbuf_submit_dynptr", "ringbuf_discard_dynptr"))
def test_records_of_any_size(kernel: Side, emulator: Side, commit: str) -> None:
    for size in (0, 8, 13, 4088, 4089, 1 << 24):
        for flags in (0, 1):
            program = main(
                put(-64, 99),
                [*the_map(1), *mov(2, size), *mov(3, flags), *stack(4, -32), *call("ringbuf_reserve_dynptr")],
                copy(7, 0),
                [*stack(1, -32), *mov(2, 0), *stack(3, -64), *mov(4, 8), *mov(5, 0), *call("dynptr_write")],
                copy(8, 0),
                [*stack(1, -32), *mov(2, 0), *call(commit)],
                [*copy(0, 7), Instruction(ebpf.ALU64 | ebpf.LSH, 0, 0, 0, 32), *copy(1, 8), ADD],
            )
            results = []
            for side in (kernel, emulator):
                with made(side, RING) as (fd,):
                    result = run(side, program, [fd])
                    memory = side.backend.map_memory(fd, 2 * PAGE, PAGE)
                    results.append((result, bytes(memory[:8]), bytes(memory[PAGE:])))
                    memory.release()
            assert results[1] == results[0], (size, flags)


def drain(flags: int = 0, stop: bool = False) -> tuple[Code, dict[str, bytes]]:
    """Sum the first words of all records into the low half of R0; the high half is what the helper returns."""
    caller = main(
        put(-8, 0),
        [*the_map(1), *function_address(2, 1), *stack(3, -8), *mov(4, flags), *call("user_ringbuf_drain")],
        [Instruction(ebpf.ALU64 | ebpf.LSH, 0, 0, 0, 32), *get(1, 10, -8), ADD],
    )
    callback = [
        *copy(6, 2),
        *copy(3, 1),
        *put(-8, 0),
        *[*stack(1, -8), *mov(2, 4), *mov(4, 0), *mov(5, 0), *call("dynptr_read")],
        *[*get(1, 10, -8), *get(0, 6), ADD, Instruction(ebpf.STX | ebpf.MEM | ebpf.DW, 6, 0)],
        *mov(0, int(stop)),
        EXIT,
    ]
    program, starts = link_functions(caller, callback)
    return program, described(starts)


BUSY, DISCARD = uapi.BPF_RINGBUF_BUSY_BIT, uapi.BPF_RINGBUF_DISCARD_BIT
RECORDS = {
    "none": (),
    "one": ((8, 8),),
    "three": ((8, 8), (4, 4), (17, 17)),
    "discarded": ((8, 8), (8 | DISCARD, 8), (8, 8)),
    "not ready": ((8, 8), (8 | BUSY, 8), (8, 8)),
    "too short to read": ((2, 2), (8, 8)),
    "longer than what was produced": ((8, 8), (80, 8)),
    "longer than the ring": ((5000, 8),),
}


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("stop", (False, True))
def test_programs_read_what_user_space_wrote(kernel: Side, emulator: Side, name: str, stop: bool) -> None:
    results = []
    for side in (kernel, emulator):
        with made(side, MapSpec(type="user_ringbuf", max_entries=PAGE)) as (fd,):
            memory = side.backend.map_memory(fd, 2 * PAGE, PAGE, True)
            consumer = side.backend.map_memory(fd, PAGE)
            outcome: list[object] = []
            at = 0
            for number in range(60):
                for header, size in RECORDS[name]:
                    start = PAGE + at % PAGE
                    memory[start : start + 8] = struct.pack("=II", header, 0)
                    for i, byte in enumerate((number + 1).to_bytes(4, "little")[:size]):
                        memory[PAGE + (at + 8 + i) % PAGE] = byte
                    at += 8 + (size + 7 & ~7)
                memory[:8] = at.to_bytes(8, "little")
                program, info = drain(stop=stop)
                outcome += [run(side, program, [fd], **info), bytes(consumer[:8])]
                if name in ("not ready", "longer than what was produced", "longer than the ring") or stop:
                    break
            for flags in (1, 2, 4):
                program, info = drain(flags)
                outcome.append(run(side, program, [fd], **info))
            consumer.release()
            memory.release()
        results.append(outcome)
    assert results[1] == results[0]
