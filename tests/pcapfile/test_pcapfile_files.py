"""Capture files written by others are read as they are read by others, and ours are read by others."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kbpf.errors import KbpfError
from kbpf.pcapfile import CaptureError, PcapWriter, Record, dlt_of_linktype, linktype_of_dlt, open_capture

PACKETS = [(1_700_000_000_123_456_789, b"\x02" * 60, 60), (1_700_000_001_000_000_001, b"abc", 1500), (0, b"", 9)]


def pcap(order: str = "<", magic: int = 0xA1B2C3D4, linktype: int = 1) -> bytes:
    parts = [struct.pack(order + "IHHiIII", magic, 2, 4, 0, 0, 262144, linktype)]
    ticks = 1 if magic == 0xA1B23C4D else 1000
    extra = bytes(8) if magic == 0xA1B2CD34 else b""
    for stamp, data, wirelen in PACKETS:
        seconds, fraction = divmod(stamp, 10**9)
        parts.append(struct.pack(order + "IIII", seconds, fraction // ticks, len(data), wirelen) + extra + data)
    return b"".join(parts)


def block(order: str, kind: int, body: bytes) -> bytes:
    body += bytes(-len(body) % 4)
    total = struct.pack(order + "I", len(body) + 12)
    return struct.pack(order + "I", kind) + total + body + total


def section(order: str) -> bytes:
    return block(order, 0x0A0D0D0A, struct.pack(order + "IHHq", 0x1A2B3C4D, 1, 0, -1))


def interface(order: str, linktype: int = 1, snaplen: int = 0, options: bytes = b"") -> bytes:
    return block(order, 1, struct.pack(order + "HHI", linktype, 0, snaplen) + options)


def option(order: str, code: int, value: bytes) -> bytes:
    return struct.pack(order + "HH", code, len(value)) + value + bytes(-len(value) % 4)


def enhanced(order: str, index: int, ticks: int, data: bytes, wirelen: int) -> bytes:
    head = struct.pack(order + "IIIII", index, ticks >> 32, ticks & 0xFFFFFFFF, len(data), wirelen)
    return block(order, 6, head + data)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(("magic", "digits"), [(0xA1B2C3D4, 1000), (0xA1B23C4D, 1), (0xA1B2CD34, 1000)])
def test_pcap_is_read_in_both_byte_orders_and_resolutions(order: str, magic: int, digits: int) -> None:
    with open_capture(pcap(order, magic, 113)) as capture:
        records = list(capture)
    assert capture.format == "pcap"
    assert records == [Record(s // digits * digits, d, w, 113) for s, d, w in PACKETS]


@pytest.mark.parametrize("order", "<>")
def test_pcapng_interfaces_have_their_own_link_type_and_resolution(order: str) -> None:
    data = (
        section(order)
        + interface(order, 1, 0, option(order, 2, b"eth0") + option(order, 9, b"\x09") + option(order, 0, b""))
        + interface(order, 101, 4, option(order, 9, b"\x94") + option(order, 14, struct.pack(order + "q", 100)))
        + enhanced(order, 0, PACKETS[0][0], b"first", 5)
        + block(order, 0xBAD, b"unknown blocks are skipped")
        + enhanced(order, 1, 3 << 19, b"wxyz", 99)
        + block(order, 2, struct.pack(order + "HHIIII", 1, 0, 0, 1 << 20, 2, 3) + b"ob")
    )
    capture = open_capture(data)
    assert list(capture) == [
        Record(PACKETS[0][0], b"first", 5, 1, 0),
        Record(101_500_000_000, b"wxyz", 99, 12, 1),
        Record(101_000_000_000, b"ob", 3, 12, 1),
    ]
    assert [i.name for i in capture.interfaces] == ["eth0", ""]


def test_sections_may_differ_in_byte_order_and_begin_their_interfaces_anew() -> None:
    data = b"".join(section(o) + interface(o, t) + enhanced(o, 0, 1, b"x", 1) for o, t in (("<", 1), (">", 113)))
    assert [(r.dlt, r.interface, r.timestamp_ns) for r in open_capture(data)] == [(1, 0, 1000), (113, 1, 1000)]


def test_simple_packets_are_cut_to_the_first_interface_s_snaplen() -> None:
    data = section("<") + interface("<", 1, 5) + block("<", 3, struct.pack("<I", 70) + b"abcde")
    assert list(open_capture(data)) == [Record(0, b"abcde", 70, 1, 0)]


def test_raw_ip_is_101_in_files_and_12_in_programs() -> None:
    assert (dlt_of_linktype(101), linktype_of_dlt(12), dlt_of_linktype(1), linktype_of_dlt(276)) == (12, 101, 1, 276)
    out = io.BytesIO()
    PcapWriter(out, 12).write(b"E")
    assert struct.unpack_from("=I", out.getvalue(), 20) == (101,)
    assert [r.dlt for r in open_capture(out.getvalue())] == [12]


@pytest.mark.parametrize("ticks", [10**6, 10**9])
def test_what_is_written_reads_back(tmp_path: Path, ticks: int) -> None:
    path = tmp_path / "x.pcap"
    with PcapWriter(path, ticks=ticks, snaplen=20) as writer:
        for stamp, data, wirelen in PACKETS:
            writer.write_record(Record(stamp, data, wirelen))
        with pytest.raises(CaptureError, match="link type"):
            writer.write_record(Record(0, b"", 0, dlt=12))
        with pytest.raises(CaptureError, match="room"):
            writer.write(b"", timestamp_ns=-1)
    step = 10**9 // ticks
    with open_capture(path) as capture:
        assert list(capture) == [Record(s // step * step, d[:20], w) for s, d, w in PACKETS]


def test_file_objects_stay_open_and_may_read_short() -> None:
    class Trickle(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(min(size or 0, 3))

    file = Trickle(pcap())
    with open_capture(file) as capture:
        assert len(list(capture)) == 3
    assert not file.closed


FILES = {
    "pcap": pcap(),
    "pcapng": section(">") + interface(">") + b"".join(enhanced(">", 0, 7, d, w) for _, d, w in PACKETS),
}


@pytest.mark.parametrize("name", FILES)
def test_a_cut_off_file_yields_what_is_whole_then_says_where_it_ends(name: str) -> None:
    whole = FILES[name]
    records = list(open_capture(whole))
    seen = set()
    for size in range(len(whole)):
        got = []
        try:
            got.extend(open_capture(whole[:size]))
        except CaptureError as error:
            assert isinstance(error, (KbpfError, ValueError)) and error.offset <= size
        got = []
        try:
            for record in open_capture(whole[:size]):
                got.append(record)
        except CaptureError as error:
            assert f"byte {error.offset}" in str(error)
        assert got == records[: len(got)]
        seen.add(len(got))
    assert seen == {0, 1, 2}


@pytest.mark.parametrize(
    "data",
    [
        pcap()[:24] + struct.pack("<IIII", 0, 0, 0xFFFFFFF0, 1),
        pcap()[:24] + struct.pack("<IIII", 0, 0, 100_000_000, 1) + b"short",
        section("<") + interface("<") + struct.pack("<II", 6, 0xFFFFFFF0),
        section("<") + interface("<") + struct.pack("<II", 77, 0xFFFFFFF0) + b"short",
        section("<")[:4] + struct.pack("<II", 0xFFFFFFF0, 0x1A2B3C4D) + section("<")[12:],
    ],
)
def test_lying_lengths_allocate_nothing(data: bytes) -> None:
    tracemalloc.start()
    with pytest.raises(CaptureError):
        list(open_capture(data))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4_000_000


@pytest.mark.parametrize(
    ("data", "offset"),
    [
        (b"", 0),
        (b"not a capture", 0),
        (struct.pack("<IHH", 0xA1B2C3D4, 9, 4) + bytes(16), 4),
        (section("<") + enhanced("<", 0, 0, b"x", 1), 28),
        (section("<") + interface("<") + struct.pack("<II", 6, 13) + bytes(5), 48),
        (section("<") + interface("<") + enhanced("<", 0, 0, b"", 1)[:-4] + b"\x01\0\0\0", 76),
        (section("<") + interface("<") + block("<", 6, struct.pack("<IIIII", 0, 0, 0, 9, 9)), 48),
    ],
)
def test_corruption_is_named_with_its_offset(data: bytes, offset: int) -> None:
    with pytest.raises(CaptureError) as raised:
        list(open_capture(data))
    assert raised.value.offset == offset


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(FILES)), st.data())
def test_damaged_files_raise_capture_errors_only(name: str, draw: st.DataObject) -> None:
    data = bytearray(FILES[name])
    for position in draw.draw(st.lists(st.integers(0, len(data) - 1), max_size=6)):
        data[position] = draw.draw(st.integers(0, 255))
    try:
        list(open_capture(bytes(data)))
    except CaptureError as error:
        assert 0 <= error.offset <= len(data)


def test_scapy_s_files_read_the_same(tmp_path: Path) -> None:
    utils = pytest.importorskip("scapy.utils")
    for name, writer in (("a.pcap", utils.RawPcapWriter), ("b.pcapng", utils.RawPcapNgWriter)):
        path = tmp_path / name
        kwargs = {"linktype": 1} if name == "a.pcap" else {}
        out = writer(str(path), **kwargs)
        if not kwargs:
            out.linktype = 1
        for index in range(5):
            out.write(bytes([index]) * (60 + index))
        out.close()
        with open_capture(path) as capture:
            assert [r.data for r in capture] == [bytes([i]) * (60 + i) for i in range(5)], name


@pytest.mark.requires("tcpdump")
def test_tcpdump_reads_our_files_and_we_read_its_own(tmp_path: Path) -> None:
    frame = bytes(12) + b"\x08\0" + bytes.fromhex("4500001c0000000040110000c0000201c0000202 0035003500080000")
    ours, theirs = tmp_path / "ours.pcap", tmp_path / "theirs.pcap"
    with PcapWriter(ours) as writer:
        for index in range(4):
            writer.write(frame, 1_700_000_000_000_000_123 + index * 10**9)
    environment = {**os.environ, "TZ": "UTC"}
    listing = subprocess.run(
        ["tcpdump", "-nn", "-tt", "--time-stamp-precision=nano", "-r", ours],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
    ).stdout
    assert listing.splitlines()[0].startswith("1700000000.000000123 IP 192.0.2.1.53 > 192.0.2.2.53")
    subprocess.run(
        ["tcpdump", "--time-stamp-precision=nano", "-r", ours, "-w", theirs], check=True, capture_output=True
    )
    with open_capture(ours) as first, open_capture(theirs) as second:
        assert list(first) == list(second)
