"""BTF that is written is read again as it was, and the kernel takes it."""

from __future__ import annotations

import pytest

from kbpf.elf.btf import Btf
from kbpf.elf.btf_writer import btf_of
from kbpf.kernel.backend import kernel_backend
from kbpf.types import Array, Enum, Float, Int, Member, Pointer, Struct, Type

U8, U32 = Int(name="u8", size=1), Int(name="u32", size=4)
INNER = Struct(name="inner", size=8, members=(Member(name="a", type=U32), Member(name="b", type=U32, bit_offset=32)))
TYPES: list[Type] = [
    Int(name="long", size=8, signed=True),
    Int(name="__int128", size=16, signed=True),
    Int(name="char", size=1, char=True),
    Int(name="_Bool", size=1, boolean=True),
    Float(name="double", size=8),
    Pointer(),
    Array(element=U8, count=16),
    Array(element=Array(element=INNER, count=2), count=3),
    Enum(name="color", size=4, values=(("RED", 0), ("BLUE", 4_000_000_000))),
    Enum(name="side", size=4, signed=True, values=(("LEFT", -1), ("RIGHT", 1))),
    Enum(name="wide", size=8, values=(("LARGE", 1 << 40),)),
    Enum(name="deep", size=8, signed=True, values=(("LOW", -(1 << 40)),)),
    INNER,
    Struct(name="either", size=8, members=(Member(name="one", type=INNER), Member(name="all", type=U8)), union=True),
    Struct(
        name="bits",
        size=4,
        members=(
            Member(name="low", type=U32, bit_size=3),
            Member(name="high", type=U32, bit_offset=3, bit_size=5),
            Member(name="rest", type=U8, bit_offset=8, bit_size=8),
        ),
    ),
    Struct(
        name="outer",
        size=24,
        members=(
            Member(name="", type=INNER),
            Member(name="again", type=INNER, bit_offset=64),
            Member(name="address", type=Pointer(), bit_offset=128),
        ),
    ),
]


@pytest.mark.parametrize("type", TYPES, ids=lambda type: getattr(type, "name", "") or type.__class__.__name__)
def test_what_is_written_is_read_again(type: Type) -> None:
    blob, [number] = btf_of(type)
    assert Btf(blob).resolve(number) == type


def test_types_that_are_there_are_not_written_again() -> None:
    blob, numbers = btf_of(INNER, U32, INNER, Array(element=U32, count=4))
    assert numbers[0] == numbers[2] and numbers[1] == 1
    assert [Btf(blob).resolve(number) for number in numbers] == [INNER, U32, INNER, Array(element=U32, count=4)]


@pytest.mark.requires("kernel")
def test_the_kernel_takes_it() -> None:
    kernel = kernel_backend()
    blob, _ = btf_of(*TYPES)
    fd = kernel.btf_load(blob)
    try:
        assert kernel.btf_info(fd).size == len(blob)
        assert kernel.btf_data(fd) == blob
    finally:
        kernel.close(fd)
