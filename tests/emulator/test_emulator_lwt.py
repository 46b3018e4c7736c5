"""bpf_lwt_push_encap, and the programs of segments."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
from mapcode import EXIT, call, copy, mov
from sides import FRAME, Side

from kbpf.errors import ENOTSUPP, EmulationFault
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.specs import MapSpec, ProgramSpec
from kbpf.uapi import constants as uapi
from kbpf.uapi.structs import STRUCTS

CB = STRUCTS["__sk_buff"].fields["cb"].offset
SIXES = bytes.fromhex("20010db8000000000000000000000001"), bytes.fromhex("20010db8000000000000000000000002")
FRAME6 = bytes(12) + b"\x86\xdd" + bytes.fromhex("6000000000401140") + SIXES[0] + SIXES[1] + bytes(range(64))
IPV4 = bytes.fromhex("4510004000004000ff2f0000c0000201c0000202")
IPV6 = bytes.fromhex("6000000000403b40") + SIXES[1] + SIXES[0]
IP, INLINE, ENCAP = uapi.BPF_LWT_ENCAP_IP, uapi.BPF_LWT_ENCAP_SEG6_INLINE, uapi.BPF_LWT_ENCAP_SEG6


def pushed(
    side: Side, type: str, kind: int, header: bytes, data: bytes = FRAME, context: bytes = bytes(192), flags: int = 0
) -> Any:
    """Push a header, and see in ``cb`` what came of it, the length, the protocol and where the tail may be cut."""
    fd = side.backend.map_create(MapSpec(type="array", key_size=4, value_size=512, max_entries=1))
    side.backend.map_update(fd, bytes(4), header.ljust(512, b"\0"))
    fields = STRUCTS["__sk_buff"].fields
    program = [
        *copy(6, 1), *mov(2, kind), Instruction(ebpf.LD_IMM64, 3, ebpf.PSEUDO_MAP_IDX_VALUE, 0, 0), Instruction(0),
        *mov(4, len(header)), *call("lwt_push_encap"),
        Instruction(ebpf.STX | ebpf.MEM | ebpf.W, 6, 0, CB),
        *(i for at, name in enumerate(("len", "protocol", "hash"), 1) for i in (
            Instruction(ebpf.LDX | ebpf.MEM | ebpf.W, 2, 6, fields[name].offset),
            Instruction(ebpf.STX | ebpf.MEM | ebpf.W, 6, 2, CB + 4 * at))),
    ]  # fmt: skip
    if type == "lwt_xmit":
        program += [*copy(1, 6), *mov(2, 70), *mov(3, 0), *call("skb_change_tail"),
                    Instruction(ebpf.STX | ebpf.MEM | ebpf.W, 6, 0, CB + 16)]  # fmt: skip
    loaded = side.backend.program_load(ProgramSpec(type=type, instructions=(*program, *mov(0, 1), EXIT)), [fd])
    try:
        return side.backend.program_run(loaded, data, context, flags=flags)[:3]
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    finally:
        side.backend.close(loaded)
        side.backend.close(fd)


def headers(rng: Random) -> Iterator[bytes]:
    """IP headers, right and wrong."""
    for size in (1, 19, 20, 24, 27, 28, 40, 47, 48, 60, 100, 256, 257, 300):
        for first in (0x45, 0x46, 0x4F, 0x44, 0x40, 0x60, 0x50):
            for protocol in (47, 17):
                for check in (b"\0\0", b"\x12\x34"):
                    header = bytearray(rng.randbytes(size))
                    header[0] = first
                    header[6:7] = header[9:10] = bytes((protocol,))
                    header[10:12] = check
                    yield bytes(header[:size])


@pytest.mark.requires("kernel")
@pytest.mark.parametrize("type", ("lwt_in", "lwt_xmit"))
def test_ip_headers(kernel: Side, emulator: Side, type: str) -> None:
    for header in headers(Random(1)):
        for data in (FRAME, FRAME6):
            given = type, IP, header, data
            assert pushed(emulator, *given) == pushed(kernel, *given), header.hex()


@pytest.mark.requires("kernel")
@pytest.mark.parametrize("type", ("lwt_in", "lwt_xmit"))
def test_ip_headers_before_what_is_segmented_or_summed_up(kernel: Side, emulator: Side, type: str) -> None:
    context = bytearray(192)
    context[STRUCTS["__sk_buff"].fields["gso_size"].offset] = 100
    for header in (IPV4, IPV6, IPV6 + bytes(8)):
        for flags in (0, uapi.BPF_F_TEST_SKB_CHECKSUM_COMPLETE):
            for given in (bytes(192), bytes(context)):
                ours, theirs = (pushed(side, type, IP, header, FRAME, given, flags) for side in (emulator, kernel))
                assert ours == theirs, (header.hex(), flags)


@pytest.mark.requires("kernel")
@pytest.mark.parametrize("type", ("lwt_in", "lwt_xmit"))
def test_other_kinds(kernel: Side, emulator: Side, type: str) -> None:
    for kind in (3, 4, 255, -1):
        assert pushed(emulator, type, kind, IPV4) == pushed(kernel, type, kind, IPV4)


def routing(
    segments: int = 2, left: int | None = None, first: int | None = None, options: bytes = b"", **at: int
) -> bytes:
    """A segment routing header; the last segment comes first."""
    first = segments - 1 if first is None else first
    left = first if left is None else left
    header = bytearray((59, 2 * segments + len(options) // 8, 4, left & 255, first & 255, 0, 0, 0))
    for name, value in at.items():
        header[{"length": 1, "type": 2}[name]] = value
    return bytes(header) + b"".join(SIXES[n & 1] for n in range(segments)) + options


WRONG = {
    "too short": routing()[:7],
    "of another type": routing(type=0),
    "of another length": routing(length=5),
    "one left too many": routing(left=2),
    "more than there are": routing(first=2, left=0),
    "none": routing(0, left=0, first=0),
    "an option cut off": routing(options=b"\1\7\0\0\0\0\0\0"),
    "half an option": routing(options=b"\1\5\0\0\0\0\0\1"),
}
RIGHT = {
    "one": routing(1),
    "two": routing(),
    "three, one left": routing(3, left=1),
    "options": routing(options=b"\1\6\0\0\0\0\0\0"),
    "many options": routing(options=b"\1\0\5\4\0\0\0\0" + b"\1\6\0\0\0\0\0\0"),
}


@pytest.mark.requires("kernel")
@pytest.mark.parametrize("header", WRONG.values(), ids=WRONG)
def test_wrong_routing_headers(kernel: Side, emulator: Side, header: bytes) -> None:
    for type in ("lwt_in", "lwt_xmit"):
        for kind in (INLINE, ENCAP):
            for data in (FRAME, FRAME6):
                given = type, kind, header, data
                assert pushed(emulator, *given) == pushed(kernel, *given)


@pytest.mark.requires("kernel")
@pytest.mark.parametrize("header", RIGHT.values(), ids=RIGHT)
def test_right_routing_headers(kernel: Side, emulator: Side, header: bytes) -> None:
    """What the emulator does not have faults; Linux breaks where a packet of a test run has no route."""
    ours, theirs = (pushed(side, "lwt_in", INLINE, header, FRAME) for side in (emulator, kernel))
    assert ours == theirs
    for kind, data in ((INLINE, FRAME6), (ENCAP, FRAME), (ENCAP, FRAME6)):
        with pytest.raises(EmulationFault, match="segment routing"):
            pushed(emulator, "lwt_in", kind, header, data)


@pytest.mark.requires("kernel")
def test_programs_of_segments_have_no_test_run(kernel: Side, emulator: Side) -> None:
    for side in (kernel, emulator):
        fd = side.backend.program_load(ProgramSpec(type="lwt_seg6local", instructions=(*mov(0, 0), EXIT)), [])
        with pytest.raises(OSError) as caught:
            side.backend.program_run(fd, FRAME6, b"")
        assert caught.value.errno == ENOTSUPP
        side.backend.close(fd)


def test_what_programs_of_segments_call_is_refused_by_name(emulator: Side) -> None:
    with pytest.raises(OSError, match="bpf_lwt_seg6_action#76"):
        emulator.backend.program_load(
            ProgramSpec(type="lwt_seg6local", instructions=(*call("lwt_seg6_action"), EXIT)), []
        )
