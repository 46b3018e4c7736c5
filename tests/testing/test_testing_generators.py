"""The generators: seeded, and nearly always accepted by the kernel."""

from __future__ import annotations

import struct
from random import Random

import pytest

from kbpf.isa import cbpf, ebpf
from kbpf.kernel.backend import kernel_backend
from kbpf.testing import coverage, differ, generate_classic, generate_ebpf, generate_packets, shrink
from kbpf.testing.generate_state import SCALAR, Pointer, State, merge


def test_a_seed_names_a_filter() -> None:
    assert generate_classic.generate(Random("7")) == generate_classic.generate(Random("7"))


def test_a_seed_names_a_program_and_its_runs() -> None:
    assert generate_ebpf.generate(Random("7")) == generate_ebpf.generate(Random("7"))


@pytest.mark.parametrize("seed", range(300))
def test_generated_filters_pass_the_kernels_check(seed: int) -> None:
    cbpf.check(generate_classic.generate(Random(f"check/{seed}")))


@pytest.mark.requires("kernel")
def test_the_verifier_accepts_what_is_generated() -> None:
    kernel = kernel_backend()
    refused = [
        outcome.log
        for seed in range(300)
        if (outcome := differ.run_ebpf(kernel, generate_ebpf.generate(Random(f"accept/{seed}")))).refused
    ]
    # The verifier now and then has enough of a loop; nothing else is to be refused.
    assert len(refused) <= 3, refused


def test_ip_frames_hold_their_headers() -> None:
    for seed in range(500):
        frame = generate_packets.frame(Random(seed))
        least = {b"\x08\x00": 34, b"\x86\xdd": 54}.get(frame[12:14], 14)
        assert len(frame) >= least


def test_what_two_ways_do_not_agree_on_may_not_be_used() -> None:
    one, other = State(), State()
    one.registers[1], other.registers[1] = SCALAR, Pointer("value", map=1, size=8)
    one.registers[2], other.registers[2] = Pointer("stack", -16, -16), Pointer("stack", -8, -8)
    one.registers[3] = other.registers[3] = SCALAR
    one.store(-8, 8)
    other.store(-4, 4)
    met = merge(one, other)
    assert met is not None
    assert met.registers[1:4] == [None, Pointer("stack", -16, -8), SCALAR]
    assert met.is_ready(-4, 4) and not met.is_ready(-8, 8)


def test_taking_out_an_instruction_keeps_jump_targets() -> None:
    nop = ebpf.Instruction(ebpf.JMP | ebpf.JA)
    over = ebpf.Instruction(ebpf.JMP | ebpf.JA, 0, 0, 2)
    back = ebpf.Instruction(ebpf.JMP | ebpf.JA, 0, 0, -3)
    end = ebpf.Instruction(ebpf.JMP | ebpf.EXIT)
    assert shrink.without_ebpf([over, nop, back, end], 1) == [over._replace(off=1), back._replace(off=-2), end]


def test_taking_out_an_instruction_moves_the_functions_behind_it() -> None:
    nop = ebpf.Instruction(ebpf.JMP | ebpf.JA)
    end = ebpf.Instruction(ebpf.JMP | ebpf.EXIT)
    program = [*ebpf.ld_imm64(2, 3, ebpf.PSEUDO_FUNC), nop, end, nop, end]
    shorter = shrink.without_ebpf(program, 2)
    assert shorter[0].imm == 2
    assert shrink.moved_functions(struct.pack("=4I", 0, 7, 4, 8), shorter) == struct.pack("=4I", 0, 7, 3, 8)


def test_a_failure_is_made_small() -> None:
    program = [cbpf.stmt(cbpf.LD | cbpf.IMM, k) for k in range(20)] + [cbpf.stmt(cbpf.RET | cbpf.A)]
    wanted = cbpf.stmt(cbpf.LD | cbpf.IMM, 13)

    def fails(trial: object) -> bool:
        assert isinstance(trial, list)
        return wanted in trial and trial[-1].code == cbpf.RET | cbpf.A

    small = shrink.drop(shrink.blank(program, shrink.CLASSIC_NOP, fails), shrink.without_classic, fails)
    assert small == [wanted, cbpf.stmt(cbpf.RET | cbpf.A)]


def test_coverage_is_claimed_for_every_classic_opcode() -> None:
    claimed = {name.removesuffix(" true").removesuffix(" false") for name in coverage.required_classic()}
    assert claimed >= {coverage.classic_name(code, 0) for code in cbpf.VALID_CODES}
