"""What native code calls back for: accesses that its table says nothing of, helpers, ancillary words, and faults.

Each gets the run's structure and the instruction's index. What goes wrong is kept in the session, whose status makes
native code return; nothing may be raised through it.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from kbpf.emulator import engines
from kbpf.emulator.jit.access import LOAD, READ, STORE
from kbpf.emulator.jit.emit import EXHAUSTED, Callbacks
from kbpf.emulator.jit.layout import ASKED, RUNNING
from kbpf.emulator.memory import CONTEXT, M32, M64
from kbpf.emulator.semantics import DATA
from kbpf.errors import EmulationFault
from kbpf.isa import ebpf
from kbpf.isa.translate import REG_A, REG_X
from kbpf.uapi.enums import HELPERS

if TYPE_CHECKING:
    from kbpf.emulator.jit.session import NativeRun, Session

#: Sessions by the address of their structure, as long as the programs that own them.
SESSIONS: WeakValueDictionary[int, Session] = WeakValueDictionary()

#: Helpers that leave the packet and what the context says of it as they are.
QUIET = frozenset(
    HELPERS[name]
    for name in ("map_lookup_elem", "map_update_elem", "map_delete_elem", "ktime_get_ns", "get_prandom_u32",
                 "get_smp_processor_id", "trace_printk")
)  # fmt: skip


def _guarded(session: Session, pc: int, action: Callable[[NativeRun], int]) -> int:
    native = session.native
    try:
        result = action(session.met()) & M64
        # Last: until then, native code would stop where an exception comes up outside of this.
        if native.status == ASKED:
            native.status = RUNNING
        return result
    except RecursionError:
        session.fail(EmulationFault("callbacks are nested too deep", pc), pc)
    except BaseException as failure:
        session.fail(failure, pc)
    return 0


def _access(address_of_run: int, pc: int, kind: int, address: int, size: int, value: int) -> int:
    session = SESSIONS[address_of_run]

    def action(run: NativeRun) -> int:
        number, result = address >> 32, 0
        if kind == LOAD:
            if number == CONTEXT and not session.native.slots_valid:
                session.fill_slots(run)
            result = run.load(address, size)
        elif kind == STORE:
            run.store(address, size, value)
            if number == CONTEXT:
                session.native.slots_valid = 0
        elif kind == READ:
            result = int.from_bytes(run.read(address, size), sys.byteorder)
        else:
            return session.resolve(run, address, size)
        session.meet(run, number)
        return result

    return _guarded(session, pc, action)


def _helper(address_of_run: int, pc: int, number: int, *arguments: int) -> int:
    session = SESSIONS[address_of_run]

    def action(run: NativeRun) -> int:
        before = run.state[DATA]
        result = session.program.helpers[number](run, *arguments)
        if number not in QUIET:
            session.changed(run, before)
        return result

    return _guarded(session, pc, action)


def _ancillary(address_of_run: int, pc: int, offset: int, a: int, x: int) -> int:
    """-1 where the word is not there, which ends the program."""
    session = SESSIONS[address_of_run]

    def action(run: NativeRun) -> int:
        run.state[REG_A], run.state[REG_X] = a, x
        value = session.program.ancillary[offset](run, run.state)
        return M64 if value is None else value

    return _guarded(session, pc, action)


def _tail_call(address_of_run: int, pc: int, map: int, index: int) -> int:
    session = SESSIONS[address_of_run]

    def action(run: NativeRun) -> int:
        find = session.program.tail_target
        code = None if find is None else find(run, map, index & M32)
        return 0 if code is None else session.tail_call(run, code, engines.native_of)

    return _guarded(session, pc, action)


def _fault(address_of_run: int, pc: int, what: int) -> None:
    session = SESSIONS[address_of_run]

    def action(run: NativeRun) -> int:
        if what == EXHAUSTED:
            run.exhausted()
        raise EmulationFault(f"the call stack of {ebpf.MAX_CALL_FRAMES + 1} frames is too deep")

    _guarded(session, pc, action)


_U64, _POINTER = ctypes.c_uint64, ctypes.c_void_p
_KEPT: list[Any] = [
    ctypes.CFUNCTYPE(_U64, _POINTER, *[_U64] * 5)(_access),
    ctypes.CFUNCTYPE(_U64, _POINTER, *[_U64] * 7)(_helper),
    ctypes.CFUNCTYPE(_U64, _POINTER, *[_U64] * 4)(_ancillary),
    ctypes.CFUNCTYPE(_U64, _POINTER, *[_U64] * 3)(_tail_call),
    ctypes.CFUNCTYPE(None, _POINTER, *[_U64] * 2)(_fault),
]
CALLBACKS = Callbacks(*(ctypes.cast(function, _POINTER).value or 0 for function in _KEPT))
