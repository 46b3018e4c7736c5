"""The grammar, its quirks, and bad input."""

from __future__ import annotations

import contextlib
import random

import pytest

from kbpf.errors import FilterError, FilterSyntaxError
from kbpf.filter import compile_filter, syntax
from kbpf.filter.lexer import tokens
from kbpf.filter.parser import parse


def same(left: str, right: str) -> bool:
    return compile_filter(left, names="numeric").instructions == compile_filter(right, names="numeric").instructions


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("port 80 or 443", "port 80 or port 443"),
        ("host 10.0.0.1 and not 10.0.0.2", "host 10.0.0.1 and not host 10.0.0.2"),
        ("tcp port 80 or (not 443 and 22)", "tcp port 80 or (not tcp port 443 and tcp port 22)"),
        ("host (not (10.0.0.1 or 10.0.0.2))", "not (host 10.0.0.1 or host 10.0.0.2)"),
        (
            "tcp dst port (80 or 443 or (8080 or 81))",
            "tcp dst port 80 or tcp dst port 443 or tcp dst port 8080 or tcp dst port 81",
        ),
        ("tcp or udp and ip", "(tcp or udp) and ip"),
        ("!tcp&&udp||arp", "not tcp and udp or arp"),
        ("not not tcp", "tcp"),
        ("ether proto \\arp", "arp"),
        ("net 10", "net 10.0.0.0/8"),
        ("host 0x0a000001", "host 10.0.0.1"),
        ("host 012", "host 10"),
        ("ip[0] & 0xf != 5", "(ip[0] & 0xf) != 5"),
        ("1 + 2 * 3 - 4 = len", "len = 3"),
        ("len = 2 * 5 % 3", "len = 2 * (5 % 3)"),
        ("len = 10 % 3 + 1", "len = 10 % (3 + 1)"),
        ("len = 1 << 2 + 1", "len = 8"),
        ("len < 5 - -1", "len < 6"),
        ("tcp[tcpflags] & (tcp-syn|tcp-ack) = tcp-syn", "tcp[13] & 18 = 2"),
        ("ether host aa0004001d04", "ether host aa:0:4:0:1d:4"),
        ("ether host aa00.0400.1d04", "ether host AA-0-4-0-1D-4"),
        ("net 192.168 mask 255.255", "net 192.168.0.0/16"),
    ],
)
def test_two_ways_to_say_the_same(short: str, long: str) -> None:
    assert same(short, long)


@pytest.mark.parametrize(
    ("expression", "position"),
    [
        ("tcp and dst port", 16),
        ("tcp and", 7),
        ("foo", 0),
        ("80", 2),
        ("dst proto 17", 4),
        ("host ((not 1.2.3.4))", 11),
        ("tcp port 80 and ((not not 90))", 28),
        ("1 / ip[0] = 5", 2),
        ("1 << ip[40] = 5", 2),
        ("(port 80", 8),
        ("port 80)", 7),
        ("ip[0", 4),
        ("ip[0:3] = 1", 0),
        ("host 1.2.3.4 5.6.7.8", 13),
        ("(tcp port 80) and 90", 20),
        ("tcp and 90", 10),
        ("len = 4294967296", 6),
        ("len = 09", 6),
        ("port nosuchport", 5),
        ("port 65536", 5),
        ("host 1.2.3.256", 5),
        ("net 10.0.0.1/8", 4),
        ("net fe80::1/64", 4),
        ("ether host ab:cd:ef:", 11),
        ("tcp \x00", 4),
        ("tcp host 1.2.3.4", 9),
        ("wlan addr1 1:2:3:4:5:6", 11),
        ("vpi 1", 0),
        ("len / 0 = 1", 4),
    ],
)
def test_refusals_point_at_the_token(expression: str, position: int) -> None:
    with pytest.raises(FilterSyntaxError) as caught:
        compile_filter(expression, names="numeric")
    assert caught.value.position == position
    assert str(caught.value).splitlines()[-1].index("^") == 2 + min(position, 60)


def test_an_empty_expression_accepts_everything() -> None:
    assert parse(" \n") is None
    assert [i.k for i in compile_filter("").instructions] == [262144]


def test_a_bare_number_after_a_parenthesis_takes_what_stood_before_it() -> None:
    tree = parse("host 10.0.0.1 and (tcp or udp) or 10.0.0.2")
    assert isinstance(tree, syntax.Some)
    last = tree.terms[1]
    assert isinstance(last, syntax.Match) and last.qualifiers.type == "host"


def test_ipv6_and_mac_addresses_are_told_from_offsets() -> None:
    assert [t.kind for t in tokens("::1 fe80::1:2 1:2:3:4:5:6 1:2:3:4:5:6:7:8 ip[0:2]")][:-1] == [
        *("ipv6", "ipv6", "mac", "ipv6"),
        *("protocol", "[", "number", ":", "number", "]"),
    ]


DEEP = [
    "(" * 10_000 + "tcp" + ")" * 10_000,
    "not " * 10_000 + "tcp",
    "(" * 500_000,
    "tcp[" * 250_000,
    "ip[" * 3000 + "0" + "]" * 3000 + "=1",
    "1%" * 400_000 + "1=2",
    "-" * 1_000_000 + "1=2",
    "1" * 1_000_000,
    "a:" * 500_000,
    "ip[0]+" * 100_000 + "1=2",
    "ip[0]+(" * 5_000 + "1" + ")" * 5_000 + "=2",
    "\xff" * 1_000_000,
    "(tcp or " * 9_000 + "udp" + ")" * 9_000,
]


@pytest.mark.parametrize("expression", DEEP, ids=range(len(DEEP)))
@pytest.mark.timeout(60)
def test_long_and_deep_text_is_answered(expression: str) -> None:
    # Within a second on an idle machine; what the limit of the test would end is a hang.
    with contextlib.suppress(FilterError):
        compile_filter(expression, names="numeric")


WORDS = [
    "tcp",
    "udp",
    "ip",
    "ip6",
    "arp",
    "and",
    "or",
    "not",
    "(",
    ")",
    "host",
    "net",
    "port",
    "portrange",
    "src",
    "dst",
    "80",
    "443",
    "1.2.3.4",
    "10.0.0.0",
    "/",
    "8",
    "fe80::1",
    "ether",
    "[",
    "]",
    ":",
    "=",
    "!=",
    "<",
    ">",
    "+",
    "-",
    "*",
    "/",
    "%",
    "&",
    "|",
    "^",
    "<<",
    ">>",
    "len",
    "vlan",
    "mpls",
    "pppoes",
    "geneve",
    "vxlan",
    "less",
    "greater",
    "byte",
    "proto",
    "protochain",
    "\\tcp",
    "1:2:3:4:5:6",
    "broadcast",
    "multicast",
    "llc",
    "iso",
    "isis",
    "decnet",
    "1.5",
    "gateway",
    "inbound",
    "ifindex",
    "mask",
    "255.0.0.0",
    "type",
    "mgt",
    "subtype",
    "beacon",
    "icmp[icmptype]",
    "tcp[13]",
    "$5",
    "x",
]


def test_random_words_give_a_filter_or_a_filter_error() -> None:
    rng = random.Random(20)
    accepted = 0
    for _ in range(6000):
        text = " ".join(rng.choice(WORDS) for _ in range(rng.randrange(1, 9)))
        try:
            compile_filter(text, names="numeric")
            accepted += 1
        except FilterError:
            pass
    assert accepted > 100


def test_random_characters_give_a_filter_or_a_filter_error() -> None:
    rng = random.Random(21)
    for _ in range(3000):
        text = "".join(
            chr(rng.choice((rng.randrange(32, 127), rng.randrange(0, 1000)))) for _ in range(rng.randrange(30))
        )
        try:
            compile_filter(text, names="numeric")
        except FilterError as error:
            str(error)
