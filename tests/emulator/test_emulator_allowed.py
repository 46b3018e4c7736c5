"""What programs may call and where they may be attached, by type and attach type: the kernel's answers and ours."""

from __future__ import annotations

import errno

import pytest
from sides import Side

from kbpf.backend import LoadRefused
from kbpf.emulator import helpers
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.specs import ProgramSpec
from kbpf.uapi.enums import ATTACH_TYPES, HELPERS, PROG_TYPES

pytestmark = pytest.mark.requires("kernel")

EXIT = Instruction(ebpf.JMP | ebpf.EXIT)
#: One of each group of attach types that the kernel tells apart.
ATTACHED = {
    "cgroup_sock": ("cgroup_inet_sock_create", "cgroup_inet4_post_bind"),
    "cgroup_sock_addr": ("cgroup_inet4_bind", "cgroup_inet6_connect", "cgroup_udp4_recvmsg", "cgroup_unix_sendmsg"),
    "sock_ops": ("cgroup_inet_ingress", "cgroup_sock_ops", "xdp"),
    "cgroup_device": ("cgroup_inet_ingress", "cgroup_device"),
    "cgroup_sysctl": ("cgroup_inet_ingress", "cgroup_sysctl"),
    "cgroup_sockopt": ("cgroup_getsockopt", "cgroup_setsockopt"),
    "sk_reuseport": ("sk_reuseport_select",),
    "netfilter": ("netfilter",),
    "lwt_seg6local": ("cgroup_inet_ingress",),
}
PAIRS = [(type, attach_type) for type, types in ATTACHED.items() for attach_type in types]


def answer(side: Side, spec: ProgramSpec) -> tuple[int, str]:
    """The errno and the log of a load."""
    try:
        side.backend.close(side.backend.program_load(spec, []))
    except LoadRefused as refused:
        return refused.errno or -1, refused.log
    return 0, ""


def test_attach_types_that_programs_may_expect(kernel: Side, emulator: Side) -> None:
    """A register that is not there is found after the attach type."""
    wrong = (Instruction(ebpf.ALU64 | ebpf.MOV, 11, 0, 0, 1), EXIT)
    for type in helpers.ALLOWED:
        for number in (*sorted(ATTACH_TYPES.values()), 1000):
            spec = ProgramSpec(type=type, instructions=wrong, expected_attach_type=number)
            found = [(code, "R11 is invalid" in log) for code, log in (answer(kernel, spec), answer(emulator, spec))]
            assert found[0] == found[1], (type, number)


def test_a_programs_length_is_looked_at_before_its_attach_type_and_that_before_its_type(
    kernel: Side, emulator: Side
) -> None:
    for type in sorted(set(helpers.ALLOWED) & set(PROG_TYPES)):
        for instructions in ((), (EXIT,)):
            for number in (0, 1000):
                spec = ProgramSpec(type=type, instructions=instructions, expected_attach_type=number, flags=0)
                if instructions and answer(kernel, spec)[0] == errno.EACCES:
                    continue  # R0 is not set, which the verifier sees.
                assert answer(emulator, spec)[0] == answer(kernel, spec)[0], (type, instructions, number)


@pytest.mark.parametrize("license", ["GPL", "Proprietary"])
@pytest.mark.parametrize(("type", "attach_type"), PAIRS)
def test_helpers_that_programs_may_call(
    kernel: Side, emulator: Side, type: str, attach_type: str, license: str
) -> None:
    """What the kernel says against the helper itself; it goes on to look at arguments, which the emulator does not."""
    for id in range(max(HELPERS.values()) + 3):
        call = (Instruction(ebpf.JMP | ebpf.CALL, 0, 0, 0, id), EXIT)
        spec = ProgramSpec(type=type, instructions=call, expected_attach_type=attach_type, license=license)
        words = ("cannot use helper", "invalid func", "GPL-restricted", "might sleep")
        truth, ours = ([word for word in words if word in answer(side, spec)[1]] for side in (kernel, emulator))
        if "might sleep" in ours:
            continue  # The kernel says so only where the arguments are right.
        assert ours == truth, (id, license)
