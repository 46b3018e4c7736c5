"""What a kernel does not have is said by name, where it says no more than that something is invalid."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kbpf
from kbpf import features
from kbpf.backend import Answer
from kbpf.isa.ebpf import Instruction
from kbpf.kernel import attrs
from kbpf.kernel.backend import KernelBackend
from kbpf.uapi.constants import BPF_F_BEFORE
from kbpf.uapi.enums import COMMANDS
from kbpf.uapi.structs import ATTRS

RETURNS_0 = (Instruction(0xB7), Instruction(0x95))
ARENA = kbpf.MapSpec(type="arena", max_entries=1, flags=1 << 10)
TCX = "attach type tcx_ingress here; Linux has it since 6.6"

pytestmark = pytest.mark.requires("kernel")


@pytest.fixture
def older(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that knows of nothing that came after Linux 6.1, and says EINVAL."""
    asked = KernelBackend.feature

    def feature(self: KernelBackend, kind: Any, name: str, program_type: str = "") -> Answer:
        found = asked(self, kind, name, program_type)
        return Answer("no", "EINVAL", found.since) if found.since in ("6.6", "6.9") else found

    def refuse(*_: Any) -> Any:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(KernelBackend, "feature", feature)
    for command in ("map_create", "link_create", "program_query"):
        monkeypatch.setattr(KernelBackend, command, refuse)


def test_a_program_type_that_this_kernel_was_built_without() -> None:
    if features.program_type("lirc_mode2", backend="kernel").answer != "no":
        pytest.skip("this kernel has programs for infrared receivers")
    with pytest.raises(kbpf.NotSupportedError, match=r"no program type lirc_mode2 here; Linux has it since 4\.18"):
        kbpf.load_program(kbpf.ProgramSpec(type="lirc_mode2", instructions=RETURNS_0), backend="kernel")


def test_types_that_an_older_kernel_does_not_know(older: None) -> None:
    with pytest.raises(kbpf.NotSupportedError, match=r"no map type arena here; Linux has it since 6\.9"):
        kbpf.BpfMap.create(ARENA, "kernel")
    with pytest.raises(kbpf.NotSupportedError, match=TCX):
        kbpf.attached_programs("lo", "tcx_ingress", "kernel")
    spec = kbpf.ProgramSpec(type="sched_cls", instructions=RETURNS_0)
    with kbpf.load_program(spec, backend="kernel") as program, pytest.raises(kbpf.NotSupportedError, match=TCX):
        program.attach("lo", "tcx_ingress")


def test_what_is_there_and_wrong_is_not_said_to_be_missing(older: None) -> None:
    with pytest.raises(kbpf.BpfError) as caught:
        kbpf.Map.create(kbpf.MapSpec(type="hash", max_entries=1), "kernel")
    assert not isinstance(caught.value, kbpf.NotSupportedError) and caught.value.errno == 22


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group of version 2."""
    mounts = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
    unified = next((Path(where) for _, where, kind, *_ in mounts if kind == "cgroup2"), None)
    if unified is None:
        pytest.skip("no control groups of version 2 are mounted")
    path = unified / f"kbpf-test-not-there-{os.getpid()}"
    path.mkdir()
    yield path
    path.rmdir()


@pytest.fixture
def unaware(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that knows neither streams nor these attributes and flags, and says so before it looks at anything."""
    original = attrs.syscall.bpf
    cookie = ATTRS["raw_tracepoint_open"].fields["cookie"].offset
    flags = {
        COMMANDS["link_create"]: ATTRS["link_create"].fields["flags"].offset,
        COMMANDS["prog_attach"]: ATTRS["prog_attach"].fields["attach_flags"].offset,
    }

    def bpf(command: int, attr: bytearray) -> int:
        if (
            command == COMMANDS["prog_stream_read_by_fd"]
            or (command == COMMANDS["raw_tracepoint_open"] and any(attr[cookie:]))
            or (command in flags and attr[flags[command]] & BPF_F_BEFORE)
        ):
            raise attrs.syscall.failure(errno.EINVAL)
        return original(command, attr)

    monkeypatch.setattr(attrs.syscall, "bpf", bpf)


def use(what: str, group: Path) -> None:
    type, more = {
        "streams": ("xdp", {}),
        "cookies": ("raw_tracepoint", {}),
        "places": ("cgroup_skb", {"expected_attach_type": "cgroup_inet_egress"}),
    }[what]
    spec = kbpf.ProgramSpec(type=type, instructions=RETURNS_0, **more)  # type: ignore[arg-type]
    with kbpf.load_program(spec, backend="kernel") as program:
        if what == "streams":
            program.read_stream()
        elif what == "cookies":
            program.attach(kbpf.RawTracepoint("sched_switch"), cookie=7)
        else:
            program.attach(group, before="all")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("streams", "there are no streams of programs here; Linux has them since 6.17"),
        ("cookies", "there are no cookies of raw tracepoints here; Linux has them since 6.10"),
        ("places", "there are no places before and after others in control groups here; Linux has them since 6.17"),
    ],
)
def test_what_else_an_older_kernel_does_not_know(unaware: None, group: Path, what: str, said: str) -> None:
    with pytest.raises(kbpf.NotSupportedError) as caught:
        use(what, group)
    assert caught.value.errno == errno.EINVAL and caught.value.hints == (said,)


@pytest.mark.requires("linux-6.17")
def test_what_is_wrong_about_something_newer_is_not_said_to_be_missing(group: Path) -> None:
    spec = kbpf.ProgramSpec(type="cgroup_sock_addr", instructions=RETURNS_0, expected_attach_type="cgroup_inet4_bind")
    with kbpf.load_program(spec, backend="kernel") as program, pytest.raises(kbpf.BpfError) as caught:
        program.attach(group, "cgroup_inet6_bind", before="all")
    assert not isinstance(caught.value, kbpf.NotSupportedError) and caught.value.errno == errno.EINVAL
