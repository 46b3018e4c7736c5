"""Memory in LLVM IR: loads, stores and atomic operations, checked against the run's table of regions.

An address that is known at compile time to lie in the function's frame needs no check. Any other is looked up: its
upper half is the region's number, whose entry of the table says where its bytes are and how many. What is not found
there is left to Python, which does the access or raises the fault (`kbpf.emulator.jit.callbacks`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from kbpf.emulator.jit.code import Body
from kbpf.emulator.jit.layout import ASKED, TABLE_SIZE
from kbpf.emulator.jit.pointers import CONTEXT, GUESS, STACK, Pointer, Registers, at_frame, size_of
from kbpf.emulator.memory import CONTEXT as CONTEXT_REGION
from kbpf.emulator.memory import M32
from kbpf.emulator.memory import PACKET as PACKET_REGION
from kbpf.emulator.memory import STACK as STACK_REGION
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction

#: What the callback for accesses is asked to do: load, store, read bytes that a helper takes, find the host address.
LOAD, STORE, READ, RESOLVE = range(4)

#: Behind an entry's base, the words that say how many bytes may be read and written.
RIGHTS = {"readable": 1, "writable": 2}
_OPERATIONS = {ebpf.ADD: "add", ebpf.OR: "or", ebpf.AND: "and", ebpf.XOR: "xor"}


class Lasting(NamedTuple):
    """A region whose bytes stay where they are as long as the program does, which has `held` for that."""

    address: int
    size: int
    readable: bool
    writable: bool
    held: object


class _Inside(NamedTuple):
    """Whether memory between two offsets from a value is inside a region, and where address 0 of that would be."""

    low: int
    high: int
    inside: str
    zero: str


@dataclass
class Memory:
    """What memory accesses of one function need to know.

    `callback` is the host address of the function for accesses. `extents` says, of an instruction and a register, from
    where to where, counted from the register, it goes to memory, and those behind it do until something changes the
    register, or may change where the packet is. `slots` are the numbers of the context's fields that are read at known
    places, by (offset, size), `lasting` are regions by number, and the stack has `stack_size` bytes.
    """

    body: Body
    callback: int
    extents: Callable[[int, int], list[tuple[int, int]]]
    slots: dict[tuple[int, int], int]
    lasting: Mapping[int, Lasting]
    stack_size: int
    _in_packet: dict[tuple[str, str], _Inside] = field(default_factory=dict)

    def forget(self) -> None:
        """What was found is not known any longer: another block begins, or packets may be elsewhere."""
        self._in_packet.clear()

    def load(self, pc: int, instruction: Instruction, registers: Registers) -> None:
        """LDX, and the atomic load-acquire."""
        opcode, dst, src, off, _ = instruction
        size = size_of(opcode)
        held = registers[src]
        signed = opcode & 7 == ebpf.LDX and opcode & 0xE0 == ebpf.MEMSX
        at = None if held is None or held.kind != CONTEXT or held.offset is None else held.offset + off
        if at is not None and at >= 0 and not signed:
            value = self._context_field(pc, at, size)
        else:
            value = self.value_at(pc, held, src, off, size)
        if signed:
            value = self.body.value(f"trunc i64 {value} to i{8 * size}")
            value = self.body.value(f"sext i{8 * size} {value} to i64")
        self.body.set(dst, value)

    def value_at(self, pc: int, held: Pointer | None, base: int, off: int, size: int, kind: int = LOAD) -> str:
        """An unsigned number in memory, as 64 bits."""
        at = at_frame(held, off, size)
        if at is not None:
            return self._plain_load(self._in_frame(at), size)
        return self._reach(pc, held, base, off, size, ("readable",), lambda found: self._plain_load(found, size), kind)

    def store(self, pc: int, instruction: Instruction, registers: Registers) -> None:
        """ST and STX, and the atomic store-release."""
        opcode, dst, src, off, imm = instruction
        body, size = self.body, size_of(opcode)
        value = str(imm) if opcode & 7 == ebpf.ST else body.get(src)
        narrow = value if size == 8 else body.value(f"trunc i64 {value} to i{8 * size}")
        at = at_frame(registers[dst], off, size)

        def put(found: str) -> str:
            body.emit(f"store i{8 * size} {narrow}, ptr {found}, align 1")
            return "0"

        if at is not None:
            put(self._in_frame(at))
        else:
            self._reach(pc, registers[dst], dst, off, size, ("writable",), put, STORE, value)

    def atomic(self, pc: int, instruction: Instruction, registers: Registers) -> None:
        """Read-modify-write; one that is not aligned is not atomic, and Linux does not let it pass."""
        opcode, dst, src, off, imm = instruction
        body, size = self.body, size_of(opcode)
        kind = f"i{8 * size}"
        at = at_frame(registers[dst], off, size)
        if at is not None:
            pointer = self._in_frame(at)
        else:
            rights = ("writable", "readable")
            host = self._reach(
                pc, registers[dst], dst, off, size, rights, lambda p: body.value(f"ptrtoint ptr {p} to i64"), RESOLVE
            )
            pointer = body.value(f"inttoptr i64 {host} to ptr")
        operand = body.get(src) if size == 8 else body.get32(src)
        compared = (body.get(0) if size == 8 else body.get32(0)) if imm == ebpf.CMPXCHG else ""
        old = self._exchange(pointer, kind, size, imm, operand, compared)
        wide = old if size == 8 else body.value(f"zext {kind} {old} to i64")
        if imm == ebpf.CMPXCHG:
            body.set(0, wide)
        elif imm & ebpf.FETCH:
            body.set(src, wide)

    def _exchange(self, pointer: str, kind: str, size: int, imm: int, operand: str, compared: str) -> str:
        """The old value. Memory that is not aligned is changed in two steps, which LLVM's atomics do not do."""
        body = self.body
        number = body.value(f"ptrtoint ptr {pointer} to i64")
        low = body.value(f"and i64 {number}, {size - 1}")
        aligned, split, joined = body.label(), body.label(), body.label()
        whole = body.value(f"icmp eq i64 {low}, 0")
        body.emit(f"br i1 {whole}, label %{aligned}, label %{split}, !prof !0")
        body.place(aligned)
        operation = _OPERATIONS.get(imm & ~ebpf.FETCH, "xchg")
        if imm == ebpf.CMPXCHG:
            pair = body.value(
                f"cmpxchg ptr {pointer}, {kind} {compared}, {kind} {operand} seq_cst seq_cst, align {size}"
            )
            first = body.value(f"extractvalue {{ {kind}, i1 }} {pair}, 0")
        else:
            first = body.value(f"atomicrmw {operation} ptr {pointer}, {kind} {operand} seq_cst, align {size}")
        body.emit(f"br label %{joined}")
        with body.aside(split):
            second = body.value(f"load {kind}, ptr {pointer}, align 1")
            new = operand
            if imm == ebpf.CMPXCHG:
                same = body.value(f"icmp eq {kind} {second}, {compared}")
                new = body.value(f"select i1 {same}, {kind} {operand}, {kind} {second}")
            elif operation != "xchg":
                new = body.value(f"{operation} {kind} {second}, {operand}")
            body.emit(f"store {kind} {new}, ptr {pointer}, align 1")
            body.emit(f"br label %{joined}")
        body.place(joined)
        return body.value(f"phi {kind} [ {first}, %{aligned} ], [ {second}, %{split} ]")

    # Places.

    def _in_frame(self, at: int) -> str:
        return self.body.value(f"getelementptr i8, ptr %frame, i64 {at}")

    def _plain_load(self, pointer: str, size: int) -> str:
        if size == 8:
            return self.body.value(f"load i64, ptr {pointer}, align 1")
        narrow = self.body.value(f"load i{8 * size}, ptr {pointer}, align 1")
        return self.body.value(f"zext i{8 * size} {narrow} to i64")

    def _address(self, base: int, off: int) -> str:
        return self.body.value(f"add i64 {self.body.get(base)}, {off}") if off else self.body.get(base)

    def _reach(
        self,
        pc: int,
        held: Pointer | None,
        base: int,
        off: int,
        size: int,
        rights: tuple[str, ...],
        use: Callable[[str], str],
        kind: int,
        value: str = "0",
    ) -> str:
        """Go to memory: `use` takes the host's pointer and gives a number, where Python is not asked for it instead."""
        body = self.body
        address = self._address(base, off)
        joined = body.label()
        ways: list[str] = []

        def arrive(result: str, block: str) -> None:
            ways.append(f"[ {result}, %{block} ]")
            body.emit(f"br label %{joined}")

        def look_up() -> None:
            found, missed, usual = self._find(address, size, *rights)
            arrive(use(found), usual)
            with body.aside(missed):
                arrive(*self._ask(pc, kind, address, size, value))

        guessed = self._guess(pc, held, base, off, size, rights)
        if guessed is None:
            look_up()
        else:
            bad, good = body.unlikely(guessed.inside)
            body.place(good)
            arrive(use(body.value(f"getelementptr i8, ptr {guessed.zero}, i64 {address}")), good)
            with body.aside(bad):
                look_up()
        body.place(joined)
        return body.value(f"phi i64 {', '.join(ways)}")

    def _guess(
        self, pc: int, held: Pointer | None, base: int, off: int, size: int, rights: tuple[str, ...]
    ) -> _Inside | None:
        """Whether an access is in the region that is likely, and where it is then; None if none is."""
        if held is None or held.kind not in (STACK, GUESS):
            return None
        number = STACK_REGION if held.kind == STACK else held.offset or 0
        if number == PACKET_REGION:
            return self._packet(pc, base, off, size, rights[0])
        if number == STACK_REGION:
            start, limit = "%stack", self.stack_size - size + 1
        else:
            lasting = self.lasting.get(number)
            if lasting is None or lasting.size < size or not all(getattr(lasting, right) for right in rights):
                return None
            start, limit = f"inttoptr (i64 {lasting.address} to ptr)", lasting.size - size + 1
        offset = self.body.value(f"sub i64 {self._address(base, off)}, {number << 32}")
        inside = self.body.value(f"icmp ult i64 {offset}, {limit}")
        return _Inside(off, off + size, inside, self._zero(number, start))

    def _packet(self, pc: int, base: int, off: int, size: int, right: str) -> _Inside:
        """As `_guess`: one look for all that the block does in the packet from the same value on."""
        body = self.body
        key = body.get(base), right
        found = self._in_packet.get(key)
        if found is None or off < found.low or off + size > found.high:
            lows, highs = zip((off, off + size), *self.extents(pc, base), strict=True)
            low, high = min(lows), max(highs)
            entry = body.value(f"getelementptr [4 x i64], ptr %table, i64 {PACKET_REGION}")
            where = body.value(f"getelementptr i64, ptr {entry}, i64 1")
            word = body.value(f"getelementptr i64, ptr {where}, i64 {RIGHTS[right]}")
            limit = body.value(f"load i64, ptr {word}")
            first = body.value(f"add i64 {key[0]}, {low - (PACKET_REGION << 32)}")
            last = body.value(f"add i64 {first}, {high - low - 1}")
            starts, ends = (body.value(f"icmp ult i64 {each}, {limit}") for each in (first, last))
            inside = body.value(f"and i1 {starts}, {ends}")
            zero = self._zero(PACKET_REGION, body.value(f"load ptr, ptr {where}"))
            found = self._in_packet[key] = _Inside(low, high, inside, zero)
        return found

    def _zero(self, number: int, start: str) -> str:
        """Where a region's address 0 would be: from there on nothing but an address is waited for."""
        return self.body.value(f"getelementptr i8, ptr {start}, i64 {-(number << 32)}")

    def _find(self, address: str, size: int, *rights: str) -> tuple[str, str, str]:
        """Look an address up and go on where it was found; returns the host pointer, and both blocks' labels."""
        body = self.body
        number = body.value(f"lshr i64 {address}, 32")
        index = body.value(f"and i64 {number}, {TABLE_SIZE - 1}")
        entry = body.value(f"getelementptr [4 x i64], ptr %table, i64 {index}")
        held = body.value(f"load i64, ptr {entry}")
        good = body.value(f"icmp eq i64 {held}, {number}")
        offset = body.value(f"and i64 {address}, {M32}")
        last = body.value(f"add nuw nsw i64 {offset}, {size}")
        for right in rights:
            word = body.value(f"getelementptr i64, ptr {entry}, i64 {1 + RIGHTS[right]}")
            limit = body.value(f"load i64, ptr {word}")
            good = body.value(f"and i1 {good}, {body.value(f'icmp ule i64 {last}, {limit}')}")
        missed, usual = body.unlikely(good)
        body.place(usual)
        where = body.value(f"getelementptr i64, ptr {entry}, i64 1")
        base = body.value(f"load ptr, ptr {where}")
        return body.value(f"getelementptr i8, ptr {base}, i64 {offset}"), missed, usual

    def _ask(self, pc: int, kind: int, address: str, size: int, value: str) -> tuple[str, str]:
        """Leave an access to Python; goes on only if it did not fault, in the block that is returned."""
        body = self.body
        body.store_field("status", str(ASKED))
        got = body.value(
            f"call i64 inttoptr (i64 {self.callback} to ptr)(ptr %run, i64 {pc}, i64 {kind}, i64 {address},"
            f" i64 {size}, i64 {value})"
        )
        return got, check_status(body)

    def _context_field(self, pc: int, offset: int, size: int) -> str:
        """A context's field: from the slots where Python has filled them in, else from Python, which fills them in."""
        body = self.body
        slot = self.slots.setdefault((offset, size), len(self.slots))
        valid = body.value(f"icmp ne i64 {body.load_field('slots_valid')}, 0")
        missed, usual = body.unlikely(valid)
        joined = body.label()
        body.place(usual)
        slots = body.value(f"inttoptr i64 {body.load_field('slots')} to ptr")
        hit = body.value(f"load i64, ptr {body.value(f'getelementptr i64, ptr {slots}, i64 {slot}')}")
        body.emit(f"br label %{joined}")
        with body.aside(missed):
            got, last = self._ask(pc, LOAD, str((CONTEXT_REGION << 32) + offset), size, "0")
            body.emit(f"br label %{joined}")
        body.place(joined)
        return body.value(f"phi i64 [ {hit}, %{usual} ], [ {got}, %{last} ]")


def check_status(body: Body) -> str:
    """Leave the function if Python has a fault or an exception to raise; returns the block that goes on."""
    status = body.load_field("status")
    fine, out = body.label(), body.label()
    clean = body.value(f"icmp eq i64 {status}, 0")
    body.emit(f"br i1 {clean}, label %{fine}, label %{out}, !prof !0")
    body.place(out)
    body.emit("br label %faulted")
    body.place(fine)
    return fine
