"""The contexts of tracing programs and of `syscall` programs, and which accesses to them there are.

The `*_is_valid_access` rules of kernel/trace/bpf_trace.c and kernel/bpf/syscall.c, measured on Linux 6.18. Registers
are those of x86-64, in the order of its ``struct pt_regs``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kbpf.emulator.interpreter import Run
from kbpf.emulator.memory import CONTEXT, Region
from kbpf.errors import EmulationFault
from kbpf.uapi.structs import STRUCTS

_PERF_DATA = STRUCTS["bpf_perf_event_data"]
_PREFIX = "regs."
#: Where registers lie in ``struct pt_regs``, by the kernel's names: ``di``, ``ax``, ``ip``.
REGISTERS = {
    name.removeprefix(_PREFIX): place
    for name, place in _PERF_DATA.fields.items()
    if name.startswith(_PREFIX) and name.count(".") == 1
}
#: What contexts have, by type of program.
_FIELDS = {
    "kprobe": REGISTERS,
    "perf_event": REGISTERS | {name: _PERF_DATA.fields[name] for name in ("sample_period", "addr")},
}
#: Bytes of ``struct pt_regs``.
REGISTERS_SIZE = _PERF_DATA.fields["sample_period"].offset
#: MAX_BPF_FUNC_ARGS: arguments of a raw tracepoint, of eight bytes each.
MOST_ARGUMENTS = 12
#: PERF_MAX_TRACE_SIZE.
_MOST_RECORD = 8192
#: What is before a tracepoint's fields, which programs may not read.
RECORD_HEADER = 8


class Access(NamedTuple):
    """What programs of a type read: from `first` to `end`; loads at an offset below `whole` are of eight bytes."""

    first: int
    end: int
    whole: int = 0


ACCESS = {
    "tracepoint": Access(RECORD_HEADER, _MOST_RECORD),
    "raw_tracepoint": Access(0, 8 * MOST_ARGUMENTS),
    # The first argument is the address of what may be written; Linux looks only at loads that begin where it does.
    "raw_tracepoint_writable": Access(0, 8 * MOST_ARGUMENTS, whole=1),
    "perf_event": Access(0, _PERF_DATA.size, whole=REGISTERS_SIZE),
    "kprobe": Access(0, REGISTERS_SIZE),
}


class Value(NamedTuple):
    """``struct bpf_perf_event_value``: what an event has counted, and nanoseconds that it was enabled and ran."""

    counter: int = 0
    enabled: int = 0
    running: int = 0


@dataclass(slots=True, kw_only=True)
class Event:
    """What a program can ask of the event that it runs for, beside the context."""

    #: The number given when the program was attached (bpf_get_attach_cookie).
    cookie: int = 0
    #: The traced function's address (bpf_get_func_ip).
    function: int = 0
    #: The perf event's count (bpf_perf_prog_read_value), and its branch records, ``struct perf_branch_entry`` back to
    #: back; None where it does not sample branches (bpf_read_branch_records).
    value: Value = field(default_factory=Value)
    branches: bytes | None = None


class TracingContext:
    """A `kbpf.emulator.interpreter.Context` over the bytes that a program is run with, read only."""

    __slots__ = ("_access", "_buffer", "_given", "event")

    def __init__(
        self, program_type: str, given: bytes, event: Event | None = None, buffer: bytes | None = None
    ) -> None:
        """`buffer` is what the first argument of a writable raw tracepoint points to."""
        self._access = ACCESS[program_type]
        self._given = given
        self.event = event or Event()
        self._buffer = None if buffer is None else Region(bytearray(buffer))
        if self._buffer is not None:
            self._given = self._buffer.address.to_bytes(8, sys.byteorder) + given[8:]

    def show(self, run: Run) -> None:
        """There is no packet."""

    def load(self, offset: int, size: int) -> int | None:
        first, end, whole = self._access
        if offset % size or not first <= offset <= min(end, len(self._given)) - size:
            return None
        if offset < whole and size != 8:
            return None
        return int.from_bytes(self._given[offset : offset + size], sys.byteorder)

    def store(self, offset: int, size: int, value: int) -> bool:
        return False

    def read(self, offset: int, size: int) -> bytes:
        """What bpf_probe_read_kernel finds there, whatever programs may load; faults beyond the end."""
        if offset + size > len(self._given):
            raise EmulationFault(f"read of {size} bytes out of bounds", address=CONTEXT << 32 | offset)
        return self._given[offset : offset + size]

    def result(self) -> dict[str, Any]:
        """What a writable raw tracepoint's program may set."""
        return {} if self._buffer is None else {"buffer": bytes(self._buffer.buffer)}


class SyscallContext:
    """A `kbpf.emulator.interpreter.Context` over memory that a `syscall` program shares with who runs it."""

    __slots__ = ("memory",)

    def __init__(self, given: bytes) -> None:
        self.memory = bytearray(given)

    def show(self, run: Run) -> None:
        """There is no packet."""

    def load(self, offset: int, size: int) -> int | None:
        if offset % size or offset + size > len(self.memory):
            return None
        return int.from_bytes(self.memory[offset : offset + size], sys.byteorder)

    def store(self, offset: int, size: int, value: int) -> bool:
        if offset % size or offset + size > len(self.memory):
            return False
        self.memory[offset : offset + size] = value.to_bytes(size, sys.byteorder)
        return True


def make(program_type: str, given: Mapping[str, Any] | bytes, event: Event | None = None) -> TracingContext:
    """A context from its fields, or its bytes; `ValueError` for fields that are not there or do not fit."""
    if isinstance(given, bytes):
        return TracingContext(program_type, given, event)
    if program_type in _FIELDS:
        return TracingContext(program_type, packed(program_type, given), event)
    if program_type == "tracepoint":
        if given:
            raise ValueError("a tracepoint's record is given as bytes")
        return TracingContext(program_type, bytes(_MOST_RECORD), event)
    settable = {"args", "buffer"} if program_type == "raw_tracepoint_writable" else {"args"}
    if given.keys() - settable:
        raise ValueError(f"a {program_type} program has only {' and '.join(sorted(settable))}")
    return TracingContext(program_type, arguments(given.get("args", ())), event, given.get("buffer"))


def arguments(values: Sequence[int]) -> bytes:
    """The context of a raw tracepoint, arguments that are not given being 0; `ValueError` where it has no room."""
    if len(values) > MOST_ARGUMENTS:
        raise ValueError(f"{len(values)} arguments, where a raw tracepoint has at most {MOST_ARGUMENTS}")
    packed = b"".join(_bytes(value, 8, f"argument {index}") for index, value in enumerate(values))
    return packed.ljust(8 * MOST_ARGUMENTS, b"\0")


def packed(program_type: str, values: Mapping[str, int]) -> bytes:
    """The context of a kprobe's or perf event's program; `ValueError` for what is no field or does not fit."""
    data = bytearray(ACCESS[program_type].end)
    for name, value in values.items():
        place = _FIELDS[program_type].get(name)
        if place is None:
            raise ValueError(f"the context of a {program_type} program has no field {name!r}")
        data[place.offset : place.offset + place.size] = _bytes(value, place.size, name)
    return bytes(data)


def _bytes(value: int, size: int, name: str) -> bytes:
    try:
        return value.to_bytes(size, sys.byteorder, signed=value < 0)
    except OverflowError:
        raise ValueError(f"{value} does not fit {name}, {size} bytes") from None
