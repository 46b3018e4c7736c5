"""What the fuzzer once found to differ between kernel and emulator, each as small as it could be made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import pytest

from kbpf.isa import cbpf
from kbpf.testing import carriers, differ
from kbpf.testing.differ import ClassicCase, assert_same

pytestmark = pytest.mark.requires("kernel")

Classic: TypeAlias = "Callable[[str, Sequence[tuple[int, int, int, int]], Sequence[bytes]], list[int | None]]"

_PAY_OFFSET = [
    (cbpf.LD | cbpf.W | cbpf.ABS, 0, 0, cbpf.AD_OFF + 52),
    (cbpf.ALU | cbpf.ADD | cbpf.K, 0, 0, 1),
    (cbpf.RET | cbpf.A, 0, 0, 0),
]


@pytest.fixture(scope="module")
def classic() -> Iterator[Classic]:
    """Runs a filter over packets on both sides, which must agree; gives how many bytes are kept of each."""
    with carriers.emulated() as emulated, carriers.kernel() as kernel:

        def run(
            carrier: str, program: Sequence[tuple[int, int, int, int]], packets: Sequence[bytes]
        ) -> list[int | None]:
            case = ClassicCase(
                carrier=carrier,
                program=tuple(cbpf.Instruction(*i) for i in program),
                packets=tuple(packets),
            )
            truth = differ.run_classic(kernel, case)
            assert not isinstance(truth, int)
            assert differ.run_classic(emulated, case) == truth
            return [None if data is None else len(data) for data in truth]

        yield run


def _ipv6(next_header: int, rest: bytes) -> bytes:
    return b"\x60\0\0\0\0\0" + bytes([next_header, 64]) + bytes(32) + rest


def _ethernet(protocols: str, rest: bytes) -> bytes:
    return bytes(12) + bytes.fromhex(protocols) + rest + bytes(64)


@pytest.mark.requires("netns")
@pytest.mark.parametrize(
    ("frame", "offset"),
    [
        # The first tag goes into the metadata, the second one stays.
        pytest.param(_ethernet("88a8 0000 8100 0000 86dd", _ipv6(6, bytes(12) + b"\x50")), 78, id="two tags"),
        pytest.param(_ethernet("8100 0000 8100 0000 0806", b""), 18, id="ARP behind two tags"),
        pytest.param(_ethernet("8847", b""), 18, id="MPLS"),
        pytest.param(_ethernet("86dd", _ipv6(47, bytes.fromhex("2000 86dd 00000000") + _ipv6(17, b""))), 110, id="GRE"),
        pytest.param(_ethernet("8864", bytes.fromhex("110000000000 0057") + _ipv6(17, b"")), 70, id="PPPoE"),
        pytest.param(_ethernet("892f", bytes(4) + bytes.fromhex("86dd") + _ipv6(17, b"")), 68, id="HSR"),
        pytest.param(
            _ethernet("4305", b"\x40\x0f" + bytes(20) + bytes.fromhex("86dd") + _ipv6(17, b"")), 86, id="B.A.T."
        ),
    ],
)
def test_where_the_payload_starts(classic: Classic, frame: bytes, offset: int) -> None:
    assert classic("packet", _PAY_OFFSET, [frame]) == [offset + 1]


def test_a_test_run_knows_both_kinds_of_ieee_802_3_frames() -> None:
    program = [
        (0x61, 0, 1, 16, 0),  # r0 = ctx->protocol
        (0x95, 0, 0, 0, 0),
    ]
    assert_same(program=program, runs=[(bytes(14) + b"\xff\xff", b""), (bytes(14), b"")])


def test_a_test_run_gives_back_zeroes_for_the_link_header() -> None:
    assert_same(program=[(0xB7, 0, 0, 0, 1), (0x95, 0, 0, 0, 0)], runs=[(b"\x02" * 12 + b"\x12\x34" + bytes(8), b"")])


@pytest.mark.parametrize("field", [4, 12, 16, 24, 28, 44, 164, 176])
def test_half_a_field_is_what_the_kernel_keeps_of_it(field: int) -> None:
    """Fields that the kernel keeps in one or two bytes are not shifted by a load that is not narrower than that."""
    context = bytearray(192)
    context[164:166] = context[176:178] = b"\x12\x34"
    for offset in (0, 2):
        program = [
            (0x69, 0, 1, field + offset, 0),  # r0 = *(u16 *)(ctx + ...)
            (0x95, 0, 0, 0, 0),
        ]
        assert_same(program=program, runs=[(b"\x01" + bytes(11) + b"\x88\xb5", bytes(context))])
