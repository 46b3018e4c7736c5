"""Functions of programs, callbacks and tail calls between them, against the kernel."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import pytest
from mapcode import (
    EXIT,
    Code,
    call,
    call_function,
    copy,
    described,
    function_address,
    get,
    link_functions,
    made,
    main,
    mov,
    put,
    run,
    stack,
    the_map,
    unless_null,
)
from sides import FRAME, Side

from kbpf.backend import LoadRefused
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.specs import MapSpec, ProgramSpec
from kbpf.testing.btf_bytes import GLOBAL, BtfBytes

pytestmark = pytest.mark.requires("kernel")

I = Instruction  # noqa: E741
RETURN_ZERO = [*mov(0, 0), EXIT]


def refusal(side: Side, program: Code, maps: Sequence[int] = (), **spec: Any) -> tuple[int, str]:
    """The errno, and the line of the log that says why; (0, "") if it is loaded."""
    try:
        side.backend.close(side.backend.program_load(ProgramSpec(instructions=tuple(program), **spec), maps))
    except LoadRefused as error:
        lines = [line for line in error.log.splitlines() if not line.startswith(("processed", "verification"))]
        return error.errno or 0, lines[-1].partition("processed")[0]
    return 0, ""


def loops(count: int, stop_at: int = -1, flags: int = 0) -> tuple[Code, dict[str, bytes]]:
    """bpf_loop whose callback adds the index to a word of the stack, and stops at `stop_at`; R0 is both."""
    caller = main(
        put(-8, 0),
        mov(1, count),
        function_address(2, 1),
        stack(3, -8),
        mov(4, flags),
        call("loop"),
        get(1, 10, -8),
        [I(ebpf.ALU64 | ebpf.LSH, 1, 0, 0, 32), I(ebpf.ALU64 | ebpf.ADD | ebpf.X, 0, 1)],
    )
    callback = [
        *get(0, 2),
        I(ebpf.ALU64 | ebpf.ADD | ebpf.X, 0, 1),
        I(ebpf.STX | ebpf.MEM | ebpf.DW, 2, 0),
        *mov(0, 0),
        I(ebpf.JMP | ebpf.JNE, 1, 0, 1, stop_at),
        *mov(0, 1),
        EXIT,
    ]
    program, starts = link_functions(caller, callback)
    return program, described(starts)


@pytest.mark.parametrize("count", (0, 1, 5, 1000, (8 << 20) + 1, -1))
@pytest.mark.parametrize("stop_at", (-1, 0, 3))
@pytest.mark.parametrize("flags", (0, 1))
def test_a_loop_runs_as_often_as_in_the_kernel(
    kernel: Side, emulator: Side, count: int, stop_at: int, flags: int
) -> None:
    program, info = loops(count, stop_at, flags)
    assert run(emulator, program, [], **info) == run(kernel, program, [], **info)


def nested() -> tuple[Code, dict[str, bytes]]:
    """A loop in a loop."""
    caller = main(put(-8, 0), mov(1, 3), function_address(2, 1), stack(3, -8), mov(4, 0), call("loop"), get(0, 10, -8))
    outer = [*copy(3, 2), *mov(1, 4), *function_address(2, 2), *mov(4, 0), *call("loop"), *RETURN_ZERO]
    inner = [*get(0, 2), I(ebpf.ALU64 | ebpf.ADD, 0, 0, 0, 1), I(ebpf.STX | ebpf.MEM | ebpf.DW, 2, 0), *RETURN_ZERO]
    program, starts = link_functions(caller, outer, inner)
    return program, described(starts)


def test_a_callback_may_call_back(kernel: Side, emulator: Side) -> None:
    program, info = nested()
    assert run(emulator, program, [], **info) == run(kernel, program, [], **info) == 12


def each(change: Code) -> tuple[Code, dict[str, bytes]]:
    """Sum all values of a map of u64 by key of 4 bytes; R0 is the sum with the number of calls in the high half."""
    caller = main(
        put(-8, 0),
        the_map(1),
        function_address(2, 1),
        stack(3, -8),
        mov(4, 0),
        call("for_each_map_elem"),
        get(1, 10, -8),
        [I(ebpf.ALU64 | ebpf.LSH, 0, 0, 0, 32), I(ebpf.ALU64 | ebpf.ADD | ebpf.X, 0, 1)],
    )
    callback = [
        *copy(6, 3),
        *copy(7, 4),
        *get(0, 3),
        *get(5, 4),
        I(ebpf.LDX | ebpf.MEM | ebpf.W, 8, 2),
        I(ebpf.ALU64 | ebpf.ADD | ebpf.X, 5, 0),
        I(ebpf.ALU64 | ebpf.ADD | ebpf.X, 5, 8),
        I(ebpf.STX | ebpf.MEM | ebpf.DW, 4, 5),
        *change,
        EXIT,
    ]
    program, starts = link_functions(caller, callback)
    return program, described(starts, parameters=4)


CHANGES: dict[str, Code] = {
    "none": mov(0, 0),
    "stop": mov(0, 1),
    "increment": [I(ebpf.ALU64 | ebpf.ADD, 0, 0, 0, 1), I(ebpf.STX | ebpf.MEM | ebpf.DW, 6, 0), *mov(0, 0)],
    "delete": [*call("map_delete_elem"), *mov(0, 0)],
}
EACH = ["array", "percpu_array", "hash", "percpu_hash", "lru_hash", "lru_percpu_hash"]


@pytest.mark.parametrize("type", EACH)
@pytest.mark.parametrize("change", CHANGES)
def test_programs_go_through_a_map(kernel: Side, emulator: Side, type: str, change: str) -> None:
    program, info = each(CHANGES[change])
    # Linux promises no order: where the callback stops at once, there is one element.
    spec = MapSpec(type=type, key_size=4, value_size=8, max_entries=1 if change == "stop" else 40)
    results = []
    for side in (kernel, emulator):
        with made(side, spec) as (fd,):
            for key in range(min(spec.max_entries, 7)):
                slots = side.backend.possible_cpus() if "percpu" in type else 1
                side.backend.map_update(fd, struct.pack("=I", key), struct.pack("=Q", 10 + key) * slots)
            results.append([run(side, program, [fd], **info) for _ in range(2)])
    assert results[1] == results[0]


TOUCH = {size: put(-size, 0) for size in (8, 240, 248, 256, 264, 496, 504, 512)}
TAIL_CALL = [*the_map(2), *mov(3, 0), *call("tail_call")]
LOOP = [*mov(1, 1), *function_address(2, 1), *mov(3, 0), *mov(4, 0), *call("loop"), EXIT]
CALLER = [*copy(6, 1), *call_function(1), EXIT]
TAIL = [*TAIL_CALL, *RETURN_ZERO]
LOAD = [*copy(6, 1), I(ebpf.LD | ebpf.ABS), EXIT]
LOOKUP = [*put(-400, 0), *stack(2, -400), *the_map(1), *call("map_lookup_elem"), *call_function(1), EXIT]
#: Functions, and what `described` is told of them; None: there is no function info.
CHECKED: dict[str, tuple[list[Code], dict[str, Any] | None]] = {
    "callback without function info": ([LOOP, RETURN_ZERO], None),
    "callback": ([LOOP, RETURN_ZERO], {}),
    "global callback": ([LOOP, RETURN_ZERO], {"linkage": GLOBAL}),
    "tail call without function info": ([CALLER, TAIL], None),
    "tail call": ([CALLER, TAIL], {}),
    "tail call of a function without result": ([CALLER, TAIL], {"returns": 0}),
    "packet load without function info": ([CALLER, LOAD], None),
    "packet load": ([CALLER, LOAD], {}),
    "packet load of a function without result": ([CALLER, LOAD], {"returns": 0}),
    **{
        f"stack of {own} and {callee}": ([[*TOUCH[own], *CALLER], [*TOUCH[callee], *RETURN_ZERO]], None)
        for own, callee in ((256, 256), (264, 264), (264, 240), (248, 256), (512, 8), (504, 8), (496, 8))
    },
    **{
        f"stack of {own} before a tail call": ([[*TOUCH[own], *CALLER], [*TOUCH[8], *TAIL]], {})
        for own in (240, 248, 256, 264)
    },
    "stack of a helper's argument": ([LOOKUP, [*TOUCH[264], *RETURN_ZERO]], None),
}


@pytest.mark.parametrize("name", CHECKED)
def test_functions_are_checked_as_the_kernel_does(kernel: Side, emulator: Side, name: str) -> None:
    functions, description = CHECKED[name]
    program, starts = link_functions(*functions)
    info = {} if description is None else described(starts, **description)
    type = "array" if "helper" in name else "prog_array"
    spec = MapSpec(type=type, key_size=4, value_size=4, max_entries=1)
    with made(kernel, spec) as one, made(emulator, spec) as other:
        assert refusal(emulator, program, other, **info) == refusal(kernel, program, one, **info)


@pytest.mark.parametrize("depth", (8, 9))
def test_functions_may_be_eight_deep(kernel: Side, emulator: Side, depth: int) -> None:
    functions = [*([*call_function(n + 1), EXIT] for n in range(depth - 1)), RETURN_ZERO]
    program, _ = link_functions(*functions)
    results = [refusal(side, program) for side in (kernel, emulator)]
    assert results[1] == results[0]
    assert results[0][0] == (0 if depth == 8 else 7)


BAD_INFO = {
    "not at the start": ((1, 0), (7, 1)),
    "elsewhere": ((0, 0), (6, 1)),
    "too few": ((0, 0),),
    "too many": ((0, 0), (7, 1), (8, 1)),
    "no function": ((0, 0), (7, -2)),
    "no type": ((0, 0), (7, 90)),
}


@pytest.mark.parametrize("name", BAD_INFO)
def test_function_info_must_fit(kernel: Side, emulator: Side, name: str) -> None:
    program, starts = link_functions(LOOP, RETURN_ZERO)
    assert starts == [0, 7]
    btf = BtfBytes()
    ids = [btf.function("main", GLOBAL), btf.function("callback", parameters=2)]
    info = b"".join(struct.pack("=II", at, ids[n] if 0 <= n < 2 else 1 if n < 0 else 99) for at, n in BAD_INFO[name])
    results = [refusal(side, program, btf=btf.bytes(), func_info=info) for side in (kernel, emulator)]
    assert results[1] == results[0]
    assert results[0][0] == 22


def test_a_tail_call_replaces_only_the_function_that_makes_it(kernel: Side, emulator: Side) -> None:
    """The target's result is that of the call, and the caller goes on; the count of tail calls is one for all."""
    spec = MapSpec(type="prog_array", key_size=4, value_size=4, max_entries=2)
    counter = MapSpec(type="array", key_size=4, value_size=8, max_entries=1)
    count = [
        *put(-8, 0),
        *the_map(1, 1),
        *stack(2, -8),
        *call("map_lookup_elem"),
        *unless_null(0, [*mov(1, 1), I(ebpf.STX | ebpf.ATOMIC | ebpf.DW, 0, 1)]),
    ]
    add = [I(ebpf.ALU64 | ebpf.ADD, 0, 0, 0, 100)]
    for index in (0, 1, 2):
        caller = [
            *main(
                copy(8, 1),
                put(-16, 7),
                call_function(1),
                add,
                get(1, 10, -16),
                [I(ebpf.ALU64 | ebpf.ADD | ebpf.X, 0, 1)],
            )
        ]
        tail = [*copy(6, 1), *count, *copy(1, 6), *the_map(2), *mov(3, index), *call("tail_call"), *mov(0, 3), EXIT]
        program, starts = link_functions(caller, tail)
        info = described(starts, parameters=1)
        outcomes = []
        for side in (kernel, emulator):
            with made(side, spec, counter) as (array, counts):
                itself = side.backend.program_load(ProgramSpec(instructions=tuple(program), **info), [array, counts])
                other = side.backend.program_load(ProgramSpec(instructions=(*mov(0, 5), EXIT)), [])
                side.backend.map_update(array, struct.pack("=I", 0), struct.pack("=I", itself))
                side.backend.map_update(array, struct.pack("=I", 1), struct.pack("=I", other))
                result = side.backend.program_run(itself, FRAME, bytes(192))
                outcomes.append((result.value, result.context, side.backend.map_lookup(counts, bytes(4), 8)))
                for key in (0, 1):
                    side.backend.map_delete(array, struct.pack("=I", key))
                side.backend.close(itself)
                side.backend.close(other)
        assert outcomes[1] == outcomes[0], index


def test_a_packet_load_that_fails_in_a_function_ends_only_that(kernel: Side, emulator: Side) -> None:
    caller = main(copy(6, 1), call_function(1), [I(ebpf.ALU64 | ebpf.ADD, 0, 0, 0, 100)])
    for offset in (0, 4000):
        load = [*copy(6, 1), I(ebpf.LD | ebpf.ABS | ebpf.B, 0, 0, 0, offset), EXIT]
        program, starts = link_functions(caller, load)
        info = described(starts, parameters=1)
        assert run(emulator, program, [], **info) == run(kernel, program, [], **info)
