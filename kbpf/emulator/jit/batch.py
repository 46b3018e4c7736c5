"""Many packets in one call of native code: a filter over a list of bytes objects, or over spans of a buffer.

The loop asks CPython's C API for the bytes of each object; over a buffer it touches no Python object, and runs without
the interpreter's lock. What calls back meanwhile (`kbpf.emulator.jit.callbacks`) takes the lock, and finds the packet
in the session's structure.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

from kbpf.emulator.interpreter import Code, Subject
from kbpf.emulator.jit import emit
from kbpf.emulator.jit.blocks import over_blocks
from kbpf.emulator.jit.buffers import read_address, unwritten
from kbpf.emulator.jit.callbacks import CALLBACKS
from kbpf.emulator.jit.engine import Compiled, gathers
from kbpf.emulator.jit.layout import WORD, WORDS
from kbpf.emulator.jit.program import NativeProgram, source_of
from kbpf.emulator.jit.session import Session

#: What lies before offset 0 of what a filter sees of a packet: nothing, or the IP header.
Start = Literal["packet", "transport"]

#: How many packets ahead memory is asked for.
_AHEAD = 8
#: Packets in spans that are worth compiling their loop a second time, in vectors: what that saves takes as long.
_MANY = 2_000_000
_PREFETCH = "call void @llvm.prefetch.p0(ptr %{}, i32 0, i32 3, i32 1)"

#: Where offset 0 is in a packet that begins with its IP header, of either version; all of it where it is cut off.
_START: dict[Start, str] = {
    "packet": "  %offset = add i64 0, 0\n",
    "transport": """
  %none = icmp eq i64 %size, 0
  br i1 %none, label %empty, label %some
some:
  %first = load i8, ptr %data
  %version = lshr i8 %first, 4
  %four = icmp eq i8 %version, 4
  %words = and i8 %first, 15
  %wide = zext i8 %words to i64
  %header = shl i64 %wide, 2
  %header6 = select i1 %four, i64 %header, i64 40
  %cut = call i64 @llvm.umin.i64(i64 %header6, i64 %size)
  br label %empty
empty:
  %offset = phi i64 [ 0, %entry ], [ %cut, %some ]
""",
}


_DECLARATIONS = """
declare i64 @llvm.umin.i64(i64, i64)
declare i64 @llvm.usub.sat.i64(i64, i64)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
"""


def each(start: Start, budget: int, asks: bool) -> str:
    """``@each(run, data, size, wirelen)``: the bytes that the filter keeps of one packet, 0 for none.

    A filter that never asks Python for anything gets a structure that LLVM keeps in registers.
    """
    stores = {
        "data": "%at0",
        "size": "%size0",
        "length": "%length",
        "fuel": str(budget),
        "buffer": "%at",
        "buffer_size": "%size",
    }
    text = f"""
define i64 @each(ptr noalias %shared, ptr %data, i64 %size, i64 %wirelen) alwaysinline {{
entry:
  %run = {"getelementptr i8, ptr %shared, i64 0" if asks else f"alloca [{WORDS} x i64]"}
{_START[start]}
  %at = ptrtoint ptr %data to i64
  %at0 = add i64 %at, %offset
  %size0 = sub i64 %size, %offset
  %length = call i64 @llvm.usub.sat.i64(i64 %wirelen, i64 %offset)
"""
    for name, value in stores.items():
        text += f"  %p_{name} = getelementptr i64, ptr %run, i64 {WORD[name]}\n  store i64 {value}, ptr %p_{name}\n"
    for name in () if asks else ("network", "mac", "status", "table", "half", "cpu"):
        text += f"  %s_{name} = getelementptr i64, ptr %shared, i64 {WORD[name]}\n"
        text += f"  %v_{name} = load i64, ptr %s_{name}\n"
        text += f"  %p_{name} = getelementptr i64, ptr %run, i64 {WORD[name]}\n  store i64 %v_{name}, ptr %p_{name}\n"
    return (
        text
        + """
  %r = call i64 @f0(ptr %run, i64 0, i64 0, i64 0, i64 0, i64 0, i64 0)
  %low = and i64 %r, 4294967295
  %kept = call i64 @llvm.umin.i64(i64 %low, i64 %length)
  ret i64 %kept
}
"""
    )


#: What a loop writes for each packet: a byte, 1 where something is kept, or the 32 bits that a program returned.
Results = Literal["matches", "values"]
_STORE: dict[Results, str] = {
    "matches": """
  %match = icmp ne i64 %kept, 0
  %byte = zext i1 %match to i8
  %outp = getelementptr i8, ptr %out, i64 %i
  store i8 %byte, ptr %outp
""",
    "values": """
  %value = trunc i64 %kept to i32
  %outp = getelementptr i32, ptr %out, i64 %i
  store i32 %value, ptr %outp
""",
}


_STATUS = """
  %status = load i64, ptr %statusp
  %fine = icmp eq i64 %status, 0
  br i1 %fine, label %done, label %stop, !prof !0
"""


def _loop(name: str, parameters: str, fetch: str, results: Results, asks: bool) -> str:
    """A loop over `count` packets that writes a result of each; returns how many it did before something came up.

    `fetch` finds ``%data`` and ``%size`` of packet ``%i``, or goes to ``%stop``.
    """
    return f"""
define i64 @{name}(ptr noalias %run, i64 %count, ptr %wirelens, ptr %out, {parameters}) {{
entry:
  %given = icmp ne ptr %wirelens, null
  %statusp = getelementptr i64, ptr %run, i64 {WORD["status"]}
  %last = sub i64 %count, 1
  br label %head
head:
  %i = phi i64 [ 0, %entry ], [ %following, %done ]
  %more = icmp ult i64 %i, %count
  br i1 %more, label %body, label %stop
body:
  %farther = add i64 %i, {_AHEAD}
  %ahead = call i64 @llvm.umin.i64(i64 %farther, i64 %last)
{fetch}
fetched:
  br i1 %given, label %wire, label %run1
wire:
  %wirep = getelementptr i64, ptr %wirelens, i64 %i
  %wire1 = load i64, ptr %wirep
  br label %run1
run1:
  %wirelen = phi i64 [ %size, %fetched ], [ %wire1, %wire ]
  %kept = call i64 @each(ptr %run, ptr %data, i64 %size, i64 %wirelen)
{_STATUS if asks else "  br label %done"}
done:
{_STORE[results]}
  %following = add nuw i64 %i, 1
  br label %head
stop:
  ret i64 %i
}}
"""


def _internal(text: str) -> str:
    """Nothing else calls the functions: LLVM need not keep them apart from the loop."""
    return text.replace("define i64", "define internal i64")


def _api(name: str) -> str:
    """The host address of a function of CPython's C API, for a call."""
    address = ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value
    return f"inttoptr (i64 {address} to ptr)"


def _over_list(results: Results, asks: bool) -> str:
    return _loop(
        "over_list",
        "ptr %list, ptr %where",
        f"""
  %object = call ptr {_api("PyList_GetItem")}(ptr %list, i64 %i)
  %missing = icmp eq ptr %object, null
  br i1 %missing, label %stop, label %found
found:
  %later = call ptr {_api("PyList_GetItem")}(ptr %list, i64 %ahead)
  {_PREFETCH.format("later")}
  %sizep = getelementptr i64, ptr %where, i64 1
  %bad = call i32 {_api("PyBytes_AsStringAndSize")}(ptr %object, ptr %where, ptr %sizep)
  %good = icmp eq i32 %bad, 0
  br i1 %good, label %got, label %stop
got:
  %data = load ptr, ptr %where
  %size = load i64, ptr %sizep
  br label %fetched
""",
        results,
        asks,
    )


_SPANS_PARAMETERS = "ptr %base, i64 %room, ptr %offsets, ptr %sizes"
_SPANS_FETCH = f"""
  %laterp = getelementptr i64, ptr %offsets, i64 %ahead
  %later0 = load i64, ptr %laterp
  %later = getelementptr i8, ptr %base, i64 %later0
  {_PREFETCH.format("later")}
  %offsetp = getelementptr i64, ptr %offsets, i64 %i
  %offset = load i64, ptr %offsetp
  %sizep = getelementptr i64, ptr %sizes, i64 %i
  %size = load i64, ptr %sizep
  %inside = icmp ule i64 %offset, %room
  %left = sub i64 %room, %offset
  %whole = icmp ule i64 %size, %left
  %good = and i1 %inside, %whole
  %data = getelementptr i8, ptr %base, i64 %offset
  br i1 %good, label %fetched, label %stop
"""


#: For what is in order all the same, and where it is not.
_CHECKED = _internal(_loop("checked", _SPANS_PARAMETERS, _SPANS_FETCH, "matches", asks=False))

_EACH_TYPE = ctypes.PYFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint64, ctypes.c_uint64)
_COMMON = (ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_void_p)
_OVER_LIST_TYPE = ctypes.PYFUNCTYPE(*_COMMON, ctypes.py_object, ctypes.c_void_p)
_OVER_SPANS_TYPE = ctypes.CFUNCTYPE(*_COMMON, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_void_p)


class Loops:
    """Loops around ``@each`` of some text, over the packets of a session; each is compiled when it is first asked for.

    `asks` says that something may come up for Python in a run. `wide` gives the text with `wide` loads, where nothing
    may come up.
    """

    def __init__(self, text: str, results: Results, asks: bool, wide: Callable[[], str] | None = None) -> None:
        self._text = _internal(text)
        self._results: Results = results
        self._asks = asks
        self._wide = wide
        #: How many spans it has gone over.
        self._spanned = 0

    @cached_property
    def _list(self) -> tuple[Any, Compiled]:
        compiled = Compiled(_DECLARATIONS + self._text + _over_list(self._results, self._asks))
        return _OVER_LIST_TYPE(compiled.address("over_list")), compiled

    @cached_property
    def _spans(self) -> tuple[Any, Compiled]:
        if self._asks:
            loop = _loop("over_spans", _SPANS_PARAMETERS, _SPANS_FETCH, self._results, True)
            compiled = Compiled(_DECLARATIONS + self._text + loop)
        else:
            compiled = Compiled(_DECLARATIONS + self._text + _CHECKED + over_blocks("each", False), vectors=True)
        return _OVER_SPANS_TYPE(compiled.address("over_spans")), compiled

    @cached_property
    def _gathered_spans(self) -> tuple[Any, Compiled]:
        assert self._wide is not None
        wide = _internal(self._wide()).replace("@f0(", "@wide_f0(").replace("@each(", "@wide_each(")
        text = self._text + _CHECKED + wide + over_blocks("wide_each", True)
        compiled = Compiled(_DECLARATIONS + text, vectors=True)
        return _OVER_SPANS_TYPE(compiled.address("over_spans")), compiled

    def over_list(self, session: Session, packets: list[bytes], wirelens: array[int], out: Any) -> int:
        """Run over bytes objects; returns how many were done. Raises `TypeError` for what is none, `EmulationFault`.

        `out` has room for as many as there are to be: the list may have grown since that was made, and if it has become
        shorter, that is an `IndexError`.
        """
        where, count = (ctypes.c_uint64 * 2)(), len(out)
        if self._asks:
            # What Python does meanwhile, and other threads, may change the list.
            packets = list(packets)
        with _fixed(wirelens, count if wirelens else 0) as lengths, _fixed(out, count) as results:
            done: int = self._list[0](session.address, count, lengths, results, packets, ctypes.addressof(where))
        session.finish(0)
        return done

    def over_spans(
        self, session: Session, buffer: Any, offsets: array[int], sizes: array[int], wirelens: array[int], out: Any
    ) -> int:
        """Run over spans of a buffer; returns how many were done, until one was not inside it. `EmulationFault`."""
        count = len(out)
        with (
            read_address(buffer) as base, _fixed(offsets, count) as starts, _fixed(sizes, count) as ends,
            _fixed(wirelens, count if wirelens else 0) as lengths, _fixed(out, count) as results,
        ):  # fmt: skip
            self._spanned += count
            many = self._wide is not None and self._spanned > _MANY and gathers()
            function = self._gathered_spans[0] if many else self._spans[0]
            done: int = function(session.address, count, lengths, results, base, len(buffer), starts, ends)
        session.finish(0)
        return done


class NativeBatch:
    """A classic filter's loops in native code.

    `address` is that of ``each``. `network` and `mac` are where in a packet its network and link header start, -1 where
    it is not known.
    """

    def __init__(self, code: Code, subject: Subject, start: Start, network: int, mac: int) -> None:
        assert code.linked is not None
        self._code, self._subject, self._network, self._mac = code, subject, network, mac
        source = source_of(code.linked)
        text, round = emit.program(source, CALLBACKS), each(start, subject.budget, source.asks)
        self._program = NativeProgram(code, source, Compiled(_DECLARATIONS + text + round, large=source.large))
        self.address = self._program.compiled.address("each")
        self._each = _EACH_TYPE(self.address)
        self._asks = source.asks
        #: Sessions for single packets.
        self._ready: list[Session] = []

        def wide() -> str:
            return emit.program(replace(source, wide=True), CALLBACKS) + each(start, subject.budget, asks=False)

        once = source.asks or source.large
        self._loops = Loops(self._program.within(text) + round, "matches", source.asks, None if once else wide)

    def over_list(self, packets: list[bytes], wirelens: Sequence[int] | None) -> bytes:
        """A 0 or 1 for each packet. Raises `TypeError` for what is no bytes object, `EmulationFault`."""
        out = unwritten(len(packets))
        with self.session() as session:
            self._loops.over_list(session, packets, numbers(wirelens, len(out)), out)
        return out

    def over_spans(self, buffer: Any, offsets: array[int], sizes: array[int], wirelens: Sequence[int] | None) -> bytes:
        """A 0 or 1 for each span. Raises `IndexError` for one that is not inside the buffer, `EmulationFault`."""
        out = unwritten(len(offsets))
        with self.session() as session:
            lengths = numbers(wirelens, len(out))
            done = self._loops.over_spans(session, buffer, offsets, sizes, lengths, out)
        if done < len(out):
            raise IndexError(f"packet {done} is not inside the buffer of {len(buffer)} bytes")
        return out

    def one(self, packet: bytes, wirelen: int) -> int:
        """The bytes that the filter keeps of one packet, 0 for none. Raises `EmulationFault`."""
        try:
            session = self._ready.pop()
        except IndexError:
            session = self._program.armed(self._code, self._subject, self._network, self._mac)
        kept: int = self._each(session.address, packet, len(packet), wirelen)
        if self._asks and session.native.status:
            try:
                session.finish(0)
            finally:
                self._program.release(session)
        self._ready.append(session)
        return kept

    def session(self) -> AbstractContextManager[Session]:
        """A context manager for a session that packets may be run in by `each`."""
        return self._program.batch(self._code, self._subject, self._network, self._mac)


def numbers(values: Sequence[int] | None, count: int) -> array[int]:
    """Unsigned 64-bit numbers, none where there are none."""
    if values is not None and len(values) != count:
        raise ValueError(f"{len(values)} lengths for {count} packets")
    return values if isinstance(values, array) and values.typecode == "Q" else array("Q", values or ())


@contextmanager
def _fixed(numbers: Any, count: int) -> Iterator[int]:
    """Where `count` of them are in memory, which is not to change meanwhile; 0 for none.

    Raises `ValueError` if they have become fewer.
    """
    if not count:
        yield 0
        return
    with read_address(numbers) as address:
        if len(numbers) < count:
            raise ValueError(f"{len(numbers)} numbers for {count} packets")
        yield address
