"""Native code under attack, and where Python changes things under it: memory, budget, exceptions, what is freed."""

from __future__ import annotations

import gc
import resource
import signal
import struct
import sys
import weakref
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kbpf.emulator.backend import EmulatorBackend
from kbpf.emulator.classic import ClassicProgram
from kbpf.emulator.environment import environment
from kbpf.emulator.jit import session
from kbpf.emulator.packet import Packet
from kbpf.emulator.program import Program
from kbpf.errors import EmulationFault
from kbpf.isa import cbpf, ebpf
from kbpf.isa.ebpf import Instruction, ld_imm64
from kbpf.specs import MapSpec, ProgramSpec
from kbpf.testing.btf_bytes import GLOBAL, BtfBytes
from kbpf.uapi.constants import BPF_F_SLEEPABLE
from kbpf.uapi.enums import HELPERS
from tests.emulator.sides import FRAME

pytestmark = pytest.mark.requires("llvmlite")

I = Instruction  # noqa: E741
EXIT = I(ebpf.JMP | ebpf.EXIT)
MOV, ADD, MOV_X = ebpf.ALU64 | ebpf.MOV, ebpf.ALU64 | ebpf.ADD, ebpf.ALU64 | ebpf.MOV | ebpf.X
LOAD, STORE = ebpf.LDX | ebpf.MEM, ebpf.STX | ebpf.MEM
CALL = ebpf.JMP | ebpf.CALL
BUDGET = 5000


def helper(name: str) -> Instruction:
    return I(CALL, 0, 0, 0, HELPERS[name])


def described(*starts: int) -> dict[str, bytes]:
    """BTF of functions that start there, which return numbers."""
    btf = BtfBytes()
    ids = [btf.function("main", GLOBAL, parameters=1)]
    ids += [btf.function(f"f{start}", parameters=2) for start in starts]
    info = b"".join(struct.pack("=II", *pair) for pair in zip((0, *starts), ids, strict=True))
    return {"btf": btf.bytes(), "func_info": info}


def outcome(
    engine: Any, instructions: list[Instruction], context: bytes | None = None, **spec: Any
) -> tuple[object, ...]:
    """What a run gives, or its fault."""
    backend = EmulatorBackend(engine)
    program = ProgramSpec(instructions=tuple(instructions), **spec)
    fd = backend._open(Program(program, [], backend.map, budget=BUDGET, engine=engine))
    try:
        ran = backend.program_run(fd, b"" if spec.get("type") == "syscall" else FRAME, context or bytes(192))
        return ran.value, ran.data, ran.context
    except EmulationFault as fault:
        return fault.message, fault.pc, fault.address
    finally:
        backend.close(fd)


def agree(instructions: list[Instruction], context: bytes | None = None, **spec: Any) -> tuple[object, ...]:
    expected = outcome("interpreter", instructions, context, **spec)
    assert outcome("jit", instructions, context, **spec) == expected
    return expected


@pytest.fixture
def jit() -> EmulatorBackend:
    return EmulatorBackend("jit")


# The budget.


def test_a_function_that_ends_at_a_missing_packet_has_used_its_budget() -> None:
    """Else loops of calls would take the budget's square."""
    program = [
        *[I(MOV_X, 6, 1), I(MOV, 7, 0, 0, 50)],
        *[I(MOV_X, 1, 6), I(CALL, 0, ebpf.PSEUDO_CALL, 0, 4)],
        *[I(ADD, 7, 0, 0, -1), I(ebpf.JMP | ebpf.JNE, 7, 0, -4, 0)],
        *[I(MOV, 0), EXIT],
        *[I(MOV_X, 6, 1), I(MOV, 7, 0, 0, 100)],
        *[I(ADD, 7, 0, 0, -1), I(ebpf.JMP | ebpf.JNE, 7, 0, -2, 0)],
        *[I(ebpf.LD | ebpf.ABS | ebpf.W, 0, 0, 0, 0x7000), EXIT],
    ]
    assert "budget" in str(agree(program, **described(8))[0])


def test_callbacks_use_the_budget() -> None:
    loop = [
        *[I(MOV, 1, 0, 0, 2000), *ld_imm64(2, 5, ebpf.PSEUDO_FUNC), I(MOV, 3), I(MOV, 4), helper("loop"), EXIT],
        *[I(MOV, 0), EXIT],
    ]
    assert "budget" in str(agree(loop, **described(7))[0])


def test_may_goto_stops_where_the_interpreter_does() -> None:
    counted = [
        *[I(MOV, 0), I(ebpf.JMP | ebpf.JCOND, 0, 0, 2), I(ADD, 0, 0, 0, 1)],
        *[I(ebpf.JMP | ebpf.JA, 0, 0, -3), EXIT],
    ]
    assert agree(counted)[0] == 834


# The context and the stack.


def test_a_load_before_the_context_is_none() -> None:
    program = [I(LOAD | ebpf.W, 0, 1, 0), I(LOAD | ebpf.W, 0, 1, -4), EXIT]
    fault = agree(program, bytes(64), type="syscall", flags=BPF_F_SLEEPABLE)
    assert fault[1:] == (1, (1 << 32) - 4)


def test_a_field_that_is_not_there_faults_only_where_it_is_read(jit: EmulatorBackend) -> None:
    remote_port = 152
    program = ProgramSpec(
        type="cgroup_skb",
        expected_attach_type=0,
        instructions=(
            *(I(LOAD | ebpf.W, 0, 1, 0), I(ebpf.JMP | ebpf.JNE, 0, 0, 1, 0)),
            *(I(LOAD | ebpf.W, 0, 1, remote_port), EXIT),
        ),
    )
    assert Program(program, [], jit.map, engine="jit").run_packet(Packet(buffer=bytes(64))) == 64


def test_a_signed_load_of_a_pointer_is_narrow() -> None:
    data_end = 80
    agree([I(ebpf.LDX | ebpf.MEMSX | ebpf.W, 0, 1, data_end), I(ebpf.ALU64 | ebpf.RSH, 0, 0, 0, 32), EXIT], type="xdp")
    agree(
        [I(ebpf.LDX | ebpf.MEMSX | ebpf.W, 0, 1, data_end), I(ebpf.ALU64 | ebpf.RSH, 0, 0, 0, 32), EXIT],
        type="sched_cls",
    )


def test_a_function_may_give_back_the_address_of_its_frame() -> None:
    program = [
        *[I(CALL, 0, ebpf.PSEUDO_CALL, 0, 2), I(LOAD | ebpf.W, 0, 0), EXIT],
        *[I(ebpf.ST | ebpf.MEM | ebpf.DW, 10, 0, -8, 77), I(MOV_X, 0, 10), I(ADD, 0, 0, 0, -8), EXIT],
    ]
    assert agree(program)[0] == 77


# What helpers give out and do.


def test_a_record_that_is_kept_is_the_same_fault() -> None:
    faults = []
    for backend in (EmulatorBackend("interpreter"), EmulatorBackend("jit")):
        ring = backend.map_create(MapSpec(type="ringbuf", max_entries=4096))
        reserve = (*ld_imm64(1, ring, ebpf.PSEUDO_MAP_FD), I(MOV, 2, 0, 0, 8), I(MOV, 3), helper("ringbuf_reserve"))
        fd = backend.program_load(ProgramSpec(instructions=(*reserve, EXIT)), [])
        with pytest.raises(EmulationFault) as caught:
            backend.program_run(fd, FRAME, bytes(192))
        faults.append((str(caught.value), caught.value.pc))
    assert faults[0] == faults[1]
    assert faults[0][1] == 5


def test_helpers_that_leave_the_packet_where_it_is_cost_no_memory(
    jit: EmulatorBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_for = []
    real = session.host_address
    monkeypatch.setattr(session, "host_address", lambda buffer: looked_for.append(buffer) or real(buffer))
    program = (
        *(I(MOV, 6, 0, 0, 200), helper("get_smp_processor_id"), helper("get_numa_node_id")),
        *(I(ADD, 6, 0, 0, -1), I(ebpf.JMP | ebpf.JNE, 6, 0, -4, 0), I(MOV, 0), EXIT),
    )
    jit.program_run(jit.program_load(ProgramSpec(instructions=program), []), FRAME, bytes(192))
    assert 0 < len(looked_for) < 20


def table_of(backend: EmulatorBackend, *programs: int) -> int:
    fd = backend.map_create(MapSpec(type="prog_array", key_size=4, value_size=4, max_entries=len(programs)))
    for index, program in enumerate(programs):
        backend.map_update(fd, index.to_bytes(4, sys.byteorder), program.to_bytes(4, sys.byteorder))
    return fd


def goes_on_in(table: int, index: int) -> tuple[Instruction, ...]:
    return (*ld_imm64(2, table, ebpf.PSEUDO_MAP_FD), I(MOV, 3, 0, 0, index), I(CALL, 0, 0, 0, 12), I(MOV, 0), EXIT)


def test_a_program_stays_until_native_code_has_returned_through_it(
    jit: EmulatorBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    traces = (
        I(MOV_X, 1, 10),
        I(ADD, 1, 0, 0, -8),
        I(MOV, 2, 0, 0, 3),
        I(ebpf.ST | ebpf.MEM | ebpf.DW, 10, 0, -8, 0x41),
    )
    last = jit.program_load(ProgramSpec(instructions=(*traces, helper("trace_printk"), I(MOV, 0, 0, 0, 9), EXIT)), [])
    to_last = table_of(jit, last)
    middle = jit.program_load(ProgramSpec(instructions=goes_on_in(to_last, 0)), [])
    to_middle = table_of(jit, middle)
    first = jit.program_load(ProgramSpec(instructions=goes_on_in(to_middle, 0)), [])
    there = []

    def trace(_: str) -> None:
        native = weakref.ref(jit.program(middle).code.native)
        jit.map_delete(to_middle, bytes(4))
        jit.close(middle)
        gc.collect()
        there.append(native() is not None)

    monkeypatch.setattr(environment, "trace", trace)
    assert jit.program_run(first, FRAME, bytes(192)).value == 9
    assert there == [True]


def test_a_program_for_the_interpreter_is_tail_called_there(jit: EmulatorBackend) -> None:
    target = jit.program_load(ProgramSpec(instructions=(I(MOV, 0, 0, 0, 3), EXIT)), [], engine="interpreter")
    first = jit.program_load(ProgramSpec(instructions=goes_on_in(table_of(jit, target), 0)), [])
    assert jit.program_run(first, FRAME, bytes(192)).value == 3
    assert jit.program(target).code.native is None


def test_maps_go_with_their_program_after_a_fault_in_a_callback(jit: EmulatorBackend) -> None:
    array = jit.map_create(MapSpec(type="array", key_size=4, value_size=8, max_entries=1))
    program = (
        *(*ld_imm64(6, array, ebpf.PSEUDO_MAP_FD), I(MOV, 1, 0, 0, 1), *ld_imm64(2, 5, ebpf.PSEUDO_FUNC)),
        *(I(MOV, 3), I(MOV, 4), helper("loop"), EXIT),
        *(I(LOAD | ebpf.W, 0, 1), EXIT),
    )
    fd = jit.program_load(ProgramSpec(instructions=program, **described(9)), [])
    gone = weakref.ref(jit.map(array))
    gc.disable()
    try:
        with pytest.raises(EmulationFault):
            jit.program_run(fd, FRAME, bytes(192))
        jit.close(array)
        jit.close(fd)
        assert gone() is None
    finally:
        gc.enable()


def test_programs_that_are_gone_take_no_memory(jit: EmulatorBackend) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def run(times: int) -> None:
        for _ in range(times):
            fd = jit.program_load(ProgramSpec(instructions=(I(LOAD | ebpf.W, 0, 1), EXIT)), [])
            jit.program_run(fd, FRAME, bytes(192))
            jit.close(fd)
        gc.collect()

    run(40)
    before = resident()
    run(100)
    assert resident() - before < 2 << 20


# Exceptions.


class Alarm(Exception):
    pass


@pytest.fixture
def alarm() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Alarm

    before = signal.signal(signal.SIGALRM, ring)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("alarm")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_a_signal_handler_raises_is_not_lost(jit: EmulatorBackend) -> None:
    """It mostly comes while native code runs, and up on the way into the next thing that Python is asked for."""
    long_ways = (
        *(I(MOV, 7, 0, 0, 100_000), I(ebpf.ALU64 | ebpf.MUL, 8, 0, 0, 1664525), I(ADD, 8, 0, 0, 1013904223)),
        *(I(ADD, 7, 0, 0, -1), I(ebpf.JMP | ebpf.JNE, 7, 0, -4, 0)),
        *(helper("ktime_get_ns"), I(ebpf.JMP | ebpf.JNE, 8, 0, -7, 1), I(MOV_X, 0, 8), EXIT),
    )
    program = Program(ProgramSpec(instructions=long_ways), [], jit.map, engine="jit")
    with pytest.raises(EmulationFault, match="budget"):
        program.run_packet(Packet(buffer=b""))
    for _ in range(20):
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.002)
            program.run_packet(Packet(buffer=b""))
        except (Alarm, KeyboardInterrupt):
            continue
        pytest.fail("the run has ended as if nothing had been")


def test_a_helper_that_is_interrupted_ends_the_run(jit: EmulatorBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    program = (helper("ktime_get_ns"), I(MOV, 0), EXIT)
    loaded = Program(ProgramSpec(instructions=program), [], jit.map, engine="jit")
    monkeypatch.setattr(environment, "clock", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loaded.run_packet(Packet(buffer=b""))
    monkeypatch.setattr(environment, "clock", lambda: 5)
    assert loaded.run_packet(Packet(buffer=b"")) == 0


# Many packets.


def values(engine: Any, type: str, program: tuple[Instruction, ...], **maps: MapSpec) -> list[int]:
    backend = EmulatorBackend(engine)
    fd = backend.program_load(ProgramSpec(type=type, instructions=program, maps=tuple(maps.values())), [])
    return list(backend.program_values(fd, [FRAME] * 3, b"" if type == "xdp" else bytes(192)))


def test_helpers_find_the_packet_among_many() -> None:
    """The key of a lookup that lies in the packet."""
    results = []
    for engine in ("interpreter", "jit"):
        backend = EmulatorBackend(engine)  # type: ignore[arg-type]
        table = backend.map_create(MapSpec(type="hash", key_size=4, value_size=8, max_entries=1))
        backend.map_update(table, FRAME[:4], bytes(8))
        program = (
            *(I(LOAD | ebpf.W, 2, 1, 0), I(LOAD | ebpf.W, 3, 1, 4), I(MOV_X, 4, 2), I(ADD, 4, 0, 0, 8)),
            *(I(ebpf.JMP | ebpf.JGT | ebpf.X, 4, 3, 5), *ld_imm64(1, table, ebpf.PSEUDO_MAP_FD)),
            *(helper("map_lookup_elem"), I(ebpf.JMP | ebpf.JEQ, 0, 0, 1, 0), I(MOV, 0, 0, 0, 7), EXIT),
        )
        fd = backend.program_load(ProgramSpec(type="xdp", instructions=program), [])
        results.append(list(backend.program_values(fd, [FRAME] * 3, b"")))
    assert results[0] == results[1] == [7, 7, 7]


def test_what_a_function_does_to_the_context_is_seen_among_many() -> None:
    cb = 48
    program = (
        *(I(MOV_X, 6, 1), I(CALL, 0, ebpf.PSEUDO_CALL, 0, 2), I(LOAD | ebpf.W, 0, 6, cb), EXIT),
        *(I(ebpf.ST | ebpf.MEM | ebpf.W, 1, 0, cb, 5), I(MOV, 0), EXIT),
    )
    assert values("jit", "sched_cls", program) == values("interpreter", "sched_cls", program) == [5, 5, 5]


def test_a_fault_among_many_says_the_same() -> None:
    program = (I(LOAD | ebpf.W, 2, 1, 0), I(LOAD | ebpf.W, 0, 2, 0x1000), EXIT)
    faults = []
    for engine in ("interpreter", "jit"):
        with pytest.raises(EmulationFault) as caught:
            values(engine, "xdp", program)
        faults.append((str(caught.value), caught.value.pc, caught.value.address))
    assert faults[0] == faults[1]


#: The first byte, once Python has been asked for a random number.
FIRST_BYTE = [
    cbpf.Instruction(cbpf.LD | cbpf.W | cbpf.ABS, 0, 0, (cbpf.AD_OFF + 56) & 0xFFFFFFFF),
    cbpf.Instruction(cbpf.LD | cbpf.B | cbpf.ABS, 0, 0, 0),
    cbpf.Instruction(cbpf.RET | cbpf.A, 0, 0, 0),
]


def test_a_list_that_changes_meanwhile_is_run_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what Python is asked for, or by another thread."""
    filter = ClassicProgram(FIRST_BYTE, engine="jit")
    packets = [bytes([number % 2]) * 100 for number in range(50)]

    def number() -> int:
        packets.clear()
        gc.collect()
        return 4

    monkeypatch.setattr(environment, "random32", number)
    native = filter.native("packet", filter)
    assert native is not None
    assert bytes(native.over_list(packets, None)) == bytes(number % 2 for number in range(50))


def test_numbers_of_packets_stay_in_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as native code has their address."""
    filter = ClassicProgram(FIRST_BYTE, engine="jit")
    offsets, sizes, wirelens = (array("Q", numbers) for numbers in ([0, 1], [1, 1], [1, 1]))
    kept = []

    def number() -> int:
        for numbers in (offsets, sizes, wirelens):
            with pytest.raises(BufferError):
                numbers.append(5)
            kept.append(numbers)
        return 4

    monkeypatch.setattr(environment, "random32", number)
    native = filter.native("packet", filter)
    assert native is not None
    assert bytes(native.over_spans(b"\x01\x00", offsets, sizes, wirelens)) == b"\x01\x00"
    assert len(kept) == 6
