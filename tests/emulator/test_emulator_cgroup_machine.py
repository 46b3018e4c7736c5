"""Programs that say what processes of a control group may do with devices, sysctls and socket options."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hooks import Recorder, attached, call, direct_bytes, load, on_stack, parts, real_group, whole
from sides import Side

from kbpf.emulator import events
from kbpf.emulator.sock import Sock
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.uapi.structs import STRUCTS

pytestmark = pytest.mark.requires("kernel")

I = Instruction  # noqa: E741
BUFFER = 64
#: BPF_DEVCG_DEV_CHAR.
CHARACTER = 2


@pytest.fixture(scope="module")
def group() -> Iterator[int]:
    with real_group() as descriptor:
        yield descriptor


def in_emulator(recorder: Recorder, fields: dict[str, object], sock: Sock | None = None) -> events.EventRun:
    program = recorder.side.backend.program(recorder.fd)  # type: ignore[attr-defined]
    return events.run_event(program, fields, sock=sock)


def written(name: str, size: int, *rest: int, before: bytes = b"\xee") -> list[list[Instruction]]:
    """A helper that takes the context, a buffer and its size; what it gives, and what is in the buffer."""
    first = [*on_stack(before * BUFFER, -BUFFER), *call(name, "context", (10, -BUFFER), size, *rest)]
    return [first, *([I(ebpf.LDX | ebpf.MEM | ebpf.DW, 0, 10, at)] for at in range(-BUFFER, 0, 8))]


@pytest.mark.parametrize("value", [0, 1])
@pytest.mark.parametrize(("flags", "access"), [(os.O_RDONLY, 2), (os.O_WRONLY, 4), (os.O_RDWR, 6)])
def test_devices(kernel: Side, emulator: Side, group: int, flags: int, access: int, value: int) -> None:
    steps = parts("bpf_cgroup_dev_ctx", "access_type") + whole("bpf_cgroup_dev_ctx", "major", "minor")
    steps += [call("get_retval"), call("set_retval", -errno.EACCES)]
    with Recorder(kernel, "cgroup_device", "cgroup_device", steps, value) as recorder, attached(group, recorder):
        # A value that is set is what open(2) gives, where the program has said yes too.
        with pytest.raises(PermissionError) as refused:
            os.close(os.open("/dev/null", flags))
        truth = recorder.recorded()
    assert refused.value.errno == errno.EACCES
    fields = {"access_type": access << 16 | CHARACTER, "major": 1, "minor": 3}
    with Recorder(emulator, "cgroup_device", "cgroup_device", steps, value) as recorder:
        assert in_emulator(recorder, fields).value == value
        assert recorder.recorded()[1:] == truth[1:]


# Behind the end of a name Linux may leave zeroes.
NAMES = [
    step
    for flags, sizes in ((0, (1, 3, 4, 5, 8, 9, 16, 23, 24, 25, 60)), (1, (1, 14, 15, 16, 40)))
    for size in sizes
    for step in written("sysctl_get_name", size, flags, before=b"\0")
]
OLD = [step for size in (1, 2, 3, 4, 40) for step in written("sysctl_get_current_value", size)]
NEW = [step for size in (1, 2, 3, 4, 40) for step in written("sysctl_get_new_value", size)]
PATH = "net/ipv4/ip_default_ttl"


@pytest.mark.parametrize("writes", [False, True])
def test_sysctls(kernel: Side, emulator: Side, group: int, writes: bool) -> None:
    """What is written is refused, so that nothing changes."""
    file_pos = STRUCTS["bpf_sysctl"].fields["file_pos"].offset
    set_value = [*on_stack(b"12345678", -8), *call("sysctl_set_new_value", "context", (10, -8), 3)]
    steps = parts("bpf_sysctl", "write", "file_pos") + NAMES + OLD + NEW + [set_value] + NEW
    steps += [
        [I(ebpf.ALU | ebpf.MOV, 1, 0, 0, 7), I(ebpf.STX | ebpf.MEM | ebpf.W, 6, 1, file_pos), *load(file_pos, 4)],
    ]
    before = Path("/proc/sys", PATH).read_text()
    with Recorder(kernel, "cgroup_sysctl", "cgroup_sysctl", steps, 0) as recorder, attached(group, recorder):
        with pytest.raises(PermissionError):
            Path("/proc/sys", PATH).write_text("99\n") if writes else Path("/proc/sys", PATH).read_text()
        truth = recorder.recorded()
    assert Path("/proc/sys", PATH).read_text() == before
    fields: dict[str, object] = {"name": PATH, "current_value": before.encode()}
    if writes:
        fields["new_value"] = b"99\n"
    with Recorder(emulator, "cgroup_sysctl", "cgroup_sysctl", steps, 0) as recorder:
        result = in_emulator(recorder, fields)
        # A write that fails is tried again when the file is closed.
        assert recorder.recorded()[1:] == truth[1:]
    assert result.context == {"file_pos": 7, "new_value": b"123" if writes else None}


def store(name: str, value: int) -> list[Instruction]:
    offset = STRUCTS["bpf_sockopt"].fields[name].offset
    return [
        I(ebpf.ALU | ebpf.MOV, 1, 0, 0, value),
        I(ebpf.STX | ebpf.MEM | ebpf.W, 6, 1, offset),
        *load(offset, 4),
    ]


@pytest.mark.parametrize("value", [b"\1\2\3\4", b"\5", b"0123456789abcdef!"])
def test_an_option_is_set(kernel: Side, emulator: Side, group: int, value: bytes) -> None:
    steps = (
        whole("bpf_sockopt", "level", "optname", "optlen")
        + direct_bytes("bpf_sockopt", "optval", "optval_end", 20)
        + [call("get_retval")]
    )
    steps += [store("level", 7), store("optname", 8), store("optlen", -1)]
    with Recorder(kernel, "cgroup_sockopt", "cgroup_setsockopt", steps) as recorder, attached(group, recorder):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
            # Nothing but the program has seen it: -1 says that it is done.
            end.setsockopt(0x1234, 0x5678, value)
        truth = recorder.recorded()
    with Recorder(emulator, "cgroup_sockopt", "cgroup_setsockopt", steps) as recorder:
        result = in_emulator(recorder, {"level": 0x1234, "optname": 0x5678, "optval": value}, Sock(family=2, type=2))
        assert recorder.recorded() == truth
    room = value.ljust(16, b"\0")
    assert result.context == {"level": 7, "optname": 8, "optlen": -1, "optval": room}


@pytest.mark.parametrize(("level", "name", "size"), [(1, 2, 4), (1, 2, 2), (1, 9999, 8), (1, 20, 40)])
def test_an_option_is_read(kernel: Side, emulator: Side, group: int, level: int, name: int, size: int) -> None:
    steps = (
        whole("bpf_sockopt", "level", "optname", "optlen", "retval")
        + direct_bytes("bpf_sockopt", "optval", "optval_end", 48)
        + [call("get_retval")]
    )
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
        own: bytes | int = 0
        try:
            own = end.getsockopt(level, name, size)
        except OSError as error:
            own = -(error.errno or 0)
        with Recorder(kernel, "cgroup_sockopt", "cgroup_getsockopt", steps) as recorder, attached(group, recorder):
            with suppress(OSError):
                end.getsockopt(level, name, size)
            truth = recorder.recorded()
    fields = {"level": level, "optname": name, "optlen": size, "optval": b"", "retval": 0}
    if isinstance(own, bytes):
        fields |= {"optval": own.ljust(size, b"\0"), "optlen": size}
    else:
        fields["retval"] = own & 0xFFFFFFFF
    with Recorder(emulator, "cgroup_sockopt", "cgroup_getsockopt", steps) as recorder:
        program = emulator.backend.program(recorder.fd)  # type: ignore[attr-defined]
        context = events.MAKERS["cgroup_sockopt"](program, fields, Sock(family=2, type=2), None)  # type: ignore[arg-type]
        if isinstance(own, bytes):
            # The kernel's answer may be shorter than the room.
            context.optlen = len(own)  # type: ignore[attr-defined]
        events.run(program, context)
        assert recorder.recorded() == truth


def test_a_program_sets_what_an_option_is_read_as(kernel: Side, emulator: Side, group: int) -> None:
    fields = STRUCTS["bpf_sockopt"].fields
    write = [
        *load(fields["optval"].offset, 8),
        I(ebpf.ALU64 | ebpf.MOV | ebpf.X, 1, 0),
        I(ebpf.LDX | ebpf.MEM | ebpf.DW, 2, 6, fields["optval_end"].offset),
        I(ebpf.ALU64 | ebpf.MOV | ebpf.X, 3, 1),
        I(ebpf.ALU64 | ebpf.ADD, 3, 0, 0, 4),
        I(ebpf.ALU64 | ebpf.MOV, 0, 0, 0, 0),
        I(ebpf.JMP | ebpf.JGT | ebpf.X, 3, 2, 2, 0),
        I(ebpf.ALU | ebpf.MOV, 4, 0, 0, 0x1234567),
        I(ebpf.STX | ebpf.MEM | ebpf.W, 1, 4, 0),
    ]
    steps = [write, store("retval", 0), store("optlen", 4)]
    with Recorder(kernel, "cgroup_sockopt", "cgroup_getsockopt", steps) as recorder, attached(group, recorder):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
            assert end.getsockopt(1, 9999, 8) == struct.pack("=I", 0x1234567)
        truth = recorder.recorded()
    with Recorder(emulator, "cgroup_sockopt", "cgroup_getsockopt", steps) as recorder:
        given = {"level": 1, "optname": 9999, "optval": bytes(8), "retval": -errno.ENOPROTOOPT & 0xFFFFFFFF}
        result = in_emulator(recorder, given, Sock(family=2, type=2))
        assert recorder.recorded() == truth
    assert result.context == {"optlen": 4, "retval": 0, "optval": struct.pack("=II", 0x1234567, 0)}
