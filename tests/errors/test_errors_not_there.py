"""What a kernel does not have is said by name, where it says no more than that something is invalid."""

from __future__ import annotations

from typing import Any

import pytest

import kbpf
from kbpf import features
from kbpf.backend import Answer
from kbpf.isa.ebpf import Instruction
from kbpf.kernel.backend import KernelBackend

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
