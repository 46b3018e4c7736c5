"""BPF_PROG_TEST_RUN's flags, processor and batch size, and packets that the network card has summed up."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Any

import pytest
from sides import FRAME, Side

import kbpf
from kbpf.emulator.context import ACCESS
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.specs import ProgramSpec
from kbpf.uapi import constants as uapi
from kbpf.uapi.enums import HELPERS
from kbpf.uapi.structs import STRUCTS

pytestmark = pytest.mark.requires("kernel")

I = Instruction  # noqa: E741
EXIT = I(ebpf.JMP | ebpf.EXIT)
MOV, MOV_X = ebpf.ALU64 | ebpf.MOV, ebpf.ALU64 | ebpf.MOV | ebpf.X
ONE = (I(MOV, 0, 0, 0, 1), EXIT)
ATTACH = {"cgroup_skb": "cgroup_inet_ingress", "sk_lookup": "sk_lookup"}
LOOKUP = (2).to_bytes(4, "little").rjust(12, b"\0").ljust(72, b"\0")
#: What a run of each type is given.
GIVEN: dict[str, tuple[bytes, bytes]] = {
    **dict.fromkeys(ACCESS, (FRAME, b"")),
    "xdp": (FRAME, b""),
    "flow_dissector": (FRAME, b""),
    "sk_lookup": (b"", LOOKUP),
    "raw_tracepoint": (b"", b""),
    "syscall": (b"", b""),
}
OPTIONS: list[dict[str, int]] = [
    *({"flags": 1 << bit} for bit in range(32)),
    *({"cpu": cpu} for cpu in (1, 99)),
    *({"batch_size": size} for size in (1, 64)),
    *({"flags": uapi.BPF_F_TEST_XDP_LIVE_FRAMES, "batch_size": size} for size in (257, 1 << 31)),
    {"flags": uapi.BPF_F_TEST_SKB_CHECKSUM_COMPLETE, "cpu": 1},
]


def run(
    side: Side,
    type: str,
    program: Sequence[Instruction],
    data: bytes = FRAME,
    context: bytes = b"",
    attach_type: str | None = None,
    **options: int,
) -> Any:
    spec = ProgramSpec(
        type=type,
        instructions=tuple(program),
        expected_attach_type=attach_type or ATTACH.get(type),
        flags=uapi.BPF_F_SLEEPABLE if type == "syscall" else 0,
    )
    fd = side.backend.program_load(spec, [])
    try:
        return side.backend.program_run(fd, data, context, **options)[:3]
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, error.errno)
    finally:
        side.backend.close(fd)


@pytest.mark.parametrize("type", GIVEN)
def test_each_type_takes_options_of_its_own(kernel: Side, emulator: Side, type: str) -> None:
    for options in OPTIONS:
        given = type, ONE, *GIVEN[type]
        assert run(emulator, *given, **options) == run(kernel, *given, **options), options


@pytest.mark.parametrize("attach_type", ("xdp", "xdp_devmap", "xdp_cpumap"))
def test_frames_programs_of_maps_have_no_test_run(kernel: Side, emulator: Side, attach_type: str) -> None:
    for flags in (0, 1):
        given = {"attach_type": attach_type, "flags": flags}
        outcome = run(kernel, "xdp", ONE, **given)
        assert run(emulator, "xdp", ONE, **given) == outcome
        assert (outcome == "EINVAL") == (attach_type != "xdp" or flags == 1)


def call(name: str, *arguments: int) -> list[Instruction]:
    """A call over the context in R6; R3 points to eight bytes on the stack where the helper takes bytes."""
    loads = [I(MOV, register, 0, 0, value) for register, value in enumerate(arguments, 2)]
    if name == "skb_store_bytes":
        loads[1:1] = [I(MOV_X, 3, 10), I(ebpf.ALU64 | ebpf.ADD, 3, 0, 0, -8)]
        loads = [*loads[:3], *(I(MOV, at, 0, 0, value) for at, value in enumerate(arguments[1:], 4))]
    return [I(MOV_X, 1, 6), *loads, I(ebpf.JMP | ebpf.CALL, 0, 0, 0, HELPERS[name])]


SUMMED: dict[str, list[Instruction]] = {
    "nothing": call("skb_pull_data", 0),
    "bytes, and said so": call("skb_store_bytes", 21, 7, uapi.BPF_F_RECOMPUTE_CSUM),
    "bytes, and not said so": call("skb_store_bytes", 21, 7, 0),
    "bytes of the link header": call("skb_store_bytes", 0, 8, 0),
    "a correction": [*call("skb_store_bytes", 20, 8, 0), *call("csum_update", 0x12345)],
    "a tag in the metadata": call("skb_vlan_push", 0x81, 5),
    "a tag in the bytes": call("skb_vlan_push", 0x81, 5) + call("skb_vlan_push", 0x81, 6),
    "a tag out of the bytes": call("skb_vlan_push", 0x81, 5)
    + call("skb_vlan_push", 0x81, 6)
    + call("skb_vlan_pop") * 2,
    "a shorter packet": call("skb_change_tail", 60, 0),
    "a longer packet": call("skb_change_tail", 200, 0),
    "a header before": call("skb_change_head", 14, 0),
    "room": call("skb_adjust_room", 20, 0, 0),
    "room away": call("skb_adjust_room", -20, 0, 0),
    "IPv6": call("skb_change_proto", 0xDD86, 0),
    "an IP checksum": call("l3_csum_replace", 24, 0x1122, 0x3344, 2),
    "a checksum": call("l4_csum_replace", 40, 0x1122, 0x3344, 4),
    "a checksum with a pseudo header": call("l4_csum_replace", 40, 0x1122, 0x3344, 4 | uapi.BPF_F_PSEUDO_HDR),
    "a difference of a pseudo header": call("l4_csum_replace", 40, 0, 0x3344, uapi.BPF_F_PSEUDO_HDR),
    "a difference of IPv6": call("l4_csum_replace", 40, 0, 0x3344, uapi.BPF_F_PSEUDO_HDR | 1 << 7),
    "a level": call("csum_level", 1),
    "a level, then another": call("csum_level", 1) + call("csum_level", 0),
    "congestion": call("skb_ecn_set_ce"),
}


@pytest.mark.parametrize("name", SUMMED)
@pytest.mark.parametrize("ethertype", (0x0800, 0x86DD, 0x0806))
def test_a_packet_that_was_summed_up(kernel: Side, emulator: Side, name: str, ethertype: int) -> None:
    """The sum is shown by bpf_csum_update; EBADMSG where it is not the packet's any more."""
    program = [
        I(MOV_X, 6, 1),
        I(ebpf.ST | ebpf.MEM | ebpf.DW, 10, 0, -8, 0x55AA1234),
        *SUMMED[name],
        I(ebpf.STX | ebpf.MEM | ebpf.W, 6, 0, STRUCTS["__sk_buff"].fields["cb"].offset),
        *call("csum_update", 0),
        EXIT,
    ]
    data = FRAME[:12] + ethertype.to_bytes(2, "big") + FRAME[14:15] + b"\x21" + FRAME[16:]
    for flags in (0, uapi.BPF_F_TEST_SKB_CHECKSUM_COMPLETE):
        given = "sched_cls", program, data, bytes(192)
        assert run(emulator, *given, flags=flags) == run(kernel, *given, flags=flags), flags


@pytest.mark.parametrize("backend", ("kernel", "emulator"))
def test_a_program_that_runs_takes_them_too(backend: str) -> None:
    with kbpf.load_program(ProgramSpec(type="sched_cls", instructions=ONE), backend=backend) as program:
        assert program.run(FRAME, flags=uapi.BPF_F_TEST_SKB_CHECKSUM_COMPLETE).value == 1
        for options in ({"flags": 1}, {"cpu": 1}, {"batch_size": 1}):
            with pytest.raises(kbpf.BpfError) as caught:
                program.run(FRAME, **options)
            assert caught.value.errno == errno.EINVAL
        with pytest.raises(ValueError, match="32 bits"):
            program.run(FRAME, flags=1 << 32)
