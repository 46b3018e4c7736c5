"""The interpreter: a program linked into steps, and the loop that takes them.

Every program runs here, classic filters too (translated to eBPF as the kernel does). Linking binds each instruction
to a step (see `semantics`); running is ``pc = code[pc](state)`` until a step says that the program has ended.

A run cannot hang: each jump back, call and tail call is charged to a budget with the number of instructions that it
lets run; a program that uses up its budget faults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

from kbpf.backend import Engine
from kbpf.emulator.memory import CONTEXT, M32, M64, PACKET, STACK, Buffer, Fields, MutableBuffer, Space
from kbpf.emulator.packet import Packet
from kbpf.emulator.semantics import DATA, FUEL, RUN, State, Step, factory, variant
from kbpf.errors import EmulationFault
from kbpf.isa import cbpf, ebpf
from kbpf.isa.ebpf import Instruction

if TYPE_CHECKING:
    from kbpf.emulator.jit.program import NativeProgram

#: Instructions that one run may take, about a second's worth.
BUDGET = 1 << 24

CONTEXT_ADDRESS = CONTEXT << 32
PACKET_ADDRESS = PACKET << 32
FIRST_FRAME = STACK << 32 | ebpf.STACK_SIZE

#: bpf_tail_call's id: a call that does not come back.
TAIL_CALL_HELPER = 12

# What a step returns instead of an index; SWITCHED: go on in another program, at the run's `resume`.
ENDED, SWITCHED = -1, -2

#: A helper takes the run and R1 to R5 and gives R0; negative values are made unsigned.
HelperFunction: TypeAlias = Callable[["Run", int, int, int, int, int], int]
#: What a classic load gives: a number, or None to end the program with A.
AncillaryFunction: TypeAlias = Callable[["Run", State], "int | None"]


class Loaded(Protocol):
    """A loaded program, as far as what runs of it later must know it."""

    @property
    def budget(self) -> int: ...

    @property
    def maps(self) -> Sequence[object]: ...

    @property
    def attach_type(self) -> int: ...


def _no_program() -> None:
    return None


class Linked(NamedTuple):
    """What a program was linked from: `link`'s arguments."""

    instructions: Sequence[Instruction]
    constants: Mapping[int, int]
    helpers: Mapping[int, HelperFunction]
    tail_target: Callable[[Run, int, int], Code | None] | None
    ancillary: Mapping[int, AncillaryFunction]


class Code:
    """A linked program."""

    __slots__ = ("engine", "frames", "functions", "linked", "longest", "native", "program", "steps", "work")

    def __init__(self, steps: list[Step], functions: frozenset[int], frames: int, linked: Linked | None = None) -> None:
        self.steps = steps
        #: The loaded program that this is of, if it is one and is still there.
        self.program: Callable[[], Loaded | None] = _no_program
        #: What it was made of; None for code that is watched, which only the interpreter runs.
        self.linked = linked
        #: What runs it, the same in native code, and instructions that ran without (see `kbpf.emulator.engines`).
        self.engine: Engine = "auto"
        self.native: NativeProgram | None = None
        self.work = 0
        #: Instructions that a run takes at most, 0 where nobody has asked yet.
        self.longest = 0
        #: Where functions start, other than the main one.
        self.functions = functions
        #: Stack frames that a run may need; 0 if nothing but registers and the packet is touched.
        self.frames = frames


class Context(Fields, Protocol):
    """What R1 points to."""

    def show(self, run: Run) -> None:
        """Put the packet into the run's regions where programs reach it directly: at first and when it has moved."""
        ...


class Held(Protocol):
    """What a helper has given out until the program gives it back."""

    def drop(self) -> None:
        """The program has ended in a fault."""
        ...


class Subject(Protocol):
    """What is run: a program, as far as its runs must know it."""

    @property
    def budget(self) -> int: ...

    def packet(self, data: bytes, length: int) -> Packet:
        """The packet, where the run was given only its bytes."""
        ...

    def context(self, packet: Packet) -> Context: ...


class Run(Space):
    """One run of a program over one packet: what it reaches and how deep it is in calls.

    `subject` knows what the packet and the context are; it is asked when the program first needs them.
    """

    __slots__ = (
        "_context", "_packet", "base", "code", "frames", "held", "length", "lock", "resume", "state", "subject",
        "tail_calls",
    )  # fmt: skip

    def __init__(
        self,
        subject: Subject,
        code: Code,
        packet: Packet | None,
        data: bytes,
        length: int = 0,
        context: Context | None = None,
    ) -> None:
        self.subject = subject
        self.code = code
        self._packet = packet
        self.length = length
        readable: dict[int, Buffer]
        writable: dict[int, MutableBuffer]
        self.readable = readable = {}
        self.writable = writable = {}
        self.state: State = [0, CONTEXT_ADDRESS, 0, 0, 0, 0, 0, 0, 0, 0, FIRST_FRAME, self, readable, writable, data,
                             subject.budget]  # fmt: skip
        if code.frames:
            self._context = context
            if context is not None:
                context.show(self)
            #: Where to go on after the function, in which program, its `base`, and R6 to R9.
            self.frames: list[tuple[int, Code, int, int, int, int, int]] = []
            #: How many frames there were when `code` began: it may have been tail called by a function.
            self.base = 0
            self.tail_calls = 0
            #: The address of the bpf_spin_lock that is held.
            self.lock = 0
            #: What the program must give back before it ends.
            self.held: tuple[Held, ...] = ()
            self._stack(code.frames)

    @property
    def packet(self) -> Packet:
        if self._packet is None:
            self._packet = self.subject.packet(self.state[DATA], self.length)
        return self._packet

    @property
    def context(self) -> Context:
        if self._context is None:
            self._context = self.subject.context(self.packet)
            self._context.show(self)
        return self._context

    def fields(self, number: int) -> Fields | None:
        return self.context if number == CONTEXT else super().fields(number)

    def show(self, buffer: MutableBuffer, writable: bool, before: int = 0) -> None:
        """What programs reach of the packet from `PACKET_ADDRESS` on; packet loads begin `before` bytes later."""
        self.readable[PACKET] = buffer
        self.state[DATA] = buffer[before:] if before else buffer
        if writable:
            self.writable[PACKET] = buffer

    def _stack(self, frames: int) -> None:
        self.readable[STACK] = self.writable[STACK] = bytearray(ebpf.STACK_SIZE * frames)

    def load_relative(self, k: int, size: int) -> int:
        """A packet load at an offset from `cbpf.LL_OFF` on; -1 where there is nothing."""
        packet = self.packet
        if k >= cbpf.NET_OFF:
            base, k = packet.network, k - cbpf.NET_OFF
        elif k >= cbpf.LL_OFF:
            base, k = packet.mac, k - cbpf.LL_OFF
        else:
            return -1
        if base is None or base + k + size > len(packet.buffer):
            return -1
        return int.from_bytes(packet.buffer[base + k : base + k + size], "big")

    def exhausted(self) -> None:
        raise EmulationFault("the program runs too long: its instruction budget is used up")

    def enter(self, after: int) -> None:
        """Begin a function's frame; `after` is where to go on when it returns."""
        state, frames = self.state, self.frames
        if len(frames) - self.base + 1 >= ebpf.MAX_CALL_FRAMES:
            raise EmulationFault(f"the call stack of {ebpf.MAX_CALL_FRAMES + 1} frames is too deep")
        frames.append((after, self.code, self.base, *state[6:10]))
        state[10] = STACK << 32 | ebpf.STACK_SIZE * (len(frames) + 1)
        state[FUEL] -= len(self.code.steps)
        if state[FUEL] < 0:
            self.exhausted()

    def leave(self) -> int:
        """End a frame; returns where to go on."""
        if not self.frames:
            self.check_hands()
            return ENDED
        state = self.state
        after, code, self.base, *state[6:10] = self.frames.pop()
        state[10] = STACK << 32 | ebpf.STACK_SIZE * (len(self.frames) + 1)
        if code is self.code or after == ENDED:
            self.code = code
            return after
        self.code, self.resume = code, after
        return SWITCHED

    def check_hands(self) -> None:
        """The program ends: fault if it has not given back what helpers have handed out."""
        if self.lock or self.held:
            raise EmulationFault("the program ends with a lock, a socket or a reserved record in its hands")

    def call(self, function: int, *arguments: int) -> int:
        """Call one of the program's functions from a helper; returns its R0."""
        if function not in self.code.functions:
            raise EmulationFault(f"no function starts at instruction {function}")
        state, depth = self.state, len(self.frames)
        self.enter(ENDED)
        state[1 : 1 + len(arguments)] = arguments
        self._go(function, depth)
        return int(state[0])

    def tail_call(self, code: Code) -> bool:
        """Go on with another program when the current step has returned; False when there were too many.

        It takes the place of the current function: when it ends, the function's caller goes on.
        """
        if self.tail_calls >= ebpf.MAX_TAIL_CALLS:
            return False
        self.tail_calls += 1
        state, depth = self.state, len(self.frames)
        callers = self.readable[STACK][: ebpf.STACK_SIZE * depth]
        self._stack(depth + code.frames)
        self.writable[STACK][: len(callers)] = callers
        self.code, self.base, self.resume = code, depth, 0
        state[1] = CONTEXT_ADDRESS
        state[FUEL] -= len(code.steps)
        if state[FUEL] < 0:
            self.exhausted()
        return True

    def execute(self, start: int = 0) -> int:
        """Run to the end, from the beginning or from one of the program's functions; returns the low 32 bits of R0."""
        state, frames = self.state, self.code.frames
        try:
            if frames:
                self._go(start, 0)
            else:
                self._take(0)
            return int(state[0]) & M32
        finally:
            # The state holds the run: without the ring, all goes at once.
            state[RUN] = None
            for held in self.held if frames else ():
                held.drop()

    def _go(self, pc: int, depth: int) -> None:
        """Run until there are no more than `depth` frames and the program or function has ended."""
        while True:
            pc = self._take(pc)
            if pc == ENDED:
                if len(self.frames) <= depth:
                    return
                # A program without functions, tail called by a function.
                pc = self.leave()
            if pc == SWITCHED:
                pc = self.resume

    def _take(self, pc: int) -> int:
        steps, state = self.code.steps, self.state
        try:
            while pc >= 0:
                pc = steps[pc](state)
        except EmulationFault as fault:
            if fault.pc < 0:
                fault.pc = pc
            raise
        except RecursionError:
            raise EmulationFault("callbacks are nested too deep", pc) from None
        return pc


def link(
    instructions: Sequence[Instruction],
    constants: Mapping[int, int] | None = None,
    helpers: Mapping[int, HelperFunction] | None = None,
    tail_target: Callable[[Run, int, int], Code | None] | None = None,
    ancillary: Mapping[int, AncillaryFunction] | None = None,
) -> Code:
    """Bind the instructions of a checked program.

    `constants` are the values of 64-bit immediate loads that refer to something, by index; `helpers` the functions that
    calls reach, by id; `tail_target` finds the program that bpf_tail_call's map and index name; `ancillary` is what
    classic absolute loads reach by offset (classic programs only). Instructions must exist and jumps must stay in the
    program: `checks.check` has seen to that.
    """
    constants, helpers, ancillary = constants or {}, helpers or {}, ancillary or {}
    functions = frozenset(
        pc + 1 + imm
        for pc, (opcode, _, src, _, imm) in enumerate(instructions)
        if (opcode == ebpf.JMP | ebpf.CALL and src == ebpf.PSEUDO_CALL)
        or (opcode == ebpf.LD_IMM64 and src == ebpf.PSEUDO_FUNC)
    )
    end = len(instructions)
    plain = all(
        opcode & 7 in (ebpf.LD, ebpf.ALU, ebpf.ALU64, ebpf.JMP, ebpf.JMP32) and opcode != ebpf.JMP | ebpf.CALL
        for opcode, *_ in instructions
    )
    exit = _end if plain and not functions else _exit
    steps: list[Step] = []
    for pc, instruction in enumerate(instructions):
        opcode, dst, src, off, imm = instruction
        if opcode == ebpf.LD_IMM64:
            value = constants.get(pc, imm & M32 | (instructions[pc + 1].imm & M32) << 32)
            steps.append(_constant(dst, value, pc + 2))
        elif opcode == ebpf.JMP | ebpf.EXIT:
            steps.append(exit)
        elif opcode == ebpf.JMP | ebpf.CALL:
            if src == ebpf.PSEUDO_CALL:
                steps.append(_call(pc + 1, pc + 1 + imm))
            elif imm == TAIL_CALL_HELPER and tail_target is not None:
                steps.append(_tail_call(tail_target, pc + 1))
            else:
                steps.append(_helper(helpers[imm], pc + 1))
        elif ancillary and opcode & 0xE7 == ebpf.LD | ebpf.ABS and imm & M32 >= cbpf.AD_OFF:
            steps.append(_ancillary(ancillary[(imm & M32) - cbpf.AD_OFF], pc + 1, end))
        elif opcode == 0:
            steps.append(_unreachable)
        else:
            kind = opcode & 7
            jump = imm if opcode == ebpf.JMP32 | ebpf.JA else off
            make = factory(*variant(instruction), kind in (ebpf.JMP, ebpf.JMP32) and jump < 0)
            assert make is not None
            wide = kind in (ebpf.ALU64, ebpf.JMP, ebpf.ST)
            steps.append(make(dst, src, off, imm & (M64 if wide else M32), pc + 1, pc + 1 + jump, end))
    # Where a packet load goes that finds nothing.
    steps.append(exit)
    linked = Linked(instructions, constants, helpers, tail_target, ancillary)
    return Code(steps, functions, ebpf.MAX_CALL_FRAMES if functions else int(not plain), linked)


def _constant(dst: int, value: int, next: int) -> Step:
    def step(r: State) -> int:
        r[dst] = value
        return next

    return step


def _end(r: State) -> int:
    return ENDED


def _exit(r: State) -> int:
    after: int = r[RUN].leave()
    return after


def _unreachable(r: State) -> int:
    raise EmulationFault("jump into the middle of a 64-bit immediate load")


def _call(next: int, target: int) -> Step:
    def step(r: State) -> int:
        r[RUN].enter(next)
        return target

    return step


def _helper(function: HelperFunction, next: int) -> Step:
    def step(r: State) -> int:
        r[0] = function(r[RUN], r[1], r[2], r[3], r[4], r[5]) & M64
        return next

    return step


def _ancillary(function: AncillaryFunction, next: int, end: int) -> Step:
    def step(r: State) -> int:
        value = function(r[RUN], r)
        if value is None:
            return end
        r[0] = value
        return next

    return step


def _tail_call(target: Callable[[Run, int, int], Code | None], next: int) -> Step:
    def step(r: State) -> int:
        run: Run = r[RUN]
        code = target(run, r[2], r[3] & M32)
        return SWITCHED if code is not None and run.tail_call(code) else next

    return step
