"""bpf_setsockopt and bpf_getsockopt, against the kernel: what is taken, made of it, and refused."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import pytest
from hooks import Recorder, attached, call, on_stack, real_group
from sides import Side

from kbpf.emulator import events
from kbpf.emulator.sock import Sock
from kbpf.emulator.socket_options import OPTIONS
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.uapi import constants as uapi

pytestmark = pytest.mark.requires("kernel")

STACK = 32
#: Multiples of 20 ms where time is in ticks, which are 1, 4 or 10 ms.
VALUES = (0, 1, 2, 7, 100, 1000, 32767, 32768, 40000, 120000, 200000, 220000, 0x3FFFFFFF, 0x7FFFFFFF, -1, -5)
IN_TICKS = {uapi.TCP_RTO_MAX_MS, uapi.TCP_BPF_DELACK_MAX, uapi.TCP_BPF_RTO_MIN}
SOCKETS = [(family, type) for family in (socket.AF_INET, socket.AF_INET6) for type in (1, 2)]
UNKNOWN = [(1, 99), (17, 1), (1, 20), (0, 2), (41, 16), (6, 28), (6, 1005), (6, 999), (1 << 30, 1)]


@pytest.fixture(scope="module")
def group() -> Iterator[int]:
    with real_group() as descriptor:
        yield descriptor


def both(
    kernel: Side, emulator: Side, group: int, family: int, type: int, steps: list[list[Instruction]]
) -> list[tuple[int, ...]]:
    """What the steps record in the hook of connect(2) of a new socket."""
    attach_type = f"cgroup_inet{4 if family == socket.AF_INET else 6}_connect"
    # The kernel's socket is not let connect: the program returns 0.
    with Recorder(kernel, "cgroup_sock_addr", attach_type, steps, 0) as recorder, attached(group, recorder):
        with socket.socket(family, type) as end, pytest.raises(PermissionError):
            end.connect(("127.0.0.1" if family == socket.AF_INET else "::1", 9))
        truth = recorder.recorded()
    protocol = socket.IPPROTO_TCP if type == socket.SOCK_STREAM else socket.IPPROTO_UDP
    with Recorder(emulator, "cgroup_sock_addr", attach_type, steps, 0) as recorder:
        program = emulator.backend.program(recorder.fd)  # type: ignore[attr-defined]
        events.run_event(program, sock=Sock(family=family, type=type, protocol=protocol))
        return [truth, recorder.recorded()]


def set_to(level: int, name: int, value: bytes, size: int | None = None) -> list[Instruction]:
    length = len(value) if size is None else size
    return [*on_stack(value, -STACK), *call("setsockopt", "context", level, name, (10, -STACK), length)]


def get(level: int, name: int, size: int = 4) -> list[list[Instruction]]:
    """What the helper gives, and what it has written, over bytes that are not 0."""
    reads = [[Instruction(ebpf.LDX | ebpf.MEM | ebpf.DW, 0, 10, at)] for at in range(-STACK, 0, 8)]
    first = [*on_stack(b"\xee" * STACK, -STACK), *call("getsockopt", "context", level, name, (10, -STACK), size)]
    return [first, *reads]


@pytest.mark.parametrize(("family", "type"), SOCKETS)
def test_values(kernel: Side, emulator: Side, group: int, family: int, type: int) -> None:
    for level, name in OPTIONS:
        steps = get(level, name)
        for value in VALUES:
            if name in IN_TICKS and value in (1000, 32767, 32768):
                continue
            steps += [set_to(level, name, struct.pack("=i", value)), *get(level, name)]
        truth, ours = both(kernel, emulator, group, family, type, steps)
        assert ours == truth, (level, name)


@pytest.mark.parametrize(("family", "type"), SOCKETS)
def test_sizes_and_unknown_options(kernel: Side, emulator: Side, group: int, family: int, type: int) -> None:
    for level, name in (*OPTIONS, *UNKNOWN):
        steps = []
        for size in (1, 2, 3, 4, 5, 8, 16):
            steps += [set_to(level, name, b"\1".ljust(size, b"\0")), *get(level, name, size)]
        truth, ours = both(kernel, emulator, group, family, type, steps)
        assert ours == truth, (level, name)


def test_the_type_of_service_gives_a_priority(kernel: Side, emulator: Side, group: int) -> None:
    for type in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        steps = []
        for service in range(0, 256, 3):
            steps += [set_to(uapi.SOL_IP, uapi.IP_TOS, struct.pack("=i", service))]
            steps += [*get(uapi.SOL_IP, uapi.IP_TOS), *get(uapi.SOL_SOCKET, uapi.SO_PRIORITY)]
        truth, ours = both(kernel, emulator, group, socket.AF_INET, type, steps)
        assert ours == truth


def test_the_low_water_mark_keeps_within_a_buffer_that_was_set(kernel: Side, emulator: Side, group: int) -> None:
    steps = [set_to(1, uapi.SO_RCVBUF, struct.pack("=i", 5000)), set_to(1, uapi.SO_RCVLOWAT, b"\0\0\0\1")]
    truth, ours = both(
        kernel, emulator, group, socket.AF_INET, socket.SOCK_STREAM, steps + get(uapi.SOL_SOCKET, uapi.SO_RCVLOWAT)
    )
    assert ours == truth


@pytest.mark.parametrize(
    "name", [b"reno\0", b"reno", b"cubic\0", b"nope\0", b"r", b"", b"cdg\0", b"cubic".ljust(16, b"\0")]
)
def test_congestion_control(kernel: Side, emulator: Side, group: int, name: bytes) -> None:
    level, option = uapi.SOL_TCP, uapi.TCP_CONGESTION
    # What is there at first is the machine's choice.
    steps = [set_to(level, option, b"reno\0"), set_to(level, option, name, len(name) or 2)]
    for size in (1, 2, 4, 6, 16, 20):
        steps += get(level, option, size)
    for type in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        truth, ours = both(kernel, emulator, group, socket.AF_INET, type, steps)
        assert ours == truth


@pytest.mark.parametrize("name", [b"lo\0", b"lo", b"nope\0", b"\0", b"lo\0rest", b"a name that is too long"])
def test_binding_to_a_device(kernel: Side, emulator: Side, group: int, name: bytes) -> None:
    steps = [set_to(1, uapi.SO_BINDTODEVICE, name), *get(1, uapi.SO_BINDTODEVICE, 16), *get(1, uapi.SO_BINDTOIFINDEX)]
    truth, ours = both(kernel, emulator, group, socket.AF_INET, socket.SOCK_DGRAM, steps)
    assert ours == truth
