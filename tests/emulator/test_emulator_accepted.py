"""Every opcode with many operands: what is accepted as an instruction, by the kernel and by the emulator."""

from __future__ import annotations

import errno
import itertools
import socket

import pytest
from sides import Side

from kbpf.backend import LoadRefused
from kbpf.emulator import helpers
from kbpf.emulator.classic import ClassicProgram
from kbpf.errors import FilterError
from kbpf.isa import cbpf, ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.specs import ProgramSpec
from kbpf.uapi.constants import BPF_F_SLEEPABLE

pytestmark = pytest.mark.requires("kernel")

I = Instruction  # noqa: E741
EXIT = I(ebpf.JMP | ebpf.EXIT)
ZERO = I(ebpf.ALU64 | ebpf.MOV)
LOWEST = -0x80000000
ATTACH = {"cgroup_skb": "cgroup_inet_ingress", "sk_lookup": "sk_lookup", "netfilter": "netfilter"}


def taken(kernel: Side, program: list[cbpf.Instruction]) -> tuple[bool, bool]:
    """Whether a socket takes a classic filter, and whether the emulator does."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
        try:
            kernel.backend.socket_attach_filter(opened, cbpf.encode(program))
            truth = True
        except OSError as error:
            assert error.errno == errno.EINVAL
            truth = False
    try:
        ClassicProgram(program)
    except FilterError:
        return truth, False
    return truth, True


def test_classic_instructions(kernel: Side) -> None:
    ks = (0, 1, 15, 16, 31, 32, 0x7FFFFFFF, 0x80000000, 0xFFEFFFFF, 0xFFF00000, 0xFFFFF000, 0xFFFFF001, 0xFFFFFFFF)
    first = cbpf.Instruction(0x02, 0, 0, 15)
    for code, k in itertools.product((*range(256), 0x100, 0x106, 0xFF06), ks):
        for jumps in ((0, 0), (0, 1), (2, 0)):
            program = [first, cbpf.Instruction(code, *jumps, k), cbpf.Instruction(6, 0, 0, 1)]
            truth, ours = taken(kernel, program)
            assert ours == truth, (hex(code), hex(k), jumps)


@pytest.mark.parametrize("offset", range(68))
def test_classic_loads_beside_the_packet(kernel: Side, offset: int) -> None:
    for code in (0x20, 0x28, 0x30, 0x40, 0x48, 0x50, 0x80, 0x81, 0xA1, 0xB1):
        for base in (cbpf.AD_OFF - 2, cbpf.NET_OFF, cbpf.LL_OFF):
            program = [cbpf.Instruction(code, 0, 0, base + offset), cbpf.Instruction(0x16, 0, 0, 0)]
            truth, ours = taken(kernel, program)
            assert ours == truth, (hex(code), hex(base + offset))


@pytest.mark.parametrize("length", (0, 1, 4095, 4096, 4097, 5000))
def test_classic_lengths(kernel: Side, length: int) -> None:
    truth, ours = taken(kernel, [cbpf.Instruction(6, 0, 0, 1)] * length)
    assert ours == truth == (1 <= length <= 4096)


def test_classic_memory_must_be_set_on_every_way(kernel: Side) -> None:
    load, store, ret = cbpf.Instruction(0x60, 0, 0, 3), cbpf.Instruction(0x02, 0, 0, 3), cbpf.Instruction(0x16, 0, 0, 0)
    jump = cbpf.Instruction(0x15, 0, 1, 0)
    programs = (
        [load, ret], [store, load, ret], [jump, store, load, ret], [jump, load, store, load, ret],
        [ret, load, ret], [store, jump, load, load, ret], [cbpf.Instruction(0x15, 1, 0, 0), store, load, ret],
        [cbpf.Instruction(0x05, 0, 0, 1), store, load, ret], [store, cbpf.Instruction(0x05, 0, 0, 1), ret, load, ret],
    )  # fmt: skip
    for program in programs:
        truth, ours = taken(kernel, program)
        assert ours == truth, program


def answer(side: Side, *program: Instruction, type: str = "socket_filter") -> int:
    spec = ProgramSpec(
        type=type,
        instructions=program,
        expected_attach_type=ATTACH.get(type),
        flags=BPF_F_SLEEPABLE if type == "syscall" else 0,
    )
    try:
        side.backend.close(side.backend.program_load(spec, []))
    except LoadRefused as refused:
        return refused.errno or -1
    return 0


#: Destination, source, offset, immediate.
OPERANDS = [
    *itertools.product((0, 10), (0, 1, 9), (0, 1, 2, 8, 16, 32), (0, 1)),
    *itertools.product((0,), (0,), (0,), (2, 16, 32, 33, 63, 64, -1, LOWEST, 0x40, 0xF1, 0x100, 0x110)),
    (0, 2, 0, 0), (0, 7, 0, 0), (11, 0, 0, 0), (0, 11, 0, 0), (15, 0, 0, 0), (0, 15, 0, 0),
]  # fmt: skip


@pytest.mark.parametrize("opcode", range(256))
def test_instructions(kernel: Side, emulator: Side, opcode: int) -> None:
    """Refusals of values (EACCES) are the verifier's alone; what is wrong as an instruction is EINVAL for both."""
    before = (I(ebpf.ALU64 | ebpf.MOV | ebpf.X, 6, 1), *(I(ebpf.ALU64 | ebpf.MOV, n) for n in (0, 2, 7, 9)))
    for operands in OPERANDS:
        if opcode == ebpf.JMP | ebpf.CALL:
            continue  # Helpers and functions have tests of their own.
        program = (*before, I(opcode, *operands), ZERO, EXIT)
        truth, ours = answer(kernel, *program), answer(emulator, *program)
        assert ours == truth or (truth == errno.EACCES and ours == 0), operands


ATOMIC = [*range(0x120), 0x200, -1, LOWEST]


@pytest.mark.parametrize("size", (ebpf.B, ebpf.H, ebpf.W, ebpf.DW))
def test_atomics(kernel: Side, emulator: Side, size: int) -> None:
    width = {ebpf.B: 1, ebpf.H: 2, ebpf.W: 4, ebpf.DW: 8}[size]
    for operation in ATOMIC:
        stores = operation != ebpf.LOAD_ACQ
        registers = (10, 2) if stores else (2, 10)
        program = (
            I(ebpf.ST | ebpf.MEM | ebpf.DW, 10, 0, -8),
            ZERO,
            I(ebpf.ALU64 | ebpf.MOV, 2, 0, 0, 1),
            I(ebpf.STX | ebpf.ATOMIC | size, *registers, -8, operation),
            ZERO,
            EXIT,
        )
        assert answer(emulator, *program) == answer(kernel, *program), (hex(operation), width)


def test_a_million_instructions(kernel: Side, emulator: Side) -> None:
    for count in (1_000_000, 1_000_001):
        program = (*(ZERO,) * (count - 1), EXIT)
        assert answer(emulator, *program) == answer(kernel, *program) == (0 if count == 1_000_000 else errno.E2BIG)


@pytest.mark.parametrize("type", sorted(helpers.ALLOWED))
def test_which_types_load_from_the_packet(kernel: Side, emulator: Side, type: str) -> None:
    for mode in (ebpf.ABS, ebpf.IND):
        program = (I(ebpf.ALU64 | ebpf.MOV | ebpf.X, 6, 1), ZERO, I(ebpf.LD | mode | ebpf.W), ZERO, EXIT)
        truth = answer(kernel, *program, type=type)
        assert answer(emulator, *program, type=type) == truth


@pytest.mark.parametrize("offset", (0, 4, 9, 36, 40, 0xFFF))
def test_a_header_length_is_never_an_ancillary_word(kernel: Side, offset: int) -> None:
    """`ldxb 4*([k]&0xf)` that far off finds nothing, and the packet is dropped."""
    program = [
        cbpf.Instruction(0x00, 0, 0, 5), cbpf.Instruction(0xB1, 0, 0, cbpf.AD_OFF + offset),
        cbpf.Instruction(0x06, 0, 0, 100),
    ]  # fmt: skip
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with left, right:
        kernel.backend.socket_attach_filter(right, cbpf.encode(program))
        left.send(bytes(64))
        right.setblocking(False)
        with pytest.raises(BlockingIOError):
            right.recv(100)
    assert ClassicProgram(program).run(bytes(64), 64) == 0
