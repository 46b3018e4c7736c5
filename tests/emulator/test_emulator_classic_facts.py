"""What classic instructions do at run time, one fact a case, on a UNIX socket of the kernel and in the emulator."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kbpf.isa import cbpf
from kbpf.testing import carriers
from kbpf.testing.carriers import Carrier

pytestmark = pytest.mark.requires("kernel")


def op(code: int, jt: int = 0, jf: int = 0, k: int = 0) -> cbpf.Instruction:
    return cbpf.Instruction(code, jt, jf, k)


PACKET = bytes(range(0xA0, 0xB0))
KEEP, RETURN_A = op(0x06, 0, 0, 0xFFFFFFFF), op(0x16)
NET, LL = cbpf.NET_OFF, cbpf.LL_OFF


@pytest.fixture(scope="module")
def unix() -> Iterator[tuple[Carrier, Carrier]]:
    with carriers.kernel(("unix",)) as kernel, carriers.emulated() as emulated:
        yield kernel["unix"], emulated["unix"]


def showing(*program: cbpf.Instruction, shift: int = 0) -> list[cbpf.Instruction]:
    """Let four bits of A be the length that is kept, less one."""
    return [*program, op(0x74, 0, 0, shift), op(0x54, 0, 0, 15), op(0x04, 0, 0, 1), RETURN_A]


def ldx(value: int) -> cbpf.Instruction:
    return op(0x01, 0, 0, value & 0xFFFFFFFF)


def ld(value: int) -> cbpf.Instruction:
    return op(0x00, 0, 0, value & 0xFFFFFFFF)


#: What leaves a number in A, or ends the filter.
COMPUTED: dict[str, list[cbpf.Instruction]] = {
    "A is 0 at first": [],
    "X is 0 at first": [op(0x87)],
    **{f"{size} bytes at {k:#x}": [op(code, 0, 0, k & 0xFFFFFFFF)]
       for size, code in ((4, 0x20), (2, 0x28), (1, 0x30))
       for k in (0, 1, 11, 12, 13, 14, 15, 16, 0x7FFFFFFF, 0x80000000, NET, NET + 12, NET + 13, NET - 1, LL, LL - 1)},
    **{f"indirect {x:#x} + {k:#x}": [ldx(x), op(0x40, 0, 0, k & 0xFFFFFFFF)]
       for x, k in ((0, 12), (0, 13), (-4, 8), (-8, 4), (NET, 0), (9, NET), (3, NET), (4, 0xFFFFFFFF),
                    (0x1008, cbpf.AD_OFF), (0, cbpf.AD_OFF), (4, cbpf.AD_OFF))},
    **{f"4 * ([{k:#x}] & 15)": [ld(77), op(0xB1, 0, 0, k), op(0x87)] for k in (0, 5, 15, 16, NET, NET + 16)},
    "4 * ([0] & 15) leaves A": [ld(77), op(0xB1, 0, 0, 1)],
    **{f"{code:#x} of {a:#x} by X = {x:#x}": [ldx(x), ld(a), op(code)]
       for code in (0x0C, 0x1C, 0x2C, 0x3C, 0x4C, 0x5C, 0x6C, 0x7C, 0x9C, 0xAC)
       for a in (0, 3, 0xFFFFFFFF, 0x80000001) for x in (0, 1, 2, 31, 32, 33, 0xFFFFFFFF)},
    **{f"{code:#x} of {a:#x} by {k:#x}": [ld(a), op(code, 0, 0, k)]
       for code in (0x04, 0x14, 0x24, 0x34, 0x44, 0x54, 0x94, 0xA4)
       for a in (3, 0xFFFFFFFF) for k in (1, 2, 7, 0xFFFFFFFF)},
    **{f"negated {a:#x}": [ld(a), op(0x84, 0, 0, 5)] for a in (0, 1, 0x80000000)},
    "length": [op(0x80)],
    "length in X": [op(0x81), op(0x87)],
    "exclusive or by an ancillary word": [ldx(0xFF), ld(0xF0F0), op(0x20, 0, 0, cbpf.AD_OFF + 40)],
    **{f"ancillary word {word.name}": [ld(4), ldx(2), op(0x20, 0, 0, cbpf.AD_OFF + offset)]
       for offset, word in cbpf.ANCILLARY.items() if word.name not in ("cpu", "random", "alu_xor_x")},
}  # fmt: skip


@pytest.mark.parametrize("name", COMPUTED)
def test_a_number_in_a(unix: tuple[Carrier, Carrier], name: str) -> None:
    for shift in range(0, 32, 4):
        program = cbpf.encode(showing(*COMPUTED[name], shift=shift))
        kept = []
        for carrier in unix:
            carrier.attach(program)
            kept.append(carrier.deliver(PACKET))
        assert kept[1] == kept[0], shift


@pytest.mark.parametrize("code", (0x15, 0x25, 0x35, 0x45, 0x1D, 0x2D, 0x3D, 0x4D))
def test_conditions(unix: tuple[Carrier, Carrier], code: int) -> None:
    values = (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
    for a in values:
        for b in values:
            program = cbpf.encode([ldx(b), ld(a), op(code, 0, 1, b), op(0x06, 0, 0, 1), op(0x06, 0, 0, 2)])
            kept = []
            for carrier in unix:
                carrier.attach(program)
                kept.append(carrier.deliver(PACKET))
            assert kept[1] == kept[0], (hex(a), hex(b))


@pytest.mark.parametrize("value", (0, 1, 15, 16, 17, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF))
def test_the_value_returned_is_unsigned(unix: tuple[Carrier, Carrier], value: int) -> None:
    for program in ([op(0x06, 0, 0, value)], [ld(value), RETURN_A]):
        kept = []
        for carrier in unix:
            carrier.attach(cbpf.encode(program))
            kept.append(carrier.deliver(PACKET))
        assert kept == [PACKET[:value] if value else None] * 2


def test_a_division_by_zero_drops_whatever_follows(unix: tuple[Carrier, Carrier]) -> None:
    for code in (0x3C, 0x9C):
        for carrier in unix:
            carrier.attach(cbpf.encode([ldx(0), ld(5), op(code), KEEP]))
            assert carrier.deliver(PACKET) is None
