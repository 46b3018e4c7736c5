"""Programs that use timers, and maps whose values have one."""

from __future__ import annotations

from typing import Any

from mapcode import EXIT, Code, call, copy, described, function_address, get, link_functions, mov, put, stack, the_map

from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction, ld_imm64
from kbpf.specs import MapSpec
from kbpf.testing.btf_bytes import BtfBytes

#: Where a value has what: how often the callback ran, the key it was given, and the timer.
COUNT, KEY, TIMER, VALUE_SIZE = 0, 8, 16, 32
#: Results of the main program's calls, and of the callback's, in the map of results.
RESULTS = MapSpec(type="array", key_size=4, value_size=256, max_entries=1)
OF_CALLBACK = 128
_VALUE, _RESULTS = 8, 7


def with_timer(type: str = "array", at: int = TIMER, size: int = VALUE_SIZE, **changes: Any) -> MapSpec:
    """A map of {u64, u64, struct bpf_timer}."""
    btf = BtfBytes()
    timer = btf.structure("bpf_timer", 16, ("a", btf.u64, 0), ("b", btf.u64, 8))
    value = btf.structure("value", size, ("count", btf.u64, 0), ("timer", timer, at))
    return MapSpec(
        **{"key_size": 4, "value_size": size, "max_entries": 2, **changes},
        type=type,
        btf=btf.bytes(),
        btf_key_type_id=btf.int,
        btf_value_type_id=value,
    )


def timer(register: int = 1, at: int = TIMER) -> Code:
    """The address of the timer of the value at hand."""
    return [*copy(register, _VALUE), Instruction(ebpf.ALU64 | ebpf.ADD, register, 0, 0, at)]


def init(clock: int = 1, at: int = TIMER) -> Code:
    return [*timer(at=at), *the_map(2), *mov(3, clock), *call("timer_init")]


def set_callback(function: int = 1, at: int = TIMER) -> Code:
    return [*timer(at=at), *function_address(2, function), *call("timer_set_callback")]


def start(nanoseconds: int = 0, flags: int = 0, at: int = TIMER) -> Code:
    return [*timer(at=at), *ld_imm64(2, nanoseconds), *mov(3, flags), *call("timer_start")]


def start_at(clock: str, nanoseconds: int, flags: int) -> Code:
    """Start at a time that is so far from what a helper says the time is."""
    now = [*call(clock), *copy(2, 0), Instruction(ebpf.ALU64 | ebpf.ADD, 2, 0, 0, nanoseconds)]
    return [*now, *timer(), *mov(3, flags), *call("timer_start")]


def cancel(at: int = TIMER) -> Code:
    return [*timer(at=at), *call("timer_cancel")]


def element(helper: str, key: int = 0, flags: int = 0) -> Code:
    """Update an element with what is on the stack, or delete it."""
    value = [i for offset in range(0, VALUE_SIZE, 8) for i in put(-64 + offset, 0)]
    return [
        *put(-8, key),
        *value,
        *the_map(1),
        *stack(2, -8),
        *stack(3, -64),
        *mov(4, flags),
        *call(helper),
    ]


def times(count: int, body: Code) -> Code:
    """Only while the callback has run fewer than `count` times."""
    return [*mov(0, 0), *get(1, _VALUE, COUNT), Instruction(ebpf.JMP | ebpf.JGE, 1, 0, len(body), count), *body]


def _kept(pieces: tuple[Code, ...], at: int) -> Code:
    """The pieces, with R0 of each kept."""
    out = [*ld_imm64(_RESULTS, 1, ebpf.PSEUDO_MAP_IDX_VALUE)]
    for number, piece in enumerate(pieces):
        out += [*piece, Instruction(ebpf.STX | ebpf.MEM | ebpf.DW, _RESULTS, 0, at + 8 * number)]
    return out


def program(*pieces: Code, callback: tuple[Code, ...] = (), key: int = 0) -> tuple[Code, dict[str, Any]]:
    """A program over the value of a key of map 0, and a callback that counts; results go into map 1."""
    kept = [*copy(_VALUE, 0), *_kept(pieces, 0)]
    main = [
        *put(-8, key),
        *the_map(1),
        *stack(2, -8),
        *call("map_lookup_elem"),
        Instruction(ebpf.JMP | ebpf.JEQ, 0, 0, len(kept)),
        *kept,
        *mov(0, 0),
        EXIT,
    ]
    counting = [
        *copy(_VALUE, 3),
        Instruction(ebpf.LDX | ebpf.MEM | ebpf.W, 1, 2),
        Instruction(ebpf.ALU64 | ebpf.ADD, 1, 0, 0, 100),
        Instruction(ebpf.STX | ebpf.MEM | ebpf.DW, _VALUE, 1, KEY),
        *get(1, _VALUE, COUNT),
        Instruction(ebpf.ALU64 | ebpf.ADD, 1, 0, 0, 1),
        Instruction(ebpf.STX | ebpf.MEM | ebpf.DW, _VALUE, 1, COUNT),
        *_kept(callback, OF_CALLBACK),
        *mov(0, 0),
        EXIT,
    ]
    code, starts = link_functions(main, counting)
    return code, {"type": "sched_cls", **described(starts, returns=None, parameters=3)}
