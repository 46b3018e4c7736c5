"""Programs on control groups: where they go, what is refused, and when they end, on both backends alike."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kbpf
from kbpf.emulator import add_cgroup, remove_cgroup
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.specs import ProgramSpec

RETURNS_1 = (Instruction(ebpf.ALU64 | ebpf.MOV, 0, 0, 0, 1), Instruction(ebpf.JMP | ebpf.EXIT))
MOUNTS = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
UNIFIED = next((Path(where) for _, where, kind, *_ in MOUNTS if kind == "cgroup2"), None)


@pytest.fixture
def group(backend: Any) -> Iterator[str]:
    """The directory of a new group."""
    if backend == "kernel":
        assert UNIFIED is not None
        path = UNIFIED / f"kbpf-test-{os.getpid()}"
        path.mkdir()
        yield str(path)
        path.rmdir()
    else:
        made = add_cgroup(f"/sys/fs/cgroup/kbpf-test-{os.getpid()}").path
        yield made
        remove_cgroup(made)


def program(backend: Any, type: str, attach_type: str | None = None) -> kbpf.Program:
    spec = ProgramSpec(type=type, instructions=RETURNS_1, expected_attach_type=attach_type)
    return kbpf.load_program(spec, backend=backend)


def test_a_link_holds_the_program_there(backend: Any, group: str) -> None:
    with program(backend, "sock_ops") as first, program(backend, "sock_ops") as second, first.attach(group) as link:
        assert isinstance(link, kbpf.CgroupLink)
        assert (link.info.type, link.info.attach_type) == ("cgroup", "cgroup_sock_ops")
        assert link.info.cgroup_id
        link.update(second, expected=first)
        assert link.info.program_id == second.id
        with pytest.raises(kbpf.PermissionDeniedError):
            link.update(first, expected=first)
        assert link.detach()
        assert not link.detach()


def test_the_hook_is_what_the_program_was_loaded_for(backend: Any, group: str) -> None:
    with program(backend, "cgroup_sock_addr", "cgroup_inet4_bind") as loaded:
        with loaded.attach(Path(group)) as link:
            assert link.info.attach_type == "cgroup_inet4_bind"
        with pytest.raises(kbpf.BpfError) as refused:
            loaded.attach(group, "cgroup_inet6_bind")
        assert refused.value.errno == errno.EINVAL
    with program(backend, "cgroup_skb") as unsaid, pytest.raises(ValueError, match="which hook"):
        unsaid.attach(group)


@pytest.mark.requires("linux-6.17")
def test_before_and_after(backend: Any, group: str) -> None:
    with program(backend, "sock_ops") as loaded, loaded.attach(group) as there:
        loaded.attach(group, before=there).detach()
        loaded.attach(group, after="all").detach()
        with pytest.raises(kbpf.BpfError) as refused:
            # A link goes before or after links only.
            loaded.attach(group, before=loaded)
        assert refused.value.errno == errno.EINVAL
        with pytest.raises(ValueError, match="two places"):
            loaded.attach(group, before=there, after=there)


def test_directories_that_are_no_groups(backend: Any, group: str, tmp_path: Path) -> None:
    with program(backend, "sock_ops") as loaded:
        for path, number in (
            (f"{group}/nowhere", errno.ENOENT),
            (str(tmp_path), errno.EBADF),
            ("/proc/self/comm", errno.ENOTDIR),
        ):
            with pytest.raises(kbpf.BpfError) as refused:
                loaded.attach(path)
            assert refused.value.errno == number
        with pytest.raises(TypeError):
            loaded.attach(group, mode="native")


@pytest.mark.skipif(UNIFIED is None, reason="no control groups of version 2")
def test_emulated_programs_go_on_real_groups() -> None:
    """Known by the inode number of their directories, as emulated processes and sockets name theirs."""
    assert UNIFIED is not None
    with program("emulator", "sock_ops") as loaded, loaded.attach(UNIFIED) as link:
        assert link.info.cgroup_id == UNIFIED.stat().st_ino
