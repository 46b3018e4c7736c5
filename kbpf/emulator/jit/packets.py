"""LD_ABS and LD_IND in LLVM IR: big-endian loads from the packet, which end the program where there is nothing."""

from __future__ import annotations

import sys

from kbpf.emulator.jit.access import check_status
from kbpf.emulator.jit.code import Body
from kbpf.emulator.jit.layout import ASKED
from kbpf.emulator.jit.pointers import size_of
from kbpf.isa import cbpf, ebpf
from kbpf.isa.ebpf import Instruction


def packet_load(body: Body, instruction: Instruction, missing: str, wide: bool = False) -> None:
    """`missing` is the block that ends the program with 0. Where `wide`, what is loaded is eight bytes, of which some
    may lie behind the packet: neighbours share a load, and many packets' are gathered in one.
    """
    opcode, _, src, _, imm = instruction
    size, k = size_of(opcode), imm & 0xFFFFFFFF
    if opcode & 0xE0 == ebpf.ABS:
        if k >= cbpf.LL_OFF:
            _relative(body, str(k), size, missing, wide)
        else:
            good = body.value(f"icmp ule i64 {k + size}, {body.load_field('size')}")
            _leave_unless(body, good, missing)
            _big_endian(body, body.load_field("data"), str(k), size, wide)
        return
    index = body.value(f"zext i32 {body.value(f'add i32 {body.get32(src)}, {imm}')} to i64")
    last = body.value(f"add nuw nsw i64 {index}, {size}")
    good = body.value(f"icmp ule i64 {last}, {body.load_field('size')}")
    outside, inside, joined = body.label(), body.label(), body.label()
    body.emit(f"br i1 {good}, label %{inside}, label %{outside}, !prof !0")
    body.place(inside)
    _big_endian(body, body.load_field("data"), index, size, wide)
    first = body.get(0)
    body.emit(f"br label %{joined}")
    with body.aside(outside):
        negative = body.value(f"icmp uge i64 {index}, {cbpf.LL_OFF}")
        _leave_unless(body, negative, missing)
        last_block = _relative(body, index, size, missing, wide)
        second = body.get(0)
        body.emit(f"br label %{joined}")
    body.place(joined)
    body.set(0, body.value(f"phi i64 [ {first}, %{inside} ], [ {second}, %{last_block} ]"))


def _leave_unless(body: Body, good: str, missing: str) -> str:
    on = body.label()
    body.emit(f"br i1 {good}, label %{on}, label %{missing}, !prof !0")
    body.place(on)
    return on


def _relative(body: Body, k: str, size: int, missing: str, wide: bool) -> str:
    """From the network or the link header on; returns the block in which it ends."""
    network = body.value(f"icmp uge i64 {k}, {cbpf.NET_OFF}")
    base = body.value(f"select i1 {network}, i64 {body.load_field('network')}, i64 {body.load_field('mac')}")
    start = body.value(f"select i1 {network}, i64 {cbpf.NET_OFF}, i64 {cbpf.LL_OFF}")
    at = body.value(f"add i64 {base}, {body.value(f'sub i64 {k}, {start}')}")
    last = body.value(f"add i64 {at}, {size}")
    there = body.value(f"icmp sge i64 {base}, 0")
    whole = body.value(f"icmp sle i64 {last}, {body.load_field('buffer_size')}")
    block = _leave_unless(body, body.value(f"and i1 {there}, {whole}"), missing)
    _big_endian(body, body.load_field("buffer"), at, size, wide)
    return block


def _big_endian(body: Body, base: str, offset: str, size: int, wide: bool) -> None:
    """Load into R0."""
    bits, word, skipped = 8 * size, offset, 0
    if wide and offset.isdecimal() and int(offset) % 8 + size <= 8:
        skipped = int(offset) % 8
        word = str(int(offset) - skipped)
    pointer = body.value(f"getelementptr i8, ptr {body.value(f'inttoptr i64 {base} to ptr')}, i64 {word}")
    if wide:
        shift = 8 * (skipped if sys.byteorder == "little" else 8 - size - skipped)
        eight = body.value(f"lshr i64 {body.value(f'load i64, ptr {pointer}, align 1')}, {shift}")
        value = body.value(f"trunc i64 {eight} to i{bits}")
    else:
        value = body.value(f"load i{bits}, ptr {pointer}, align 1")
    if size > 1 and sys.byteorder == "little":
        value = body.value(f"call i{bits} @llvm.bswap.i{bits}(i{bits} {value})")
    body.set(0, body.value(f"zext i{bits} {value} to i64"))


def ancillary(body: Body, pc: int, instruction: Instruction, callback: int, ended: str) -> None:
    """A classic load of an ancillary word, which Python knows; -1 ends the program with A, by the block `ended`."""
    body.store_field("status", str(ASKED))
    call = f"call i64 inttoptr (i64 {callback} to ptr)(ptr %run, i64 {pc}, i64 {instruction.imm & 0xFFFFFFFF}"
    got = body.value(f"{call}, i64 {body.get(0)}, i64 {body.get(7)})")
    check_status(body)
    body.emit(f"store i64 {body.get(0)}, ptr %result")
    _leave_unless(body, body.value(f"icmp sge i64 {got}, 0"), ended)
    body.set(0, got)
