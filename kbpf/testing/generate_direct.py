"""Random programs that reach into packets directly, for traffic control, XDP and their kin.

A program is a row of pieces. Each begins from the context in R6 and mixes what it found into R7, so that whatever went
wrong shows: in the packet and the context that come out, in ``cb`` or in the return value.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from random import Random
from typing import TypeAlias

from kbpf.emulator.context import ACCESS
from kbpf.emulator.helpers.allowed import ALLOWED
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.specs import ProgramSpec
from kbpf.testing import generate_packets
from kbpf.testing.generate_ebpf import EbpfCase
from kbpf.testing.generate_ebpf import run as run_of_socket_filter
from kbpf.uapi import constants as uapi
from kbpf.uapi.enums import HELPERS
from kbpf.uapi.structs import STRUCTS

TYPES = ("sched_cls", "xdp", "sched_act", "cgroup_skb", "lwt_xmit", "lwt_in")
_CONTEXT, _MIX = 6, 7
_STACK = 64
_SIZES = {1: ebpf.B, 2: ebpf.H, 4: ebpf.W, 8: ebpf.DW}
_MOV, _MOV_X = ebpf.ALU64 | ebpf.MOV, ebpf.ALU64 | ebpf.MOV | ebpf.X
_ADD, _ADD_X = ebpf.ALU64 | ebpf.ADD, ebpf.ALU64 | ebpf.ADD | ebpf.X

Piece: TypeAlias = "list[Instruction]"


def _mix(register: int) -> Piece:
    return [
        Instruction(ebpf.ALU64 | ebpf.MUL, _MIX, 0, 0, 0x1E3779B1),
        Instruction(ebpf.ALU64 | ebpf.XOR | ebpf.X, _MIX, register),
    ]


class _Writer:
    def __init__(self, rng: Random, program_type: str) -> None:
        self.rng = rng
        self.type = program_type
        self.layout = STRUCTS["xdp_md" if program_type == "xdp" else "__sk_buff"].fields
        self.writes_packet = program_type == "xdp" or ACCESS[program_type].writes_packet
        self.helpers = [
            make for name, make in _CALLS.items() if HELPERS[name.partition(" ")[0]] in ALLOWED[program_type]
        ]

    def program(self) -> list[Instruction]:
        rng = self.rng
        out = [Instruction(_MOV_X, _CONTEXT, 1), Instruction(_MOV, _MIX, 0, 0, rng.getrandbits(31))]
        for offset in range(-_STACK, 0, 8):
            out.append(Instruction(ebpf.ST | ebpf.MEM | ebpf.DW, ebpf.FP, 0, offset, rng.getrandbits(31)))
        pieces: list[Callable[[], Piece]] = [
            self.load,
            self.load,
            self.read,
            self.read,
            self.call,
            self.call,
            self.call,
        ]
        if self.type != "xdp":
            pieces += [self.field, self.store]
        if self.writes_packet:
            pieces += [self.write, self.write]
        if self.type.startswith("sched"):
            pieces.append(self.absolute)
        for _ in range(rng.randrange(2, 14)):
            out += rng.choice(pieces)()
        if self.type == "xdp":
            out.append(Instruction(_MOV_X, 0, _MIX))
        else:
            out.append(Instruction(ebpf.STX | ebpf.MEM | ebpf.DW, _CONTEXT, _MIX, self.layout["cb"].offset))
            out.append(Instruction(_MOV, 0, 0, 0, 1))
        return [*out, Instruction(ebpf.JMP | ebpf.EXIT)]

    # Pieces.

    def load(self) -> Piece:
        """A number of the context."""
        if self.type == "xdp":
            field = self.rng.choice(("ingress_ifindex", "rx_queue_index"))
            return [Instruction(ebpf.LDX | ebpf.MEM | ebpf.W, 2, _CONTEXT, self.layout[field].offset), *_mix(2)]
        name = self.rng.choice(sorted(ACCESS[self.type].read - {"data", "data_end", "data_meta", "hash", "napi_id"}))
        offset, whole = self.layout[name].offset, self.layout[name].size
        size = whole if whole != 4 else self.rng.choice((1, 2, 4))
        at = offset if whole != 4 else offset + self.rng.randrange(0, 4, size)
        return [Instruction(ebpf.LDX | ebpf.MEM | _SIZES[size], 2, _CONTEXT, at), *_mix(2)]

    def field(self) -> Piece:
        """A word of the control block."""
        size = self.rng.choice((1, 2, 4, 8))
        at = self.layout["cb"].offset + self.rng.randrange(0, 20 - size + 1, size)
        return [Instruction(ebpf.LDX | ebpf.MEM | _SIZES[size], 2, _CONTEXT, at), *_mix(2)]

    def store(self) -> Piece:
        name = self.rng.choice(sorted(ACCESS[self.type].write))
        size = self.layout[name].size
        return [
            Instruction(_MOV, 2, 0, 0, self.rng.getrandbits(self.rng.choice((8, 16, 31)))),
            Instruction(ebpf.STX | ebpf.MEM | _SIZES[size], _CONTEXT, 2, self.layout[name].offset),
        ]

    def _bounded(self, inside: Piece, reach: int) -> Piece:
        """R2 points to the packet, at an offset that may be computed, and `reach` bytes lie behind it."""
        start = "data_meta" if self.type in ("xdp", "sched_cls") and self.rng.random() < 0.2 else "data"
        end = "data" if start == "data_meta" else "data_end"
        out = [
            Instruction(ebpf.LDX | ebpf.MEM | ebpf.W, 2, _CONTEXT, self.layout[start].offset),
            Instruction(ebpf.LDX | ebpf.MEM | ebpf.W, 3, _CONTEXT, self.layout[end].offset),
        ]
        if self.rng.random() < 0.4:
            out += [
                Instruction(_MOV_X, 4, _MIX),
                Instruction(ebpf.ALU64 | ebpf.AND, 4, 0, 0, self.rng.choice((3, 15, 63))),
                Instruction(_ADD_X, 2, 4),
            ]
        return [
            *out,
            Instruction(_MOV_X, 4, 2),
            Instruction(_ADD, 4, 0, 0, reach),
            Instruction(ebpf.JMP | ebpf.JGT | ebpf.X, 4, 3, len(inside)),
            *inside,
        ]

    def read(self) -> Piece:
        size = self.rng.choice((1, 2, 4, 8))
        at = self.rng.choice((0, 12, self.rng.randrange(60)))
        opcode = ebpf.LDX | (ebpf.MEMSX if size < 8 and self.rng.random() < 0.2 else ebpf.MEM) | _SIZES[size]
        return self._bounded([Instruction(opcode, 5, 2, at), *_mix(5)], at + size)

    def write(self) -> Piece:
        size = self.rng.choice((1, 2, 4, 8))
        at = self.rng.choice((0, 12, 16, self.rng.randrange(60)))
        if self.rng.random() < 0.5:
            inside = Instruction(ebpf.STX | ebpf.MEM | _SIZES[size], 2, _MIX, at)
        else:
            inside = Instruction(ebpf.ST | ebpf.MEM | _SIZES[size], 2, 0, at, self.rng.getrandbits(31))
        return self._bounded([inside], at + size)

    def absolute(self) -> Piece:
        size = self.rng.choice((ebpf.B, ebpf.H, ebpf.W))
        base = self.rng.choice((0, 0, 0, -0x100000, -0x200000))
        return [Instruction(ebpf.LD | ebpf.ABS | size, 0, 0, 0, base + self.rng.randrange(20)), *_mix(0)]

    def call(self) -> Piece:
        return [*self.rng.choice(self.helpers)(self), *_mix(0)]

    # Arguments.

    def offset(self) -> int:
        return self.rng.choice((0, 1, 12, 14, 16, 24, self.rng.randrange(100), self.rng.randrange(200), 0xFFFF, -1))


#: Helpers that put something onto the stack, of which a word is looked at.
_FILLING = (
    "skb_load_bytes",
    "skb_load_bytes_relative",
    "xdp_load_bytes",
    "skb_get_tunnel_key",
    "skb_get_tunnel_opt",
)


def _calls(name: str, *arguments: Callable[[_Writer], int] | str) -> Callable[[_Writer], Piece]:
    """A call; an argument is ``"context"``, ``"stack"`` with its size as the next one, or makes a number."""

    def make(writer: _Writer) -> Piece:
        rng, out, size = writer.rng, list[Instruction](), 0
        for register, argument in enumerate(arguments, 1):
            if argument == "context":
                out.append(Instruction(_MOV_X, register, _CONTEXT))
            elif argument == "mix":
                out.append(Instruction(_MOV_X, register, _MIX))
            elif argument == "stack":
                size = rng.choice((1, 2, 4, 8, 14, 20, 40))
                out += [
                    Instruction(_MOV_X, register, ebpf.FP),
                    Instruction(_ADD, register, 0, 0, -rng.choice((40, 64))),
                ]
            elif argument == "tunnel":
                size = rng.choice((44, 44, 44, 44, 42, 28, 40, 24, 12, 8))
                out += [Instruction(_MOV_X, register, ebpf.FP), Instruction(_ADD, register, 0, 0, -64)]
                # Mostly neither a flow label nor an extension.
                if rng.random() < 0.8:
                    out.append(Instruction(ebpf.ST | ebpf.MEM | ebpf.H, ebpf.FP, 0, 22 - 64))
                if rng.random() < 0.8:
                    out.append(Instruction(ebpf.ST | ebpf.MEM | ebpf.W, ebpf.FP, 0, 24 - 64))
            elif argument == "words":
                size = rng.choice((0, 4, 8, 16, 20, 40, 6, 7))
                out += [
                    Instruction(_MOV_X, register, ebpf.FP),
                    Instruction(_ADD, register, 0, 0, -rng.choice((40, 64))),
                ]
            elif argument == "size":
                out.append(Instruction(_MOV, register, 0, 0, size))
            else:
                assert not isinstance(argument, str)
                out.append(Instruction(_MOV, register, 0, 0, argument(writer)))
        out.append(Instruction(ebpf.JMP | ebpf.CALL, 0, 0, 0, HELPERS[name]))
        if name in _FILLING:
            out += [*_mix(0), Instruction(ebpf.LDX | ebpf.MEM | ebpf.DW, 0, ebpf.FP, -rng.choice((24, 32, 40, 56, 64)))]
        return out

    return make


def _of(*values: int) -> Callable[[_Writer], int]:
    return lambda writer: writer.rng.choice(values)


def _offset(writer: _Writer) -> int:
    return writer.offset()


def _length(writer: _Writer) -> int:
    return writer.rng.choice((0, 10, 14, 20, 34, 60, 100, 300, 4000, 16064, 16065, writer.rng.randrange(200)))


def _difference(writer: _Writer) -> int:
    return writer.rng.choice(
        (0, 4, -4, 8, 14, -14, 20, -20, 40, 64, -64, 300, -256, 5000, writer.rng.randrange(-80, 80))
    )


_CHECKSUM_FLAGS = (
    0,
    2,
    4,
    2 | uapi.BPF_F_PSEUDO_HDR,
    4 | uapi.BPF_F_MARK_MANGLED_0,
    1,
    0x100,
    4 | uapi.BPF_F_MARK_ENFORCE,
)
_ROOM_FLAGS = (
    0,
    0,
    0,
    uapi.BPF_F_ADJ_ROOM_FIXED_GSO,
    uapi.BPF_F_ADJ_ROOM_ENCAP_L3_IPV4,
    uapi.BPF_F_ADJ_ROOM_ENCAP_L3_IPV6 | uapi.BPF_F_ADJ_ROOM_ENCAP_L4_UDP,
    uapi.BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | uapi.BPF_F_ADJ_ROOM_ENCAP_L4_GRE,
    uapi.BPF_F_ADJ_ROOM_NO_CSUM_RESET,
    uapi.BPF_F_ADJ_ROOM_DECAP_L3_IPV4,
    uapi.BPF_F_ADJ_ROOM_DECAP_L3_IPV6,
    0x400,
)
_TUNNEL_FLAGS = (0, 0, 1, 2, 4, 8, 16, 31, 32)
_CALLS: dict[str, Callable[[_Writer], Piece]] = {
    "skb_load_bytes": _calls("skb_load_bytes", "context", _offset, "stack", "size"),
    "skb_load_bytes_relative": _calls("skb_load_bytes_relative", "context", _offset, "stack", "size", _of(0, 1, 2)),
    "skb_store_bytes": _calls("skb_store_bytes", "context", _offset, "stack", "size", _of(0, 0, 1, 2, 3, 4)),
    "skb_pull_data": _calls("skb_pull_data", "context", _length),
    "l3_csum_replace": _calls("l3_csum_replace", "context", _offset, "mix", "mix", _of(*_CHECKSUM_FLAGS)),
    "l3_csum_replace difference": _calls("l3_csum_replace", "context", _offset, _of(0), "mix", _of(0)),
    "l4_csum_replace": _calls("l4_csum_replace", "context", _offset, "mix", "mix", _of(*_CHECKSUM_FLAGS)),
    "l4_csum_replace difference": _calls("l4_csum_replace", "context", _offset, _of(0), "mix", _of(0, 16, 32)),
    "csum_diff": _calls("csum_diff", "words", "size", "words", "size", "mix"),
    "csum_diff seed": _calls("csum_diff", "words", "size", "words", "size", _of(0, 1, -1)),
    "csum_update": _calls("csum_update", "context", "mix"),
    "csum_level": _calls("csum_level", "context", _of(0, 1, 2, 3, 4)),
    "skb_vlan_push": _calls("skb_vlan_push", "context", _of(0x0081, 0xA888, 0), _of(0, 5, 0x2005, 0xFFFF)),
    "skb_vlan_pop": _calls("skb_vlan_pop", "context"),
    "skb_change_type": _calls("skb_change_type", "context", _of(0, 1, 2, 3, 4, 7)),
    "skb_change_head": _calls("skb_change_head", "context", _of(0, 14, 40, 100, 0x4000), _of(0, 0, 0, 1)),
    "skb_change_tail": _calls("skb_change_tail", "context", _length, _of(0, 0, 0, 0, 1)),
    "skb_change_proto": _calls("skb_change_proto", "context", _of(0xDD86, 0x0008, 0x0608), _of(0, 0, 0, 1)),
    "skb_adjust_room": _calls("skb_adjust_room", "context", _difference, _of(0, 1, 1, 2), _of(*_ROOM_FLAGS)),
    "skb_ecn_set_ce": _calls("skb_ecn_set_ce", "context"),
    "set_hash": _calls("set_hash", "context", "mix"),
    "set_hash_invalid": _calls("set_hash_invalid", "context"),
    "redirect": _calls("redirect", _of(1), _of(0, 1, 2, 4)),
    "redirect_peer": _calls("redirect_peer", _of(1), _of(0, 1)),
    "skb_set_tunnel_key": _calls("skb_set_tunnel_key", "context", "tunnel", "size", _of(*_TUNNEL_FLAGS)),
    "skb_get_tunnel_key": _calls("skb_get_tunnel_key", "context", "tunnel", "size", _of(0, 0, 1, 16, 17, 2)),
    "skb_set_tunnel_opt": _calls("skb_set_tunnel_opt", "context", "stack", "size"),
    "skb_get_tunnel_opt": _calls("skb_get_tunnel_opt", "context", "stack", "size"),
    "xdp_adjust_head": _calls("xdp_adjust_head", "context", _difference),
    "xdp_adjust_tail": _calls("xdp_adjust_tail", "context", _difference),
    "xdp_adjust_meta": _calls("xdp_adjust_meta", "context", _difference),
    "xdp_get_buff_len": _calls("xdp_get_buff_len", "context"),
    "xdp_load_bytes": _calls("xdp_load_bytes", "context", _offset, "stack", "size"),
    "xdp_store_bytes": _calls("xdp_store_bytes", "context", _offset, "stack", "size"),
}


def generate(rng: Random, program_type: str) -> EbpfCase:
    """A program of that type, and its runs."""
    attach_type = "cgroup_inet_ingress" if program_type == "cgroup_skb" else None
    spec = ProgramSpec(
        type=program_type,
        instructions=tuple(_Writer(rng, program_type).program()),
        expected_attach_type=attach_type,
    )
    make = _run_of_xdp if program_type == "xdp" else run_of_socket_filter
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


def called(case: EbpfCase) -> set[str]:
    """The helpers that a program calls, by name."""
    numbers = {i.imm for i in case.spec.instructions if i.opcode == ebpf.JMP | ebpf.CALL}
    return {name for name, number in HELPERS.items() if number in numbers}


def required() -> set[str]:
    """What a long run covers: each helper, called by each type that may."""
    names = {name.partition(" ")[0] for name in _CALLS}
    return {f"{kind} {name}" for kind in TYPES for name in names if HELPERS[name] in ALLOWED[kind]}
