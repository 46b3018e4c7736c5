"""Random programs of every type that has a test run: rows of pieces that reach into the packet, maps and helpers.

Each piece begins from the context in R6 and mixes what it found into R7, so that whatever went wrong shows: in the
packet and the context that come out, in the return value, in the program's maps.

How to enter a helper: add a line to `PACKET_CALLS`, `MAP_CALLS` or `SYSTEM_CALLS`, its name with a function that writes
the arguments and the call (`generate_packet_calls.calls` makes most of them from a list). What Linux leaves open of its
result is written over in the piece, and what it fills in is mixed in with `mix`. A map that it needs is a line in
`generate_maps.MAPS`; if programs change it, `case_maps` must know how to read it. A helper that cannot be compared this
way has a line in `compared_elsewhere` that says why, and which test compares it. A helper of the emulator's that is in
none of these tables fails the tests.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from functools import cache
from random import Random

from kbpf.emulator import helpers, test_runs
from kbpf.emulator.context import ACCESS
from kbpf.emulator.helpers.allowed import SLEEPING
from kbpf.emulator.interpreter import TAIL_CALL_HELPER
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.specs import ProgramSpec
from kbpf.testing import compared_elsewhere, generate_packets
from kbpf.testing.generate_ebpf import EbpfCase
from kbpf.testing.generate_ebpf import run as run_of_socket_filter
from kbpf.testing.generate_map_calls import MAP_CALLS
from kbpf.testing.generate_packet_calls import PACKET_CALLS
from kbpf.testing.generate_pieces import (
    ADD,
    ADD_X,
    CONTEXT,
    EXIT,
    FILLED,
    MIX,
    MOV,
    MOV_X,
    SIZES,
    Draft,
    Piece,
    load,
    mix,
    move,
    put,
    store,
    the_value,
)  # fmt: skip
from kbpf.testing.generate_system_calls import SYSTEM_CALLS
from kbpf.uapi.structs import STRUCTS

#: All that have a test run and are not compared elsewhere.
TYPES = tuple(type for type in test_runs.RUNNERS if type not in compared_elsewhere.TYPES)
CALLS: dict[str, Callable[[Draft], Piece]] = {**PACKET_CALLS, **MAP_CALLS, **SYSTEM_CALLS}
_BUFF, _LOOKUP = STRUCTS["__sk_buff"].fields, STRUCTS["bpf_sk_lookup"].fields
_KEYS = STRUCTS["bpf_flow_keys"]
#: What Linux leaves open, and pointers.
_NOT_LOADED = {"data", "data_end", "data_meta", "hash", "napi_id", "flow_keys", "sk"}
#: What a raw tracepoint can have.
_ARGUMENTS = 12
#: Where programs of a type expect to be attached, if it matters.
ATTACH_TYPES = {
    "cgroup_skb": "cgroup_inet_ingress",
    "sk_lookup": "sk_lookup",
}


def reachable(program_type: str) -> set[str]:
    """The helpers that the emulator has for programs of a type, by name."""
    numbers = helpers.ALLOWED[program_type] & {*helpers.functions(program_type), TAIL_CALL_HELPER} - SLEEPING
    return {helpers.NAMES[number] for number in numbers}


@cache
def _makers(program_type: str) -> list[Callable[[Draft], Piece]]:
    wanted = generated(program_type)
    return [make for name, make in CALLS.items() if name.partition(" ")[0] in wanted]


def generated(program_type: str) -> set[str]:
    """The helpers that random programs of a type call."""
    names = {name.partition(" ")[0] for name in CALLS}
    return {name for name in reachable(program_type) & names if not compared_elsewhere.where(name, program_type)}


class Writer(Draft):
    """Writes a program of one of `TYPES`."""

    def __init__(self, rng: Random, program_type: str) -> None:
        super().__init__(rng, program_type)
        self.layout = STRUCTS["xdp_md"].fields if program_type == "xdp" else _BUFF
        access = ACCESS.get(program_type)
        self.reads_packet = program_type in ("xdp", "flow_dissector") or (access is not None and access.direct)
        self.writes_packet = program_type == "xdp" or (access is not None and access.writes_packet)
        self.pieces: list[Callable[[], Piece]] = [self.call, self.call, self.call, self.call]
        if self.type == "flow_dissector":
            self.pieces += [self.keys, self.keys]
        else:
            self.pieces += [self.load, self.load]
        if access is not None:
            self.pieces.append(self.field)
            if access.write:
                self.pieces.append(self.store)
        if self.reads_packet:
            self.pieces += [self.read, self.read]
        if self.writes_packet:
            self.pieces += [self.write, self.write]
        if self.type in ("socket_filter", "sched_cls", "sched_act"):
            self.pieces.append(self.absolute)

    def program(self) -> Piece:
        rng = self.rng
        out = [Instruction(MOV_X, CONTEXT, 1), *move(MIX, rng.getrandbits(31))]
        for offset in range(-FILLED, 0, 8):
            out += put(offset, rng.getrandbits(31))
        for _ in range(rng.randrange(2, 14)):
            out += rng.choice(self.pieces)()
        out += [*the_value(1, 0), *store(1, MIX)]
        if self.type in ("xdp", "flow_dissector"):
            return [*out, Instruction(MOV_X, 0, MIX), EXIT]
        if self.type in ACCESS:
            out += store(CONTEXT, MIX, _BUFF["cb"].offset)
        return [*out, *move(0, 1), EXIT]

    # Pieces.

    def load(self) -> Piece:
        """A number of the context."""
        if self.type == "raw_tracepoint":
            return [*load(2, CONTEXT, 8 * self.rng.randrange(_ARGUMENTS)), *mix(2)]
        if self.type == "xdp":
            field = self.rng.choice(("ingress_ifindex", "rx_queue_index"))
            return [Instruction(ebpf.LDX | ebpf.MEM | ebpf.W, 2, CONTEXT, self.layout[field].offset), *mix(2)]
        if self.type == "sk_lookup":
            name = self.rng.choice([name for name in _LOOKUP if name not in ("sk", "cookie")])
            offset, whole = _LOOKUP[name].offset + 4 * self.rng.randrange(_LOOKUP[name].count), 4
        else:
            name = self.rng.choice(sorted(ACCESS[self.type].read - _NOT_LOADED))
            offset, whole = self.layout[name].offset, self.layout[name].size
        size = whole if whole != 4 else self.rng.choice((1, 2, 4))
        at = offset if whole != 4 else offset + self.rng.randrange(0, 4, size)
        return [Instruction(ebpf.LDX | ebpf.MEM | SIZES[size], 2, CONTEXT, at), *mix(2)]

    def field(self) -> Piece:
        """A word of the control block."""
        size = self.rng.choice((1, 2, 4, 8))
        at = self.layout["cb"].offset + self.rng.randrange(0, 20 - size + 1, size)
        return [Instruction(ebpf.LDX | ebpf.MEM | SIZES[size], 2, CONTEXT, at), *mix(2)]

    def store(self) -> Piece:
        name = self.rng.choice(sorted(ACCESS[self.type].write))
        size = self.layout[name].size
        return [
            Instruction(MOV, 2, 0, 0, self.rng.getrandbits(self.rng.choice((8, 16, 31)))),
            Instruction(ebpf.STX | ebpf.MEM | SIZES[size], CONTEXT, 2, self.layout[name].offset),
        ]

    def keys(self) -> Piece:
        """Read or change what a flow dissector fills in."""
        size = self.rng.choice((1, 2, 4, 8))
        at = self.rng.randrange(0, _KEYS.size - size + 1, size)
        out = load(2, CONTEXT, _BUFF["flow_keys"].offset)
        if self.rng.random() < 0.5:
            return [*out, *load(3, 2, at, size), *mix(3)]
        return [*out, Instruction(ebpf.STX | ebpf.MEM | SIZES[size], 2, MIX, at)]

    def _bounded(self, inside: Piece, reach: int) -> Piece:
        """R2 points to the packet, at an offset that may be computed, and `reach` bytes lie behind it."""
        start = "data_meta" if self.type in ("xdp", "sched_cls") and self.rng.random() < 0.2 else "data"
        end = "data" if start == "data_meta" else "data_end"
        out = [
            Instruction(ebpf.LDX | ebpf.MEM | ebpf.W, 2, CONTEXT, self.layout[start].offset),
            Instruction(ebpf.LDX | ebpf.MEM | ebpf.W, 3, CONTEXT, self.layout[end].offset),
        ]
        if self.rng.random() < 0.4:
            out += [
                Instruction(MOV_X, 4, MIX),
                Instruction(ebpf.ALU64 | ebpf.AND, 4, 0, 0, self.rng.choice((3, 15, 63))),
                Instruction(ADD_X, 2, 4),
            ]
        return [
            *out,
            Instruction(MOV_X, 4, 2),
            Instruction(ADD, 4, 0, 0, reach),
            Instruction(ebpf.JMP | ebpf.JGT | ebpf.X, 4, 3, len(inside)),
            *inside,
        ]

    def read(self) -> Piece:
        size = self.rng.choice((1, 2, 4, 8))
        at = self.rng.choice((0, 12, self.rng.randrange(60)))
        opcode = ebpf.LDX | (ebpf.MEMSX if size < 8 and self.rng.random() < 0.2 else ebpf.MEM) | SIZES[size]
        return self._bounded([Instruction(opcode, 5, 2, at), *mix(5)], at + size)

    def write(self) -> Piece:
        size = self.rng.choice((1, 2, 4, 8))
        at = self.rng.choice((0, 12, 16, self.rng.randrange(60)))
        if self.rng.random() < 0.5:
            inside = Instruction(ebpf.STX | ebpf.MEM | SIZES[size], 2, MIX, at)
        else:
            inside = Instruction(ebpf.ST | ebpf.MEM | SIZES[size], 2, 0, at, self.rng.getrandbits(31))
        return self._bounded([inside], at + size)

    def absolute(self) -> Piece:
        size = self.rng.choice((ebpf.B, ebpf.H, ebpf.W))
        base = self.rng.choice((0, 0, 0, -0x100000, -0x200000))
        return [Instruction(ebpf.LD | ebpf.ABS | size, 0, 0, 0, base + self.rng.randrange(20)), *mix(0)]

    def call(self) -> Piece:
        return [*self.rng.choice(_makers(self.type))(self), *mix(0)]


def generate(rng: Random, program_type: str) -> EbpfCase:
    """A program of that type, and its runs."""
    writer = Writer(rng, program_type)
    spec = ProgramSpec(
        type=program_type,
        **writer.linked(writer.program()),
        expected_attach_type=ATTACH_TYPES.get(program_type),
        maps=tuple(writer.maps),
    )
    make = RUNS.get(program_type, run_of_socket_filter)
    return EbpfCase(spec=spec, runs=tuple(make(rng) for _ in range(rng.randrange(1, 4))))


def _run_of_xdp(rng: Random) -> tuple[bytes, bytes]:
    frame = generate_packets.frame(rng, vlan=True)
    if rng.random() < 0.1:
        frame += rng.randbytes(rng.choice((3000, 4000, 9000)))
    metadata = rng.choice((0, 0, 4, 8, 32))
    if not metadata and rng.random() < 0.5:
        return frame, b""
    data = rng.randbytes(metadata) + frame
    return data, struct.pack("=6I", metadata, len(data), 0, rng.choice((0, 1)), 0, 0)


def _run_of_flow_dissector(rng: Random) -> tuple[bytes, bytes]:
    flags = bytearray(_KEYS.size)
    flags[_KEYS.fields["flags"].offset] = rng.randrange(8)
    return generate_packets.frame(rng, vlan=True), rng.choice((b"", bytes(flags)))


def _run_of_sk_lookup(rng: Random) -> tuple[bytes, bytes]:
    """Who looks for a socket; there is no packet."""
    context = bytearray(rng.randbytes(STRUCTS["bpf_sk_lookup"].size))
    given = {
        "sk": 0,
        "family": rng.choice((2, 2, 10, 10, 3)),
        "protocol": rng.choice((6, 17)),
        "local_port": rng.getrandbits(16),
    }
    for name, value in given.items():
        field = _LOOKUP[name]
        context[field.offset : field.offset + field.size] = value.to_bytes(field.size, sys.byteorder)
    context[_LOOKUP["ingress_ifindex"].offset :] = bytes(len(context) - _LOOKUP["ingress_ifindex"].offset)
    return b"", bytes(context)


def _run_of_raw_tracepoint(rng: Random) -> tuple[bytes, bytes]:
    """Arguments, which are numbers."""
    return b"", rng.randbytes(8 * _ARGUMENTS)


#: What programs of a type are run over, (data, context), where that is not what socket filters have.
RUNS: dict[str, Callable[[Random], tuple[bytes, bytes]]] = {
    "xdp": _run_of_xdp,
    "flow_dissector": _run_of_flow_dissector,
    "sk_lookup": _run_of_sk_lookup,
    "raw_tracepoint": _run_of_raw_tracepoint,
}
