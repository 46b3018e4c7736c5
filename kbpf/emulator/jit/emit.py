"""A program in LLVM IR: a function for each of its functions, and the entries that Python calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from kbpf.emulator.checks import jump_target
from kbpf.emulator.interpreter import CONTEXT_ADDRESS, TAIL_CALL_HELPER
from kbpf.emulator.jit.access import READ, Lasting, Memory, check_status
from kbpf.emulator.jit.arithmetic import arithmetic, condition
from kbpf.emulator.jit.code import Body, variables
from kbpf.emulator.jit.layout import ASKED
from kbpf.emulator.jit.packets import ancillary, packet_load
from kbpf.emulator.jit.pointers import CONTEXT, GUESS, HANDLE, Pointer, Registers, follow, reached, stack_escapes
from kbpf.emulator.maps.array import Array, PerCpuArray
from kbpf.emulator.memory import M32, STACK
from kbpf.isa import cbpf, ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.uapi.enums import HELPERS

_LOOKUP = HELPERS["map_lookup_elem"]
_CALL, _EXIT = ebpf.JMP | ebpf.CALL, ebpf.JMP | ebpf.EXIT
#: More text, or more ways from one instruction to another that is not behind it, are `large`: what has no more is
#: compiled in a quarter of a second, or half of one where all of the text is between two jumps.
_LONG, _MANY_JUMPS = 1 << 19, 500
_ARGUMENTS = "i64 %a1, i64 %a2, i64 %a3, i64 %a4, i64 %a5, i64 %depth"


@dataclass(frozen=True)
class Callbacks:
    """Host addresses of what Python does for native code (`kbpf.emulator.jit.runs`)."""

    access: int
    helper: int
    ancillary: int
    tail_call: int
    fault: int


#: What the fault callback is asked to raise.
EXHAUSTED, TOO_DEEP = range(2)


@dataclass
class Source:
    """What is compiled.

    `constants` are what 64-bit immediate loads of references give, by index, and `handles` the maps behind those that
    are handles, by address; `lasting` are regions whose bytes stay in their place, by number. `classic` is a classic
    filter's translation, whose absolute loads reach ancillary words, and whose context is asked for the packet's length
    only. `wide` loads of packets may read seven bytes behind them. What is said in `slots`, `escapes` and `asks` is
    found while emitting: the context's fields that are read at known places, whether Python or computed addresses
    reach the stack, and whether native code may ask Python for anything at all; and in `large`, whether there is
    so much of it that LLVM would take seconds (`kbpf.emulator.jit.engine.Compiled`).
    """

    instructions: Sequence[Instruction]
    constants: Mapping[int, int] = field(default_factory=dict)
    handles: Mapping[int, object] = field(default_factory=dict)
    lasting: Mapping[int, Lasting] = field(default_factory=dict)
    classic: bool = False
    wide: bool = False
    slots: dict[tuple[int, int], int] = field(default_factory=dict)
    escapes: bool = False
    asks: bool = False
    large: bool = False

    def supported(self) -> bool:
        """Whether this can be compiled: not where functions other than the main one make tail calls."""
        later = [*self.starts()[1:], len(self.instructions)][0]
        return all(
            opcode != _CALL or src or imm != TAIL_CALL_HELPER for opcode, _, src, _, imm in self.instructions[later:]
        )

    def starts(self) -> list[int]:
        """Where its functions start."""
        found = {0}
        for pc, (opcode, _, src, _, imm) in enumerate(self.instructions):
            if (opcode == _CALL and src == ebpf.PSEUDO_CALL) or (opcode == ebpf.LD_IMM64 and src == ebpf.PSEUDO_FUNC):
                found.add(pc + 1 + imm)
        return sorted(found)


def program(source: Source, callbacks: Callbacks) -> str:
    """The functions of a program, ``@f0`` for the main one."""
    starts = source.starts()
    functions = [
        _Function(source, callbacks, start, end).text()
        for start, end in zip(starts, [*starts[1:], len(source.instructions)], strict=True)
    ]
    text = "\n".join(functions)
    source.asks = "call i64 inttoptr" in text or "call void inttoptr" in text
    source.large = len(text) > _LONG or text.count("label %pc") > _MANY_JUMPS
    return text


def compiled(address: int) -> str:
    """A program's main function, where it has been compiled before."""
    names = ", ".join(f"i64 %a{number}" for number in range(1, 6))
    return f"""
define i64 @f0(ptr %run, {_ARGUMENTS}) {{
  %r = call i64 inttoptr (i64 {address} to ptr)(ptr %run, {names}, i64 %depth)
  ret i64 %r
}}
"""


class _Function:
    def __init__(self, source: Source, callbacks: Callbacks, start: int, end: int) -> None:
        self.source, self.callbacks = source, callbacks
        self.start, self.end = start, end
        self.instructions = source.instructions
        self.body = Body()
        frames = ebpf.MAX_CALL_FRAMES if len(source.starts()) > 1 else 1
        constants = {
            pc: Pointer(HANDLE, address) if address in source.handles else Pointer(GUESS, address >> 32)
            for pc, address in source.constants.items()
        }
        self.known: dict[int, Registers] = follow(self.instructions, start, end, constants, self._result, start == 0)
        self.lookups = {
            pc: found
            for pc, registers in self.known.items()
            if (found := self._lookup(self.instructions[pc], registers)) is not None
        }
        self.leaders = self._leaders()
        extents = partial(reached, self.instructions, self.known, self.leaders)
        stack_size = ebpf.STACK_SIZE * frames
        self.memory = Memory(self.body, callbacks.access, extents, source.slots, source.lasting, stack_size)
        self.escapes = stack_escapes(self.instructions, self.known, set(self.lookups))
        source.escapes |= self.escapes
        #: Whether helpers are called, by whatever function.
        self.helped = any(opcode == _CALL and not src for opcode, _, src, _, _ in self.instructions)
        #: Whether it uses what is left of the budget.
        self.fuelled = any(
            self.instructions[pc].opcode == _CALL or (jump_target(pc, self.instructions[pc]) or pc + 1) <= pc
            for pc in self.known
        )

    def _result(self, instruction: Instruction, registers: Registers) -> Pointer | None:
        """Where the result of a call points, perhaps."""
        found = self._lookup(instruction, registers)
        return None if found is None else Pointer(GUESS, found.values.number)

    def _lookup(self, instruction: Instruction, registers: Registers) -> Array | None:
        """The array that a lookup reads, whose place is computed here."""
        opcode, _, src, _, imm = instruction
        if opcode != _CALL or src or imm != _LOOKUP:
            return None
        held = registers[1]
        found = self.source.handles.get(held.offset or 0) if held is not None and held.kind == HANDLE else None
        return found if isinstance(found, Array) and type(found) in (Array, PerCpuArray) else None

    def text(self) -> str:
        body = self.body
        body.emit("entry:")
        body.lines += variables()
        body.emit("%result = alloca i64")
        body.emit("%fuel = alloca i64")
        body.emit(f"store i64 {body.load_field('fuel')}, ptr %fuel")
        body.emit("store i64 0, ptr %result")
        table = body.load_field("table")
        body.emit(f"%table = inttoptr i64 {table} to ptr")
        body.emit(f"%stack = inttoptr i64 {body.load_field('stack')} to ptr")
        self._frame()
        first = [str(CONTEXT_ADDRESS), "0", "0", "0", "0"] if self.start == 0 else [f"%a{n}" for n in range(1, 6)]
        for register, value in zip(range(11), ["0", *first, "0", "0", "0", "0"], strict=False):
            body.emit(f"store i64 {value}, ptr %r{register}")
        above = body.value("add i64 %depth, 1")
        top = body.value(f"mul i64 {above}, {ebpf.STACK_SIZE}")
        body.emit(f"store i64 {body.value(f'add i64 {top}, {STACK << 32}')}, ptr %r10")
        body.emit(f"br label %pc{self.start}")
        falls = False
        for pc in range(self.start, self.end):
            if pc not in self.known:
                continue
            if pc in self.leaders or not falls:
                if falls:
                    body.spill()
                    body.emit(f"br label %pc{pc}")
                body.begin(f"pc{pc}")
                self.memory.forget()
            falls = self._instruction(pc)
        body.lines += body.cold
        body.emit("missing:")
        self._end(len(self.instructions))
        body.emit("ret i64 0")
        body.emit("ended:")
        body.emit(f"ret i64 {body.value('load i64, ptr %result')}")
        body.emit("faulted:\nret i64 0")
        lines = "\n".join(body.lines)
        return f"define i64 @f{self.start}(ptr noalias %run, {_ARGUMENTS}) {{\n{lines}\n}}\n"

    def _leaders(self) -> set[int]:
        found = {self.start}
        for pc in self.known:
            target = jump_target(pc, self.instructions[pc])
            if target is not None:
                found |= {target, pc + 1}
        return found

    def _frame(self) -> None:
        """The function's frame: its own memory where nothing else reaches it, which LLVM keeps in registers."""
        body = self.body
        if not self.escapes:
            body.emit(f"%frame = alloca [{ebpf.STACK_SIZE} x i8], align 8")
            body.emit(f"call void @llvm.memset.p0.i64(ptr %frame, i8 0, i64 {ebpf.STACK_SIZE}, i1 false)")
            return
        below = body.value(f"mul i64 %depth, {ebpf.STACK_SIZE}")
        body.emit(f"%frame = getelementptr i8, ptr %stack, i64 {below}")

    def _instruction(self, pc: int) -> bool:
        """Emit one; returns whether the next one follows in the same block."""
        body, instruction, registers = self.body, self.instructions[pc], self.known[pc]
        opcode, dst, src, _, imm = instruction
        kind = opcode & 7
        if opcode == ebpf.LD_IMM64:
            body.set(dst, str(self.source.constants.get(pc, imm & M32 | (self.instructions[pc + 1].imm & M32) << 32)))
        elif kind in (ebpf.ALU, ebpf.ALU64):
            arithmetic(body, instruction)
        elif kind == ebpf.LD:
            if self.source.classic and opcode & 0xE0 == ebpf.ABS and imm & M32 >= cbpf.AD_OFF:
                ancillary(body, pc, instruction, self.callbacks.ancillary, "ended")
            else:
                packet_load(body, instruction, "missing", self.source.wide)
        elif kind == ebpf.LDX:
            if self.source.classic and (held := registers[src]) is not None and held.kind == CONTEXT:
                body.set(dst, body.value(f"and i64 {body.load_field('length')}, {M32}"))
            else:
                self.memory.load(pc, instruction, registers)
        elif kind == ebpf.STX and opcode & 0xE0 == ebpf.ATOMIC:
            self._atomic(pc, instruction, registers)
        elif kind in (ebpf.ST, ebpf.STX):
            self.memory.store(pc, instruction, registers)
        elif opcode == _EXIT:
            self._end(pc)
            body.emit(f"ret i64 {body.get(0)}")
            return False
        elif opcode == _CALL:
            self._call(pc, instruction)
            self.memory.forget()
        else:
            self._jump(pc, instruction)
            return False
        return True

    def _atomic(self, pc: int, instruction: Instruction, registers: Registers) -> None:
        if instruction.imm == ebpf.LOAD_ACQ:
            self.memory.load(pc, instruction, registers)
        elif instruction.imm == ebpf.STORE_REL:
            self.memory.store(pc, instruction, registers)
        else:
            self.memory.atomic(pc, instruction, registers)

    # Control.

    def _end(self, pc: int) -> None:
        """The function returns; where the program does, it must have given back what helpers have handed out."""
        self._show_fuel()
        if self.start == 0 and self.helped:
            self.body.store_field("ended_at", str(pc))

    def _fault(self, pc: int, what: int) -> None:
        body = self.body
        body.store_field("status", str(ASKED))
        body.emit(f"call void inttoptr (i64 {self.callbacks.fault} to ptr)(ptr %run, i64 {pc}, i64 {what})")
        body.emit("br label %faulted")

    def _charge(self, pc: int, cost: str) -> None:
        """Take from the budget, and fault where there is none left."""
        body = self.body
        left = body.value(f"sub i64 {body.value('load i64, ptr %fuel')}, {cost}")
        body.emit(f"store i64 {left}, ptr %fuel")
        none, some = body.unlikely(body.value(f"icmp sge i64 {left}, 0"))
        with body.aside(none):
            self._fault(pc, EXHAUSTED)
        body.place(some)

    def _show_fuel(self) -> None:
        """Let the run's structure say what is left of the budget, which the function keeps to itself."""
        if self.fuelled:
            self.body.store_field("fuel", self.body.value("load i64, ptr %fuel"))

    def _take_fuel(self) -> None:
        """What was called has used some of it."""
        self.body.emit(f"store i64 {self.body.load_field('fuel')}, ptr %fuel")

    def _jump(self, pc: int, instruction: Instruction) -> None:
        body, op = self.body, instruction.opcode & 0xF0
        target = jump_target(pc, instruction)
        assert target is not None
        backward = target <= pc
        if op == ebpf.JA:
            if backward:
                self._charge(pc, str(pc + 1 - target))
            body.spill()
            body.emit(f"br label %pc{target}")
            return
        if op == ebpf.JCOND:
            taken = body.value(f"icmp slt i64 {body.value('load i64, ptr %fuel')}, {body.load_field('half')}")
        else:
            taken = condition(body, instruction)
        body.spill()
        if not backward:
            body.emit(f"br i1 {taken}, label %pc{target}, label %pc{pc + 1}")
            return
        back = body.label()
        body.emit(f"br i1 {taken}, label %{back}, label %pc{pc + 1}")
        body.place(back)
        self._charge(pc, str(pc + 1 - target))
        body.emit(f"br label %pc{target}")

    def _call(self, pc: int, instruction: Instruction) -> None:
        body = self.body
        if instruction.src == ebpf.PSEUDO_CALL:
            self._function(pc, pc + 1 + instruction.imm)
        elif pc in self.lookups:
            self._array_lookup(pc, self.lookups[pc])
        elif instruction.imm == TAIL_CALL_HELPER:
            self._tail_call(pc)
        else:
            body.store_field("depth", "%depth")
            self._show_fuel()
            arguments = ", ".join(f"i64 {body.get(number)}" for number in range(1, 6))
            body.store_field("status", str(ASKED))
            call = f"call i64 inttoptr (i64 {self.callbacks.helper} to ptr)"
            got = body.value(f"{call}(ptr %run, i64 {pc}, i64 {instruction.imm}, {arguments})")
            check_status(body)
            self._take_fuel()
            body.set(0, got)

    def _function(self, pc: int, target: int) -> None:
        body = self.body
        deep = body.value(f"icmp ult i64 %depth, {ebpf.MAX_CALL_FRAMES - 1}")
        bad, good = body.unlikely(deep)
        with body.aside(bad):
            self._fault(pc, TOO_DEEP)
        body.place(good)
        self._charge(pc, str(len(self.instructions) + 1))
        self._show_fuel()
        below = body.value("add i64 %depth, 1")
        arguments = ", ".join(f"i64 {body.get(number)}" for number in range(1, 6))
        got = body.value(f"call i64 @f{target}(ptr %run, {arguments}, i64 {below})")
        check_status(body)
        self._take_fuel()
        body.set(0, got)

    def _array_lookup(self, pc: int, found: Array) -> None:
        body = self.body
        stride = found.slot_size * (found.cpus if found.per_cpu else 1)
        key = self.memory.value_at(pc, self.known[pc][2], 2, 0, 4, READ)
        offset = body.value(f"mul i64 {key}, {stride}")
        if found.per_cpu:
            here = body.value(f"mul i64 {body.load_field('cpu')}, {found.slot_size}")
            offset = body.value(f"add i64 {offset}, {here}")
        address = body.value(f"add i64 {offset}, {found.values.address}")
        there = body.value(f"icmp ult i64 {key}, {found.max_entries}")
        body.set(0, body.value(f"select i1 {there}, i64 {address}, i64 0"))

    def _tail_call(self, pc: int) -> None:
        """Go on in another program, in place of this function, if Python finds one."""
        body = self.body
        body.store_field("depth", "%depth")
        self._show_fuel()
        body.store_field("status", str(ASKED))
        call = f"call i64 inttoptr (i64 {self.callbacks.tail_call} to ptr)"
        target = body.value(f"{call}(ptr %run, i64 {pc}, i64 {body.get(2)}, i64 {body.get(3)})")
        check_status(body)
        none, other = body.label(), body.label()
        body.emit(f"br i1 {body.value(f'icmp eq i64 {target}, 0')}, label %{none}, label %{other}")
        body.place(other)
        pointer = body.value(f"inttoptr i64 {target} to ptr")
        got = body.value(f"call i64 {pointer}(ptr %run, i64 0, i64 0, i64 0, i64 0, i64 0, i64 %depth)")
        body.emit(f"ret i64 {got}")
        body.place(none)
