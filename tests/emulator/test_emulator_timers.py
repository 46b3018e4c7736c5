"""Timers in map values, against the kernel: what the helpers say, what the callback sees, what ends a timer.

The emulator's clock is moved by hand; the kernel is given the time it takes to come to the same.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from mapcode import EXIT, Code, attempt, call, call_function, copy, described, link_functions, made, mov, put, the_map
from mapcode import stack as stack_address
from sides import FRAME, Side
from test_emulator_maps_locks import locked
from timers import (
    RESULTS,
    VALUE_SIZE,
    cancel,
    element,
    init,
    program,
    set_callback,
    start,
    start_at,
    times,
    with_timer,
)

from kbpf.backend import Engine, LoadRefused
from kbpf.emulator import ManualClock, environment, test_runs
from kbpf.emulator.backend import EmulatorBackend
from kbpf.emulator.clock import timeline
from kbpf.emulator.program import Program
from kbpf.errors import EmulationFault
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.specs import MapSpec, ProgramSpec

pytestmark = pytest.mark.requires("kernel")

I = Instruction  # noqa: E741
ZERO = bytes(4)
MS = 10**6
#: Long enough for a test to do something before it is due; and what is not to come.
SOON, LATE = 20 * MS, 60 * 10**9
SECONDS = 5
READY = (init(), set_callback())

#: What the main program does, and what the callback does.
SCENARIOS: dict[str, tuple[tuple[Code, ...], tuple[Code, ...]]] = {
    "once": ((*READY, start(MS)), ()),
    "at once": ((*READY, start(0)), ()),
    "in the wrong order": ((start(), set_callback(), cancel(), init(), start(), set_callback(), start()), ()),
    "initialised twice": ((init(), init(), init(7), set_callback()), ()),
    "clocks": ((*(init(clock) for clock in (2, 3, 5, 6, 8, 9, 10, 11, 15, 16, -1, 17, 0)), set_callback()), ()),
    "CLOCK_BOOTTIME": ((init(7), set_callback(), start(MS)), ()),
    "CLOCK_REALTIME": ((init(0), set_callback(), start(MS)), ()),
    "cancelled": ((*READY, start(LATE), cancel(), cancel(), start(MS)), ()),
    "cancelled and set again": ((*READY, start(LATE), cancel(), start(MS), set_callback(), start(MS)), ()),
    "another time": ((*READY, start(LATE), start(MS), start(2 * MS)), ()),
    "as late as can be": ((*READY, start((1 << 63) - 1), cancel()), ()),
    "later than can be": ((*READY, start(1 << 63)), ()),
    "minus one": ((*READY, start((1 << 64) - 1), cancel()), ()),
    "flags": ((*READY, start(0, 4), start(0, 8), start(0, -1), start(0, 2)), ()),
    "absolute": ((*READY, start_at("ktime_get_ns", MS, 1)), ()),
    "absolute and late": ((*READY, start_at("ktime_get_ns", LATE // 100, 1), cancel()), ()),
    "absolute CLOCK_BOOTTIME": ((init(7), set_callback(), start_at("ktime_get_boot_ns", MS, 3)), ()),
    "absolute and past": ((*READY, start(0, 1)), ()),
    "absolute CLOCK_REALTIME, past": ((init(0), set_callback(), start(0, 3)), ()),
    "absolute minus one": ((*READY, start((1 << 64) - 1, 1), cancel()), ()),
    "again and again": ((*READY, start(0)), (times(5, start(MS)),)),
    "cancels itself": ((*READY, start(0)), (cancel(), times(3, start(MS)), cancel(), set_callback(), init())),
    "updates its value": ((*READY, start(0)), (element("map_update_elem"), start(), cancel())),
    "deletes its value": ((*READY, start(0)), (element("map_delete_elem"), times(3, start()))),
    "updated": ((*READY, start(LATE), element("map_update_elem"), start(), cancel(), init()), ()),
    "deleted": ((*READY, start(LATE), element("map_delete_elem"), start(), cancel(), init()), ()),
    "deleted and put again": (
        (*READY, start(LATE), element("map_delete_elem"), element("map_update_elem"), start(), cancel()),
        (),
    ),
    "another key": ((*READY, element("map_delete_elem", 1), element("map_update_elem", 1), start(MS)), ()),
}
TYPES = ("array", "hash", "lru_hash")


@pytest.fixture(autouse=True)
def clock() -> Iterator[ManualClock]:
    before = environment.clock
    clock = environment.clock = ManualClock(10**9)
    yield clock
    environment.clock = before
    timeline.clear()


def spec_of(type: str) -> MapSpec:
    return with_timer(type, max_entries=64 if type == "lru_hash" else 2)


def load(side: Side, code: Code, maps: tuple[int, ...], **spec: Any) -> int:
    return side.backend.program_load(ProgramSpec(instructions=tuple(code), **spec), maps)


def run_once(side: Side, code: Code, maps: tuple[int, ...], **spec: Any) -> None:
    fd = load(side, code, maps, **spec)
    try:
        side.backend.program_run(fd, FRAME, bytes(192))
    finally:
        side.backend.close(fd)


def results(side: Side, map: int, *others: int) -> Any:
    """The results, and the values of key 0 of other maps."""
    found = struct.unpack("=32q", side.backend.map_lookup(map, ZERO, 256))
    return found, [attempt(lambda: side.backend.map_lookup(fd, ZERO, VALUE_SIZE)) for fd in others]  # noqa: B023


def comes_to(look: Callable[[], Any], expected: Any) -> None:
    """The kernel comes to what the emulator came to, and it stays at that."""
    end = time.monotonic() + SECONDS
    while look() != expected and time.monotonic() < end:
        time.sleep(0.001)
    time.sleep(0.005)
    assert look() == expected


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("name", SCENARIOS)
def test_timers(kernel: Side, emulator: Side, clock: ManualClock, type: str, name: str) -> None:
    pieces, callback = SCENARIOS[name]
    code, info = program(*pieces, callback=callback)
    with made(kernel, spec_of(type), RESULTS) as one, made(emulator, spec_of(type), RESULTS) as other:
        for side, maps in ((kernel, one), (emulator, other)):
            side.backend.map_update(maps[0], ZERO, bytes(VALUE_SIZE))
            run_once(side, code, maps, **info)
        clock.advance(LATE // 2)
        expected = results(emulator, other[1], other[0])
        comes_to(lambda: results(kernel, one[1], one[0]), expected)


USERS = {
    "nothing": lambda side, maps: None,
    "update": lambda side, maps: side.backend.map_update(maps[0], ZERO, bytes(VALUE_SIZE)),
    "update of another": lambda side, maps: side.backend.map_update(maps[0], b"\1\0\0\0", bytes(VALUE_SIZE)),
    "delete": lambda side, maps: attempt(lambda: side.backend.map_delete(maps[0], ZERO)),
    "take": lambda side, maps: attempt(lambda: side.backend.map_lookup_and_delete(maps[0], ZERO, VALUE_SIZE)),
    "read": lambda side, maps: side.backend.map_lookup(maps[0], ZERO, VALUE_SIZE),
}


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("action", USERS)
def test_what_user_space_does_to_a_timer(
    kernel: Side, emulator: Side, clock: ManualClock, type: str, action: str
) -> None:
    """Writing over an element or deleting it cancels its timer."""
    code, info = program(*READY, start(SOON))
    outcomes = []
    for side in (emulator, kernel):
        with made(side, spec_of(type), RESULTS) as maps:
            side.backend.map_update(maps[0], ZERO, bytes(VALUE_SIZE))
            run_once(side, code, maps, **info)
            USERS[action](side, maps)
            if side is emulator:
                clock.advance(2 * SOON)
                outcomes.append(results(side, maps[1], maps[0]))
            else:
                time.sleep(2 * SOON / 1e9)
                comes_to(lambda: results(kernel, maps[1], maps[0]), outcomes[0])


def test_eviction_cancels_a_timer(emulator: Side, clock: ManualClock) -> None:
    """Which element goes is left open by Linux, so there is nothing to compare."""
    code, info = program(*READY, start(SOON), callback=(mov(0, 77),))
    with made(emulator, spec_of("lru_hash"), RESULTS) as maps:
        emulator.backend.map_update(maps[0], ZERO, bytes(VALUE_SIZE))
        run_once(emulator, code, maps, **info)
        for key in range(1, 65):
            emulator.backend.map_update(maps[0], struct.pack("=I", key), bytes(VALUE_SIZE))
        clock.advance(2 * SOON)
        assert results(emulator, maps[1])[0][16] == 0


@pytest.mark.parametrize("pinned", (False, True))
def test_timers_go_when_user_space_lets_the_map_go(
    kernel: Side, emulator: Side, clock: ManualClock, pinned: bool
) -> None:
    """The program still holds it. Without user space no timer is made either."""
    writes, info = program(*READY, start(SOON), callback=(mov(0, 77),))
    path = "/sys/fs/bpf/kbpf-test-timer-map"
    outcomes = []
    for side in (emulator, kernel):
        with made(side, RESULTS) as (result,):
            map = side.backend.map_create(spec_of("array"))
            fd = load(side, writes, (map, result), **info)
            try:
                if pinned:
                    side.backend.pin(map, path)
                side.backend.program_run(fd, FRAME, bytes(192))
                side.backend.close(map)
                if side is emulator:
                    clock.advance(2 * SOON)
                else:
                    time.sleep(2 * SOON / 1e9)
                outcome = [results(side, result)]
                if side is kernel:
                    comes_to(lambda: results(kernel, result), outcomes[0][0])
                    outcome = [results(kernel, result)]
                side.backend.program_run(fd, FRAME, bytes(192))
                outcome.append(results(side, result))
                outcomes.append(outcome)
            finally:
                if pinned:
                    side.backend.unpin(path)
                side.backend.close(fd)
    assert outcomes[1] == outcomes[0]


def test_what_a_timer_changes_is_seen_by_who_looks_later(emulator: Side) -> None:
    """With a clock that moves by itself nothing runs until somebody looks: a read, a write, another run, a close."""
    code, info = program(*READY, start(0))
    environment.clock = time.monotonic_ns
    with made(emulator, spec_of("array"), RESULTS, MapSpec(type="array", key_size=4, value_size=8, max_entries=1)) as (
        map,
        result,
        other,
    ):
        for look in (
            lambda: emulator.backend.map_update(other, ZERO, bytes(8)),
            lambda: emulator.backend.map_lookup(other, ZERO, 8),
            lambda: run_once(emulator, [*mov(0, 0), EXIT], ()),
            lambda: emulator.backend.close(emulator.backend.duplicate(other)),
        ):
            fd = load(emulator, code, (map, result), **info)
            emulator.backend.map_update(map, ZERO, bytes(VALUE_SIZE))
            emulator.backend.program_run(fd, FRAME, bytes(192))
            look()
            environment.clock = ManualClock(0)
            assert emulator.backend.map_lookup(map, ZERO, 8)[0] == 1
            environment.clock = time.monotonic_ns
            emulator.backend.close(fd)


def test_a_callback_runs_where_it_was_started(emulator: Side, clock: ManualClock) -> None:
    code, info = program(*READY, start(MS, 2), callback=(call("get_smp_processor_id"),))
    with made(emulator, spec_of("array"), RESULTS) as maps:
        environment.cpu = 1
        try:
            run_once(emulator, code, maps, **info)
        finally:
            environment.cpu = 0
        clock.advance(MS)
        assert results(emulator, maps[1])[0][16] == 1
        assert environment.cpu == 0


TOUCH = {size: put(-size, 0) for size in (8, 256, 264, 512)}


def with_stack(main: int, callback: int, callee: int = 0) -> tuple[Code, dict[str, Any]]:
    functions = [
        [
            *TOUCH[main],
            *put(-8, 0),
            *the_map(1),
            *stack_address(2, -8),
            *call("map_lookup_elem"),
            I(ebpf.JMP | ebpf.JNE, 0, 0, 2),
            *mov(0, 0),
            EXIT,
            *copy(8, 0),
            *set_callback(),
            *mov(0, 0),
            EXIT,
        ],
        [*TOUCH[callback], *(call_function(2) if callee else []), *mov(0, 0), EXIT],
        *([[*TOUCH[callee], *mov(0, 0), EXIT]] if callee else []),
    ]
    code, starts = link_functions(*functions)
    return code, {"type": "sched_cls", **described(starts, parameters=3)}


def refusal(side: Side, code: Code, map: MapSpec | None = None, **spec: Any) -> tuple[int, str]:
    with made(side, map or with_timer(), RESULTS) as maps:
        try:
            side.backend.close(load(side, code, maps, **spec))
        except LoadRefused as error:
            return error.errno or 0, [line for line in error.log.splitlines() if not line.startswith("processed")][-1]
    return 0, ""


@pytest.mark.parametrize("stacks", ((256, 256), (512, 512), (8, 256, 256), (8, 256, 264), (512, 512, 8)))
def test_a_callback_has_a_stack_of_its_own(kernel: Side, emulator: Side, stacks: tuple[int, ...]) -> None:
    code, info = with_stack(*stacks)
    assert refusal(emulator, code, **info) == refusal(kernel, code, **info)


@pytest.mark.parametrize("type", ("kprobe", "tracepoint", "perf_event", "raw_tracepoint", "raw_tracepoint_writable"))
@pytest.mark.parametrize("field", ("bpf_timer", "bpf_spin_lock"))
def test_tracing_programs_may_not_even_name_such_a_map(kernel: Side, emulator: Side, type: str, field: str) -> None:
    map = with_timer() if field == "bpf_timer" else locked("array")
    code = [*the_map(1), *mov(0, 0), EXIT]
    results = [refusal(side, code, map, type=type) for side in (kernel, emulator)]
    assert results[1] == results[0] == (22, f"tracing progs cannot use {field} yet")


@pytest.mark.parametrize("engine", ("interpreter", "jit"))
def test_native_code_sets_timers_too(emulator: Side, clock: ManualClock, engine: Engine) -> None:
    if engine == "jit":
        pytest.importorskip("llvmlite")
    code, info = program(*READY, start(MS), callback=(times(3, start(MS)),))
    backend = emulator.backend
    assert isinstance(backend, EmulatorBackend)
    with made(emulator, spec_of("array"), RESULTS) as maps:
        loaded = Program(
            ProgramSpec(instructions=tuple(code), **info), [backend.map(fd) for fd in maps], backend.map, engine=engine
        )
        for runs in (1, 2):
            test_runs.run(loaded, FRAME, bytes(192))
            clock.advance(10 * MS)
            outcome, _ = results(emulator, maps[1])
            assert outcome[:3] == ((0, 0, 0) if runs == 1 else (-16, 0, 0))


def test_callbacks_that_set_themselves_are_no_recursion(kernel: Side, emulator: Side) -> None:
    code, info = program(*READY, callback=(set_callback(),))
    assert refusal(emulator, code, **info) == refusal(kernel, code, **info) == (0, "")


@pytest.mark.parametrize("at", (8, 12, 16, 20, 24))
@pytest.mark.parametrize("flags", (0, 1 << 7, 1 << 10))
def test_where_a_timer_may_be(kernel: Side, emulator: Side, at: int, flags: int) -> None:
    """A map whose BTF Linux does not take is made without; one with special fields is not frozen and not mapped."""
    outcomes = []
    for side in (kernel, emulator):
        with made(side, with_timer(at=at, size=40, flags=flags)) as (fd,):
            backend = side.backend
            mapped = attempt(lambda: backend.map_memory(fd, 4096, 0, False).nbytes)  # noqa: B023
            outcomes.append((mapped, attempt(lambda: backend.map_freeze(fd))))  # noqa: B023
    assert outcomes[1] == outcomes[0]


def test_what_the_verifier_would_have_refused_faults(emulator: Side, clock: ManualClock) -> None:
    """A timer that is none, or of another map; a callback that is none, has no packet, or does not return 0."""
    elsewhere = [*stack_address(1, -16), *the_map(2), *mov(3, 1), *call("timer_init")]
    of_another = [*copy(1, 8), I(ebpf.ALU64 | ebpf.ADD, 1, 0, 0, 16), *the_map(2, 1), *mov(3, 1), *call("timer_init")]
    beside = [*copy(1, 8), I(ebpf.ALU64 | ebpf.ADD, 1, 0, 0, 8), *call("timer_cancel")]
    no_function = [*copy(1, 8), I(ebpf.ALU64 | ebpf.ADD, 1, 0, 0, 16), *mov(2, 3), *call("timer_set_callback")]
    number = [*mov(1, 16), *call("timer_cancel")]
    for piece in (elsewhere, of_another, beside, no_function, number):
        code, info = program(set_callback(), piece)
        with made(emulator, spec_of("array"), RESULTS) as maps, pytest.raises(EmulationFault):
            run_once(emulator, code, maps, **info)
    packet = [*call("get_hash_recalc")]
    context = [I(ebpf.LDX | ebpf.MEM | ebpf.W, 0, 1)]
    other = [*mov(0, 1), I(ebpf.JMP | ebpf.JEQ, 0, 0, 1, 0), EXIT]
    for piece in (packet, context, other):
        code, info = program(*READY, start(MS), callback=([*mov(1, 1), I(ebpf.ALU64 | ebpf.LSH, 1, 0, 0, 32), *piece],))
        with made(emulator, spec_of("array"), RESULTS) as maps:
            run_once(emulator, code, maps, **info)
            with pytest.raises(EmulationFault):
                clock.advance(MS)
