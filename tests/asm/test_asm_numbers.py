"""Filters written as numbers."""

import pytest

import kbpf
from kbpf.asm.listing import listing
from kbpf.asm.numbers import parse_numbers


@pytest.mark.parametrize("style", ["dd", "ddd"])
def test_what_is_listed_is_read_again(style):
    instructions = kbpf.compile("tcp and dst port 7070").instructions
    assert parse_numbers(listing(instructions, style)) == instructions


def test_iptables_commas_are_read():
    assert parse_numbers("2,48 0 0 9,6 0 0 1") == ((48, 0, 0, 9), (6, 0, 0, 1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no count"),
        ("x", "no count"),
        ("2,6 0 0 0", "2 instructions are announced, and 1 follow"),
        ("1,6 0 0", "not four numbers"),
        ("1,6 0 0 z", "not four numbers"),
        ("1,6 256 0 0", "jt 256 does not fit 8 bits"),
        ("{ 0x6, 0, 0, -1 }", "k -1 does not fit"),
    ],
)
def test_what_is_no_filter_is_refused_by_name(text, message):
    with pytest.raises(kbpf.FilterError, match=message):
        parse_numbers(text)
