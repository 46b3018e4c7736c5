"""A run, step by step: what each instruction did to registers and memory.

The program is run to its end first, so that what a step shows does not change any more. What a helper touched is not
shown.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

from kbpf.emulator import test_runs
from kbpf.emulator.interpreter import SWITCHED, Code, Run
from kbpf.emulator.memory import CONTEXT, FLOW_KEYS, M32, PACKET, STACK
from kbpf.emulator.program import Program
from kbpf.emulator.semantics import RUN, State, Step
from kbpf.errors import EmulationFault
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.runs import MemoryAccess, TraceStep

_SIZES = {ebpf.B: 1, ebpf.H: 2, ebpf.W: 4, ebpf.DW: 8}
_REGIONS = {CONTEXT: "context", STACK: "stack", PACKET: "packet", FLOW_KEYS: "flow_keys"}


def trace(program: Program, data: bytes, context: bytes) -> Iterator[TraceStep]:
    """The steps of one test run; raises what the run raises, an `EmulationFault` after the steps that led to it."""
    watch = _Watch()
    watched = copy.copy(program)
    watched.code = watch.of(program.code, program)
    fault = None
    try:
        test_runs.run(watched, data, context)
    except EmulationFault as error:
        fault = error
    return _shown(watch.taken, fault)


class _Watch:
    """The steps that were taken, and code that notes them down."""

    def __init__(self) -> None:
        self.taken: list[TraceStep] = []
        self._watched: dict[Code, Code] = {}

    def of(self, code: Code, program: Program) -> Code:
        """The code of a program, watched."""
        if code not in self._watched:
            instructions = program.spec.instructions
            steps = [
                self._recorded(step, pc, instructions[pc], program.id) if pc < len(instructions) else step
                for pc, step in enumerate(code.steps)
            ]
            self._watched[code] = Code(steps, code.functions, code.frames)
        return self._watched[code]

    def _recorded(self, step: Step, pc: int, instruction: Instruction, program: int) -> Step:
        taken = self.taken

        def recorded(r: State) -> int:
            before, depth = r[: ebpf.REGISTERS], len(getattr(r[RUN], "frames", ()))
            accesses = _accesses(r, instruction)
            following = step(r)
            changed = {number: r[number] for number in range(ebpf.REGISTERS) if r[number] != before[number]}
            taken.append(TraceStep(pc, instruction, changed, accesses, program, depth))
            if following == SWITCHED:
                self._follow(r[RUN])
            return following

        return recorded

    def _follow(self, run: Run) -> None:
        """Watch what the run goes on in: a program that was tail called."""
        program = run.code.program()
        if isinstance(program, Program):
            run.code = self.of(run.code, program)


def _shown(taken: list[TraceStep], fault: EmulationFault | None) -> Iterator[TraceStep]:
    yield from taken
    if fault is not None:
        raise fault


def _accesses(r: State, instruction: Instruction) -> tuple[MemoryAccess, ...]:
    opcode, dst, src, off, imm = instruction
    kind, size = opcode & 7, _SIZES[opcode & 0x18]
    if kind == ebpf.LD and opcode != ebpf.LD_IMM64:
        index = imm if opcode & 0xE0 == ebpf.ABS else r[src] + imm
        return (MemoryAccess("packet", index & M32, size, False),)
    if kind not in (ebpf.LDX, ebpf.ST, ebpf.STX):
        return ()
    atomic = kind == ebpf.STX and opcode & 0xE0 == ebpf.ATOMIC
    loads = kind == ebpf.LDX or (atomic and imm == ebpf.LOAD_ACQ)
    address = r[src if loads else dst] + off
    region = _REGIONS.get(address >> 32, "map")
    written = (False,) if loads else (False, True) if atomic and imm != ebpf.STORE_REL else (True,)
    return tuple(MemoryAccess(region, address & M32, size, writes) for writes in written)
