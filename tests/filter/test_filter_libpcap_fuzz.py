"""Expressions at random against libpcap: refused by both, or the same verdict on every packet.

Packets that end too soon are to fare as with libpcap's unoptimised code; where its optimiser changes that, either
is right. Differences from 1.10 on purpose are in the tables here: most are readings of 1.11.
"""

from __future__ import annotations

import ctypes
import os
import random
import re
import struct

import pytest
from filter_grammar import Grammar
from filter_machine import run
from filter_packets import frames, ipv4, udp

from kbpf.errors import FilterError
from kbpf.filter import compile_filter
from kbpf.specs import FILE_LAYOUTS

FULL = os.environ.get("KBPF_FUZZ") == "full"
DLTS = {dlt: layout for dlt, layout in ((layout.dlt, layout) for layout in FILE_LAYOUTS.values()) if dlt != 127}

# 1.11 refuses these, and metadata in captures.
REFUSED = re.compile("too large|live sockets only|DECnet a")
# 1.11 has these, or gives them another meaning.
NEWER = re.compile(r"\bvxlan\b|byte\s*\S+\s*[&|]|\bip\s+multicast\b")
# libpcap reads scratch memory that it never wrote where the packet is no Geneve, and can loop for ever in protochain.
UNSTEADY = re.compile(r"\b(geneve|protochain)\b")


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint), ("instructions", ctypes.c_void_p)]


class Libpcap:
    """libpcap's compiler and its machine."""

    def __init__(self) -> None:
        self.libpcap = ctypes.CDLL("libpcap.so.0.8")
        self.libpcap.pcap_open_dead.restype = ctypes.c_void_p
        self.libpcap.pcap_geterr.restype = ctypes.c_char_p
        self.libpcap.pcap_geterr.argtypes = [ctypes.c_void_p]
        self.libpcap.bpf_filter.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint]
        self.handles = {dlt: ctypes.c_void_p(self.libpcap.pcap_open_dead(dlt, 262144)) for dlt in DLTS}

    def close(self) -> None:
        for handle in self.handles.values():
            self.libpcap.pcap_close(handle)

    def compile(self, expression: str, dlt: int, optimize: bool) -> tuple[bytes | None, str]:
        """The instructions' bytes, or None and what is wrong."""
        program, handle = _Program(), self.handles[dlt]
        mask = ctypes.c_uint(0xFFFFFFFF)
        text = expression.encode()
        if self.libpcap.pcap_compile(handle, ctypes.byref(program), text, int(optimize), mask) != 0:
            return None, self.libpcap.pcap_geterr(handle).decode()
        code = ctypes.string_at(program.instructions, 8 * program.length)
        self.libpcap.pcap_freecode(ctypes.byref(program))
        return code, ""

    def verdicts(self, code: bytes, packets: list[bytes]) -> list[bool]:
        run = self.libpcap.bpf_filter
        return [run(code, packet, len(packet), len(packet)) != 0 for packet in packets]


@pytest.fixture(scope="module")
def libpcap():
    library = Libpcap()
    yield library
    library.close()


@pytest.fixture(scope="module")
def packets() -> dict[int, list[bytes]]:
    return {dlt: frames(dlt) for dlt in DLTS}


def difference(libpcap: Libpcap, expression: str, dlt: int, packets: list[bytes]) -> str | None:
    """What differs from libpcap, None where nothing does."""
    plain, error = libpcap.compile(expression, dlt, False)
    optimized, refusal = libpcap.compile(expression, dlt, True)
    if optimized is None and "rejects all" not in refusal:
        plain = None
    try:
        program = compile_filter(expression, DLTS[dlt]).instructions
    except FilterError as caught:
        return f"refused: {caught}" if plain is not None and not REFUSED.search(str(caught)) else None
    if NEWER.search(expression):
        return None
    if plain is None:
        return f"accepted; libpcap: {error or refusal}"
    if UNSTEADY.search(expression):
        return None
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    verdicts = zip(
        libpcap.verdicts(code, packets),
        libpcap.verdicts(plain, packets),
        libpcap.verdicts(optimized or plain, packets),
        packets,
        strict=True,
    )
    for ours, theirs, optimizers, packet in verdicts:
        if ours not in (theirs, optimizers):
            return f"{ours} for {packet.hex()}"
    return None


@pytest.mark.fuzz
@pytest.mark.requires("libpcap")
@pytest.mark.parametrize("dlt", DLTS)
def test_random_expressions_mean_what_they_mean_to_libpcap(
    dlt: int, libpcap: Libpcap, packets: dict[int, list[bytes]]
) -> None:
    rng = random.Random(dlt)
    grammar = Grammar(rng)
    recent = ["tcp port 80"]
    for _ in range(20_000 if FULL else 120):
        expression = grammar.expression() if rng.random() < 0.7 else grammar.mutated(rng.choice(recent))
        recent = [*recent[-20:], expression]
        found = difference(libpcap, expression, dlt, packets[dlt])
        assert found is None, f"{expression!r} on {dlt}: {found}"


FOUND = [
    # Only what stands left of an operator is tested for.
    "1 + tcp[0] > 1",
    "link[0] + ip[0] = 1",
    "ip[2:2] - tcp[12] > 40 or ip6",
    "ip[1 + tcp[0]] = 0",
    # X holds one side when the other side, which needs X, is computed.
    "len != ip[0] and tcp[0] = ip[0]",
    "31 * icmp6[0] != ip[0] and tcp[0] = ip[0]",
    # A packet may end before the protocol of an index.
    "not igmp[atalk[0] & 12:4] > 13",
    # Lists of operands after a connective or qualifiers may begin with a negation.
    "host (not 10.0.0.1)",
    "tcp port 80 or (not 443 and 22)",
    "host 10.0.0.1 and ((not not 80))",
    # A destination that ends within the packet.
    "host (1:2:3:4:5:6:7:8 or fe80::1)",
    # What an operator's right side may begin with.
    "len / ip[0] = 1",
    "1 << ip[40] = 1",
    "1 << (20 + 31) = len",
    "len << (20 + 31) = 0",
    "1 << (1 - 2) = ip[0]",
    "decnet dst 5",
    "portrange http",
    "portrange ftp-data-80",
    "net loopback",
]


@pytest.mark.requires("libpcap")
@pytest.mark.parametrize("expression", FOUND)
def test_what_was_found_stays_mended(expression: str, libpcap: Libpcap, packets: dict[int, list[bytes]]) -> None:
    for dlt in (0, 1, 12, 113, 276):
        assert difference(libpcap, expression, dlt, packets[dlt]) is None


def test_broadcasts_are_no_ipv4_multicast() -> None:
    program = compile_filter("ip multicast", FILE_LAYOUTS["RAW"]).instructions
    assert run(program, ipv4(udp(1, 2), 17, destination="239.1.2.3"))
    assert not run(program, ipv4(udp(1, 2), 17, destination="255.255.255.255"))
