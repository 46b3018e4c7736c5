"""Programs that are out to break native code end in it as in the interpreter, and leave the memory around theirs alone.

Native code runs in a copy of the process, on buffers between pages that nobody may touch: one byte beyond ends it.
"""

from __future__ import annotations

import faulthandler
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from kbpf.emulator import engines
from kbpf.emulator.backend import EmulatorBackend
from kbpf.emulator.jit import session
from kbpf.emulator.memory import PACKET, STACK, Region
from kbpf.emulator.program import Program
from kbpf.errors import EmulationFault
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction, ld_imm64
from kbpf.specs import MapSpec, ProgramSpec
from kbpf.testing import fuzz, guarded
from kbpf.testing.native import level_for
from kbpf.testing.wild_engines import DefinedRun, in_copy, memory, repeatable
from kbpf.uapi.enums import HELPERS
from tests.emulator.sides import FRAME
from tests.emulator.test_emulator_jit_safety import described

pytestmark = pytest.mark.requires("llvmlite")

I = Instruction  # noqa: E741
EXIT = I(ebpf.JMP | ebpf.EXIT)
MOV, ADD, MOV_X = ebpf.ALU64 | ebpf.MOV, ebpf.ALU64 | ebpf.ADD, ebpf.ALU64 | ebpf.MOV | ebpf.X
LOAD, STORE, PUT = ebpf.LDX | ebpf.MEM, ebpf.STX | ebpf.MEM, ebpf.ST | ebpf.MEM
ATOMIC = ebpf.STX | ebpf.ATOMIC
CALL, JA = ebpf.JMP | ebpf.CALL, ebpf.JMP | ebpf.JA
B, H, W, DW = ebpf.B, ebpf.H, ebpf.W, ebpf.DW
FD, VALUE, FUNC = ebpf.PSEUDO_MAP_FD, ebpf.PSEUDO_MAP_VALUE, ebpf.PSEUDO_FUNC


def call(name: str) -> Instruction:
    return I(CALL, 0, 0, 0, HELPERS[name])


class Machine:
    """An emulator with a few maps, and programs that run on both engines."""

    def __init__(self) -> None:
        self.backend = EmulatorBackend("interpreter")
        self.array, self.other = self.map("array", 4, 8, 1), self.map("array", 4, 8, 1)
        self.hash, self.ring = self.map("hash", 4, 8, 2), self.map("ringbuf", 0, 0, 4096)
        self.programs = self.map("prog_array", 4, 4, 2)
        self.backend.map_update(self.hash, bytes(4), b"in  hash")

    def map(self, type: str, key: int, value: int, entries: int) -> int:
        return self.backend.map_create(MapSpec(type=type, key_size=key, value_size=value, max_entries=entries))

    def value(self, fd: int) -> int:
        """The address of an array's values, as no program is told it."""
        return self.backend.map(fd).values.address  # type: ignore[attr-defined,no-any-return]

    def load(self, instructions: Sequence[Instruction], **spec: Any) -> int:
        loaded = Program(ProgramSpec(instructions=tuple(instructions), **spec), [], self.backend.map, 20_000)
        return self.backend._open(loaded)

    def end(self, fd: int, engine: Any) -> tuple[Any, ...]:
        programs = [self.backend.program(fd), *self.tail_called]
        for program in programs:
            program.code.engine = engine
        context = b"" if programs[0].type == "xdp" else bytes(192)
        try:
            ran = self.backend.program_run(fd, FRAME, context)
            return (ran.value, ran.data, ran.context), memory()
        except EmulationFault as fault:
            return (fault.message, fault.pc, fault.address), memory()

    @property
    def tail_called(self) -> list[Program]:
        found = self.backend.map(self.programs)._held.values()  # type: ignore[attr-defined]
        return list(found)

    def agree(self, *programs: Sequence[Instruction], **spec: Any) -> list[tuple[Any, ...]]:
        """How both engines end, one program after the other, native code under guard in a copy of the process."""
        return self.agree_on([self.load(program, **spec) for program in programs])

    def agree_on(self, fds: list[int]) -> list[tuple[Any, ...]]:
        found = in_copy(lambda: tuple(self.guarded(fd, number) for number, fd in enumerate(fds)))
        expected = tuple(self.end(fd, "interpreter") for fd in fds)
        assert found == expected
        return [ending for ending, _ in expected]

    def guarded(self, fd: int, number: int = 0) -> tuple[Any, ...]:
        with guarded.guarded(), level_for(number):
            return self.end(fd, "jit")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    monkeypatch.setattr(engines, "Run", DefinedRun)
    # Else what other tests have left goes at one time in the process, and at another in its copy.
    gc.collect()
    with repeatable():
        yield Machine()


# Addresses.


def at(address: int) -> list[Instruction]:
    return ld_imm64(1, address & (1 << 64) - 1)


#: What may be done at R1.
ACCESSES = [
    *([I(LOAD | size, 0, 1)] for size in (B, DW)),
    *([I(STORE | size, 1, 1)] for size in (H, DW)),
    *([I(ATOMIC | size, 1, 2, 0, imm)] for size, imm in ((W, ebpf.ADD), (DW, ebpf.XCHG), (DW, ebpf.CMPXCHG))),
    [I(ebpf.LDX | ebpf.MEMSX | W, 0, 1)],
]
#: Around the ends of what there is, and where sums of address and size or offset wrap around.
PLACES = (
    *(0, 1, -1, -8, -4, 1 << 31, (1 << 32) - 1, 1 << 63),
    *((1 << 32) - 4, (STACK << 32) - 1, (STACK << 32) + 0xFFFFFFFF, (STACK << 32) + 0xFFFFFFFC),
    *((PACKET << 32) + 0xFFFFFFFF, (PACKET << 32) + 60, 4 << 32, 0xFF << 32, 0xFFFFFFFF << 32),
)


@pytest.mark.parametrize("place", PLACES, ids=hex)
def test_forged_addresses(machine: Machine, place: int) -> None:
    for type in ("socket_filter", "xdp"):
        machine.agree(*([*at(place), *access, I(MOV, 0), EXIT] for access in ACCESSES), type=type)


def test_ends_of_an_array(machine: Machine) -> None:
    """By what the program refers to, and by a number that it should not know."""
    for offset in (-8, -1, 0, 1, 4, 5, 7, 8, 0xFFFFFFFC):
        there = [*ld_imm64(1, machine.array, VALUE), *ld_imm64(3, offset & 0xFFFFFFFF), I(ADD | ebpf.X, 1, 3)]
        machine.agree(*([*there, *access, I(MOV, 0), EXIT] for access in ACCESSES))
        there = at(machine.value(machine.other) + offset)
        machine.agree(*([*there, *access, I(MOV, 0), EXIT] for access in ACCESSES))


def test_ends_of_the_packet(machine: Machine) -> None:
    for type in ("xdp", "sched_cls"):
        data = 0 if type == "xdp" else 76
        for offset in (-1, 0, len(FRAME) - 8, len(FRAME) - 4, len(FRAME) - 1, len(FRAME), 0x7FFFFFFF):
            there = [I(LOAD | W, 1, 1, data), I(ADD, 1, 0, 0, offset)]
            machine.agree(*([*there, *access, I(MOV, 0), EXIT] for access in ACCESSES), type=type)


def test_ends_of_the_stack(machine: Machine) -> None:
    for offset in (-520, -513, -512, -511, -8, -7, -4, -1, 0, 8):
        # An offset that is only known when it runs, so that no frame is native code's own.
        there = [I(MOV_X, 1, 10), I(MOV, 3, 0, 0, offset), I(ADD | ebpf.X, 1, 3)]
        machine.agree(*([*there, *access, I(MOV, 0), EXIT] for access in ACCESSES))


def test_numbers_of_regions_that_share_an_entry(machine: Machine) -> None:
    """Of many, two are at the same place in the table, and some numbers there are of no region."""
    first = machine.value(machine.array)
    taken = []
    while not taken or taken[-1].number % 256 != (first >> 32) % 256:
        taken.append(Region(bytearray(b"another region!!")))
    second = taken[-1].address
    for one, other in ((first, second), (second, first), (second, second), (first, second + (256 << 32))):
        known = [*ld_imm64(1, machine.array, VALUE), I(LOAD | DW, 0, 1)]
        machine.agree(*([*known, *at(one), *access, *at(other), *access, EXIT] for access in ACCESSES))


def test_registers_full_of_addresses(machine: Machine) -> None:
    """Pointers made by arithmetic on others, of regions that the program was never given."""
    array, other = machine.value(machine.array), machine.value(machine.other)
    steps = [
        [I(ebpf.ALU64 | ebpf.XOR | ebpf.X, 1, 2)],
        [I(ebpf.ALU64 | ebpf.MUL, 1, 0, 0, 3)],
        [I(ebpf.ALU64 | ebpf.NEG, 1)],
        [I(ebpf.ALU | ebpf.ADD, 1, 0, 0, 0)],
        [*ld_imm64(3, other - array), I(ADD | ebpf.X, 1, 3)],
        [I(ebpf.ALU64 | ebpf.RSH, 1, 0, 0, 32), I(ADD, 1, 0, 0, 1), I(ebpf.ALU64 | ebpf.LSH, 1, 0, 0, 32)],
        [I(ebpf.ALU64 | ebpf.END, 1, 0, 0, 64)],
    ]
    for step in steps:
        known = [*ld_imm64(1, machine.array, VALUE), I(MOV_X, 2, 1)]
        machine.agree(*([*known, *step, *access, I(MOV, 0), EXIT] for access in ACCESSES))


# What goes away.


def test_a_record_that_was_submitted(machine: Machine) -> None:
    reserve = [*ld_imm64(1, machine.ring, FD), I(MOV, 2, 0, 0, 8), I(MOV, 3), call("ringbuf_reserve")]
    kept = [*reserve, I(ebpf.JMP | ebpf.JEQ, 0, 0, 6, 0), I(MOV_X, 6, 0), I(PUT | DW, 6, 0, 0, 7)]
    gone = [*kept, I(MOV_X, 1, 6), I(MOV, 2), call("ringbuf_submit"), I(MOV_X, 1, 6)]
    endings = machine.agree(*([*gone, *access, I(MOV, 0), EXIT] for access in ACCESSES))
    assert {pc for _, pc, _ in endings} == {len(gone)}


def test_a_value_that_was_deleted(machine: Machine) -> None:
    key = [I(PUT | W, 10, 0, -4, 0), I(MOV_X, 2, 10), I(ADD, 2, 0, 0, -4), *ld_imm64(1, machine.hash, FD)]
    gone = [*key, call("map_lookup_elem"), I(MOV_X, 6, 0), *key, call("map_delete_elem"), I(MOV_X, 1, 6)]
    machine.agree(*([*gone, *access, I(MOV, 0), EXIT] for access in ACCESSES))


@pytest.mark.parametrize("helper", ["xdp_adjust_head", "xdp_adjust_tail"])
@pytest.mark.parametrize("delta", [-16, 16, -len(FRAME) + 14, 200])
def test_a_packet_that_was_moved(machine: Machine, helper: str, delta: int) -> None:
    moved = [I(MOV_X, 6, 1), I(LOAD | W, 7, 1, 0), I(LOAD | W, 0, 7), I(MOV, 2, 0, 0, delta), call(helper)]
    for offset in (0, len(FRAME) - 8, len(FRAME) + 8):
        old = [*moved, I(MOV_X, 1, 7), I(ADD, 1, 0, 0, offset)]
        machine.agree(*([*old, *access, I(LOAD | W, 0, 6, 4), EXIT] for access in ACCESSES), type="xdp")


@pytest.mark.parametrize("size", [14, 34, 60, 200, 0x7FFFFFFF])
def test_a_packet_that_was_cut(machine: Machine, size: int) -> None:
    cut = [I(MOV_X, 6, 1), I(LOAD | W, 7, 1, 76), I(LOAD | W, 0, 7), I(MOV, 2, 0, 0, size), I(MOV, 3)]
    old = [*cut, call("skb_change_tail"), I(MOV_X, 1, 7), I(ADD, 1, 0, 0, 30)]
    machine.agree(*([*old, *access, I(LOAD | W, 0, 6, 80), EXIT] for access in ACCESSES), type="sched_cls")


# Helpers.


#: Helpers that take addresses.
TAKERS = (
    *("map_lookup_elem", "map_update_elem", "map_delete_elem", "for_each_map_elem", "ringbuf_output", "ringbuf_submit"),
    *("skb_load_bytes", "probe_read_kernel", "trace_printk", "loop", "snprintf", "strtol"),
)


@pytest.mark.parametrize("name", TAKERS)
def test_helpers_with_wild_pointers(machine: Machine, name: str) -> None:
    rest = [*(I(MOV_X, number, 6) for number in range(2, 6)), call(name), EXIT]
    for first in ([I(MOV_X, 1, 6)], ld_imm64(1, machine.hash, FD)):
        machine.agree(*([*ld_imm64(6, place & (1 << 64) - 1), *first, *rest] for place in PLACES))


# What does not end.


def test_what_calls_itself_is_not_loaded(machine: Machine) -> None:
    with pytest.raises(OSError):
        machine.load([I(CALL, 0, ebpf.PSEUDO_CALL, 0, -1), EXIT])


def test_a_callback_that_calls_itself_by_a_forged_number(machine: Machine) -> None:
    start = 8
    program = [
        *[I(MOV, 1, 0, 0, 2), *ld_imm64(2, start - 2, FUNC), I(MOV, 3), I(MOV, 4), call("loop"), I(MOV, 0), EXIT],
        *[I(MOV, 1, 0, 0, 2), I(MOV, 2, 0, 0, start), I(MOV, 3), I(MOV, 4), call("loop"), I(MOV, 0), EXIT],
    ]
    assert "too deep" in str(machine.agree(program, **described(start)))


@pytest.mark.parametrize(
    "loop",
    [
        [I(MOV, 0), I(ebpf.JMP | ebpf.JEQ, 0, 0, -2, 0), EXIT],
        [I(MOV, 0), I(ebpf.JMP | ebpf.JCOND, 0, 0, 1), I(JA, 0, 0, -2), I(ebpf.JMP | ebpf.JEQ, 0, 0, -4, 0), EXIT],
        [I(MOV, 0), call("ktime_get_ns"), I(ebpf.JMP | ebpf.JNE, 0, 0, -2, 0), EXIT],
        [I(ebpf.JMP32 | ebpf.JA, 0, 0, 0, 0), I(ebpf.JMP32 | ebpf.JEQ, 0, 0, -2, 0), I(MOV, 0), EXIT],
    ],
)
def test_loops_end(machine: Machine, loop: list[Instruction]) -> None:
    assert "too long" in str(machine.agree(loop))


def test_tail_calls_without_end(machine: Machine) -> None:
    """Two programs that call each other, with and without loops and stacks of their own."""
    for body in ([], [I(PUT | DW, 10, 0, -512, 7)], [I(MOV, 6, 0, 0, 90), I(ADD, 6, 0, 0, -1),
                                                    I(ebpf.JMP | ebpf.JNE, 6, 0, -2, 0)]):  # fmt: skip
        for index in range(2):
            storm = [*body, *ld_imm64(2, machine.programs, FD), I(MOV, 3, 0, 0, 1 - index), I(CALL, 0, 0, 0, 12)]
            fd = machine.load([*storm, I(LOAD | DW, 0, 10, -512), EXIT])
            machine.backend.map_update(machine.programs, index.to_bytes(4, "little"), fd.to_bytes(4, "little"))
        machine.agree_on([fd])


def test_packet_loads_at_all_kinds_of_places(machine: Machine) -> None:
    for k in (0, 1, 60, 0x7FFFFFFF, -0x80000000, -0x100000, -0x100000 + 59, -0x200000, -0x200001, -0x1000, -1):
        loads = [(0, I(ebpf.LD | ebpf.ABS | size, 0, 0, 0, k)) for size in (B, H, W)]
        loads += [(n, I(ebpf.LD | ebpf.IND | size, 0, 7, 0, k)) for size in (B, H, W) for n in (0, 1, -1, 0x7FFFFFFF)]
        machine.agree(*([I(MOV_X, 6, 1), I(MOV, 7, 0, 0, index), load, EXIT] for index, load in loads))


# The test itself.


def test_one_byte_beyond_is_seen(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., None] = session.Session._put

    def more(self: session.Session, number: int, base: int, readable: int, writable: int, held: object) -> None:
        real(self, number, base, readable + 1, writable + 1, held)

    monkeypatch.setattr(session.Session, "_put", more)
    beyond = [*at(machine.value(machine.other)), I(LOAD | DW, 0, 1), I(LOAD | B, 0, 1, 8), EXIT]
    fd = machine.load(beyond)

    def native() -> tuple[Any, ...]:
        # Which would tell at length.
        faulthandler.disable()
        return machine.guarded(fd)

    assert in_copy(native) == (("the process ended with -11",),)


def test_wild_programs_end_alike() -> None:
    report = fuzz.run_cases("wild", "test", range(100), jit=True)
    assert report.differences == []
    assert report.accepted > 50


@pytest.mark.fuzz
@pytest.mark.skipif(os.environ.get("KBPF_FUZZ") != "full", reason="the full run: make fuzz")
def test_a_hundred_thousand_wild_programs_end_alike(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        assert fuzz.main(["wild", "--count", "100000", "--engine", "jit"]) == 0
