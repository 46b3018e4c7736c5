"""Calls of helpers over maps in directly written programs: elements, ends of queues, records, callbacks, dynptrs.

Each function writes a piece that leaves a number in R0.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.testing.generate_maps import PREFIXES, VALUE_SIZE
from kbpf.testing.generate_pieces import (
    ADD,
    ADD_X,
    CONTEXT,
    DYNPTRS,
    EXIT,
    KEY,
    MIX,
    NUMBERS,
    Draft,
    Piece,
    call,
    copy,
    function,
    join,
    load,
    mix,
    move,
    put,
    put_bytes,
    stack,
    store,
    the_map,
    the_value,
    unless,
)  # fmt: skip
from kbpf.uapi import constants as uapi

HASHES = ("hash", "percpu_hash", "lru_hash", "lru_percpu_hash")
TABLES = ("array", "percpu_array", *HASHES, "lpm_trie")
_ENDS = ("queue", "stack")
_UPDATE_FLAGS = (0, 0, 0, 0, 1, 1, 2, 2, 3, 4, 8)
_DYNPTR, _OTHER = DYNPTRS
#: What a callback adds up, and the place of an element's key or a number that a helper gives.
_SUM = -NUMBERS


def _key(draft: Draft, type: str) -> Piece:
    """A key on the stack, mostly one of the few that are in use."""
    rng = draft.rng
    if type == "lpm_trie":
        return put_bytes(KEY, struct.pack("=II", rng.choice((0, 4, 8, 12, 16, 32, 32, 33)), rng.choice(PREFIXES)))
    if rng.random() < 0.2:
        return [
            *copy(2, MIX),
            Instruction(ebpf.ALU64 | ebpf.AND, 2, 0, 0, 7),
            Instruction(ebpf.STX | ebpf.MEM | ebpf.W, ebpf.FP, 2, KEY),
        ]
    return put(KEY, rng.randrange(6) if rng.random() < 0.95 else rng.getrandbits(32), 4)


def _found(draft: Draft, *pieces: Piece) -> Piece:
    """What to do with the pointer in R0 unless it is null; R0 is a number then."""
    return unless(0, *pieces, move(0, 1))


def _use(draft: Draft, size: int = VALUE_SIZE, register: int = 0) -> Piece:
    """Read or change memory that a register points to."""
    rng = draft.rng
    at = rng.randrange(0, size - 7, 8)
    dice = rng.random()
    if dice < 0.5:
        return [*load(5, register, at), *mix(5)]
    if dice < 0.8:
        return store(register, MIX, at)
    return [*copy(5, MIX), Instruction(ebpf.STX | ebpf.ATOMIC | ebpf.DW, register, 5, at, ebpf.ADD)]


def _element(draft: Draft, types: tuple[str, ...], helper: str, *more: Piece) -> Piece:
    """A call with a map and a key as its first arguments."""
    type = draft.rng.choice(types)
    return [*_key(draft, type), *the_map(1, draft.map(type)), *stack(2, KEY), *join(*more), *call(helper)]


def _lookup(draft: Draft) -> Piece:
    return [*_element(draft, TABLES, "map_lookup_elem"), *_found(draft, _use(draft))]


def _lookup_inner(draft: Draft) -> Piece:
    """An element of a map in a map."""
    inner = [*copy(1, 0), *stack(2, KEY), *call("map_lookup_elem"), *_found(draft, _use(draft))]
    outer = _element(draft, ("array_of_maps", "hash_of_maps"), "map_lookup_elem")
    return [*outer, *_found(draft, put(KEY, draft.rng.randrange(3), 4), inner)]


def _lookup_per_cpu(draft: Draft) -> Piece:
    types = ("percpu_array", "percpu_hash", "lru_percpu_hash")
    cpu = draft.rng.choice((0, 0, 0, 1 << 20, -1))
    return [*_element(draft, types, "map_lookup_percpu_elem", move(3, cpu)), *_found(draft, [*load(5, 0), *mix(5)])]


def _update(draft: Draft) -> Piece:
    value = -draft.rng.choice((16, 32, 64))
    return _element(draft, TABLES, "map_update_elem", stack(3, value), move(4, draft.rng.choice(_UPDATE_FLAGS)))


def _delete(draft: Draft) -> Piece:
    return _element(draft, TABLES, "map_delete_elem")


def _push(draft: Draft) -> Piece:
    index = draft.map(draft.rng.choice((*_ENDS, *_ENDS, "bloom_filter")))
    flags = draft.rng.choice((0, 0, 0, 2, 2, 1, 3))
    # Values that come again, for the filter.
    value = put(_SUM, draft.rng.randrange(8)) if draft.rng.random() < 0.5 else store(ebpf.FP, MIX, _SUM)
    return [*value, *the_map(1, index), *stack(2, _SUM), *move(3, flags), *call("map_push_elem")]


def _take(helper: str) -> Callable[[Draft], Piece]:
    def make(draft: Draft) -> Piece:
        index = draft.map(draft.rng.choice(_ENDS))
        return [*the_map(1, index), *stack(2, _SUM), *call(helper), *mix(0), *load(0, ebpf.FP, _SUM)]

    return make


def _contains(draft: Draft) -> Piece:
    value = put(_SUM, draft.rng.randrange(8))
    return [*value, *the_map(1, draft.map("bloom_filter")), *stack(2, _SUM), *call("map_peek_elem")]


# Records.

_RECORD_FLAGS = (0, 0, 0, uapi.BPF_RB_NO_WAKEUP, uapi.BPF_RB_FORCE_WAKEUP, 4)


def _ring_output(draft: Draft) -> Piece:
    rng = draft.rng
    size = rng.choice((0, 1, 8, 13, 64))
    return [
        *the_map(1, draft.map("ringbuf")), *stack(2, -NUMBERS), *move(3, size), *move(4, rng.choice(_RECORD_FLAGS)),
        *call("ringbuf_output"),
    ]  # fmt: skip


def _ring_reserve(commit: str) -> Callable[[Draft], Piece]:
    def make(draft: Draft) -> Piece:
        rng = draft.rng
        size = rng.choice((8, 16, 40, 500, 4088, 4089))
        reserve = [*the_map(1, draft.map("ringbuf")), *move(2, size), *move(3, rng.choice((0, 0, 0, 0, 1)))]
        given = [*copy(8, 0), *_use(draft, size), *copy(1, 8), *move(2, rng.choice(_RECORD_FLAGS)), *call(commit)]
        return [*reserve, *call("ringbuf_reserve"), *_found(draft, given)]

    return make


def _ring_query(draft: Draft) -> Piece:
    return [*the_map(1, draft.map("ringbuf")), *move(2, draft.rng.randrange(5)), *call("ringbuf_query")]


def _perf_output(draft: Draft) -> Piece:
    rng = draft.rng
    index = rng.choice((uapi.BPF_F_CURRENT_CPU,) * 4 + (0, 1, 2, 77))
    packet = rng.choice((0, 0, 0, 1, 14, 40, 5000))
    flags = packet << 32 | index | rng.choice((0,) * 9 + (1 << 60,))
    return [
        *copy(1, CONTEXT), *the_map(2, draft.map("perf_event_array")), *ebpf.ld_imm64(3, flags), *stack(4, -NUMBERS),
        *move(5, rng.choice((0, 1, 8, 13, 64))), *call("perf_event_output"),
    ]  # fmt: skip


# Callbacks.


def _add(register: int, base: int) -> Piece:
    """Add to the number that `base` points to."""
    return [*load(0, base), Instruction(ADD_X, 0, register), *store(base, 0)]


def _loop(draft: Draft) -> Piece:
    """bpf_loop, whose callback adds up and may stop, and may loop itself."""
    rng = draft.rng
    inner: Piece = []
    if rng.random() < 0.4:
        number = draft.function(_loop_steps(draft))
        # The arguments are kept over the call.
        inner = [*copy(6, 2), *copy(7, 1), *copy(3, 2), *_call_loop(move(1, 3), number), *copy(2, 6), *copy(1, 7)]
    number = draft.function(inner, _loop_steps(draft))
    # No constant of 0: Linux takes the code of a callback that is never called away, and trips over that.
    count = move(1, rng.choice((1, 3, 17, 100, (8 << 20) + 1, -1)))
    if rng.random() < 0.3:
        # As far as the verifier knows.
        count = [*the_value(1, draft.map("memory")), *load(1, 1), Instruction(ebpf.ALU64 | ebpf.AND, 1, 0, 0, 3)]
    return [*put(_SUM, 0), *stack(3, _SUM), *_call_loop(count, number, rng.choice((0, 0, 0, 0, 1))), *_sum()]


def _loop_steps(draft: Draft) -> Piece:
    """The end of a callback ``(index, sum)``."""
    rng = draft.rng
    operation = rng.choice((ebpf.ADD, ebpf.XOR, ebpf.MUL, ebpf.SUB))
    change = [*load(3, 2), Instruction(ebpf.ALU64 | operation | ebpf.X, 3, 1), Instruction(ADD, 3, 0, 0, 5)]
    stop = unless(1, move(0, 1), op=ebpf.JNE, value=rng.choice((1, 5, 50))) if rng.random() < 0.4 else []
    return [*change, *store(2, 3), *move(0, 0), *stop, EXIT]


def _call_loop(count: Piece, number: int, flags: int = 0) -> Piece:
    """`count` sets R1; R3 is set."""
    return [*count, *function(2, number), *move(4, flags), *call("loop")]


def _sum() -> Piece:
    """Mix the result in, and go on with what was added up."""
    return [*mix(0), *load(0, ebpf.FP, _SUM)]


def _each(draft: Draft) -> Piece:
    """bpf_for_each_map_elem; an order that is open does not come into what is added up."""
    rng = draft.rng
    type = rng.choice(("array", "percpu_array", *HASHES))
    steps = [*load(5, 3), *_add(5, 4)]
    dice = rng.random()
    if dice < 0.3:
        steps += [Instruction(ADD, 5, 0, 0, 3), *store(3, 5)]
    elif dice < 0.6 and type in HASHES:
        steps += call("map_delete_elem")
    stop = move(0, 1) if "array" in type and rng.random() < 0.3 else move(0, 0)
    number = draft.function(steps, stop, [EXIT])
    return [
        *put(_SUM, 0), *the_map(1, draft.map(type)), *function(2, number), *stack(3, _SUM),
        *move(4, rng.choice((0, 0, 0, 0, 1))), *call("for_each_map_elem"), *_sum(),
    ]  # fmt: skip


def _drain(draft: Draft) -> Piece:
    """bpf_user_ringbuf_drain, whose callback reads each record and may stop."""
    rng = draft.rng
    read = [
        *copy(6, 2), *copy(3, 1), *put(-8, 0), *stack(1, -8), *move(2, rng.choice((4, 8))),
        *move(4, rng.choice((0, 0, 4))), *move(5, 0), *call("dynptr_read"), *load(5, ebpf.FP, -8), *_add(5, 6),
    ]  # fmt: skip
    number = draft.function(read, move(0, rng.choice((0, 0, 0, 1))), [EXIT])
    return [
        *put(_SUM, 0), *the_map(1, draft.map("user_ringbuf")), *function(2, number), *stack(3, _SUM),
        *move(4, rng.choice((0, 0, 1, 2, 4))), *call("user_ringbuf_drain"), *_sum(),
    ]  # fmt: skip


# Dynamic pointers.


def _dynptr(draft: Draft) -> Piece:
    """A dynptr over the memory of a value."""
    rng = draft.rng
    size, flags = rng.choice((0, 1, 8, 24, 32)), rng.choice((0,) * 9 + (1,))
    return [
        *the_value(1, draft.map("memory")), *move(2, size), *move(3, flags), *stack(4, _DYNPTR),
        *call("dynptr_from_mem"), *mix(0),
    ]  # fmt: skip


def _place(draft: Draft) -> int:
    return draft.rng.choice((0, 0, 1, 8, 16, 24, 31, 32, 100, -1))


def _dynptr_read(draft: Draft) -> Piece:
    length = draft.rng.choice((1, 8, 16))
    return [
        *_dynptr(draft), *stack(1, -NUMBERS), *move(2, length), *stack(3, _DYNPTR), *move(4, _place(draft)),
        *move(5, draft.rng.choice((0,) * 9 + (1,))), *call("dynptr_read"), *mix(0), *load(0, ebpf.FP, -NUMBERS),
    ]  # fmt: skip


def _write(draft: Draft, length: int) -> Piece:
    flags = draft.rng.choice((0,) * 9 + (1,))
    return [
        *stack(1, _DYNPTR), *move(2, _place(draft)), *stack(3, -NUMBERS), *move(4, length), *move(5, flags),
        *call("dynptr_write"),
    ]  # fmt: skip


def _dynptr_write(draft: Draft) -> Piece:
    return [*_dynptr(draft), *_write(draft, draft.rng.choice((0, 1, 8, 16)))]


def _dynptr_data(draft: Draft) -> Piece:
    size = draft.rng.choice((8, 16))
    slice = [*stack(1, _DYNPTR), *move(2, _place(draft)), *move(3, size), *call("dynptr_data")]
    return [*_dynptr(draft), *slice, *_found(draft, _use(draft, size))]


def _ring_dynptr(commit: str) -> Callable[[Draft], Piece]:
    def make(draft: Draft) -> Piece:
        rng = draft.rng
        size = rng.choice((0, 8, 13, 64, 4088, 4089))
        return [
            *the_map(1, draft.map("ringbuf")), *move(2, size), *move(3, rng.choice((0,) * 9 + (1,))),
            *stack(4, _DYNPTR), *call("ringbuf_reserve_dynptr"), *mix(0), *_write(draft, 8), *mix(0),
            *stack(1, _DYNPTR), *move(2, 0), *call(commit), *move(0, 0),
        ]  # fmt: skip

    return make


# Others.


def _locked(draft: Draft) -> Piece:
    """Change a value while its lock is held."""
    inside = [
        *copy(8, 0), *copy(1, 8), *call("spin_lock"), *load(5, 8, 8), *mix(5), *store(8, MIX, 8), *copy(1, 8),
        *call("spin_unlock"),
    ]  # fmt: skip
    look = [*put(KEY, draft.rng.randrange(3), 4), *the_map(1, draft.map("locked")), *stack(2, KEY)]
    return [*look, *call("map_lookup_elem"), *_found(draft, inside)]


def _timer(draft: Draft) -> Piece:
    """A timer through all that can be done to it before it is due, which is long after the run."""
    rng = draft.rng
    init = [
        *copy(1, 8),
        *the_map(2, draft.map("timers")),
        *move(3, rng.choice((1, 1, 1, 0, 7, 2))),
        *call("timer_init"),
    ]
    callback = draft.function(move(0, 0), [EXIT])
    inside = [
        *copy(8, 0), *init, *mix(0), *copy(1, 8), *function(2, callback), *call("timer_set_callback"), *mix(0),
        *copy(1, 8), *ebpf.ld_imm64(2, 1 << 62), *move(3, rng.choice((0, 0, 0, 1, 2, 8))),
        *call("timer_start"), *mix(0),
    ]  # fmt: skip
    if rng.random() < 0.7:
        inside += [*copy(1, 8), *call("timer_cancel"), *mix(0)]
    look = [*put(KEY, rng.randrange(3), 4), *the_map(1, draft.map("timers")), *stack(2, KEY), *call("map_lookup_elem")]
    return [*look, *_found(draft, inside)]


def _local_storage(draft: Draft) -> Piece:
    """The value that a program has for the control group: in a test run, one of its own."""
    type = draft.rng.choice(("cgroup_storage", "percpu_cgroup_storage"))
    return [*the_map(1, draft.map(type)), *move(2, 0), *call("get_local_storage"), *_use(draft), *move(0, 1)]


def _tail_call(draft: Draft) -> Piece:
    """Begin again where the program array has the program, else go on."""
    index = draft.rng.choice((0, 1, 2))
    return [*copy(1, CONTEXT), *the_map(2, draft.map("prog_array")), *move(3, index), *call("tail_call"), *move(0, 0)]


def _redirect_map(draft: Draft) -> Piece:
    rng = draft.rng
    type = rng.choice(("devmap", "devmap_hash", "cpumap", "xskmap"))
    flags = rng.choice((0, 1, 2, 3, 4, 8, 24, 1 << 32))
    return [*the_map(1, draft.map(type)), *move(2, rng.randrange(4)), *ebpf.ld_imm64(3, flags), *call("redirect_map")]


#: By helper, or helper and what is particular.
MAP_CALLS: dict[str, Callable[[Draft], Piece]] = {
    "map_lookup_elem": _lookup,
    "map_lookup_elem inner": _lookup_inner,
    "map_lookup_percpu_elem": _lookup_per_cpu,
    "map_update_elem": _update,
    "map_delete_elem": _delete,
    "map_push_elem": _push,
    "map_pop_elem": _take("map_pop_elem"),
    "map_peek_elem": _take("map_peek_elem"),
    "map_peek_elem of a filter": _contains,
    "ringbuf_output": _ring_output,
    "ringbuf_reserve": _ring_reserve("ringbuf_submit"),
    "ringbuf_submit": _ring_reserve("ringbuf_submit"),
    "ringbuf_discard": _ring_reserve("ringbuf_discard"),
    "ringbuf_query": _ring_query,
    "perf_event_output": _perf_output,
    "loop": _loop,
    "for_each_map_elem": _each,
    "user_ringbuf_drain": _drain,
    "dynptr_from_mem": _dynptr_write,
    "dynptr_read": _dynptr_read,
    "dynptr_write": _dynptr_write,
    "dynptr_data": _dynptr_data,
    "ringbuf_reserve_dynptr": _ring_dynptr("ringbuf_submit_dynptr"),
    "ringbuf_submit_dynptr": _ring_dynptr("ringbuf_submit_dynptr"),
    "ringbuf_discard_dynptr": _ring_dynptr("ringbuf_discard_dynptr"),
    "spin_lock": _locked,
    "spin_unlock": _locked,
    **dict.fromkeys(("timer_init", "timer_set_callback", "timer_start", "timer_cancel"), _timer),
    "get_local_storage": _local_storage,
    "tail_call": _tail_call,
    "redirect_map": _redirect_map,
}
