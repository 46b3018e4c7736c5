"""Which loads and stores contexts of control groups' and sockets' programs allow, against the kernel's verifier."""

from __future__ import annotations

import pytest
from sides import Side

from kbpf.emulator import events
from kbpf.emulator.attach_types import EXPECTED
from kbpf.errors import EmulationFault
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.specs import ProgramSpec
from kbpf.uapi.enums import ATTACH_TYPES
from kbpf.uapi.structs import STRUCTS

pytestmark = pytest.mark.requires("kernel")

I = Instruction  # noqa: E741
STRUCTURES = {
    "cgroup_sock": "bpf_sock",
    "cgroup_sock_addr": "bpf_sock_addr",
    "sock_ops": "bpf_sock_ops",
    "cgroup_device": "bpf_cgroup_dev_ctx",
    "cgroup_sysctl": "bpf_sysctl",
    "cgroup_sockopt": "bpf_sockopt",
    "sk_reuseport": "sk_reuseport_md",
}
CASES = [
    (type, number) for type in STRUCTURES for number in sorted(EXPECTED.get(type, {ATTACH_TYPES["cgroup_device"]}))
]
SIZES = {ebpf.B: 1, ebpf.H: 2, ebpf.W: 4, ebpf.DW: 8}


def access(opcode: int, offset: int) -> tuple[Instruction, ...]:
    loads = opcode & 7 == ebpf.LDX
    return (
        I(ebpf.ALU64 | ebpf.MOV, 2, 0, 0, 1),
        I(opcode | ebpf.MEM, *((2, 1) if loads else (1, 2)), offset),
        I(ebpf.ALU64 | ebpf.MOV, 0, 0, 0, 1),
        I(ebpf.JMP | ebpf.EXIT),
    )


@pytest.mark.parametrize(("type", "attach_type"), CASES)
def test_what_may_be_loaded_and_stored(kernel: Side, emulator: Side, type: str, attach_type: int) -> None:
    for offset in range(STRUCTS[STRUCTURES[type]].size + 8):
        for size in SIZES:
            for kind in (ebpf.LDX, ebpf.STX):
                spec = ProgramSpec(
                    type=type, instructions=access(kind | size, offset), expected_attach_type=attach_type
                )
                assert _runs(emulator, spec) == _loads(kernel, spec), (offset, SIZES[size], kind)


def _loads(side: Side, spec: ProgramSpec) -> bool:
    try:
        side.backend.close(side.backend.program_load(spec, []))
    except OSError:
        return False
    return True


def _runs(side: Side, spec: ProgramSpec) -> bool:
    fd = side.backend.program_load(spec, [])
    try:
        events.run_event(side.backend.program(fd))  # type: ignore[attr-defined]
    except EmulationFault:
        return False
    finally:
        side.backend.close(fd)
    return True


def test_they_are_not_run_by_test_run(kernel: Side, emulator: Side) -> None:
    for type, attach_type in CASES:
        instructions = access(ebpf.STX | ebpf.W, -4)[0], *access(ebpf.LDX, 0)[2:]
        spec = ProgramSpec(type=type, instructions=instructions, expected_attach_type=attach_type)
        found = []
        for side in (kernel, emulator):
            fd = side.backend.program_load(spec, [])
            with pytest.raises(OSError, match="524") as error:
                side.backend.program_run(fd, b"", b"")
            side.backend.close(fd)
            found.append(error.value.errno)
        assert found[0] == found[1]
