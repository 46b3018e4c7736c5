"""Keys and values between bytes and Python."""

import struct

import pytest

from kbpf.runtime.codecs import PerCpu, codec, per_cpu_codec
from kbpf.types import Array, Enum, Float, Int, Member, Pointer, Struct

U8 = Int(name="unsigned char", size=1)
U16 = Int(name="unsigned short", size=2)
U32 = Int(name="unsigned int", size=4)
U64 = Int(name="unsigned long long", size=8)
S32 = Int(name="int", size=4, signed=True)
BOOL = Int(name="_Bool", size=1, boolean=True)

FLOW = Struct(
    name="flow",
    size=16,
    members=(
        Member(name="addr", type=Array(element=U8, count=4), bit_offset=0),
        Member(name="port", type=U16, bit_offset=32),
        Member(name="up", type=BOOL, bit_offset=48),
        Member(name="bytes", type=U64, bit_offset=64),
    ),
)
NESTED = Struct(
    name="nested",
    size=24,
    members=(
        Member(name="flow", type=FLOW, bit_offset=0),
        Member(name="counts", type=Array(element=U32, count=2), bit_offset=128),
    ),
)


@pytest.mark.parametrize(
    ("type", "value", "raw"),
    [
        (U8, 255, b"\xff"),
        (U32, 7, struct.pack("=I", 7)),
        (S32, -7, struct.pack("=i", -7)),
        (U64, 2**64 - 1, b"\xff" * 8),
        (BOOL, True, b"\x01"),
        (Float(name="double", size=8), 1.5, struct.pack("=d", 1.5)),
        (Enum(name="e", size=4, signed=True), -1, b"\xff" * 4),
        (Pointer(), 0x1000, struct.pack("=Q", 0x1000)),
        (Array(element=U8, count=3), b"abc", b"abc"),
        (Array(element=U16, count=2), (1, 2), struct.pack("=HH", 1, 2)),
    ],
)
def test_a_typed_value_goes_to_bytes_and_back(type, value, raw):
    made = codec(type, type.size)
    assert made.encode(value) == raw
    assert made.decode(raw) == value
    assert made.decode_many(raw * 3) == [value] * 3
    assert made.encode(raw) == raw


def test_a_struct_is_a_named_tuple_with_its_padding_skipped():
    made = codec(FLOW, 16)
    raw = struct.pack("=4sH?xQ", b"\x0a\0\0\1", 53, True, 99)
    flow = made.decode(raw)
    assert (flow.addr, flow.port, flow.up, flow.bytes) == (b"\x0a\0\0\1", 53, True, 99)
    assert made.encode(flow) == raw
    assert made.encode({"addr": b"\x0a\0\0\1", "port": 53, "up": 1, "bytes": 99}) == raw
    assert {flow: 1}[made.decode(raw)] == 1


def test_a_struct_within_a_struct_decodes_by_member():
    made = codec(NESTED, 24)
    value = made.decode(made.encode({"flow": (b"\1\2\3\4", 5, False, 6), "counts": (7, 8)}))
    assert value.flow.port == 5
    assert value.counts == (7, 8)
    assert made.decode_many(made.encode(value) * 2) == [value, value]


def test_a_union_and_a_bit_field_stay_bytes():
    union = Struct(name="u", size=4, members=(Member(name="a", type=U32), Member(name="b", type=U16)), union=True)
    bits = Struct(name="b", size=4, members=(Member(name="a", type=U32, bit_size=3),))
    for type in (union, bits):
        assert codec(type, 4).decode(b"abcd") == b"abcd"


@pytest.mark.parametrize(
    ("type", "value"), [(U8, 256), (U32, -1), (U32, "x"), (FLOW, (1, 2)), (FLOW, {"nope": 1}), (None, b"abc")]
)
def test_a_value_that_does_not_fit_is_a_value_error(type, value):
    with pytest.raises(ValueError):
        codec(type, type.size if type else 4).encode(value)


def test_text_that_is_short_ends_in_zeroes_as_in_c():
    char = Int(name="char", size=1, char=True)
    comm = Struct(name="comm", size=8, members=(Member(name="text", type=Array(element=char, count=8)),))
    assert codec(comm, 8).encode((b"bash",)) == b"bash\0\0\0\0"
    for type, value in ((comm, (b"too long a name",)), (Array(element=U8, count=8), b"bash")):
        with pytest.raises(ValueError, match="where 8 are wanted"):
            codec(type, 8).encode(value)


def test_bytes_without_a_type_also_take_an_integer():
    assert codec(None, 4).encode(6) == struct.pack("=I", 6)
    assert codec(None, 4).decode(b"abcd") == b"abcd"


def test_a_type_of_another_size_than_the_map_says_is_not_believed():
    assert codec(U32, 8).decode(b"abcdefgh") == b"abcdefgh"


def test_per_cpu_slots_are_rounded_up_to_eight_bytes():
    made = per_cpu_codec(codec(U32, 4), 3)
    assert made.size == 24
    assert made.encode([1, 2, 3]) == struct.pack("=IxxxxIxxxxIxxxx", 1, 2, 3)
    value = made.decode(made.encode([1, 2, 3]))
    assert isinstance(value, PerCpu)
    assert value == (1, 2, 3)
    assert value.sum() == 6


def test_per_cpu_structs_sum_member_by_member():
    counter = Struct(
        name="counter",
        size=16,
        members=(Member(name="packets", type=U64), Member(name="bytes", type=U64, bit_offset=64)),
    )
    total = PerCpu(codec(counter, 16).decode_many(struct.pack("=4Q", 1, 100, 2, 200))).sum()
    assert (total.packets, total.bytes) == (3, 300)


def test_per_cpu_bytes_have_no_sum():
    with pytest.raises(TypeError):
        PerCpu([b"a", b"b"]).sum()


def test_a_per_cpu_value_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="sequence of 2"):
        per_cpu_codec(codec(U32, 4), 2).encode([1])


def test_a_struct_named_by_a_python_keyword_decodes():
    keyword = Struct(name="class", size=4, members=(Member(name="if", type=U32),))
    assert codec(keyword, 4).decode(struct.pack("=I", 7)) == (7,)
