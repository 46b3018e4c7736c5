"""Calls of helpers over packets in directly written programs."""

from __future__ import annotations

import struct
from collections.abc import Callable

from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.testing.generate_pieces import (
    ADD,
    CONTEXT,
    KEY,
    MIX,
    MOV,
    MOV_X,
    Draft,
    Piece,
    call,
    copy,
    load,
    mix,
    move,
    put,
    put_bytes,
    stack,
)
from kbpf.uapi import constants as uapi
from kbpf.uapi.enums import HELPERS

#: Helpers that put something onto the stack, of which a word is looked at.
_FILLING = (
    "skb_load_bytes",
    "skb_load_bytes_relative",
    "xdp_load_bytes",
    "skb_get_tunnel_key",
    "skb_get_tunnel_opt",
)


def calls(name: str, *arguments: Callable[[Draft], int] | str) -> Callable[[Draft], Piece]:
    """A call; an argument is ``"context"``, ``"stack"`` with its size as the next one, or makes a number."""

    def make(draft: Draft) -> Piece:
        rng, out, size = draft.rng, list[Instruction](), 0
        for register, argument in enumerate(arguments, 1):
            if argument == "context":
                out.append(Instruction(MOV_X, register, CONTEXT))
            elif argument == "mix":
                out.append(Instruction(MOV_X, register, MIX))
            elif argument == "stack":
                size = rng.choice((1, 2, 4, 8, 14, 20, 40))
                out += [
                    Instruction(MOV_X, register, ebpf.FP),
                    Instruction(ADD, register, 0, 0, -rng.choice((40, 64))),
                ]
            elif argument == "tunnel":
                size = rng.choice((44, 44, 44, 44, 42, 28, 40, 24, 12, 8))
                out += [Instruction(MOV_X, register, ebpf.FP), Instruction(ADD, register, 0, 0, -64)]
                # Mostly neither a flow label nor an extension.
                if rng.random() < 0.8:
                    out.append(Instruction(ebpf.ST | ebpf.MEM | ebpf.H, ebpf.FP, 0, 22 - 64))
                if rng.random() < 0.8:
                    out.append(Instruction(ebpf.ST | ebpf.MEM | ebpf.W, ebpf.FP, 0, 24 - 64))
            elif argument == "words":
                size = rng.choice((0, 4, 8, 16, 20, 40, 6, 7))
                out += [
                    Instruction(MOV_X, register, ebpf.FP),
                    Instruction(ADD, register, 0, 0, -rng.choice((40, 64))),
                ]
            elif argument == "size":
                out.append(Instruction(MOV, register, 0, 0, size))
            else:
                assert not isinstance(argument, str)
                out.append(Instruction(MOV, register, 0, 0, argument(draft)))
        out.append(Instruction(ebpf.JMP | ebpf.CALL, 0, 0, 0, HELPERS[name]))
        if name in _FILLING:
            out += [*mix(0), Instruction(ebpf.LDX | ebpf.MEM | ebpf.DW, 0, ebpf.FP, -rng.choice((24, 32, 40, 56, 64)))]
        return out

    return make


def _of(*values: int) -> Callable[[Draft], int]:
    return lambda draft: draft.rng.choice(values)


def _offset(draft: Draft) -> int:
    rng = draft.rng
    return rng.choice((0, 1, 12, 14, 16, 24, rng.randrange(100), rng.randrange(200), 0xFFFF, -1))


def _length(draft: Draft) -> int:
    return draft.rng.choice((0, 10, 14, 20, 34, 60, 100, 300, 4000, 16064, 16065, draft.rng.randrange(200)))


def _difference(draft: Draft) -> int:
    return draft.rng.choice((0, 4, -4, 8, 14, -14, 20, -20, 40, 64, -64, 300, -256, 5000, draft.rng.randrange(-80, 80)))


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


def _route(draft: Draft) -> Piece:
    """Questions that no route answers: of an unknown family, for a device that is not there, not whole."""
    rng = draft.rng
    question = struct.pack("=BBHHHI", rng.choice((2, 10, 3)), rng.choice((6, 17)), 0, 0, rng.choice((0, 1000)), 99)
    size = rng.choice((64, 64, 64, 60))
    flags = rng.choice((0, 1, 2, 4, 16, 64))
    return [
        *put_bytes(KEY, question.ljust(64, b"\1")), *copy(1, CONTEXT), *stack(2, KEY), *move(3, size), *move(4, flags),
        *call("fib_lookup"), *mix(0), *load(0, ebpf.FP, KEY),
    ]  # fmt: skip


def _fits(draft: Draft) -> Piece:
    rng = draft.rng
    return [
        *put(KEY, rng.choice((0, 0, 100, 65536, 65537)), 4), *put(KEY + 4, 0, 4), *copy(1, CONTEXT),
        *move(2, rng.choice((0, 1, 99))), *stack(3, KEY), *move(4, _difference(draft)),
        *move(5, rng.choice((0, 0, 0, 1, 2))), *call("check_mtu"), *mix(0), *load(0, ebpf.FP, KEY),
    ]  # fmt: skip


PACKET_CALLS: dict[str, Callable[[Draft], Piece]] = {
    "skb_load_bytes": calls("skb_load_bytes", "context", _offset, "stack", "size"),
    "skb_load_bytes_relative": calls("skb_load_bytes_relative", "context", _offset, "stack", "size", _of(0, 1, 2)),
    "skb_store_bytes": calls("skb_store_bytes", "context", _offset, "stack", "size", _of(0, 0, 1, 2, 3, 4)),
    "skb_pull_data": calls("skb_pull_data", "context", _length),
    "l3_csum_replace": calls("l3_csum_replace", "context", _offset, "mix", "mix", _of(*_CHECKSUM_FLAGS)),
    "l3_csum_replace difference": calls("l3_csum_replace", "context", _offset, _of(0), "mix", _of(0)),
    "l4_csum_replace": calls("l4_csum_replace", "context", _offset, "mix", "mix", _of(*_CHECKSUM_FLAGS)),
    "l4_csum_replace difference": calls("l4_csum_replace", "context", _offset, _of(0), "mix", _of(0, 16, 32)),
    "csum_diff": calls("csum_diff", "words", "size", "words", "size", "mix"),
    "csum_diff seed": calls("csum_diff", "words", "size", "words", "size", _of(0, 1, -1)),
    "csum_update": calls("csum_update", "context", "mix"),
    "csum_level": calls("csum_level", "context", _of(0, 1, 2, 3, 4)),
    "skb_vlan_push": calls("skb_vlan_push", "context", _of(0x0081, 0xA888, 0), _of(0, 5, 0x2005, 0xFFFF)),
    "skb_vlan_pop": calls("skb_vlan_pop", "context"),
    "skb_change_type": calls("skb_change_type", "context", _of(0, 1, 2, 3, 4, 7)),
    "skb_change_head": calls("skb_change_head", "context", _of(0, 14, 40, 100, 0x4000), _of(0, 0, 0, 1)),
    "skb_change_tail": calls("skb_change_tail", "context", _length, _of(0, 0, 0, 0, 1)),
    "skb_change_proto": calls("skb_change_proto", "context", _of(0xDD86, 0x0008, 0x0608), _of(0, 0, 0, 1)),
    "skb_adjust_room": calls("skb_adjust_room", "context", _difference, _of(0, 1, 1, 2), _of(*_ROOM_FLAGS)),
    "skb_ecn_set_ce": calls("skb_ecn_set_ce", "context"),
    # No routing headers: Linux breaks where a packet of a test run has no route.
    "lwt_push_encap": calls("lwt_push_encap", "context", _of(uapi.BPF_LWT_ENCAP_IP, 3), "stack", "size"),
    "skb_set_tstamp": calls("skb_set_tstamp", "context", _of(0, 1, 12345), _of(0, 1, 2, 3)),
    "skb_get_xfrm_state": calls("skb_get_xfrm_state", "context", _of(0, 1), "stack", "size", _of(0, 0, 1)),
    "set_hash": calls("set_hash", "context", "mix"),
    "set_hash_invalid": calls("set_hash_invalid", "context"),
    "redirect": calls("redirect", _of(1), _of(0, 1, 2, 4)),
    "redirect_peer": calls("redirect_peer", _of(1), _of(0, 1)),
    "skb_set_tunnel_key": calls("skb_set_tunnel_key", "context", "tunnel", "size", _of(*_TUNNEL_FLAGS)),
    "skb_get_tunnel_key": calls("skb_get_tunnel_key", "context", "tunnel", "size", _of(0, 0, 1, 16, 17, 2)),
    "skb_set_tunnel_opt": calls("skb_set_tunnel_opt", "context", "stack", "size"),
    "skb_get_tunnel_opt": calls("skb_get_tunnel_opt", "context", "stack", "size"),
    "xdp_adjust_head": calls("xdp_adjust_head", "context", _difference),
    "xdp_adjust_tail": calls("xdp_adjust_tail", "context", _difference),
    "xdp_adjust_meta": calls("xdp_adjust_meta", "context", _difference),
    "xdp_get_buff_len": calls("xdp_get_buff_len", "context"),
    "xdp_load_bytes": calls("xdp_load_bytes", "context", _offset, "stack", "size"),
    "xdp_store_bytes": calls("xdp_store_bytes", "context", _offset, "stack", "size"),
    "clone_redirect": calls("clone_redirect", "context", _of(1, 1, 99), _of(0, 0, 1, 2)),
    "redirect_neigh": calls("redirect_neigh", _of(1), "words", "size", _of(0, 0, 1)),
    # What a route gives depends on the machine.
    "fib_lookup": _route,
    "check_mtu": _fits,
}
