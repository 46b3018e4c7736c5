"""No call of a helper with whatever in the registers crashes the process or reaches outside the regions."""

from __future__ import annotations

from random import Random

import pytest
from mapcode import described_value
from sides import FRAME

from kbpf.backend import LoadRefused
from kbpf.emulator import events, helpers, test_runs
from kbpf.emulator.attach_types import EXPECTED
from kbpf.emulator.backend import EmulatorBackend
from kbpf.emulator.helpers.allowed import allowed
from kbpf.emulator.maps import KINDS
from kbpf.emulator.packet import Packet
from kbpf.emulator.program import Program
from kbpf.errors import EmulationFault
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction, ld_imm64
from kbpf.specs import MapSpec, ProgramSpec
from kbpf.uapi.constants import BPF_F_NO_PREALLOC, BPF_F_SLEEPABLE
from kbpf.uapi.enums import HELPERS

I = Instruction  # noqa: E741
PROGRAMS = 400
WITHOUT_PACKET = ("sk_lookup", "syscall")
#: These would end the run.
LEFT_OUT = {HELPERS["tail_call"]}
NUMBERS = (0, 1, 2, 4, 8, 14, 16, 64, 255, 512, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, -1, -8)


#: Shapes of maps, of which each type takes one: sizes of key and value, entries, flags.
SHAPES = (
    (4, 4, 2, 0),
    (4, 8, 2, 0),
    (8, 8, 2, BPF_F_NO_PREALLOC),
    (8, 8, 0, 0),
    (4, 8, 0, BPF_F_NO_PREALLOC),
    (0, 8, 2, 0),
    (0, 0, 4096, 0),
)


def one_of_each(backend: EmulatorBackend) -> list[int]:
    """A map of each type that the emulator has."""
    template = MapSpec(type="array", key_size=4, value_size=8, max_entries=2)
    inner = backend.map_create(template)
    made = [inner]
    for type in KINDS:
        for key_size, value_size, entries, flags in SHAPES:
            described = described_value("u64") if not entries else {}
            spec = MapSpec(
                type=type, key_size=key_size, value_size=value_size, max_entries=entries, flags=flags, **described
            )
            try:
                made.append(backend.map_create(spec, inner if type.endswith("_of_maps") else None))
            except OSError:
                continue
            break
    return made


def test_there_is_a_map_of_each_type() -> None:
    backend = EmulatorBackend()
    maps = one_of_each(backend)
    assert {backend.map_info(fd).type for fd in maps} == set(KINDS)
    for fd in maps:
        backend.close(fd)


def wild_calls(rng: Random, program_type: str, attach_type: int, maps: list[int]) -> list[Instruction]:
    callable_ones = sorted(allowed(program_type, attach_type) & set(helpers.functions(program_type)) - LEFT_OUT)
    out = [I(ebpf.ALU64 | ebpf.MOV | ebpf.X, 6, 1)]
    for _ in range(rng.randrange(1, 6)):
        for register in range(1, 6):
            kind = rng.random()
            if kind < 0.3 or (register == 1 and kind < 0.6):
                out.append(I(ebpf.ALU64 | ebpf.MOV | ebpf.X, register, 6))
            elif kind < 0.6:
                out.append(I(ebpf.ALU64 | ebpf.MOV | ebpf.X, register, 10))
                out.append(I(ebpf.ALU64 | ebpf.ADD, register, 0, 0, -rng.choice((8, 64, 512, 600))))
            elif kind < 0.7:
                out += ld_imm64(register, rng.choice(maps), ebpf.PSEUDO_MAP_FD)
            elif kind < 0.75:
                out += ld_imm64(register, rng.getrandbits(64))
            else:
                out.append(I(ebpf.ALU64 | ebpf.MOV, register, 0, 0, rng.choice(NUMBERS)))
        out.append(I(ebpf.JMP | ebpf.CALL, 0, 0, 0, rng.choice(callable_ones)))
    return [*out, I(ebpf.JMP | ebpf.EXIT)]


@pytest.mark.parametrize("program_type", helpers.ALLOWED)
def test_wild_calls(program_type: str) -> None:
    backend = EmulatorBackend()
    maps = one_of_each(backend)
    context = b"" if program_type != "sk_lookup" else bytes(8) + b"\2" + bytes(63)
    attach_type = min(EXPECTED.get(program_type, {0}))
    ran = 0
    for number in range(PROGRAMS):
        rng = Random(f"{program_type}/{number}")
        try:
            spec = ProgramSpec(
                type=program_type,
                instructions=tuple(wild_calls(rng, program_type, attach_type, maps)),
                expected_attach_type=attach_type,
                flags=BPF_F_SLEEPABLE if program_type == "syscall" else 0,
            )
            program = Program(spec, [], backend.map, 3000)
            if program_type in events.TYPES:
                events.run_event(program, packet=Packet(buffer=FRAME[34:]))
            else:
                test_runs.run(program, b"" if program_type in WITHOUT_PACKET else FRAME, context)
            ran += 1
        except EmulationFault:
            ran += 1
        except LoadRefused:
            pass
    assert ran
    for fd in maps:
        backend.close(fd)
