"""A program in native code: compiled from what the interpreter linked, and the sessions that it runs in."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from kbpf.emulator.interpreter import Code, Context, Linked, Subject
from kbpf.emulator.jit import emit
from kbpf.emulator.jit.access import Lasting
from kbpf.emulator.jit.buffers import host_address
from kbpf.emulator.jit.callbacks import CALLBACKS, SESSIONS
from kbpf.emulator.jit.engine import Compiled
from kbpf.emulator.jit.session import Session
from kbpf.emulator.maps.array import Array
from kbpf.emulator.memory import REGIONS, Region
from kbpf.emulator.packet import Packet
from kbpf.isa import cbpf

_FUNCTION = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p, *[ctypes.c_uint64] * 6)


class NativeProgram:
    """Runs what the interpreter's `Code` runs, with the same results; see `supports`.

    It does not hold the code, which holds it.
    """

    def __init__(self, code: Code, source: emit.Source, compiled: Compiled) -> None:
        """`source` is what `compiled` was made of, and code's."""
        assert code.linked is not None
        linked = code.linked
        self.helpers = linked.helpers
        self.tail_target = linked.tail_target
        self.ancillary = {cbpf.AD_OFF + offset: load for offset, load in linked.ancillary.items()}
        self.compiled = compiled
        #: The context's fields that it reads at known places, by (offset, size), and whether Python sees its stack.
        self.slots, self.escapes = source.slots, source.escapes
        self.main = compiled.address("f0")
        self._main = _FUNCTION(self.main)
        self._large = source.large
        self._functions: dict[int, Callable[..., int]] = {}
        #: Memory that stays where it is as long as the program, whose addresses are in its code: values of arrays.
        self.regions, self._lasting = _lasting(linked), source.lasting
        self._free: list[Session] = []

    def within(self, text: str) -> str:
        """What loops go around: the text that this was compiled of, or a call where compiling that again takes long."""
        return emit.compiled(self.main) if self._large else text

    def slot_array(self) -> Any:
        return (ctypes.c_uint64 * max(len(self.slots), 1))()

    def call(self, function: int, run: int, arguments: tuple[int, ...], depth: int) -> int:
        """Call one of its functions, that starts at an instruction, with five arguments; returns R0."""
        if function not in self._functions:
            self._functions[function] = _FUNCTION(self.compiled.address(f"f{function}"))
        return self._functions[function](run, *arguments, depth)

    def execute(
        self,
        code: Code,
        subject: Subject,
        packet: Packet | None,
        data: Any,
        length: int = 0,
        context: Context | None = None,
    ) -> int:
        """The low 32 bits of R0, as `Run.execute` gives them for the code that this was made of."""
        session = self._session()
        try:
            session.begin(self, code, subject, packet, data, length, context)
            return session.finish(self._main(session.address, 0, 0, 0, 0, 0, 0))
        finally:
            self.release(session)

    @contextmanager
    def batch(self, code: Code, subject: Subject, network: int, mac: int) -> Iterator[Session]:
        """A session in which native code goes from packet to packet by itself; `subject` makes packets of bytes.

        `network` and `mac` are positions in each packet, -1 for none.
        """
        session = self.armed(code, subject, network, mac)
        try:
            yield session
        finally:
            self.release(session)

    def armed(self, code: Code, subject: Subject, network: int, mac: int) -> Session:
        """Such a session, until `release`."""
        session = self._session()
        session.begin_batch(self, code, subject, network, mac)
        return session

    def release(self, session: Session) -> None:
        """The session is free for another run."""
        session.clear()
        self._free.append(session)

    def _session(self) -> Session:
        try:
            return self._free.pop()
        except IndexError:
            session = Session(self)
            SESSIONS[session.address] = session
            return session


def compiled(code: Code) -> NativeProgram:
    """Compile code that is supported."""
    assert code.linked is not None
    source = source_of(code.linked)
    text = emit.program(source, CALLBACKS)
    return NativeProgram(code, source, Compiled(text, large=source.large))


def source_of(linked: Linked) -> emit.Source:
    """What is compiled, from what was linked."""
    handles = {}
    for address in linked.constants.values():
        region = REGIONS.get(address >> 32)
        owner = None if region is None or region.owner is None else region.owner()
        if owner is not None:
            handles[address] = owner
    lasting = {}
    for found in _lasting(linked):
        address, held = host_address(found.buffer)
        if held is not None:
            writable = found.writable and not isinstance(found.buffer, bytes)
            lasting[found.number] = Lasting(address, len(found.buffer), found.readable, writable, held)
    return emit.Source(linked.instructions, linked.constants, handles, lasting, bool(linked.ancillary))


def _lasting(linked: Linked) -> list[Region]:
    """The values of arrays that the program refers to."""
    found = []
    for address in set(linked.constants.values()):
        region = REGIONS.get(address >> 32)
        if region is None or region.fields is not None:
            continue
        if region.owner is None:
            found.append(region)
        elif isinstance(owner := region.owner(), Array):
            found.append(owner.values)
    return found


def supports(code: Code) -> bool:
    """Whether code can be compiled: not where functions other than the main one make tail calls."""
    return code.linked is not None and source_of(code.linked).supported()
