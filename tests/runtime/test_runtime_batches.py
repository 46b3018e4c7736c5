"""A filter over many packets gives for each what it gives for one, whatever runs it and however they come."""

from __future__ import annotations

import io
import mmap
import tempfile
import threading
from array import array
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import pytest

import kbpf
from kbpf.backend import Engine
from kbpf.errors import EmulationFault
from kbpf.pcapfile import PcapWriter, open_capture
from kbpf.specs import SOCKET_LAYOUTS
from kbpf.testing.generate_packets import frame

pytestmark = [
    pytest.mark.requires("llvmlite"),
    pytest.mark.parametrize("engine", ["interpreter", "jit", "auto"]),
]

EXPRESSIONS = ["tcp and dst port 7070", "ip6 or arp", "less 60", "vlan 3", "ip[0] & 0xf > 5 and udp", "not ip", ""]


def frames(count: int, seed: object = 0) -> list[bytes]:
    rng = Random(f"batches/{seed}")
    return [frame(rng, vlan=True)[: rng.choice((14, 20, 40, 2000))] for _ in range(count)]


def one_by_one(filter: kbpf.Filter, packets: list[bytes], wirelens: list[int] | None = None) -> bytes:
    lengths = wirelens or [len(packet) for packet in packets]
    return bytes(
        filter.run(packet, length, engine="interpreter") > 0 for packet, length in zip(packets, lengths, strict=True)
    )


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_a_list_gives_what_each_packet_gives(engine: Engine, expression: str) -> None:
    filter, packets = kbpf.compile(expression), frames(400)
    expected = one_by_one(filter, packets)
    assert filter.match_all(packets, engine=engine) == expected
    assert filter.match_all(iter(packets), engine=engine) == expected
    assert filter.match_all([bytearray(packet) for packet in packets], engine=engine) == expected  # type: ignore[misc]
    assert filter.select(packets, engine=engine) == [p for p, keep in zip(packets, expected, strict=True) if keep]
    assert bytes(filter.run(packet, engine=engine) > 0 for packet in packets) == expected


def test_lengths_on_the_wire_count(engine: Engine) -> None:
    filter, packets = kbpf.compile("greater 1000"), frames(50)
    wirelens = [1500 if number % 3 else 60 for number in range(50)]
    assert filter.match_all(packets, wirelens, engine=engine) == bytes(int(length > 1000) for length in wirelens)
    # A packet without length keeps nothing.
    assert kbpf.compile("").match_all([b"", b""], [0, 7], engine=engine) == b"\0\1"
    with pytest.raises(ValueError, match="2 lengths for 50 packets"):
        filter.match_all(packets, [1, 2], engine=engine)


@pytest.mark.parametrize("layout", sorted(SOCKET_LAYOUTS))
def test_filters_for_sockets_find_where_their_data_starts(engine: Engine, layout: str) -> None:
    """Ancillary words and offsets from the network header on, for a packet as the socket would hand it over."""
    rng, known = Random(layout), SOCKET_LAYOUTS[layout]
    program = [(0x20, 0, 0, 0xFFFFF000), (0x15, 2, 0, 0x800), (0x30, 0, 0, 0xFFF00006), (0x15, 0, 1, 17), (6, 0, 0, 9),
               (0x30, 0, 0, 1), (0x16, 0, 0, 0)]  # fmt: skip
    filter = kbpf.Filter(program, layout=known)
    packets = [frame(rng)[rng.choice((0, 14)) :] for _ in range(200)] + [b"", b"\x45", b"\x60" + bytes(50)]
    assert filter.match_all(packets, engine=engine) == one_by_one(filter, packets)


def test_spans_of_a_buffer_and_of_a_mapped_file(engine: Engine) -> None:
    filter, packets = kbpf.compile("tcp or udp"), frames(300)
    offsets = [0]
    for packet in packets:
        offsets.append(offsets[-1] + len(packet))
    whole, expected = b"".join(packets), one_by_one(filter, packets)
    together = kbpf.Packets(whole, offsets)
    assert (len(together), together[-1], list(together[2:4])) == (300, packets[-1], packets[2:4])
    assert filter.match_all(together, engine=engine) == expected
    assert filter.select(together, engine=engine) == [p for p, keep in zip(packets, expected, strict=True) if keep]
    apart = kbpf.Packets(bytearray(whole), array("Q", offsets[:-1]), [len(p) for p in packets], [9000] * 300)
    assert kbpf.compile("greater 9000").match_all(apart, engine=engine) == bytes([1]) * 300
    with tempfile.TemporaryFile() as file:
        file.write(whole)
        file.flush()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            read_only = kbpf.Packets(mapped, offsets)
            assert filter.match_all(read_only, engine=engine) == expected
            read_only.buffer.release()


@pytest.mark.parametrize(
    ("offsets", "sizes"),
    [([0, 11], None), ([11], [0]), ([3], [8]), ([1 << 63], [1 << 63]), ([], None), ([0, -1], None), ([5, 3], None)],
)
def test_spans_outside_the_buffer_are_refused(engine: Engine, offsets: list[int], sizes: list[int] | None) -> None:
    with pytest.raises(ValueError, match=r"not inside|end with|from 0 on"):
        kbpf.Packets(bytes(10), offsets, sizes)


def test_an_open_capture_brings_its_lengths(engine: Engine) -> None:
    file = io.BytesIO()
    with PcapWriter(file) as writer:
        for packet in frames(20):
            writer.write(packet[:20], wirelen=max(len(packet), 20))
    filter = kbpf.compile("greater 60")
    expected = bytes(int(max(len(packet), 20) >= 60) for packet in frames(20))
    with open_capture(file.getvalue()) as capture:
        assert filter.match_all(capture, engine=engine) == expected


def test_what_is_no_packet_is_a_type_error(engine: Engine) -> None:
    with pytest.raises(TypeError):
        kbpf.compile("tcp").match_all([b"x", "text"], engine=engine)  # type: ignore[list-item]


def test_a_loop_that_does_not_end_is_an_error(engine: Engine) -> None:
    endless = kbpf.Filter([(0x05, 0, 0, 0xFFFFFFFF), (6, 0, 0, 1)])
    for attempt in (lambda: endless.match_all([b"x" * 20], engine=engine), lambda: endless.run(b"x", engine=engine)):
        with pytest.raises(EmulationFault, match="budget"):
            attempt()
    assert kbpf.compile("").match_all([b"x"], engine=engine) == b"\1"


def test_threads_share_a_filter(engine: Engine) -> None:
    filter, packets = kbpf.compile("tcp and dst port 7070 or vlan"), frames(200)
    expected, wrong = one_by_one(filter, packets), []

    def work() -> None:
        for _ in range(5):
            if filter.match_all(packets, engine=engine) != expected or filter.run(packets[0], engine=engine) < 0:
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_numbers_are_copied(engine: Engine) -> None:
    """A caller may fill its own again, for the next packets."""
    offsets, sizes, wirelens = (array("Q", numbers) for numbers in ([0, 5], [5, 5], [5, 5]))
    packets = kbpf.Packets(b"0123456789", offsets, sizes, wirelens)
    for numbers in (offsets, sizes, wirelens):
        numbers[1] = 1 << 40
    assert list(packets) == [b"01234", b"56789"]
    assert kbpf.Filter([(6, 0, 0, 5)]).match_all(packets, engine=engine) == b"\1\1"


class _Growing(Sequence[int]):
    """Lengths that take their time: meanwhile the caller's list has grown."""

    def __init__(self, lengths: list[int], meanwhile: Callable[[], object]) -> None:
        self._lengths, self._meanwhile = lengths, meanwhile

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: Any) -> Any:
        self._meanwhile()
        return self._lengths[index]


def test_a_list_that_has_grown_gives_no_more_than_was_asked_for(engine: Engine) -> None:
    packets = frames(10)
    more = _Growing([len(packet) for packet in packets], lambda: packets.extend(frames(10)))
    filter = kbpf.compile("ip")
    native = filter.native("jit", 0)
    assert native is not None
    expected = one_by_one(filter, packets[:10])
    assert native.over_list(packets, more) == expected
    assert len(packets) > 10


def test_numbers_that_have_become_fewer_are_an_error(engine: Engine) -> None:
    packets = kbpf.Packets(b"0123456789", [0, 5, 10])
    packets.sizes.pop()
    with pytest.raises((ValueError, IndexError)):
        kbpf.compile("ip").match_all(packets, engine=engine)


@pytest.mark.parametrize("length", [-1, 1 << 64])
def test_lengths_that_are_none_are_refused(engine: Engine, length: int) -> None:
    filter = kbpf.compile("ip")
    with pytest.raises(ValueError, match=r"no sign|from 0 on"):
        filter.run(b"", length, engine=engine)
    with pytest.raises(ValueError, match="from 0 on"):
        filter.match_all([b""], [length], engine=engine)


def test_numbers_are_no_packets_and_items_are_not_bytes(engine: Engine) -> None:
    filter = kbpf.Filter([(0x80, 0, 0, 0), (0x16, 0, 0, 0)])
    with pytest.raises(TypeError):
        filter.match_all([5], engine=engine)  # type: ignore[list-item]
    words = memoryview(bytes(8)).cast("I")
    assert filter.run(words, engine=engine) == 8


def test_what_is_no_engine_is_said(engine: Engine) -> None:
    filter = kbpf.compile("ip")
    filter.match_all([b""], engine=engine)
    for attempt in (filter.run, lambda packet, engine: filter.match_all([packet], engine=engine)):
        with pytest.raises(ValueError, match="engine: 'fast' is none of auto, interpreter, jit"):
            attempt(b"", engine="fast")  # type: ignore[operator]
