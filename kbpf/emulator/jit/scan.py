"""The records of capture files in native code: found, filtered, counted, and their places noted.

Only what is in order is done here. At a record that is cut off, corrupt, or says something about the file (pcapng's
section and interface blocks) the loop stops, and Python's reader goes on from there, so that both see the same file.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Literal

from kbpf.emulator.jit.engine import Compiled
from kbpf.pcapfile.stream import MAX_RECORD

#: Why a loop has stopped: the record at `position` is not all there; is Python's; there is no room for its place; the
#: filter has faulted; `until` was reached.
INCOMPLETE, PYTHONS, FULL, FAULTED, REACHED = range(5)


class Scan(ctypes.Structure):
    """How far a loop is. `spans` are pairs of offsets that hold what is kept, with room for `most` of them."""

    _fields_ = (
        ("position", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("until", ctypes.c_uint64),
        ("packets", ctypes.c_uint64),
        ("matched", ctypes.c_uint64),
        ("spans", ctypes.c_uint64),
        ("count", ctypes.c_uint64),
        ("most", ctypes.c_uint64),
        ("first", ctypes.c_uint64),
        ("interfaces", ctypes.c_uint64),
    )


class Way(ctypes.Structure):
    """What is run over an interface's packets, and the run's structure."""

    _fields_ = (("each", ctypes.c_uint64), ("run", ctypes.c_uint64))


_WORD = {name: number for number, (name, _) in enumerate(Scan._fields_)}
_STATUS = 5


def _field(name: str, type: str = "i64") -> str:
    at = f"  %{name}_p = getelementptr i64, ptr %scan, i64 {_WORD[name]}\n"
    return f"{at}  %{name}_0 = load {type}, ptr %{name}_p\n"


def _number(name: str, at: str, bits: int = 32) -> str:
    """Load a number of the file's byte order as 64 bits."""
    return f"""
  %{name}_p = getelementptr i8, ptr %record, i64 {at}
  %{name}_r = load i{bits}, ptr %{name}_p, align 1
  %{name}_b = call i{bits} @llvm.bswap.i{bits}(i{bits} %{name}_r)
  %{name}_s = select i1 %swap, i{bits} %{name}_b, i{bits} %{name}_r
  %{name} = zext i{bits} %{name}_s to i64
"""


#: A packet's headers must come from memory, and where the next ones are is not known: ask for all that lies there.
_DISTANCE, _LINES, _LINE = 3072, 6, 64
_PREFETCH = "".join(
    f"""
  %soon{line} = getelementptr i8, ptr %record, i64 {_DISTANCE + _LINE * line}
  call void @llvm.prefetch.p0(ptr %soon{line}, i32 0, i32 3, i32 1)
"""
    for line in range(_LINES)
)


# Both loops: the state lives in phis, `keep` notes [position, next) and `skip` does not; `leave` writes it back.
def _loop(name: str, header: str, read: str) -> str:
    return f"""
define i64 @{name}(ptr noalias %scan, ptr %base, ptr %ways, i1 %swap, i64 %header) {{
entry:
{"".join(_field(name) for name in ("position", "end", "until", "packets", "matched", "count", "most", "first"))}
{_field("interfaces")}
{_field("spans", "ptr")}
  br label %head
head:
  %at = phi i64 [ %position_0, %entry ], [ %next, %go ]
  %packets = phi i64 [ %packets_0, %entry ], [ %packets2, %go ]
  %matched = phi i64 [ %matched_0, %entry ], [ %matched2, %go ]
  %count = phi i64 [ %count_0, %entry ], [ %count2, %go ]
  %reached = icmp uge i64 %at, %until_0
  br i1 %reached, label %leave, label %room
room:
  %free = icmp ult i64 %count, %most_0
  br i1 %free, label %whole, label %leave
whole:
  %record = getelementptr i8, ptr %base, i64 %at
  %headed = add i64 %at, {header}
  %there = icmp ule i64 %headed, %end_0
  br i1 %there, label %begin, label %leave
begin:
{_PREFETCH}
{read}
packet:
  %way = getelementptr [2 x i64], ptr %ways, i64 %interface
  %each = load ptr, ptr %way
  %able = icmp ne ptr %each, null
  br i1 %able, label %run_it, label %leave
run_it:
  %run_p = getelementptr i64, ptr %way, i64 1
  %run = load ptr, ptr %run_p
  %data = getelementptr i8, ptr %record, i64 %skipped
  %kept = call i64 %each(ptr %run, ptr %data, i64 %size, i64 %wirelen)
  %status_p = getelementptr i64, ptr %run, i64 {_STATUS}
  %status = load i64, ptr %status_p
  %fine = icmp eq i64 %status, 0
  br i1 %fine, label %counted, label %leave
counted:
  %packets1 = add i64 %packets, 1
  %match = icmp ne i64 %kept, 0
  %one = zext i1 %match to i64
  %matched1 = add i64 %matched, %one
  br i1 %match, label %keep, label %go
keep:
  %packets3 = phi i64 [ %packets1, %counted ], [ %packets, %begin_other ]
  %matched3 = phi i64 [ %matched1, %counted ], [ %matched, %begin_other ]
  %listing = icmp ne ptr %spans_0, null
  br i1 %listing, label %note, label %go
note:
  %any = icmp ne i64 %count, 0
  %slot = getelementptr [2 x i64], ptr %spans_0, i64 %count
  %last_p = getelementptr i64, ptr %slot, i64 -1
  br i1 %any, label %look, label %new
look:
  %last = load i64, ptr %last_p
  %joins = icmp eq i64 %last, %at
  br i1 %joins, label %extend, label %new
extend:
  store i64 %next, ptr %last_p
  br label %go
new:
  store i64 %at, ptr %slot
  %slot_end = getelementptr i64, ptr %slot, i64 1
  store i64 %next, ptr %slot_end
  %count1 = add i64 %count, 1
  br label %go
go:
  %packets2 = phi i64 [ %packets1, %counted ], [ %packets3, %keep ], [ %packets3, %extend ], [ %packets3, %new ]
  %matched2 = phi i64 [ %matched1, %counted ], [ %matched3, %keep ], [ %matched3, %extend ], [ %matched3, %new ]
  %count2 = phi i64 [ %count, %counted ], [ %count, %keep ], [ %count, %extend ], [ %count1, %new ]
  br label %head
leave:
  %why = phi i64 [ {REACHED}, %head ], [ {FULL}, %room ], [ {INCOMPLETE}, %whole ],
    [ {PYTHONS}, %packet ], [ {FAULTED}, %run_it ], %EXITS%
  store i64 %at, ptr %position_p
  store i64 %packets, ptr %packets_p
  store i64 %matched, ptr %matched_p
  store i64 %count, ptr %count_p
  ret i64 %why
}}
"""


_PCAP = _loop(
    "pcap",
    "%header",
    f"""
{_number("size", "8")}
{_number("wirelen", "12")}
  %sane = icmp ule i64 %size, {MAX_RECORD}
  br i1 %sane, label %sized, label %leave
sized:
  %skipped = add i64 %header, 0
  %interface = add i64 0, 0
  %next = add i64 %headed, %size
  %all = icmp ule i64 %next, %end_0
  br i1 %all, label %packet, label %leave
begin_other:
  br label %keep
""",
).replace("%EXITS%", f"[ {PYTHONS}, %begin ], [ {INCOMPLETE}, %sized ]")

# Blocks of type 6 (enhanced packet), whose interface is described and whose lengths fit; all others are passed over,
# and kept, but for those that Python reads: sections, interfaces, the other kinds of packet.
_PCAPNG = _loop(
    "pcapng",
    "12",
    f"""
{_number("kind", "0")}
{_number("total", "4")}
  %next = add i64 %at, %total
  %low = and i64 %total, 3
  %even = icmp eq i64 %low, 0
  %long = icmp uge i64 %total, 12
  %short = icmp ule i64 %total, {MAX_RECORD}
  %good0 = and i1 %even, %long
  %good = and i1 %good0, %short
  br i1 %good, label %sized, label %leave
sized:
  %all = icmp ule i64 %next, %end_0
  br i1 %all, label %ended, label %leave
ended:
  %again_at = sub i64 %total, 4
{_number("again", "%again_at")}
  %same = icmp eq i64 %again, %total
  br i1 %same, label %which, label %leave
which:
  switch i64 %kind, label %begin_other [
    i64 6, label %enhanced
    i64 168627466, label %leave
    i64 1, label %leave
    i64 2, label %leave
    i64 3, label %leave
  ]
enhanced:
  %big = icmp uge i64 %total, 32
  br i1 %big, label %fields, label %leave
fields:
{_number("index", "8")}
{_number("size", "20")}
{_number("wirelen", "24")}
  %interface = add i64 %first_0, %index
  %known = icmp ult i64 %interface, %interfaces_0
  %room1 = sub i64 %total, 32
  %fits = icmp ule i64 %size, %room1
  %usable = and i1 %known, %fits
  %skipped = add i64 28, 0
  br i1 %usable, label %packet, label %leave
begin_other:
  br label %keep
""",
).replace(
    "%EXITS%",
    f"[ {PYTHONS}, %begin ], [ {INCOMPLETE}, %sized ], [ {PYTHONS}, %ended ], [ {PYTHONS}, %enhanced ],"
    f" [ {PYTHONS}, %fields ]" + 4 * f", [ {PYTHONS}, %which ]",
)

_GATHER = """
define i64 @gather(ptr %base, ptr %spans, i64 %from, i64 %count, ptr %out, i64 %room, ptr %used) {
entry:
  br label %head
head:
  %i = phi i64 [ %from, %entry ], [ %following, %copy ]
  %filled = phi i64 [ 0, %entry ], [ %after, %copy ]
  %more = icmp ult i64 %i, %count
  br i1 %more, label %span, label %leave
span:
  %slot = getelementptr [2 x i64], ptr %spans, i64 %i
  %start = load i64, ptr %slot
  %end_p = getelementptr i64, ptr %slot, i64 1
  %end = load i64, ptr %end_p
  %size = sub i64 %end, %start
  %after = add i64 %filled, %size
  %fits = icmp ule i64 %after, %room
  br i1 %fits, label %copy, label %leave
copy:
  %from_p = getelementptr i8, ptr %base, i64 %start
  %to_p = getelementptr i8, ptr %out, i64 %filled
  call void @llvm.memcpy.p0.p0.i64(ptr %to_p, ptr %from_p, i64 %size, i1 false)
  %following = add i64 %i, 1
  br label %head
leave:
  store i64 %filled, ptr %used
  ret i64 %i
}
"""

_TYPE = ctypes.CFUNCTYPE(
    ctypes.c_uint64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_bool, ctypes.c_uint64
)


@cache
def _compiled() -> Compiled:
    return Compiled("declare void @llvm.prefetch.p0(ptr, i32, i32, i32)\n" + _PCAP + _PCAPNG + _GATHER)


_GATHER_TYPE = ctypes.CFUNCTYPE(
    ctypes.c_uint64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_void_p,
    ctypes.c_uint64, ctypes.c_void_p,
)  # fmt: skip


@cache
def gather() -> ctypes._FuncPointer:
    """Copies spans behind one another: takes the window, the spans, from which on, how many there are, where to copy
    them, how much room there is, and where to store how much was copied. Returns the first span that was not."""
    return _GATHER_TYPE(_compiled().address("gather"))


@cache
def loop(format: Literal["pcap", "pcapng"]) -> ctypes._FuncPointer:
    """The loop for a format: takes a `Scan`, the window, an array of `Way`, and whether the bytes are swapped; of pcap
    also how long a record's header is. Returns why it has stopped. Runs without the interpreter's lock."""
    return _TYPE(_compiled().address(format))
