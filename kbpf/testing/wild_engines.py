"""Run wild programs on both engines: native code must end as the interpreter does, and leave the same behind.

Each program is run by native code in a copy of the process (fork), and by the interpreter in the process itself, from
one state: so all can be compared, addresses too, and a crash takes only the copy along. Part of the copies run under
guard (`kbpf.testing.guarded`).

What Linux leaves undefined, and lets no program see, is defined here for the interpreter as it is for native code:
functions and programs that were tail called begin with zeroes in their registers and on their stack, and calls leave
R1 to R5 alone. One thing is left: native code keeps a frame to itself that no pointer leads to, where a program that
forges an address of the stack does not find it. Such a run is compared again with all frames in sight.
"""

from __future__ import annotations

import faulthandler
import gc
import itertools
import os
import pickle
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from random import Random
from typing import Any
from unittest import mock

from kbpf.emulator import engines
from kbpf.emulator.environment import environment
from kbpf.emulator.interpreter import CONTEXT_ADDRESS, Code, Run
from kbpf.emulator.jit import emit, engine
from kbpf.emulator.memory import REGIONS, STACK
from kbpf.isa import ebpf
from kbpf.testing import guarded
from kbpf.testing.generate_wild import Wild
from kbpf.testing.native import level_for
from kbpf.testing.wild import Runner

#: One in so many programs is run under guard.
_GUARDED = 5


class DefinedRun(Run):
    """A run in which nothing is undefined."""

    __slots__ = ("arguments",)

    def __init__(self, *given: Any, **named: Any) -> None:
        #: R1 to R5 of each caller.
        self.arguments: list[list[int]] = []
        super().__init__(*given, **named)

    def enter(self, after: int) -> None:
        self.arguments.append(self.state[1:6])
        super().enter(after)
        state, end = self.state, ebpf.STACK_SIZE * (len(self.frames) + 1)
        state[0], state[6:10] = 0, (0, 0, 0, 0)
        self.writable[STACK][end - ebpf.STACK_SIZE : end] = bytes(ebpf.STACK_SIZE)

    def leave(self) -> int:
        after = super().leave()
        if self.arguments:
            self.state[1:6] = self.arguments.pop()
        return after

    def call(self, function: int, *arguments: int) -> int:
        return super().call(function, *(*arguments, 0, 0, 0, 0, 0)[:5])

    def tail_call(self, code: Code) -> bool:
        switched = super().tail_call(code)
        if switched:
            self.state[:10] = 0, CONTEXT_ADDRESS, *[0] * 8
        return switched


@contextmanager
def repeatable() -> Iterator[None]:
    """Nothing is read from outside: clocks count, and all numbers are the same in a copy of the process."""
    now, pid_tgid = itertools.count(1 << 50, 1000), environment.pid_tgid()
    count = partial(next, now)
    with ExitStack() as stack:
        for name in ("clock", "real_clock", "tai_clock"):
            stack.enter_context(mock.patch.object(environment, name, count))
        # Those of the random module are others in each copy.
        stack.enter_context(mock.patch.object(environment, "random32", partial(Random("wild").getrandbits, 32)))
        stack.enter_context(mock.patch.object(environment, "pid_tgid", lambda: pid_tgid))
        yield


class Engines:
    """Runs wild programs on both."""

    def __init__(self, stack: ExitStack) -> None:
        stack.enter_context(repeatable())
        stack.enter_context(mock.patch.object(engines, "Run", DefinedRun))
        self.runner = Runner(stack)
        # Loads LLVM, which the copies of the process then have.
        engine.Compiled("define i64 @f0() {\nret i64 0\n}")

    def compare(
        self, fd: int, wild: Wild, number: int, before: Callable[[], object] = lambda: None
    ) -> tuple[tuple[Any, ...], bool]:
        """Run on both; returns how the interpreter ended, before whose run `before` is called, and whether the program
        forges addresses of the stack. `AssertionError` where they differ otherwise."""
        prepare: list[AbstractContextManager[object]] = [level_for(number)]
        if number % _GUARDED == 0:
            prepare.append(guarded.guarded())
        native, interpreted = self._both(fd, wild, prepare, before)
        forges = native != interpreted and _forges(wild)
        if native != interpreted and not forges:
            raise AssertionError(_differences(native, interpreted))
        ending: tuple[Any, ...] = interpreted[0]
        return ending, forges

    def _both(
        self,
        fd: int,
        wild: Wild,
        prepare: Sequence[AbstractContextManager[object]],
        before: Callable[[], object] = lambda: None,
    ) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """What native code ends with, and the interpreter."""
        code = self.runner.backend.program(fd).code

        def native() -> tuple[Any, ...]:
            code.engine = "jit"
            with ExitStack() as stack:
                for context in prepare:
                    stack.enter_context(context)
                return self._run(fd, wild)

        # What earlier programs have left for the garbage collector is not to go in one of them only.
        gc.disable()
        try:
            found = in_copy(native)
            code.engine = "interpreter"
            before()
            return found, self._run(fd, wild)
        finally:
            gc.enable()

    def _run(self, fd: int, wild: Wild) -> tuple[Any, ...]:
        return self.runner.run(fd, wild), memory()


def memory() -> dict[int, int]:
    """A checksum of what is in each region, by number."""
    regions = {number: region.buffer for number, region in sorted(REGIONS.items()) if len(region.buffer)}
    return {number: zlib.crc32(buffer) for number, buffer in regions.items()}


def _forges(wild: Wild) -> bool:
    """Whether engines that have run nothing else differ, but not where all frames are in sight."""
    ways: tuple[AbstractContextManager[object], ...] = (
        nullcontext(),
        mock.patch.object(emit, "stack_escapes", lambda *_: True),
    )
    same = []
    for way in ways:
        with ExitStack() as stack:
            fresh = Engines(stack)
            fd = fresh.runner.load(wild)
            stack.callback(fresh.runner.backend.close, fd)
            native, interpreted = fresh._both(fd, wild, [way])
            same.append(native == interpreted)
    return same == [False, True]


def _differences(native: tuple[Any, ...], interpreted: tuple[Any, ...]) -> str:
    if len(native) != len(interpreted) or native[0] != interpreted[0]:
        return f"native code: {native[0]}\ninterpreter: {interpreted[0]}"
    numbers = [n for n in native[1] | interpreted[1] if native[1].get(n) != interpreted[1].get(n)]
    return f"both end in {native[0]}, but leave something else in the regions {[hex(n) for n in numbers]}"


def in_copy(action: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
    """What an action gives in a copy of this process, whose end is told, too."""
    # Its thread would not be there, which it waits for when it is asked again.
    faulthandler.cancel_dump_traceback_later()
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.close(reader)
            with os.fdopen(writer, "wb") as file:
                try:
                    file.write(pickle.dumps(action()))
                    status = 0
                except BaseException:
                    file.write(pickle.dumps(((traceback.format_exc(),),)))
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        got = file.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    found: tuple[Any, ...] = pickle.loads(got) if got else ((f"the process ended with {status}",),)
    return found
