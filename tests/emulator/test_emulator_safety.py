"""No program, however wrong, crashes or hangs the process, or reaches outside its regions."""

from __future__ import annotations

from random import Random

import pytest

from kbpf.backend import LoadRefused
from kbpf.emulator.backend import EmulatorBackend
from kbpf.emulator.packet import Packet
from kbpf.emulator.program import Program
from kbpf.emulator.semantics import factory
from kbpf.errors import EmulationFault
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction, ld_imm64
from kbpf.specs import MapSpec, ProgramSpec

I = Instruction  # noqa: E741
EXIT = I(ebpf.JMP | ebpf.EXIT)
MOV_K = ebpf.ALU64 | ebpf.MOV | ebpf.K
#: Every opcode that the table knows, but calls and exits.
OPCODES = [
    code for code in range(256) if code & 7 != ebpf.STX or code & 0xE0 != ebpf.ATOMIC if factory(code, 0, 16, False)
]
ATOMIC_OPERATIONS = (0, 1, 0x40, 0x41, 0x50, 0x51, 0xA0, 0xA1, ebpf.XCHG, ebpf.CMPXCHG)
HELPERS = (1, 2, 3, 5, 6, 7, 8, 14, 15, 16, 26, 42, 68, 125, 160, 195)
BUDGET = 3000
PROGRAMS = 5000


@pytest.fixture
def backend() -> EmulatorBackend:
    return EmulatorBackend()


def load(backend: EmulatorBackend, *instructions: Instruction, budget: int = BUDGET) -> Program:
    return Program(ProgramSpec(instructions=instructions), [], backend.map, budget)


def wild_program(rng: Random, map_fd: int) -> list[Instruction]:
    """Instructions that exist, with registers, offsets and jumps at random."""
    length = rng.randrange(2, 30)
    program: list[Instruction] = [*ld_imm64(1, map_fd, ebpf.PSEUDO_MAP_FD)] if rng.random() < 0.5 else []
    start = len(program)
    for pc in range(start, start + length):
        kind = rng.random()
        target = rng.randrange(start, start + length + 1) - pc - 1
        d, s, off = rng.randrange(10), rng.randrange(11), rng.choice((0, -8, -4, 4, 8, -512, 48, 0x7FFF, -0x8000))
        imm = rng.choice((0, 1, 4, 8, 64, -1, -8, rng.getrandbits(31)))
        if kind < 0.1:
            program.append(I(ebpf.JMP | ebpf.CALL, 0, 0, 0, rng.choice(HELPERS)))
        elif kind < 0.13:
            program.append(I(ebpf.JMP | ebpf.CALL, 0, ebpf.PSEUDO_CALL, 0, target))
        elif kind < 0.2:
            size = rng.choice((ebpf.W, ebpf.DW))
            program.append(I(ebpf.STX | ebpf.ATOMIC | size, d, s, off, rng.choice(ATOMIC_OPERATIONS)))
        else:
            opcode = rng.choice(OPCODES)
            cls, by_register, op = opcode & 7, opcode & ebpf.X, opcode & 0xF0
            if cls in (ebpf.JMP, ebpf.JMP32):
                long = opcode == ebpf.JMP32 | ebpf.JA
                bare = op in (ebpf.JA, ebpf.JCOND)
                program.append(
                    I(
                        opcode,
                        0 if bare else d,
                        s if by_register else 0,
                        0 if long else target,
                        target if long else 0 if bare or by_register else imm,
                    )
                )
            elif cls in (ebpf.ALU, ebpf.ALU64):
                if op == ebpf.END:
                    program.append(I(opcode, d, 0, 0, 16))
                elif op == ebpf.NEG:
                    program.append(I(opcode, d))
                else:
                    program.append(I(opcode, d, s if by_register else 0, 0, 0 if by_register else imm & 31 or 1))
            elif cls == ebpf.LD:
                program.append(I(opcode, 0, s if opcode & 0xE0 == ebpf.IND else 0, 0, imm))
            else:
                program.append(I(opcode, d, 0 if cls == ebpf.ST else s, off, imm if cls == ebpf.ST else 0))
    return [*program, I(MOV_K), EXIT]


def test_wild_programs_end_or_fault(backend: EmulatorBackend) -> None:
    rng = Random(1)
    map_fd = backend.map_create(MapSpec(type="hash", key_size=4, value_size=8, max_entries=4))
    packet = Packet(buffer=bytes(range(100)), offset=14, mac=0, network=14)
    ended = faulted = refused = 0
    while ended + faulted < PROGRAMS:
        try:
            program = load(backend, *wild_program(rng, map_fd))
        except LoadRefused:
            refused += 1
            continue
        try:
            assert 0 <= program.run_packet(packet) <= 0xFFFFFFFF
            ended += 1
        except EmulationFault as fault:
            assert fault.pc >= 0
            faulted += 1
    assert min(ended, faulted) > PROGRAMS // 10, (ended, faulted, refused)


def test_random_bytes_are_refused_or_run(backend: EmulatorBackend) -> None:
    rng = Random(2)
    packet = Packet(buffer=bytes(100))
    for _ in range(5000):
        raw = ebpf.decode(rng.randbytes(8 * rng.randrange(1, 6)))
        try:
            program = load(backend, *raw, EXIT)
        except LoadRefused as refusal:
            assert refusal.errno
            continue
        with pytest.raises(EmulationFault):
            assert program.run_packet(packet) >= 0
            raise EmulationFault("it ran")


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
