"""BPF_PROG_TEST_RUN over many packets in one call of native code, where only the values are asked for.

What `kbpf.emulator.test_run` and `test_run_xdp` set up in Python for a run without a context of the user's, the loop
sets up here: what programs see of the frame, a copy of it where they may write, and the context's fields. That is for
programs whose context is read at known places and never written, and whose helpers have nothing to do with the packet;
`supports` says so. A frame that is refused, or is none of these, stops the loop: Python runs it as it runs one.
"""

from __future__ import annotations

import itertools
import socket
import sys
from array import array
from threading import Lock
from typing import Any

from kbpf.emulator.context import ACCESS, SkBuff
from kbpf.emulator.ethernet import ETH_P_802_2, ETH_P_802_3
from kbpf.emulator.interpreter import PACKET_ADDRESS
from kbpf.emulator.jit import emit
from kbpf.emulator.jit.batch import Loops, numbers
from kbpf.emulator.jit.buffers import host_address
from kbpf.emulator.jit.callbacks import CALLBACKS, QUIET
from kbpf.emulator.jit.engine import Compiled
from kbpf.emulator.jit.layout import WORD
from kbpf.emulator.jit.pointers import CONTEXT, follow
from kbpf.emulator.jit.program import NativeProgram, source_of
from kbpf.emulator.memory import PACKET
from kbpf.emulator.packet import Packet
from kbpf.emulator.program import Program
from kbpf.emulator.test_run import ETH_HLEN, MOST_DATA
from kbpf.emulator.xdp import FRAME, HEADROOM, SHARED_INFO, XdpBuff
from kbpf.isa import ebpf
from kbpf.uapi.constants import PACKET_HOST, PACKET_MULTICAST, PACKET_OTHERHOST
from kbpf.uapi.structs import STRUCTS

#: A status that nothing raises: the frame is Python's.
_PYTHONS = 9
_CALL = ebpf.JMP | ebpf.CALL
#: Arithmetic whose result is known to be in the context where it is.
_FOLLOWED = tuple(
    ebpf.ALU64 | op for op in (ebpf.MOV | ebpf.X, ebpf.MOV | ebpf.K, ebpf.ADD | ebpf.K, ebpf.SUB | ebpf.K)
)
_LITTLE = sys.byteorder == "little"

#: Fields of the context that follow from the frame, each a value of `_each`.
_FRAME_FIELDS = {
    "__sk_buff": {
        "len": "%size0",
        "wire_len": "%size0",
        "protocol": "%protocol",
        "pkt_type": "%kind",
        "data": str(PACKET_ADDRESS & 0xFFFFFFFFFFFFFFFF),
        "data_meta": str(PACKET_ADDRESS),
        "data_end": "%data_end",
    },
    "xdp_md": {"data": str(PACKET_ADDRESS), "data_meta": str(PACKET_ADDRESS), "data_end": "%data_end"},
}
#: Those that say something of the packet's socket, which Python makes.
_SOCKET_FIELDS = ("family", "remote_ip4", "local_ip4", "remote_ip6", "local_ip6", "remote_port", "local_port", "sk")


def _context_name(program: Program) -> str | None:
    return "xdp_md" if program.type == "xdp" else "__sk_buff" if program.type in ACCESS else None


def _constant(program: Program, offset: int, size: int) -> int | None:
    """A field that is the same in every such run."""
    packet = Packet(buffer=bytes(ETH_HLEN + 40), ifindex=1)
    context: Any = XdpBuff(bytes(60)) if program.type == "xdp" else SkBuff(packet, program.type)
    value: int | None = context.load(offset, size)
    return value


def _values(program: Program, slots: dict[tuple[int, int], int]) -> dict[int, str] | None:
    """What each slot holds, as a value of `_each`; None if there is one that only Python knows."""
    name = _context_name(program)
    if name is None:
        return None
    fields = STRUCTS[name].fields
    held: dict[int, str] = {}
    for (offset, size), slot in slots.items():
        at = next((n for n, f in fields.items() if f.offset <= offset < f.offset + f.size * f.count), "")
        if at in _FRAME_FIELDS[name]:
            if (offset, size) != (fields[at].offset, 4) or (at != "len" and _constant(program, offset, size) is None):
                return None
            held[slot] = _FRAME_FIELDS[name][at]
        else:
            constant = None if at in _SOCKET_FIELDS else _constant(program, offset, size)
            if constant is None:
                return None
            held[slot] = str(constant)
    return held


def _is_plain(program: Program) -> bool:
    """Whether the program only reads its context, at known places, and calls no helper that does more."""
    instructions = program.spec.instructions
    source = source_of(program.code.linked) if program.code.linked is not None else None
    if source is None or not source.supported():
        return False
    starts = [*source.starts(), len(instructions)]
    for start, end in itertools.pairwise(starts):
        for pc, registers in follow(instructions, start, end, {}, lambda *_: None, start == 0).items():
            opcode, dst, src, _, imm = instructions[pc]
            if opcode == _CALL and not src and imm not in QUIET:
                return False
            in_context = {number for number, held in enumerate(registers) if held is not None and held.kind == CONTEXT}
            if opcode == _CALL:
                used = set(range(1, 6)) if src else set()
            elif opcode & 7 in (ebpf.ST, ebpf.STX):
                used = {dst, src, 0} if opcode & 7 == ebpf.STX else {dst}
            elif opcode & 7 == ebpf.ALU64 and opcode not in _FOLLOWED:
                used = {dst, src}
            else:
                used = set()
            if used & in_context:
                return False
    return True


def _each(program: Program, source: emit.Source, values: dict[int, str], scratch: int) -> str:
    """``@each(run, data, size, wirelen)``: what the program returns for a frame. `scratch` is where copies go, or 0."""
    xdp, access = program.type == "xdp", ACCESS.get(program.type)
    most = FRAME - HEADROOM - SHARED_INFO if xdp else MOST_DATA
    skipped = 0 if xdp or program.type in ("sched_cls", "sched_act") else ETH_HLEN
    direct = xdp or (access is not None and access.direct)
    writable = "%size0" if xdp or (access is not None and access.writes_packet) else "0"
    network = "call i16 @llvm.bswap.i16(i16 %type_raw)" if _LITTLE else "or i16 %type_raw, 0"
    swapped = {n: socket.htons(n) for n in (ETH_P_802_2, ETH_P_802_3)}
    text = f"""
declare i64 @llvm.umin.i64.dummy(i64, i64)
define i64 @each(ptr noalias %run, ptr %frame, i64 %size, i64 %wirelen) {{
entry:
  %long = icmp uge i64 %size, {ETH_HLEN}
  %short = icmp ule i64 %size, {most}
  %fits = and i1 %long, %short
  br i1 %fits, label %typed, label %pythons
typed:
  %type_p = getelementptr i8, ptr %frame, i64 12
  %type_raw = load i16, ptr %type_p, align 1
  %type = {network}
  %is4 = icmp eq i16 %type, 2048
  %is6 = icmp eq i16 %type, -31011
  %need4 = select i1 %is4, i64 {ETH_HLEN + 20}, i64 0
  %need = select i1 %is6, i64 {ETH_HLEN + 40}, i64 %need4
  %whole = icmp uge i64 %size, %need
  br i1 {"true" if xdp else "%whole"}, label %good, label %pythons
pythons:
  %status_p = getelementptr i64, ptr %run, i64 {WORD["status"]}
  store i64 {_PYTHONS}, ptr %status_p
  ret i64 0
good:
  %is_type = icmp uge i16 %type, 1536
  %raw_p = getelementptr i8, ptr %frame, i64 14
  %more = icmp uge i64 %size, 16
  %first_p = select i1 %more, ptr %raw_p, ptr %type_p
  %first = load i16, ptr %first_p, align 1
  %ones = icmp eq i16 %first, -1
  %raw = and i1 %ones, %more
  %length_type = select i1 %raw, i64 {swapped[ETH_P_802_3]}, i64 {swapped[ETH_P_802_2]}
  %wide_type = zext i16 %type_raw to i64
  %protocol = select i1 %is_type, i64 %wide_type, i64 %length_type
  %group = load i8, ptr %frame
  %group1 = and i8 %group, 1
  %is_group = icmp ne i8 %group1, 0
  %low = load i32, ptr %frame, align 1
  %high_p = getelementptr i8, ptr %frame, i64 4
  %high = load i16, ptr %high_p, align 1
  %low0 = icmp eq i32 %low, 0
  %high0 = icmp eq i16 %high, 0
  %zero = and i1 %low0, %high0
  %other = select i1 %zero, i64 {PACKET_HOST}, i64 {PACKET_OTHERHOST}
  %kind = select i1 %is_group, i64 {PACKET_MULTICAST}, i64 %other
  %size0 = sub i64 %size, {skipped}
  %data_end = add i64 %size0, {PACKET_ADDRESS}
"""
    if scratch:
        text += f"""
  %seen = inttoptr i64 {scratch} to ptr
  call void @llvm.memcpy.p0.p0.i64(ptr %seen, ptr %frame, i64 %size, i1 false)
"""
    else:
        text += "  %seen = getelementptr i8, ptr %frame, i64 0\n"
    text += f"""
  %at = ptrtoint ptr %seen to i64
  %at0 = add i64 %at, {skipped}
"""
    stores = {
        "data": "%at0",
        "size": "%size0",
        "length": "%size0",
        "fuel": str(program.budget),
        "buffer": "%at",
        "buffer_size": "%size",
        "slots_valid": "1",
        "tail_calls": "0",
    }
    for name, value in stores.items():
        text += f"  %p_{name} = getelementptr i64, ptr %run, i64 {WORD[name]}\n  store i64 {value}, ptr %p_{name}\n"
    for slot, value in values.items():
        text += f"  %slot{slot} = getelementptr i64, ptr %slots, i64 {slot}\n  store i64 {value}, ptr %slot{slot}\n"
    if direct:
        for word, value in enumerate((str(PACKET), "%at0", "%size0", writable)):
            text += f"  %entry{word} = getelementptr i64, ptr %table, i64 {4 * PACKET + word}\n"
            text += f"  store i64 {value}, ptr %entry{word}\n"
    if source.escapes:
        size = ebpf.STACK_SIZE * program.code.frames
        text += f"""
  %stack_w = getelementptr i64, ptr %run, i64 {WORD["stack"]}
  %stack = load ptr, ptr %stack_w
  call void @llvm.memset.p0.i64(ptr %stack, i8 0, i64 {size}, i1 false)
"""
    text += """
  %r = call i64 @f0(ptr %run, i64 0, i64 0, i64 0, i64 0, i64 0, i64 0)
  %value32 = and i64 %r, 4294967295
  ret i64 %value32
}
"""
    loads = "".join(
        f"  %{name}_w = getelementptr i64, ptr %run, i64 {WORD[name]}\n  %{name} = load ptr, ptr %{name}_w\n"
        for name in ("slots", "table")
    )
    return text.replace("declare i64 @llvm.umin.i64.dummy(i64, i64)\n", "").replace("good:\n", f"good:\n{loads}", 1)


class NativeTestRuns:
    """A program's test runs over many frames."""

    def __init__(self, program: Program, source: emit.Source, text: str, values: dict[int, str]) -> None:
        self._source, self._code = source, program.code
        writes = program.type == "xdp" or ACCESS[program.type].writes_packet
        #: Where frames are copied that the program may write into; one run at a time.
        self._scratch = bytearray(FRAME) if writes else None
        scratch, self._held = host_address(self._scratch) if self._scratch is not None else (0, None)
        each = _each(program, source, values, scratch)
        self._native = NativeProgram(program.code, source, Compiled(text, large=source.large))
        self._loops = Loops(self._native.within(text) + each, "values", asks=True)
        self._busy = Lock()

    def run(self, program: Program, packets: list[bytes]) -> array[int]:
        """The values of the first packets, up to the first that Python must run."""
        if not self._busy.acquire(blocking=False):
            # What Python does for a run, or another thread meanwhile, runs the program, too.
            return array("I")
        try:
            out = array("I", bytes(4 * len(packets)))
            with self._native.batch(self._code, program, ETH_HLEN, 0) as session:
                done = self._loops.over_list(session, packets, numbers(None, len(packets)), out)
            return out[:done]
        finally:
            self._busy.release()


def native_test_runs(program: Program) -> NativeTestRuns | None:
    """The program's test runs in native code, if it is one that can be run so."""
    if not _is_plain(program) or program.code.linked is None:
        return None
    source = source_of(program.code.linked)
    text = emit.program(source, CALLBACKS)
    values = _values(program, source.slots)
    return None if values is None else NativeTestRuns(program, source, text, values)
