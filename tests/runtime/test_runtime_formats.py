"""Layouts said in Python: each is C's, and goes to bytes and back."""

import ctypes
import struct
from dataclasses import dataclass
from typing import Annotated

import pytest

from kbpf.runtime.codecs import codec
from kbpf.runtime.formats import codec_for, type_for
from kbpf.types import Int, Member, Struct


class CEvent(ctypes.Structure):
    _fields_ = (
        ("pid", ctypes.c_uint32),
        ("time", ctypes.c_uint64),
        ("comm", ctypes.c_char * 16),
        ("counts", ctypes.c_uint16 * 3),
    )


@dataclass
class Event:
    pid: Annotated[int, "I"]
    time: Annotated[int, "Q"]
    comm: Annotated[bytes, "16s"]
    counts: Annotated[tuple[int, ...], "3H"]


@dataclass(frozen=True)
class Flow:
    host: Annotated[int, "I"]
    port: Annotated[int, "H"]


@dataclass
class Seen:
    open: bool
    flow: Flow
    rate: float
    times: Annotated[tuple[int, ...], "2q"]


def test_a_dataclass_is_laid_out_as_c_lays_it_out():
    assert type_for(Event).size == ctypes.sizeof(CEvent) == 40
    offsets = [member.bit_offset // 8 for member in type_for(Event).members]
    assert offsets == [getattr(CEvent, name).offset for name, _ in CEvent._fields_]
    assert offsets == [member.bit_offset // 8 for member in type_for(CEvent).members]


def test_a_dataclass_goes_there_and_back():
    made = codec_for(Event)
    event = Event(7, 2**63, b"init".ljust(16, b"\0"), (1, 2, 3))
    raw = bytes(CEvent(7, 2**63, b"init", (ctypes.c_uint16 * 3)(1, 2, 3)))
    assert made.encode(event) == raw
    assert made.decode(raw) == event
    assert made.decode_many(raw * 2) == [event, event]
    seen = Seen(True, Flow(9, 53), 0.5, (-1, 2))
    assert codec_for(Seen).decode(codec_for(Seen).encode(seen)) == seen
    flat = codec_for(Flow)
    assert flat.decode_many(flat.encode(Flow(1, 2)) + flat.encode((3, 4))) == [Flow(1, 2), Flow(3, 4)]


def test_a_format_gives_tuples_and_one_field_its_value():
    assert codec_for("=IQ").decode_many(struct.pack("=IQIQ", 1, 2, 3, 4)) == [(1, 2), (3, 4)]
    assert codec_for("=IQ").encode((1, 2)) == codec_for(struct.Struct("=IQ")).encode([1, 2]) == struct.pack("=IQ", 1, 2)
    one = codec_for(">H")
    assert one.decode(b"\1\2") == 0x0102
    assert one.decode_many(b"\1\2\3\4") == [0x0102, 0x0304]
    assert one.encode(0x0102) == b"\1\2"
    assert codec_for("4s").encode(b"ab") == b"ab\0\0"


def test_bytes_that_only_align_are_no_difference():
    assert codec_for("QI", 16).decode(struct.pack("QIxxxx", 1, 2)) == (1, 2)
    for spec in ("=QI", "IQI", "III", Event, CEvent, ctypes.c_uint32):
        with pytest.raises(ValueError, match="where there are 16"):
            codec_for(spec, 16)


def test_ctypes_give_instances_and_simple_ones_values():
    event = codec_for(CEvent).decode(bytes(CEvent(1, 2, b"x")))
    assert (event.pid, event.time, event.comm) == (1, 2, b"x")
    assert codec_for(CEvent).encode(event) == bytes(event)
    assert codec_for(CEvent).encode((1, 2, b"x")) == bytes(event)
    assert codec_for(ctypes.c_uint32).decode_many(struct.pack("=II", 5, 6)) == [5, 6]
    with pytest.raises(ValueError, match="does not fit c_u"):
        codec_for(ctypes.c_uint32).encode(1 << 32)


def test_types_of_btf_and_codecs_are_taken_as_they_are():
    word = Int(name="u32", size=4)
    pair = Struct(
        name="pair", size=8, members=(Member(name="a", type=word), Member(name="b", type=word, bit_offset=32))
    )
    assert codec_for(pair).decode(struct.pack("=II", 1, 2)) == (1, 2)
    made = codec(word, 4)
    assert codec_for(made) is made
    assert codec_for(None, 3).decode(b"abc") == b"abc"


def test_what_says_no_layout_is_refused():
    @dataclass
    class Unsized:
        pid: int

    with pytest.raises(TypeError, match=r"Unsized.pid does not say how many bytes"):
        codec_for(Unsized)
    for spec in (int, object(), dict, lambda data: data):
        with pytest.raises(TypeError, match="is no format"):
            codec_for(spec)
    with pytest.raises(ValueError, match="no format of struct"):
        codec_for("y")
    with pytest.raises(TypeError):
        codec_for(None)
