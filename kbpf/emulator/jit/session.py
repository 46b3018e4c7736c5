"""What one run of native code works in: its structure, its table of regions, and Python's view of it.

The interpreter's `Run` over the same memory is made when native code first asks Python for something, or at once where
the program's context or stack is reached through it. Programs that never ask never pay for it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from kbpf.emulator.environment import environment
from kbpf.emulator.interpreter import CONTEXT_ADDRESS, Code, Context, Run, Subject
from kbpf.emulator.jit.buffers import host_address
from kbpf.emulator.jit.layout import ASKED, DECIDED, RAISED, RUNNING, TABLE_SIZE, Entry, Native
from kbpf.emulator.memory import M32, PACKET, REGIONS, STACK, Buffer, Region
from kbpf.emulator.packet import Packet
from kbpf.emulator.semantics import DATA, FUEL, RUN
from kbpf.errors import EmulationFault
from kbpf.isa import ebpf

if TYPE_CHECKING:
    from kbpf.emulator.jit.program import NativeProgram

#: The native program for code, if there may be one.
NativeOf: TypeAlias = "Callable[[Code], NativeProgram | None]"


class NativeRun(Run):
    """The interpreter's view of a run of native code."""

    __slots__ = ("session",)

    def __init__(
        self,
        session: Session,
        subject: Subject,
        code: Code,
        packet: Packet | None,
        data: Any,
        length: int,
        context: Context | None,
    ) -> None:
        self.session = session
        super().__init__(subject, code, packet, data, length, context)

    def call(self, function: int, *arguments: int) -> int:
        if self.session.interpreted:
            return super().call(function, *arguments)
        return self.session.call(self, function, arguments)

    def forget(self, region: Region) -> None:
        super().forget(region)
        self.session.empty(region.number)

    def _stack(self, frames: int) -> None:
        stack = self.session.stack
        if stack is None:
            super()._stack(frames)
        else:
            self.readable[STACK] = self.writable[STACK] = stack
        self.session.show_stack(self.readable[STACK])


class Session:
    """For one run at a time."""

    def __init__(self, program: NativeProgram) -> None:
        #: What runs now, or would: the program that was begun with, or one that it tail called. Only during a run.
        self.program: NativeProgram
        self.code: Code
        self.native = native = Native()
        self.address = ctypes.addressof(native)
        self._table = (Entry * TABLE_SIZE)()
        native.table = ctypes.addressof(self._table)
        self._own_slots = program.slot_array()
        native.network = native.mac = -1
        self.run: NativeRun | None = None
        #: What `Run` is made of.
        self.given: tuple[Subject, Packet | None, Any, int, Context | None] | None = None
        self.pending: BaseException | None = None
        #: The rest of the run is the interpreter's, which gave this.
        self.interpreted = False
        self.result = 0
        #: What the runs over many packets have for a stack, where Python sees it.
        self.stack: bytearray | None = None
        #: What keeps the bytes in their place that native code reaches: by entry of the table, of those that go with a
        #: run; the packet, its whole buffer, and what an atomic operation is carried out on.
        self._kept: dict[int, object] = {}
        self._data: tuple[object, object] = (None, None)
        self._buffer: tuple[object, object] = (None, None)
        self._resolved: object = None
        #: The programs that native code will return into.
        self._entered: list[NativeProgram] = []
        # Values of arrays stay where they are as long as the program does.
        for region in program.regions:
            self._fill(region.number, region)
        self._lasting, self._kept = self._kept, {}

    # The table of regions.

    def _fill(self, number: int, region: Region) -> None:
        """Let native code reach a region by itself, where its place in the table is free."""
        if self._table[number % TABLE_SIZE].number:
            return
        base, held = host_address(region.buffer)
        size = len(region.buffer)
        writable = region.writable and not isinstance(region.buffer, bytes)
        if held is not None:
            self._put(number, base, size if region.readable else 0, size if writable else 0, held)

    def _put(self, number: int, base: int, readable: int, writable: int, held: object) -> None:
        entry = self._table[number % TABLE_SIZE]
        entry.number, entry.base, entry.readable, entry.writable = number, base, readable, writable
        self._kept[number % TABLE_SIZE] = held

    def empty(self, number: int) -> None:
        """Have accesses to a region ask Python again."""
        if self._table[number % TABLE_SIZE].number == number:
            self._clear(number % TABLE_SIZE)

    def _clear(self, at: int) -> None:
        # Native code that guesses the region looks at the sizes only.
        entry = self._table[at]
        entry.number = entry.readable = entry.writable = 0
        self._kept.pop(at, None)

    def meet(self, run: NativeRun, number: int) -> None:
        """Native code has not found a region that is there."""
        region = REGIONS.get(number)
        if region is not None:
            if region.fields is None:
                self._fill(number, region)
        elif number == PACKET:
            buffer = run.readable[PACKET]
            base, held = host_address(buffer)
            if held is not None:
                self._put(PACKET, base, len(buffer), len(buffer) if PACKET in run.writable else 0, held)

    def resolve(self, run: NativeRun, address: int, size: int) -> int:
        """The host's address of memory that may be read and written."""
        buffer, offset = run._writable(address, size)
        run.load(address, size)
        base, held = host_address(buffer)
        if held is None:
            raise EmulationFault(f"invalid write of {size} bytes", address=address)
        self._resolved = held
        return base + offset

    def show_stack(self, stack: Buffer) -> None:
        base, held = host_address(stack)
        self.native.stack = base
        self._put(STACK, base, len(stack), len(stack), held)

    # Runs.

    def begin(
        self,
        program: NativeProgram,
        code: Code,
        subject: Subject,
        packet: Packet | None,
        data: Any,
        length: int,
        context: Context | None,
    ) -> None:
        """Make ready; what native code does then is this run's."""
        native = self.native
        self.program, self.code, self._slots = program, code, self._own_slots
        self._entered.append(program)
        native.slots = ctypes.addressof(self._slots)
        native.fuel, native.half = subject.budget, subject.budget >> 1
        native.slots_valid = native.tail_calls = 0
        native.cpu = environment.cpu
        native.length = length
        self.given = (subject, packet, data, length, context)
        if context is not None or program.escapes:
            data = self.met().state[DATA]
        self._point_at(data, packet)

    def begin_batch(self, program: NativeProgram, code: Code, subject: Subject, network: int, mac: int) -> None:
        """Make ready for packets that native code goes through by itself."""
        native = self.native
        self.program, self.code, self._slots = program, code, self._own_slots
        native.slots = ctypes.addressof(self._slots)
        native.half = subject.budget >> 1
        native.slots_valid = native.tail_calls = 0
        native.cpu = environment.cpu
        native.network, native.mac = network, mac
        self.given = (subject, None, None, 0, None)
        if program.escapes:
            self.stack = bytearray(ebpf.STACK_SIZE * code.frames)
            self.show_stack(self.stack)

    def met(self) -> NativeRun:
        """The interpreter's view."""
        assert self.given is not None
        subject, packet, data, length, context = self.given
        if self.run is not None and data is not None:
            return self.run
        if data is None:
            # One of many packets: perhaps another one than last time, and changed by native code since.
            self._drop_run()
            native = self.native
            packet = subject.packet(
                ctypes.string_at(native.buffer, native.buffer_size), native.length + native.data - native.buffer
            )
            data = packet.data
        self.run = NativeRun(self, subject, self.code, packet, data, length, context)
        if self.given[2] is None:
            self._show_packet(self.run)
        return self.run

    def _show_packet(self, run: NativeRun) -> None:
        """Let Python see what native code has let the program reach of one of many packets."""
        entry = self._table[PACKET]
        if entry.number == PACKET:
            seen = memoryview((ctypes.c_char * entry.readable).from_address(entry.base)).cast("B")
            run.readable[PACKET] = seen
            if entry.writable:
                run.writable[PACKET] = seen

    def _point_at(self, data: Any, packet: Packet | None) -> None:
        native = self.native
        if data is not self._data[0]:
            native.data, held = _address(data)
            native.size = len(data)
            self._data = data, held
        if packet is None:
            native.buffer, native.buffer_size = native.data, native.size
            return
        native.length = packet.length
        if packet.buffer is not self._buffer[0]:
            native.buffer, held = _address(packet.buffer)
            native.buffer_size = len(packet.buffer)
            self._buffer = packet.buffer, held
        native.network = -1 if packet.network is None else packet.network
        native.mac = -1 if packet.mac is None else packet.mac

    def changed(self, run: NativeRun, before: object) -> None:
        """A helper may have moved the packet, whose bytes were in `before`, or changed what the context says."""
        self.native.slots_valid = 0
        if run.state[DATA] is not before:
            self.empty(PACKET)
        self._point_at(run.state[DATA], run._packet)

    def fill_slots(self, run: NativeRun) -> None:
        """Read all of the context's fields that the program asks for at known places, if it may read them all."""
        try:
            for (offset, size), slot in self.program.slots.items():
                value = run.context.load(offset, size)
                if value is None:
                    return
                self._slots[slot] = value
        except EmulationFault:
            # Of a field that is perhaps not reached.
            return
        self.native.slots_valid = 1

    def call(self, run: NativeRun, function: int, arguments: tuple[int, ...]) -> int:
        """Call one of the program's functions for a helper; returns its R0."""
        native, depth = self.native, int(self.native.depth)
        if function not in self.code.functions:
            raise EmulationFault(f"no function starts at instruction {function}")
        if depth + 1 >= ebpf.MAX_CALL_FRAMES:
            raise EmulationFault(f"the call stack of {ebpf.MAX_CALL_FRAMES + 1} frames is too deep")
        native.fuel -= len(self.code.steps)
        if native.fuel < 0:
            run.exhausted()
        native.status = RUNNING
        result = self.program.call(function, self.address, (*arguments, 0, 0, 0, 0, 0)[:5], depth + 1)
        native.depth = depth
        failed, native.status = native.status != RUNNING, ASKED
        if failed:
            self._raise()
        return result

    def tail_call(self, run: NativeRun, code: Code, native_of: NativeOf) -> int:
        """Go on with another program; returns its host address, 0 if there were too many."""
        native = self.native
        if native.tail_calls >= ebpf.MAX_TAIL_CALLS:
            return 0
        native.tail_calls += 1
        run._stack(code.frames)
        native.fuel -= len(code.steps)
        if native.fuel < 0:
            run.exhausted()
        self.code = run.code = code
        program = native_of(code)
        if program is None:
            self._interpret(run, code)
            return 0
        self.program = program
        self._entered.append(program)
        self._slots = program.slot_array()
        native.slots = ctypes.addressof(self._slots)
        native.slots_valid = 0
        return program.main

    def _interpret(self, run: NativeRun, code: Code) -> None:
        self.interpreted = True
        run.state[1], run.state[FUEL] = CONTEXT_ADDRESS, self.native.fuel
        run.tail_calls = self.native.tail_calls
        run._go(0, 0)
        self.result, self.native.status = run.state[0], DECIDED

    def fail(self, failure: BaseException, pc: int) -> None:
        """To be raised when native code has come back."""
        if isinstance(failure, EmulationFault) and failure.pc < 0:
            failure.pc = pc
        self.pending, self.native.status = failure, RAISED

    def finish(self, result: int) -> int:
        """Native code has come back with R0: returns its low 32 bits, or raises what has come up."""
        native, run = self.native, self.run
        if native.status in (RAISED, ASKED):
            self._raise()
        if native.status == DECIDED:
            return self.result & M32
        if run is not None and run.code.frames:
            try:
                run.check_hands()
            except EmulationFault as fault:
                fault.pc = native.ended_at
                raise
        return result & M32

    def _raise(self) -> NoReturn:
        """Raise what has come up, once."""
        failure, self.pending = self.pending, None
        try:
            # What came up on the way to where Python notes it is a signal handler's, and only ctypes has seen it.
            raise failure or KeyboardInterrupt
        finally:
            # The exception has this frame.
            del failure

    def clear(self) -> None:
        """Ready for another run, whatever became of the last one."""
        self.pending, self.interpreted, self.given, self.stack = None, False, None, None
        self.native.status = RUNNING
        self.native.network = self.native.mac = -1
        self._drop_run()
        self._data = self._buffer = None, None
        self._entered.clear()
        # Not there where something came up before the run began.
        self.__dict__.pop("program", None)
        self.__dict__.pop("code", None)

    def _drop_run(self) -> None:
        """Forget the interpreter's view, and what it let native code reach."""
        run, self.run = self.run, None
        for at in list(self._kept):
            self._clear(at)
        self._resolved = None
        if run is not None:
            # The state holds the run: without the ring, all goes at once.
            run.state[RUN] = None
            run.readable.clear()
            run.writable.clear()
            # Code that touches nothing but registers has nothing, but may have been called by other code.
            for held in getattr(run, "held", ()):
                held.drop()


def _address(buffer: Buffer) -> tuple[int, object]:
    """Where a packet's bytes are; a copy where they may only be read, as such are not changed by anybody."""
    address, held = host_address(buffer)
    return (address, held) if held is not None else host_address(bytes(buffer))
