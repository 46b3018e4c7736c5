"""Helpers over a socket buffer's metadata: times of delivery, what IPsec has done."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from mapcode import EXIT, Code, call, copy, get, mov, put, stack
from sides import FRAME, Side

from kbpf.emulator.environment import environment
from kbpf.emulator.xfrm import XfrmState
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction, ld_imm64
from kbpf.specs import ProgramSpec
from kbpf.uapi.structs import STRUCTS

FIELDS = STRUCTS["__sk_buff"].fields
CB = FIELDS["cb"].offset
TYPES = ("sched_cls", "sched_act")


@pytest.fixture
def ipsec() -> Iterator[None]:
    before = environment.xfrm_states
    yield
    environment.xfrm_states = before


def kept(side: Side, type: str, body: Code, data: bytes = FRAME) -> tuple[int, bytes]:
    """Run; the body leaves the context in R6, and what it wants to be seen in ``cb`` and the context."""
    fd = side.backend.program_load(
        ProgramSpec(type=type, instructions=(*copy(6, 1), *body, *mov(0, 1), EXIT), license="GPL"), []
    )
    try:
        ran = side.backend.program_run(fd, data, bytes(192))
    finally:
        side.backend.close(fd)
    return ran.value, ran.context


@pytest.mark.requires("kernel")
@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("ethertype", (0x0800, 0x86DD, 0x0806, 0x8100))
def test_times_of_delivery(kernel: Side, emulator: Side, type: str, ethertype: int) -> None:
    data = FRAME[:12] + ethertype.to_bytes(2, "big") + FRAME[14:]
    for clock in (0, 1, 2, 3, 4, -1):
        for stamp in (0, 1, 0x1122334455667788, -1):
            body = [
                *copy(1, 6), *mov(2, 5), *mov(3, 1), *call("skb_set_tstamp"),
                *copy(1, 6), *ld_imm64(2, stamp & (1 << 64) - 1), *mov(3, clock), *call("skb_set_tstamp"),
                Instruction(ebpf.STX | ebpf.MEM | ebpf.W, 6, 0, CB),
                *get(2, 6, FIELDS["tstamp"].offset), Instruction(ebpf.STX | ebpf.MEM | ebpf.DW, 6, 2, CB + 8),
                Instruction(ebpf.LDX | ebpf.MEM | ebpf.B, 2, 6, FIELDS["tstamp_type"].offset),
                Instruction(ebpf.STX | ebpf.MEM | ebpf.W, 6, 2, CB + 4),
            ]  # fmt: skip
            assert kept(emulator, type, body, data) == kept(kernel, type, body, data), (clock, stamp)


def asked_for(index: int, size: int, flags: int, word: int) -> Code:
    """Ask for a transformation, and keep the result and eight bytes of it."""
    return [
        *(i for at in range(-32, 0, 8) for i in put(at, -1)),
        *copy(1, 6), *mov(2, index), *stack(3, -32), *mov(4, size), *mov(5, flags), *call("skb_get_xfrm_state"),
        Instruction(ebpf.STX | ebpf.MEM | ebpf.W, 6, 0, CB),
        *get(2, ebpf.FP, word - 32), Instruction(ebpf.STX | ebpf.MEM | ebpf.DW, 6, 2, CB + 8),
    ]  # fmt: skip


@pytest.mark.requires("kernel")
@pytest.mark.parametrize("type", TYPES)
def test_packets_without_ipsec(kernel: Side, emulator: Side, type: str) -> None:
    for index, size, flags in ((0, 28, 0), (1, 28, 0), (0, 27, 0), (0, 32, 0), (0, 4, 0), (0, 28, 1)):
        for word in (0, 8, 24):
            body = asked_for(index, size, flags, word)
            assert kept(emulator, type, body) == kept(kernel, type, body), (index, size, flags)


@pytest.mark.parametrize("type", TYPES)
def test_what_ipsec_has_done_is_what_the_test_says(emulator: Side, ipsec: None, type: str) -> None:
    environment.xfrm_states = (
        XfrmState(reqid=7, spi=0x01020304, remote="192.0.2.1"),
        XfrmState(spi=5, remote="2001:db8::1"),
    )

    def state(index: int, size: int = 28, flags: int = 0) -> tuple[int, bytes]:
        words = [kept(emulator, type, asked_for(index, size, flags, word))[1][CB : CB + 16] for word in (0, 8, 16, 24)]
        return struct.unpack_from("=i", words[0])[0], b"".join(word[8:] for word in words)[:28]

    ipv4 = struct.pack("=I4sHH4s", 7, b"\1\2\3\4", 2, 0, bytes((192, 0, 2, 1))) + bytes(12)
    ipv6 = struct.pack("=I4sHH", 0, b"\0\0\0\5", 10, 0) + bytes.fromhex("20010db8000000000000000000000001")
    assert [state(0), state(1)] == [(0, ipv4), (0, ipv6)]
    assert [state(2)[0], state(0, 27)[0], state(0, 28, 1)[0]] == [-22] * 3
