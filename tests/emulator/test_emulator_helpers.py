"""Helpers that programs of every type have: text, numbers, time and the process."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from sides import CB, FRAME, Side, with_result

from kbpf.emulator.environment import Environment, environment
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction, ld_imm64
from kbpf.specs import MapSpec, ProgramSpec
from kbpf.uapi.constants import BPF_F_RDONLY_PROG
from kbpf.uapi.enums import HELPERS

I = Instruction  # noqa: E741
MOV, MOV_X, ADD = ebpf.ALU64 | ebpf.MOV, ebpf.ALU64 | ebpf.MOV | ebpf.X, ebpf.ALU64 | ebpf.ADD


@pytest.fixture
def machine() -> Iterator[Environment]:
    """The environment, as it was before afterwards."""
    before = {name: getattr(environment, name) for name in Environment.__slots__}
    yield environment
    for name, value in before.items():
        setattr(environment, name, value)


def call(name: str) -> Instruction:
    return I(ebpf.JMP | ebpf.CALL, 0, 0, 0, HELPERS[name])


def on_stack(data: bytes, below: int) -> list[Instruction]:
    """Put bytes onto the stack, `below` bytes under its top."""
    padded = data.ljust(len(data) + 3 & ~3, b"\0")
    words = struct.unpack(f"={len(padded) // 4}i", padded)
    return [I(ebpf.ST | ebpf.MEM | ebpf.W, 10, 0, 4 * n - below, word) for n, word in enumerate(words)]


def pointer(register: int, below: int) -> list[Instruction]:
    return [I(MOV_X, register, 10), I(ADD, register, 0, 0, -below)]


def result(side: Side, body: list[Instruction]) -> Any:
    outcome = side.run(with_result(body))
    return outcome.refused or struct.unpack_from("=q", outcome.context, CB)[0]


NUMBERS = (
    b"0", b"7", b"-7", b"+7", b" \t\n12", b"12 ", b"0x1f", b"0X1F", b"0x", b"0xg", b"017", b"09", b"08", b"ff", b"FFz",
    b"9223372036854775807", b"9223372036854775808", b"-9223372036854775808", b"-9223372036854775809",
    b"18446744073709551615", b"18446744073709551616", b"-", b" ", b"\xa05", b"", b"-0x10", b"--1", b"1" * 24,
)  # fmt: skip


@pytest.mark.requires("kernel")
@pytest.mark.parametrize("helper", ("strtol", "strtoul"))
@pytest.mark.parametrize("base", (0, 8, 10, 16, 2, 32))
def test_numbers_out_of_text(kernel: Side, emulator: Side, helper: str, base: int) -> None:
    for text in NUMBERS:
        for size in {len(text), len(text) + 1} - {0}:
            body = [
                *on_stack(text + bytes(4), 64),
                I(ebpf.ST | ebpf.MEM | ebpf.DW, 10, 0, -8, 99),
                *pointer(1, 64),
                I(MOV, 2, 0, 0, size),
                I(MOV, 3, 0, 0, base),
                *pointer(4, 8),
                call(helper),
                I(ebpf.LDX | ebpf.MEM | ebpf.DW, 1, 10, -8),
                I(ebpf.ALU64 | ebpf.MUL, 0, 0, 0, 1000),
                I(ebpf.ALU64 | ebpf.XOR | ebpf.X, 0, 1),
            ]
            assert result(emulator, body) == result(kernel, body), (text, size)


FORMATS = (
    b"plain", b"%d", b"%5d|", b"%-5d|", b"%05d|", b"%+d", b"% d", b"%i %u %x", b"%X", b"%ld %lu", b"%lld %llx", b"%%",
    b"%c", b"%o", b"%", b"%q", b"%d %d %d", b"%d %d %d %d", b"%-08x|", b"%lX", b"\xff", b"\x01", b"\x7f", b"%\xff",
    b"\xc3\xa9%d", b"tab\t%d\n", b"%#x", b"%hd",
    b"%l", b"% u|%+u|%+x",
)  # fmt: skip


@pytest.mark.requires("kernel")
@pytest.mark.parametrize("format", FORMATS)
def test_formatting(kernel: Side, emulator: Side, format: bytes) -> None:
    """bpf_trace_printk's length, and what bpf_snprintf writes, cut and whole."""
    body = [
        *on_stack(format + b"\0", 64),
        *pointer(1, 64),
        I(MOV, 2, 0, 0, len(format) + 1),
        I(MOV, 3, 0, 0, -123456),
        I(MOV, 4, 0, 0, 77),
        I(MOV, 5, 0, 0, 0x61),
        call("trace_printk"),
    ]
    assert result(emulator, body) == result(kernel, body)


def formatted(side: Side, format: bytes, size: int, values: tuple[int, ...]) -> Any:
    spec = MapSpec(type="array", key_size=4, value_size=32, max_entries=1, flags=BPF_F_RDONLY_PROG)
    fd = side.backend.map_create(spec)
    out = side.backend.map_create(MapSpec(type="array", key_size=4, value_size=64, max_entries=1))
    try:
        side.backend.map_update(fd, bytes(4), format.ljust(32, b"\0"))
        side.backend.map_freeze(fd)
        body = [
            *on_stack(struct.pack(f"={len(values)}Q", *(value & (1 << 64) - 1 for value in values)), 128),
            *ld_imm64(1, out, ebpf.PSEUDO_MAP_VALUE),
            I(MOV, 2, 0, 0, size),
            *ld_imm64(3, fd, ebpf.PSEUDO_MAP_VALUE),
            *pointer(4, 128),
            I(MOV, 5, 0, 0, 8 * len(values)),
            call("snprintf"),
        ]
        try:
            program = side.backend.program_load(ProgramSpec(instructions=tuple(with_result(body))), [fd, out])
        except OSError as error:
            return error.errno
        ran = side.backend.program_run(program, FRAME, bytes(192))
        side.backend.close(program)
        return ran.context, side.backend.map_lookup(out, bytes(4), 64)
    finally:
        side.backend.close(fd)
        side.backend.close(out)


@pytest.mark.requires("kernel")
@pytest.mark.parametrize("size", (1, 5, 40))
def test_snprintf(kernel: Side, emulator: Side, size: int) -> None:
    for format, values in (
        (b"%d,%u", (-5, 7)),
        (b"[%08llx]", (0x1234,)),
        (b"%5d|%-5d|%+d", (1, -2, 3)),
        (b"%c%c%%", (0x41, 0x7A)),
        (b"none", ()),
    ):
        if values:
            assert formatted(emulator, format, size, values) == formatted(kernel, format, size, values), format


@pytest.mark.requires("kernel")
def test_strncmp(kernel: Side, emulator: Side) -> None:
    for text, size in ((b"abc", 4), (b"abd", 4), (b"abb", 4), (b"ab", 2), (b"abcd", 3), (b"a\0zz", 4), (b"\xff", 1)):
        outcomes = []
        for side in (kernel, emulator):
            spec = MapSpec(type="array", key_size=4, value_size=8, max_entries=1, flags=BPF_F_RDONLY_PROG)
            fd = side.backend.map_create(spec)
            side.backend.map_update(fd, bytes(4), b"abc\0\0\0\0\0")
            side.backend.map_freeze(fd)
            body = [
                *on_stack(text, 8),
                *pointer(1, 8),
                I(MOV, 2, 0, 0, size),
                *ld_imm64(3, fd, ebpf.PSEUDO_MAP_VALUE),
                call("strncmp"),
            ]
            outcomes.append(result(side, body))
            side.backend.close(fd)
        assert outcomes[1] == outcomes[0], text


@pytest.mark.requires("kernel")
def test_the_process_is_this_one(kernel: Side, emulator: Side) -> None:
    for helper in ("get_current_pid_tgid", "get_current_uid_gid", "get_socket_uid", "get_current_ancestor_cgroup_id"):
        body = [I(MOV, 2, 0, 0, 0), call(helper)]
        if helper == "get_current_ancestor_cgroup_id":
            body = [I(MOV, 1, 0, 0, 99), call(helper)]
        assert result(emulator, body) == result(kernel, body), helper


@pytest.mark.requires("kernel")
def test_what_is_not_there_is_read_as_zeroes(kernel: Side, emulator: Side) -> None:
    for helper in ("probe_read_kernel", "probe_read_user", "probe_read_kernel_str"):
        body = [
            I(ebpf.ST | ebpf.MEM | ebpf.DW, 10, 0, -8, -1),
            *pointer(1, 8),
            I(MOV, 2, 0, 0, 8),
            I(MOV, 3, 0, 0, 16),
            call(helper),
            I(ebpf.LDX | ebpf.MEM | ebpf.DW, 1, 10, -8),
            I(ebpf.ALU64 | ebpf.ADD | ebpf.X, 0, 1),
        ]
        assert result(emulator, body) == result(kernel, body), helper


@pytest.mark.requires("kernel")
def test_a_string_is_copied_with_its_end(kernel: Side, emulator: Side) -> None:
    for size in (1, 3, 4, 8):
        body = [
            *on_stack(b"abc\0defg", 16),
            I(ebpf.ST | ebpf.MEM | ebpf.DW, 10, 0, -8, -1),
            *pointer(1, 8),
            I(MOV, 2, 0, 0, size),
            *pointer(3, 16),
            call("probe_read_kernel_str"),
            I(ebpf.LDX | ebpf.MEM | ebpf.W, 1, 10, -8),
            I(ebpf.ALU64 | ebpf.MUL, 0, 0, 0, 1 << 20),
            I(ebpf.ALU64 | ebpf.XOR | ebpf.X, 0, 1),
        ]
        assert result(emulator, body) == result(kernel, body), size


def test_the_environment_answers(emulator: Side, machine: Environment) -> None:
    machine.clock = lambda: 5_000_000_000
    machine.suspended, machine.ticks, machine.tai_clock = 7, 250, lambda: 11
    machine.cgroup_id, machine.cgroup_ancestors = 30, (10, 20)
    machine.netns_cookie = 9
    expected = {
        "ktime_get_ns": 5_000_000_000,
        "ktime_get_boot_ns": 5_000_000_007,
        "ktime_get_tai_ns": 11,
        "jiffies64": 1250,
        "get_current_cgroup_id": 30,
        "get_netns_cookie": 9,
    }
    for helper, value in expected.items():
        assert result(emulator, [call(helper)]) == value, helper
    for level, group in enumerate((10, 20, 30, 0)):
        assert result(emulator, [I(MOV, 1, 0, 0, level), call("get_current_ancestor_cgroup_id")]) == group


def test_signals_are_noted_and_not_sent(emulator: Side, machine: Environment) -> None:
    machine.signals = []
    assert result(emulator, [I(MOV, 1, 0, 0, 9), call("send_signal")]) == 0
    assert machine.signals == [9]


def test_user_memory_is_what_the_test_says(emulator: Side, machine: Environment) -> None:
    machine.user_memory = lambda address, size: b"memories"[:size] if address == 0x7000 else None
    body = [
        *pointer(1, 8),
        I(MOV, 2, 0, 0, 8),
        I(MOV, 3, 0, 0, 0x7000),
        call("probe_read_user"),
        I(ebpf.LDX | ebpf.MEM | ebpf.DW, 0, 10, -8),
    ]
    assert result(emulator, body) == int.from_bytes(b"memories", "little")


def test_the_process_id_is_the_systems(emulator: Side) -> None:
    assert result(emulator, [call("get_current_pid_tgid")]) >> 32 == os.getpid()


def test_programs_may_not_sleep(kernel: Side, emulator: Side) -> None:
    body = [*pointer(1, 8), I(MOV, 2, 0, 0, 8), I(MOV, 3, 0, 0, 16), call("copy_from_user")]
    assert result(emulator, body) == result(kernel, body)
