"""No program, however wrong, crashes or hangs the process, or reaches outside its regions."""

from __future__ import annotations

import os
from contextlib import ExitStack

import pytest

from kbpf.emulator import helpers
from kbpf.emulator.backend import EmulatorBackend
from kbpf.emulator.maps import KINDS
from kbpf.emulator.packet import Packet
from kbpf.emulator.program import Program
from kbpf.errors import EmulationFault
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction, ld_imm64
from kbpf.specs import MapSpec, ProgramSpec
from kbpf.testing import fuzz
from kbpf.testing.generate_wild import BUDGET
from kbpf.testing.wild import one_of_each
from kbpf.uapi.enums import HELPERS

I = Instruction  # noqa: E741
EXIT = I(ebpf.JMP | ebpf.EXIT)
MOV_K = ebpf.ALU64 | ebpf.MOV | ebpf.K
#: Of a million that `make fuzz` runs.
PROGRAMS = 6000


@pytest.fixture
def backend() -> EmulatorBackend:
    return EmulatorBackend()


def load(backend: EmulatorBackend, *instructions: Instruction, budget: int = BUDGET) -> Program:
    return Program(ProgramSpec(instructions=instructions), [], backend.map, budget)


def test_wild_programs_end_or_fault() -> None:
    report = fuzz.run_cases("wild", "test", range(PROGRAMS))
    assert report.differences == []
    ways = [report.coverage[f"ended in {way}"] for way in ("value", "fault", "errno")]
    assert sum(ways) == report.accepted > PROGRAMS // 2
    assert min(ways) > PROGRAMS // 100, ways


@pytest.mark.fuzz
@pytest.mark.skipif(os.environ.get("KBPF_FUZZ") != "full", reason="the full run: make fuzz")
def test_a_million_wild_programs_end_or_fault(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        assert fuzz.main(["wild", "--count", "1000000"]) == 0


def test_what_no_program_may_raise_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise TypeError("a bug")

    monkeypatch.setitem(helpers.FUNCTIONS, HELPERS["map_lookup_elem"], broken)
    report = fuzz.run_cases("wild", "broken", range(2000), enough=1)
    assert "TypeError: a bug" in report.differences[0]


def test_there_is_a_map_of_each_type(backend: EmulatorBackend) -> None:
    with ExitStack() as stack:
        assert {backend.map_info(fd).type for fd in one_of_each(backend, stack)} == set(KINDS)


@pytest.mark.parametrize(
    ("name", "program", "pc"),
    [
        ("a null pointer", (I(MOV_K, 1), I(ebpf.LDX | ebpf.MEM | ebpf.W, 0, 1)), 1),
        ("above the stack", (I(ebpf.LDX | ebpf.MEM | ebpf.W, 0, 10),), 0),
        ("across the stack's end", (I(ebpf.STX | ebpf.MEM | ebpf.DW, 10, 1, -4),), 0),
        ("below the stack", (I(ebpf.LDX | ebpf.MEM | ebpf.B, 0, 10, -513),), 0),
        ("behind the context", (I(ebpf.LDX | ebpf.MEM | ebpf.W, 0, 1, 192),), 0),
        ("a context field that may not be written", (I(ebpf.STX | ebpf.MEM | ebpf.W, 1, 1, 0),), 0),
        ("a wild pointer", (*ld_imm64(1, 0xFFFFFFFFFFFFFFF0), I(ebpf.LDX | ebpf.MEM | ebpf.DW, 0, 1, 0x7FFF)), 2),
        ("an atomic on the context", (I(ebpf.STX | ebpf.ATOMIC | ebpf.W, 1, 0, 48, 0),), 0),
        ("a map that is none", (I(ebpf.JMP | ebpf.CALL, 0, 0, 0, 1),), 0),
        ("an endless loop", (I(ebpf.JMP | ebpf.JEQ, 2, 0, -1, 0), I(ebpf.JMP | ebpf.JA, 0, 0, -2)), 0),
    ],
)  # fmt: skip
def test_it_faults_at_the_instruction(
    backend: EmulatorBackend, name: str, program: tuple[Instruction, ...], pc: int
) -> None:
    if program[-1].opcode & 7 != ebpf.JMP or program[-1].opcode == ebpf.JMP | ebpf.CALL:
        program = (*program, EXIT)
    with pytest.raises(EmulationFault) as fault:
        load(backend, *program).run_packet(Packet(buffer=bytes(64)))
    assert fault.value.pc == pc


def test_may_goto_backwards_is_charged(backend: EmulatorBackend) -> None:
    with pytest.raises(EmulationFault, match="runs too long"):
        load(backend, I(MOV_K), I(ebpf.JMP | ebpf.JCOND, 0, 0, -2), I(ebpf.JMP | ebpf.JA, 0, 0, -3)).run_packet(
            Packet(buffer=b"")
        )


def test_an_endless_loop_uses_up_its_budget(backend: EmulatorBackend) -> None:
    with pytest.raises(EmulationFault, match="runs too long"):
        load(backend, I(MOV_K), I(ebpf.JMP | ebpf.JA, 0, 0, -2), budget=1 << 20).run_packet(Packet(buffer=b""))


def test_a_map_value_ends_where_the_map_does(backend: EmulatorBackend) -> None:
    fd = backend.map_create(MapSpec(type="array", key_size=4, value_size=8, max_entries=1))
    read = I(ebpf.LDX | ebpf.MEM | ebpf.W, 0, 1, 8)
    with pytest.raises(EmulationFault) as fault:
        load(backend, *ld_imm64(1, fd, ebpf.PSEUDO_MAP_VALUE), read, EXIT).run_packet(Packet(buffer=b""))
    assert fault.value.address is not None
    assert fault.value.address & 0xFFFFFFFF == 8


def test_a_map_that_programs_may_only_read_is_not_written(backend: EmulatorBackend) -> None:
    fd = backend.map_create(MapSpec(type="array", key_size=4, value_size=8, max_entries=1, flags=1 << 7))
    write = I(ebpf.STX | ebpf.MEM | ebpf.W, 1, 1)
    with pytest.raises(EmulationFault, match="write"):
        load(backend, *ld_imm64(1, fd, ebpf.PSEUDO_MAP_VALUE), write, I(MOV_K), EXIT).run_packet(Packet(buffer=b""))


def test_a_record_that_is_kept_is_a_fault_where_the_program_ends(backend: EmulatorBackend) -> None:
    fd = backend.map_create(MapSpec(type="ringbuf", max_entries=4096))
    reserve = [I(MOV_K, 2, 0, 0, 8), I(MOV_K, 3), I(ebpf.JMP | ebpf.CALL, 0, 0, 0, HELPERS["ringbuf_reserve"])]
    with pytest.raises(EmulationFault, match="in its hands") as fault:
        load(backend, *ld_imm64(1, fd, ebpf.PSEUDO_MAP_FD), *reserve, EXIT).run_packet(Packet(buffer=b""))
    assert fault.value.pc == 5


def test_values_and_pointers_go_with_their_map(backend: EmulatorBackend) -> None:
    """An address kept in another map is dead once its map is gone."""
    keep = backend.map_create(MapSpec(type="array", key_size=4, value_size=8, max_entries=1))
    gone = backend.map_create(MapSpec(type="array", key_size=4, value_size=8, max_entries=1))
    store = load(
        backend, *ld_imm64(1, keep, 2), *ld_imm64(2, gone, 2), I(ebpf.STX | ebpf.MEM | ebpf.DW, 1, 2), I(MOV_K), EXIT
    )
    follow = load(
        backend,
        *ld_imm64(1, keep, 2),
        I(ebpf.LDX | ebpf.MEM | ebpf.DW, 1, 1),
        I(ebpf.LDX | ebpf.MEM | ebpf.W, 0, 1),
        EXIT,
    )
    packet = Packet(buffer=b"")
    store.run_packet(packet)
    assert follow.run_packet(packet) == 0
    backend.close(gone)
    del store
    with pytest.raises(EmulationFault):
        follow.run_packet(packet)
