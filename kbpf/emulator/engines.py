"""What runs a program: the interpreter, or native code once the program has earned it.

Compiling takes a hundredth of a second, and loading llvmlite a tenth: a program whose runs have taken as many
instructions as the interpreter does in that time is compiled, where the `jit` extra is installed.
"""

from __future__ import annotations

import importlib.util
import threading
import warnings
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from kbpf.backend import ENGINES, Engine
from kbpf.emulator.checks import jump_target
from kbpf.emulator.interpreter import Code, Context, Run, Subject
from kbpf.emulator.packet import Packet
from kbpf.emulator.semantics import FUEL
from kbpf.errors import EmulationWarning, MissingDependencyError
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction

if TYPE_CHECKING:
    from kbpf.emulator.jit.batch import NativeBatch, Start
    from kbpf.emulator.jit.program import NativeProgram
    from kbpf.emulator.jit.testrun import NativeTestRuns
    from kbpf.emulator.program import Program

#: Instructions in the interpreter that are worth compiling a program of up to `_USUAL` instructions; as often more for
#: one that has more.
WORTH, _USUAL = 200_000, 200
#: Instructions that take as long as what the interpreter does for a run besides them.
_RUN = 40

#: What is never followed by the next instruction.
_NO_FALL = (ebpf.JMP | ebpf.EXIT, ebpf.JMP | ebpf.JA, ebpf.JMP32 | ebpf.JA)
_COMMAND = "pip install 'kbpf[jit]'"
# A signal handler may come to this while the program that it interrupts is being compiled.
_lock = threading.RLock()


def execute(
    code: Code,
    subject: Subject,
    packet: Packet | None,
    data: Any,
    length: int = 0,
    context: Context | None = None,
) -> int:
    """Run to the end; returns the low 32 bits of R0. Raises `EmulationFault`."""
    if code.engine != "interpreter":
        native = code.native or (native_of(code) if code.engine == "jit" or has_earned(code) else None)
        if native is not None:
            return native.execute(code, subject, packet, data, length, context)
    run = Run(subject, code, packet, data, length, context)
    try:
        return run.execute()
    finally:
        code.work += work_of(code) + subject.budget - run.state[FUEL]


def work_of(code: Code) -> int:
    """What a run takes at most, in instructions, as long as it does not go back.

    That is far less than the program has where it is a long list of hosts.
    """
    if not code.longest:
        code.longest = _RUN + _longest([] if code.linked is None else code.linked.instructions)
    return code.longest


def _longest(instructions: Sequence[Instruction]) -> int:
    """Instructions on the longest way through a program that never goes back."""
    behind = [0] * (len(instructions) + 2)
    for pc in range(len(instructions) - 1, -1, -1):
        instruction = instructions[pc]
        opcode, target = instruction.opcode, jump_target(pc, instruction)
        taken = behind[target] if target is not None and target > pc else 0
        following = 0 if opcode in _NO_FALL else behind[pc + (2 if opcode == ebpf.LD_IMM64 else 1)]
        behind[pc] = 1 + max(taken, following)
    return behind[0]


def has_earned(code: Code, runs: int = 0) -> bool:
    """Whether compiling it is worth the while, after what has run and with so many `runs` that are to come."""
    work = code.work + runs * work_of(code)
    return work > WORTH and work > WORTH * len(code.steps) // _USUAL


def check(engine: Engine) -> None:
    """Raise `MissingDependencyError` if native code is asked for, and what makes it is not installed.

    Raises `ValueError` for what is no engine.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine: {engine!r} is none of {', '.join(ENGINES)}")
    if engine == "jit" and not _found():
        raise MissingDependencyError(f"llvmlite, which makes native code, is not installed: {_COMMAND}")


def native_of(code: Code) -> NativeProgram | None:
    """The code in native code, compiled when it is first asked for; None where the interpreter must run it."""
    if code.native is None and _installed():
        from kbpf.emulator.jit.program import compiled, supports

        with _lock:
            if code.native is None and code.engine != "interpreter":
                if supports(code):
                    code.native = compiled(code)
                else:
                    code.engine = "interpreter"
    return code.native


def batch_of(code: Code, subject: Subject, start: Start, network: int | None, mac: int | None) -> NativeBatch | None:
    """A classic filter's loops over packets in native code; None where the interpreter must run it."""
    if not _installed():
        return None
    from kbpf.emulator.jit.batch import NativeBatch

    places = (-1 if place is None else place for place in (network, mac))
    with _lock:
        return NativeBatch(code, subject, start, *places)


def test_runs_of(program: Program, count: int) -> NativeTestRuns | None:
    """A program's test runs over `count` packets in native code; None where each must be run by itself."""
    code = program.code
    if code.engine == "interpreter" or code.linked is None:
        return None
    if code.engine == "auto" and not has_earned(code, count):
        return None
    if program.test_runs is None and _installed():
        from kbpf.emulator.jit.testrun import native_test_runs

        with _lock:
            program.test_runs = native_test_runs(program) or False
    return program.test_runs or None


def _found() -> bool:
    return importlib.util.find_spec("llvmlite") is not None


@cache
def _installed() -> bool:
    """Whether llvmlite is there; says so once where a program would have been compiled."""
    found = _found()
    if not found:
        warnings.warn(
            f"llvmlite is not installed, so that emulated programs stay in the interpreter: {_COMMAND}",
            EmulationWarning,
            stacklevel=2,
        )
    return found
