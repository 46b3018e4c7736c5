"""Netfilter programs: what they load from their context, and BPF_PROG_TEST_RUN, against the kernel."""

from __future__ import annotations

import errno
import struct
from typing import Any

import pytest
from mapcode import EXIT, mov
from sides import FRAME, Side

from kbpf.errors import EmulationFault
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.specs import ProgramSpec

pytestmark = pytest.mark.requires("kernel")

ACCEPT = (*mov(0, 1), EXIT)
SIZES = {1: ebpf.B, 2: ebpf.H, 4: ebpf.W, 8: ebpf.DW}
STATE = 48


def run(side: Side, data: bytes, context: bytes = b"", program: tuple[Instruction, ...] = ACCEPT, **how: int) -> Any:
    spec = ProgramSpec(type="netfilter", instructions=program, expected_attach_type="netfilter")
    try:
        fd = side.backend.program_load(spec, [])
    except OSError as error:
        return f"not loaded: {errno.errorcode[error.errno or 0]}"
    try:
        return side.backend.program_run(fd, data, context, **how)[:3]
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, error.errno)
    finally:
        side.backend.close(fd)


def test_sizes(kernel: Side, emulator: Side) -> None:
    for size in (0, 13, 14, 19, 20, 34, 60, 3712, 3713):
        assert run(emulator, bytes(size)) == run(kernel, bytes(size)), size


@pytest.mark.parametrize("hook", (*range(7), 255))
@pytest.mark.parametrize("family", (0, 2, 10, 3))
def test_hooks_and_families(kernel: Side, emulator: Side, hook: int, family: int) -> None:
    for ethertype in (0x0800, 0x86DD, 0x0806, 0x0010):
        for size in (20, 33, 34, 53, 54, 60):
            data = (bytes(12) + struct.pack(">H", ethertype) + bytes(60))[:size]
            context = bytes((hook, family)).ljust(STATE, b"\0")
            assert run(emulator, data, context) == run(kernel, data, context), (ethertype, size)


def test_contexts(kernel: Side, emulator: Side) -> None:
    state = bytes((3, 2))
    for size in (1, 2, 8, 47, 48, 49, 100, 4096, 4097):
        for context in (state.ljust(100, b"\0")[:size].ljust(size, b"\0"), state[:size].ljust(size, b"\1")):
            assert run(emulator, FRAME, context) == run(kernel, FRAME, context), context
    for at in range(STATE):
        changed = bytearray(state.ljust(STATE, b"\0"))
        changed[at] ^= 1
        assert run(emulator, FRAME, bytes(changed)) == run(kernel, FRAME, bytes(changed)), at


def test_options(kernel: Side, emulator: Side) -> None:
    for how in ({"repeat": 100}, {"flags": 1}, {"flags": 2}, {"flags": 4}, {"cpu": 1}, {"batch_size": 1}):
        assert run(emulator, FRAME, **how) == run(kernel, FRAME, **how), how


def test_two_pointers_are_loaded(kernel: Side, emulator: Side) -> None:
    for size, code in SIZES.items():
        for offset in range(0, 24, size):
            program = (Instruction(ebpf.LDX | ebpf.MEM | code, 2, 1, offset), *ACCEPT)
            truth = run(kernel, FRAME, program=program)
            if isinstance(truth, str):
                with pytest.raises(EmulationFault, match="context"):
                    run(emulator, FRAME, program=program)
            else:
                assert run(emulator, FRAME, program=program) == truth, (size, offset)


@pytest.mark.parametrize("at", (0, 1))
def test_the_state_has_the_hook_and_the_family(kernel: Side, emulator: Side, at: int) -> None:
    for context in (b"", *(bytes((hook, family)) for hook in range(5) for family in (2, 10))):
        for expected in (0, 1, 2, 3, 4, 10):
            program = (
                Instruction(ebpf.LDX | ebpf.MEM | ebpf.DW, 2, 1, 0),
                Instruction(ebpf.LDX | ebpf.MEM | ebpf.B, 2, 2, at),
                *mov(0, 0),
                Instruction(ebpf.JMP | ebpf.JNE, 2, 0, 1, expected),
                *ACCEPT,
            )
            assert run(emulator, FRAME, context, program) == run(kernel, FRAME, context, program), (context, expected)


def test_what_the_other_points_to_is_not_here(emulator: Side) -> None:
    program = (
        Instruction(ebpf.LDX | ebpf.MEM | ebpf.DW, 2, 1, 8),
        Instruction(ebpf.LDX | ebpf.MEM | ebpf.W, 2, 2, 0),
        *ACCEPT,
    )
    with pytest.raises(EmulationFault, match="invalid read"):
        run(emulator, FRAME, program=program)
