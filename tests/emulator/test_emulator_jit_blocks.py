"""Spans of a buffer give what the interpreter gives for each packet, in vectors too, and nothing else is read."""

from __future__ import annotations

import ctypes
import mmap
from array import array
from random import Random

import pytest

import kbpf
from kbpf.emulator.jit import batch
from kbpf.isa import cbpf
from kbpf.specs import SOCKET_LAYOUTS
from kbpf.testing import generate_classic
from kbpf.testing.generate_packets import frame

pytestmark = pytest.mark.requires("llvmlite")

EXPRESSIONS = [
    "tcp and dst port 7070",
    "ip[ip[0] & 0xf] > 5 or ether[0] & 1 != 0",
    "udp portrange 1000-9000 and not ip6",
    "tcp[13] & 7 != 0 or len > 200",
    "vlan and ip6 protochain 17",
    "link[5:4] = 7 or ether[6:4] & 3 = 2",
]


@pytest.fixture(params=["one at a time", "vectors"])
def many(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether loops are compiled in vectors from the first packet on."""
    monkeypatch.setattr(batch, "_MANY", 0 if request.param == "vectors" else 1 << 62)
    monkeypatch.setattr(batch, "gathers", lambda: True)
    return bool(request.param == "vectors")


def frames(rng: Random, count: int) -> list[bytes]:
    """Some are cut, to nothing too."""
    return [frame(rng, vlan=True)[: rng.choice((0, 1, 14, 17, 23, 40, 2000, 2000))] for _ in range(count)]


def at_the_end(packets: list[bytes]) -> tuple[kbpf.Packets, object]:
    """Packets that end where memory does: one byte beyond is a crash. What is returned with them holds the memory."""
    whole = b"".join(packets)
    room = -(-max(len(whole), 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, room + 2 * mmap.PAGESIZE)
    held = (ctypes.c_char * len(pages)).from_buffer(pages)
    protect = ctypes.CDLL(None).mprotect
    protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for page in (0, mmap.PAGESIZE + room):
        assert protect(ctypes.addressof(held) + page, mmap.PAGESIZE, 0) == 0
    end = mmap.PAGESIZE + room
    view = memoryview(pages)[end - len(whole) : end]
    view[:] = whole
    sizes = [len(packet) for packet in packets]
    return kbpf.Packets(view, [sum(sizes[:number]) for number in range(len(sizes))], sizes), (pages, held)


def expected(filter: kbpf.Filter, packets: list[bytes], wirelens: list[int] | None = None) -> bytes:
    lengths = wirelens or [len(packet) for packet in packets]
    runs = zip(packets, lengths, strict=True)
    return bytes(filter.run(packet, length, engine="interpreter") > 0 for packet, length in runs)


@pytest.mark.parametrize("expression", EXPRESSIONS)
@pytest.mark.parametrize("count", [1, 7, 64, 300])
def test_expressions(many: bool, expression: str, count: int) -> None:
    rng = Random(f"blocks/{expression}/{count}")
    filter, packets = kbpf.compile(expression), frames(rng, count)
    spans, _held = at_the_end(packets)
    assert filter.match_all(spans, engine="jit") == expected(filter, packets)
    wirelens = [rng.choice((0, len(packet), len(packet) + 1000)) for packet in packets]
    assert filter.match_all(spans, wirelens, engine="jit") == expected(filter, packets, wirelens)


def test_random_filters(many: bool) -> None:
    """Packets are in no order, the last ones of the buffer in every block but some."""
    rng, in_vectors = Random("blocks"), 0
    for _ in range(40):
        filter = kbpf.Filter(generate_classic.generate(rng))
        packets = frames(rng, 100)
        spans, _held = at_the_end(packets)
        order = [rng.randrange(100 - 20 * (number // 64 % 2)) for number in range(300)]
        mixed = kbpf.Packets(spans.buffer, [spans.offsets[n] for n in order], [spans.sizes[n] for n in order])
        kept = expected(filter, packets)
        assert filter.match_all(mixed, engine="jit") == bytes(kept[number] for number in order)
        in_vectors += "_gathered_spans" in filter._native._loops.__dict__  # type: ignore[union-attr]
    assert (in_vectors > 10) == many


def test_sockets_that_hand_over_what_follows_the_ip_header(many: bool) -> None:
    program = [(0x28, 0, 0, 2), (0x35, 0, 2, 1000), (0x80, 0, 0, 0), (0x16, 0, 0, 0), (6, 0, 0, 0)]
    filter = kbpf.Filter(program, layout=SOCKET_LAYOUTS["udp"])
    rng = Random("transport")
    packets = [frame(rng)[14 : rng.choice((14, 20, 36, 80))] for _ in range(200)]
    spans, _held = at_the_end(packets)
    assert filter.match_all(spans, engine="jit") == expected(filter, packets)


@pytest.mark.parametrize("bad", [0, 63, 64, 130, 199])
def test_a_span_outside_the_buffer_is_found_before_it_is_read(many: bool, bad: int) -> None:
    filter = kbpf.compile("ip")
    packets = frames(Random(bad), 200)
    spans, _held = at_the_end(packets)
    filter.match_all(spans, engine="jit")
    native = filter._native
    assert native
    for offset, size in ((len(spans.buffer), 1), (0, len(spans.buffer) + 1), (1 << 63, 1 << 63), (5, (1 << 64) - 1)):
        offsets, sizes = array("Q", spans.offsets), array("Q", spans.sizes)
        offsets[bad], sizes[bad] = offset, size
        with pytest.raises(IndexError, match=f"packet {bad} is not inside"):
            native.over_spans(spans.buffer, offsets, sizes, None)


def test_classic_arithmetic_in_vectors(many: bool) -> None:
    """Division by what a packet says, which may be 0, and shifts by as much as it says."""
    for op, most in ((cbpf.DIV, 256), (cbpf.MOD, 256), (cbpf.LSH, 40), (cbpf.RSH, 40), (cbpf.MUL, 256)):
        program = [
            (0x30, 0, 0, 1), (cbpf.MISC | cbpf.TAX, 0, 0, 0), (0x20, 0, 0, 2), (cbpf.ALU | op | cbpf.X, 0, 0, 0),
            (cbpf.ALU | cbpf.AND, 0, 0, 0xFF), (cbpf.MISC | cbpf.TAX, 0, 0, 0), (0x30, 0, 0, 6),
            (cbpf.JMP | cbpf.JEQ | cbpf.X, 0, 1, 0), (6, 0, 0, 0), (6, 0, 0, 1),
        ]  # fmt: skip
        filter, rng = kbpf.Filter(program), Random(op)
        packets = [
            bytes([0, rng.randrange(most)]) + rng.randbytes(4) + bytes([rng.choice((0, 1, 9))]) for _ in range(200)
        ]
        spans, _held = at_the_end(packets)
        assert filter.match_all(spans, engine="jit") == expected(filter, packets)
