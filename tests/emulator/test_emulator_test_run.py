"""BPF_PROG_TEST_RUN by program type: what is accepted, refused, and comes out, against the kernel."""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence
from typing import Any

import pytest
from sides import FRAME, Side

from kbpf.emulator.context import ACCESS
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.specs import ProgramSpec
from kbpf.uapi.structs import STRUCTS

pytestmark = pytest.mark.requires("kernel")

I = Instruction  # noqa: E741
EXIT = I(ebpf.JMP | ebpf.EXIT)
SKB = tuple(ACCESS)
ATTACH = {"cgroup_skb": "cgroup_inet_ingress", "sk_lookup": "sk_lookup"}
FIELDS = STRUCTS["__sk_buff"].fields


def returns(value: int) -> list[Instruction]:
    return [I(ebpf.ALU64 | ebpf.MOV, 0, 0, 0, value), EXIT]


def run(
    side: Side, type: str, program: Sequence[Instruction], data: bytes, context: bytes = b"", repeat: int = 1
) -> Any:
    spec = ProgramSpec(type=type, instructions=tuple(program), expected_attach_type=ATTACH.get(type))
    try:
        fd = side.backend.program_load(spec, [])
    except OSError as error:
        return f"not loaded: {errno.errorcode[error.errno or 0]}"
    try:
        return side.backend.program_run(fd, data, context, repeat)[:3]
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, error.errno)
    finally:
        side.backend.close(fd)


@pytest.mark.parametrize("type", SKB)
@pytest.mark.parametrize("ethertype", (0x0800, 0x86DD, 0x0806, 0x8100))
def test_sizes_of_socket_buffers(kernel: Side, emulator: Side, type: str, ethertype: int) -> None:
    for size in (0, 13, 14, 33, 34, 53, 54, 60, 3712, 3713, 5000):
        data = (bytes(range(12)) + ethertype.to_bytes(2, "big") + bytes(5000))[:size]
        assert run(emulator, type, returns(1), data) == run(kernel, type, returns(1), data), size


@pytest.mark.parametrize("type", SKB)
def test_contexts_of_socket_buffers(kernel: Side, emulator: Side, type: str) -> None:
    for name, field in FIELDS.items():
        for value in (1, 45, 46, 60, 0xFFFF):
            context = bytearray(192)
            context[field.offset : field.offset + field.size] = (value & (1 << 8 * field.size) - 1).to_bytes(
                field.size, "little"
            )
            if "ifindex" in name:
                continue
            given = FRAME[:60], bytes(context)
            assert run(emulator, type, returns(1), *given) == run(kernel, type, returns(1), *given), (name, value)


@pytest.mark.parametrize("type", SKB)
def test_each_field_may_be_read_or_not(kernel: Side, emulator: Side, type: str) -> None:
    """What the kernel refuses to load faults in the emulator; addresses and what only a socket has are left out."""
    left_out = {"data", "data_end", "data_meta", "sk", "family", "hash"}
    for name, field in FIELDS.items():
        if name in left_out or name.startswith(("remote_", "local_")):
            continue
        for opcode, size in ((ebpf.B, 1), (ebpf.H, 2), (ebpf.W, 4), (ebpf.DW, 8)):
            program = [I(ebpf.LDX | ebpf.MEM | opcode, 2, 1, field.offset), *returns(1)]
            truth = run(kernel, type, program, FRAME)
            if isinstance(truth, str):
                with pytest.raises(Exception, match="context"):
                    run(emulator, type, program, FRAME)
            else:
                assert run(emulator, type, program, FRAME) == truth, (name, size)


@pytest.mark.parametrize("type", SKB)
def test_each_field_may_be_written_or_not(kernel: Side, emulator: Side, type: str) -> None:
    for name, field in FIELDS.items():
        for opcode in (ebpf.B, ebpf.H, ebpf.W, ebpf.DW):
            program = [
                I(ebpf.ALU64 | ebpf.MOV, 2, 0, 0, 0x1234567),
                I(ebpf.STX | ebpf.MEM | opcode, 1, 2, field.offset),
                *returns(1),
            ]
            truth = run(kernel, type, program, FRAME, bytes(192))
            if isinstance(truth, str):
                with pytest.raises(Exception, match="context"):
                    run(emulator, type, program, FRAME, bytes(192))
            else:
                assert run(emulator, type, program, FRAME, bytes(192)) == truth, name


@pytest.mark.parametrize("ethertype", (0x0800, 0x86DD, 0x0806))
def test_the_socket_of_a_cgroups_packet(kernel: Side, emulator: Side, ethertype: int) -> None:
    data = bytes(12) + ethertype.to_bytes(2, "big") + bytes(range(1, 61))
    for name, field in FIELDS.items():
        if name == "family" or name.startswith(("remote_", "local_")):
            for offset in range(field.offset, field.offset + field.size * field.count):
                for opcode in (ebpf.B, ebpf.H, ebpf.W):
                    program = [
                        I(ebpf.LDX | ebpf.MEM | opcode, 2, 1, offset),
                        I(ebpf.STX | ebpf.MEM | ebpf.W, 1, 2, FIELDS["cb"].offset),
                        *returns(1),
                    ]
                    truth = run(kernel, "cgroup_skb", program, data, bytes(192))
                    if not isinstance(truth, str):
                        assert run(emulator, "cgroup_skb", program, data, bytes(192)) == truth, (name, offset)


def test_repeated_runs_go_on_with_the_same_packet(kernel: Side, emulator: Side) -> None:
    push = [
        I(ebpf.ALU64 | ebpf.MOV, 2, 0, 0, 14),
        I(ebpf.ALU64 | ebpf.MOV, 3, 0, 0, 0),
        I(ebpf.JMP | ebpf.CALL, 0, 0, 0, 43),
        EXIT,
    ]
    assert run(emulator, "sched_cls", push, FRAME, bytes(192), 3) == run(
        kernel, "sched_cls", push, FRAME, bytes(192), 3
    )


@pytest.mark.parametrize("size", (0, 1, 13, 14, 15, 60, 3519, 3520, 3521, 4096, 8000, 73152, 73153, 130000))
def test_sizes_of_frames(kernel: Side, emulator: Side, size: int) -> None:
    data = bytes(n & 255 for n in range(size))
    for context in (b"", struct.pack("=6I", 0, size, 0, 0, 0, 0)):
        assert run(emulator, "xdp", returns(2), data, context) == run(kernel, "xdp", returns(2), data, context)


@pytest.mark.parametrize(
    "words",
    [
        (0, 100, 0, 0, 0, 0), (4, 100, 0, 0, 0, 0), (5, 100, 0, 0, 0, 0), (0, 99, 0, 0, 0, 0), (0, 13, 0, 0, 0, 0),
        (0, 101, 0, 0, 0, 0), (0, 100, 4, 0, 0, 0), (0, 100, 0, 1, 0, 0), (0, 100, 0, 1, 1, 0), (0, 100, 0, 999, 0, 0),
        (0, 100, 0, 0, 1, 0), (0, 100, 0, 0, 0, 1), (50, 40, 0, 0, 0, 0), (88, 100, 0, 0, 0, 0), (84, 100, 0, 0, 0, 0),
        (0, 0, 0, 0, 0, 0),
    ],
)  # fmt: skip
def test_contexts_of_frames(kernel: Side, emulator: Side, words: tuple[int, ...]) -> None:
    given = bytes(range(100)), struct.pack("=6I", *words)
    assert run(emulator, "xdp", returns(2), *given) == run(kernel, "xdp", returns(2), *given)


@pytest.mark.parametrize("metadata", (212, 216, 220, 252, 256))
def test_the_most_metadata(kernel: Side, emulator: Side, metadata: int) -> None:
    given = bytes(400), struct.pack("=6I", metadata, 400, 0, 0, 0, 0)
    assert run(emulator, "xdp", returns(2), *given) == run(kernel, "xdp", returns(2), *given)


@pytest.mark.parametrize("size", (1, 8, 20, 23, 24, 25, 4096, 4097))
def test_sizes_of_frame_contexts(kernel: Side, emulator: Side, size: int) -> None:
    for context in (bytes(size), (struct.pack("=II", 0, 400) + bytes(5000))[:size], bytes(size - 1) + b"\1"):
        assert run(emulator, "xdp", returns(2), bytes(400), context) == run(
            kernel, "xdp", returns(2), bytes(400), context
        )


@pytest.mark.parametrize("value", (0, 1, 2, 129))
def test_flow_dissectors_give_their_keys(kernel: Side, emulator: Side, value: int) -> None:
    for size in (0, 13, 14, 60, 4096, 4097):
        data = bytes(n & 255 for n in range(size))
        given = "flow_dissector", returns(value), data
        assert run(emulator, *given) == run(kernel, *given), size


@pytest.mark.parametrize(
    "context",
    [
        bytes(56), b"\1" + bytes(55), bytes(48) + b"\5" + bytes(7), bytes(52) + b"\1" + bytes(3), bytes(57),
        bytes(56) + b"\1", bytes(4),
    ],
)  # fmt: skip
def test_flow_dissector_contexts(kernel: Side, emulator: Side, context: bytes) -> None:
    given = "flow_dissector", returns(0), FRAME, context
    assert run(emulator, *given) == run(kernel, *given)


@pytest.mark.parametrize("places", ((0, 0), (20, 10), (14, 5000), (60, 61), (65535, 3)))
def test_header_offsets_are_kept_within_the_frame(kernel: Side, emulator: Side, places: tuple[int, int]) -> None:
    program = [
        I(ebpf.LDX | ebpf.MEM | ebpf.DW, 2, 1, FIELDS["flow_keys"].offset),
        I(ebpf.ST | ebpf.MEM | ebpf.H, 2, 0, 0, places[0]),
        I(ebpf.ST | ebpf.MEM | ebpf.H, 2, 0, 2, places[1]),
        I(ebpf.LDX | ebpf.MEM | ebpf.W, 3, 1, FIELDS["data"].offset),
        I(ebpf.LDX | ebpf.MEM | ebpf.W, 4, 1, FIELDS["data_end"].offset),
        I(ebpf.ALU64 | ebpf.MOV | ebpf.X, 5, 3),
        I(ebpf.ALU64 | ebpf.ADD, 5, 0, 0, 16),
        I(ebpf.ALU64 | ebpf.MOV, 0, 0, 0, 2),
        I(ebpf.JMP | ebpf.JGT | ebpf.X, 5, 4, 1),
        I(ebpf.LDX | ebpf.MEM | ebpf.H, 0, 3, 12),
        I(ebpf.STX | ebpf.MEM | ebpf.W, 2, 0, 20),
        EXIT,
    ]
    assert run(emulator, "flow_dissector", program, FRAME) == run(kernel, "flow_dissector", program, FRAME)


def lookup(**fields: int) -> bytes:
    """``struct bpf_sk_lookup``; every byte of the addresses is another one."""
    layout = STRUCTS["bpf_sk_lookup"].fields
    context = bytearray(72)
    for start, name in enumerate(("remote_ip4", "remote_ip6", "local_ip4", "local_ip6")):
        size = layout[name].size * layout[name].count
        context[layout[name].offset : layout[name].offset + size] = bytes(range(16 * start + 1, 16 * start + 1 + size))
    for name, value in {"family": 2, "protocol": 6, "remote_port": 0x5000, "local_port": 8081, **fields}.items():
        context[layout[name].offset : layout[name].offset + layout[name].size] = value.to_bytes(
            layout[name].size, "little"
        )
    return bytes(context)


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"family": 10}, {"family": 1}, {"family": 0x10002}, {"local_port": 70000}, {"ingress_ifindex": 1},
        {"cookie": 1}, {"protocol": 0x12345},
    ],
)  # fmt: skip
def test_lookup_contexts(kernel: Side, emulator: Side, fields: dict[str, int]) -> None:
    for value in (0, 1):
        given = "sk_lookup", returns(value), b"", lookup(**fields)
        assert run(emulator, *given) == run(kernel, *given)


def test_lookups_take_a_context_and_no_data(kernel: Side, emulator: Side) -> None:
    for data, context in ((b"x" * 20, lookup()), (b"", b""), *((b"", lookup()[:size]) for size in (8, 60, 64))):
        given = "sk_lookup", returns(1), data, context
        assert run(emulator, *given) == run(kernel, *given)


@pytest.mark.parametrize("family", (2, 10))
@pytest.mark.parametrize("size", (1, 2, 4, 8))
def test_lookup_fields(kernel: Side, emulator: Side, family: int, size: int) -> None:
    opcode = {1: ebpf.B, 2: ebpf.H, 4: ebpf.W, 8: ebpf.DW}[size]
    for offset in range(0, 72, size):
        for bit in range(0, min(8 * size, 32), 5):
            program = [
                I(ebpf.LDX | ebpf.MEM | opcode, 2, 1, offset),
                I(ebpf.ALU64 | ebpf.RSH, 2, 0, 0, bit),
                I(ebpf.ALU64 | ebpf.AND, 2, 0, 0, 1),
                I(ebpf.ALU64 | ebpf.MOV | ebpf.X, 0, 2),
                EXIT,
            ]
            given = "sk_lookup", program, b"", lookup(family=family)
            truth = run(kernel, *given)
            if isinstance(truth, str):
                break
            assert run(emulator, *given) == truth, (offset, bit)
