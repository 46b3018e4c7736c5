"""``protochain``: a loop for captures, unrolled where Linux has to take it."""

from __future__ import annotations

import itertools
import random
import struct

import filter_packets
import pytest
from filter_machine import libpcap, run

import kbpf
from kbpf.errors import FilterError
from kbpf.filter import compile_filter
from kbpf.isa import cbpf
from kbpf.specs import FILE_LAYOUTS, SOCKET_LAYOUTS

HOP, TCP, UDP, ROUTING, FRAGMENT, AH, NONE, OPTIONS = 0, 6, 17, 43, 44, 51, 59, 60


def chained(*kinds: int, rng: random.Random | None = None) -> bytes:
    """An Ethernet frame with IPv6 and a header of each of these protocols, the last one's 8 bytes long."""
    headers = b""
    for kind, following in itertools.pairwise(kinds):
        units = rng.randrange(4) if rng else 0
        size = 4 * (units + 2) if kind == AH else 8 * (units + 1)
        headers += struct.pack("!BB", following, units).ljust(size, b"\6")
    return b"\2" * 12 + b"\x86\xdd" + filter_packets.ipv6(headers + bytes(8), kinds[0])


@pytest.mark.parametrize("expression", ["ip6 protochain 17", "protochain 17", "vlan or ip6 protochain 17"])
def test_a_chain_of_any_length_is_walked(expression: str) -> None:
    flt = kbpf.compile(expression, names="numeric")
    for length in (0, 1, 6, 7, 40):
        found, missing = (chained(*[OPTIONS] * length, end) for end in (UDP, TCP))
        if "vlan" in expression:
            found, missing = (b"\2" * 12 + b"\x81\0\0\1" + frame[12:] for frame in (found, missing))
            assert flt.run(missing)
        else:
            assert not flt.run(missing)
        assert flt.run(found)


@pytest.mark.requires("libpcap")
@pytest.mark.parametrize("number", [HOP, TCP, UDP, ROUTING, FRAGMENT, AH, NONE, OPTIONS])
def test_every_chain_gets_libpcaps_verdict(number: int) -> None:
    rng = random.Random(number)
    for expression in (f"ip6 protochain {number}", f"protochain {number}", f"not ip6 protochain {number} and ip6"):
        program = compile_filter(expression).instructions
        reference = libpcap(expression, 1)
        assert reference is not None
        for _ in range(150):
            # Behind an authentication header libpcap goes on at a wrong place.
            kinds = [rng.choice((HOP, ROUTING, FRAGMENT, OPTIONS)) for _ in range(rng.randrange(9))]
            frame = chained(*kinds, rng.choice((TCP, UDP, NONE, 58)), rng=rng)
            frame = frame[: rng.choice((len(frame), rng.randrange(14, len(frame) + 1)))]
            assert run(program, frame) == run(reference, frame), (expression, frame.hex())
        for frame in filter_packets.frames(1):
            assert run(program, frame) == run(reference, frame), (expression, frame.hex())


def test_authentication_headers_are_as_long_as_they_say() -> None:
    flt = kbpf.compile("protochain 17", names="numeric")
    for seed in range(20):
        rng = random.Random(seed)
        assert flt.run(chained(AH, OPTIONS, AH, AH, UDP, rng=rng))
        assert not flt.run(chained(AH, OPTIONS, AH, AH, TCP, rng=rng))
    ahs = struct.pack("!BB", AH, 4).ljust(24) + struct.pack("!BB", UDP, 1).ljust(12) + bytes(8)
    frame = b"\2" * 12 + b"\x08\0" + filter_packets.ipv4(ahs, AH)
    assert flt.run(frame) and not flt.run(frame.replace(b"\x11\1", b"\6\1"))


@pytest.mark.parametrize("dlt", [0, 1, 12, 113, 276])
def test_optimizing_changes_no_verdict_of_a_chain(dlt: int) -> None:
    layout = next(layout for layout in FILE_LAYOUTS.values() if layout.dlt == dlt)
    for expression in ("protochain 17", "ip protochain 51 or ip6 protochain 58", "protochain 6 and not protochain 17"):
        plain = compile_filter(expression, layout, optimize=False).instructions
        better = compile_filter(expression, layout).instructions
        for frame in filter_packets.frames(dlt):
            assert run(better, frame) == run(plain, frame)


def test_linux_refuses_loops_and_says_so() -> None:
    flt = kbpf.compile("ip6 protochain 17")
    with pytest.raises(FilterError, match="Linux refuses filters with loops"):
        flt.check()
    cbpf.check(flt.instructions, loops=True)


@pytest.mark.parametrize("name", ["packet_ethernet", "packet", "packet_ip", "raw4"])
def test_sockets_get_the_walk_without_a_loop(name: str) -> None:
    program = compile_filter("protochain 17", SOCKET_LAYOUTS[name]).instructions
    cbpf.check(program)


def test_the_explanation_goes_back_and_ends() -> None:
    flt = kbpf.compile("ip6 protochain 17")
    explained = flt.explain()
    assert "go back to (" in explained.decisions()
    frame = chained(*[OPTIONS] * 3, UDP)
    path = flt.path(frame)
    assert path.kept == len(frame)
    assert len(path.instructions) > len(set(path.instructions))


def test_scratch_words_are_checked_through_loops() -> None:
    back = 0xFFFFFFFF
    # Entered in the middle: M[0] is read before it is written.
    program = [
        cbpf.stmt(cbpf.JMP | cbpf.JA, 2),
        cbpf.stmt(cbpf.LD | cbpf.MEM, 0),
        cbpf.stmt(cbpf.RET | cbpf.A),
        cbpf.stmt(cbpf.JMP | cbpf.JA, back - 2),
        cbpf.stmt(cbpf.RET | cbpf.K, 0),
    ]
    with pytest.raises(FilterError, match="before it is written"):
        cbpf.check(program, loops=True)
    program[0:1] = [cbpf.stmt(cbpf.ST, 0), cbpf.stmt(cbpf.JMP | cbpf.JA, 2)]
    cbpf.check(program, loops=True)
    with pytest.raises(FilterError, match="out of the program"):
        cbpf.check([cbpf.stmt(cbpf.JMP | cbpf.JA, back - 1), cbpf.stmt(cbpf.RET | cbpf.K, 0)], loops=True)
