"""Whole captures: counted and written alike by native code, by the interpreter and by tcpdump; damage is said."""

from __future__ import annotations

import concurrent.futures
import gc
import gzip
import io
import os
import select
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest

import kbpf
from kbpf.backend import Engine
from kbpf.elf import read_object
from kbpf.errors import FilterError, KbpfError
from kbpf.pcapfile import CaptureError, PcapWriter, open_capture
from kbpf.pcapfile.windows import Windows
from kbpf.runtime.captures import CaptureResult, run_capture
from kbpf.testing.generate_packets import frame

pytestmark = pytest.mark.requires("llvmlite")
ENGINES = pytest.mark.parametrize("engine", ["interpreter", "jit"])
EXPRESSION = "tcp or arp or ip6 and not udp"


def packets(count: int = 300, seed: object = 0) -> list[tuple[bytes, int]]:
    """Bytes and lengths on the wire."""
    rng = Random(f"captures/{seed}")
    made = []
    for _ in range(count):
        whole = frame(rng, vlan=True)
        made.append((whole[: rng.choice((14, 30, 2000))], len(whole)))
    return made


def pcap(order: str = "<", magic: int = 0xA1B2C3D4, extra: int = 0, linktype: int = 1, seed: object = 0) -> bytes:
    out = struct.pack(order + "IHHiIII", magic, 2, 4, 0, 0, 65535, linktype)
    for number, (data, wirelen) in enumerate(packets(seed=seed)):
        out += struct.pack(order + "IIII", 1700000000, number, len(data), wirelen) + bytes(extra) + data
    return out


def block(order: str, kind: int, body: bytes) -> bytes:
    body += bytes(-len(body) % 4)
    return struct.pack(order + "II", kind, len(body) + 12) + body + struct.pack(order + "I", len(body) + 12)


def section(order: str) -> bytes:
    return block(order, 0x0A0D0D0A, struct.pack(order + "IHHq", 0x1A2B3C4D, 1, 0, -1))


def interface(order: str, linktype: int = 1, snaplen: int = 0) -> bytes:
    return block(order, 1, struct.pack(order + "HHI", linktype, 0, snaplen))


def enhanced(order: str, data: bytes, wirelen: int, index: int = 0, options: bytes = b"") -> bytes:
    body = struct.pack(order + "IIIII", index, 1, 2, len(data), wirelen) + data + bytes(-len(data) % 4) + options
    return block(order, 6, body)


def pcapng(order: str = "<") -> bytes:
    """Two sections, interfaces of two link types, all kinds of packet blocks, and blocks that nobody knows."""
    out = section(order) + interface(order)
    for number, (data, wirelen) in enumerate(packets(200)):
        if number % 50 == 10:
            out += block(order, 5, b"statistics") + block(order, 0x0BAD, bytes(number))
        if number == 60:
            out += interface(order, 101)
        if number % 7 == 3:
            out += block(order, 3, struct.pack(order + "I", len(data)) + data)
        elif number % 7 == 4:
            out += block(order, 2, struct.pack(order + "HHIIII", 0, 0, 0, 0, len(data), wirelen) + data)
        elif number > 60 and number % 5 == 0:
            out += enhanced(order, data[14:], wirelen, 1, struct.pack(order + "HHHH", 1, 3, 0, 0))
        else:
            out += enhanced(order, data, wirelen)
    other = "<" if order == ">" else ">"
    return out + section(other) + interface(other, snaplen=40) + enhanced(other, *packets(1)[0])


def by_record(data: bytes) -> CaptureResult:
    """Packet by packet, as the reference."""
    filters = {1: kbpf.compile(EXPRESSION), 12: kbpf.compile(EXPRESSION, link="RAW")}
    with open_capture(data) as capture:
        kept = [filters[r.dlt].run(r.data, r.wirelen, engine="interpreter") > 0 for r in capture]
    return CaptureResult(len(kept), sum(kept))


FILES = {
    "pcap": pcap(),
    "pcap big-endian": pcap(">"),
    "pcap nanoseconds": pcap("<", 0xA1B23C4D),
    "pcap with longer headers": pcap(">", 0xA1B2CD34, 8),
    "pcap without records": pcap()[:24],
    "pcapng": pcapng(),
    "pcapng big-endian": pcapng(">"),
    "pcapng without interfaces": section("<"),
}


@ENGINES
@pytest.mark.parametrize("name", FILES)
def test_files_are_counted_and_written_whole(engine: Engine, name: str, tmp_path: Path) -> None:
    path, out = tmp_path / "in", tmp_path / "out"
    path.write_bytes(FILES[name])
    expected = by_record(FILES[name])
    assert run_capture(EXPRESSION, path, engine=engine) == expected
    assert run_capture(EXPRESSION, path, write=out, engine=engine) == expected
    assert run_capture(EXPRESSION, out, engine=engine) == CaptureResult(expected.matched, expected.matched)
    assert run_capture("", path, write=out, engine=engine).packets == expected.packets
    assert out.read_bytes() == FILES[name]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.requires("tcpdump")
@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("pcap ") or name == "pcap"])
def test_what_is_written_is_what_tcpdump_writes(name: str, tmp_path: Path) -> None:
    path, ours, theirs = tmp_path / "in.pcap", tmp_path / "ours.pcap", tmp_path / "theirs.pcap"
    path.write_bytes(FILES[name])
    run_capture(EXPRESSION, path, write=ours, engine="jit")
    command = ["tcpdump", "-Z", "root", "-r", str(path), "-w", str(theirs), EXPRESSION]
    subprocess.run(command, check=True, capture_output=True)
    with open_capture(ours) as one, open_capture(theirs) as other:
        assert [r[1:3] for r in one] == [r[1:3] for r in other]


@ENGINES
def test_compressed_files_pipes_and_open_files(engine: Engine, tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    for name in ("pcap", "pcapng"):
        expected = by_record(FILES[name])
        packed = {"gzip": gzip.compress(FILES[name]), "zstd": zstandard.compress(FILES[name])}
        # Two members behind one another are one file.
        half = len(FILES[name]) // 2
        packed["members"] = gzip.compress(FILES[name][:half]) + gzip.compress(FILES[name][half:])
        for how, data in packed.items():
            path, out = tmp_path / how, tmp_path / "out"
            path.write_bytes(data)
            assert run_capture(EXPRESSION, path, engine=engine) == expected
            assert run_capture("", path, write=out, engine=engine).packets == expected.packets
            assert out.read_bytes() == FILES[name]
        assert run_capture(EXPRESSION, io.BytesIO(FILES[name]), engine=engine) == expected
        reading, writing = os.pipe()
        with concurrent.futures.ThreadPoolExecutor(1) as pool, os.fdopen(reading, "rb") as reader:

            def feed(writing: int = writing, data: bytes = FILES[name]) -> None:
                with os.fdopen(writing, "wb") as writer:
                    writer.write(data)

            pool.submit(feed)
            assert run_capture(EXPRESSION, reader, engine=engine) == expected


@ENGINES
@pytest.mark.parametrize("name", ["pcap", "pcap big-endian", "pcapng", "pcapng big-endian"])
def test_of_a_cut_file_what_is_there_is_counted_and_written(engine: Engine, name: str, tmp_path: Path) -> None:
    path, out, rng = tmp_path / "in", tmp_path / "out", Random(name)
    whole = FILES[name]
    for _ in range(30):
        cut = whole[: rng.randrange(4, len(whole))]
        path.write_bytes(cut)
        with open_capture(io.BytesIO(whole)) as capture:
            complete = list(capture)
        expected: tuple[object, ...]
        try:
            expected = (by_record(cut), None, None)
        except CaptureError as error:
            readable = 0
            try:
                with open_capture(cut) as capture:
                    for _record in capture:
                        readable += 1
            except CaptureError:
                pass
            filters = {1: kbpf.compile(EXPRESSION), 12: kbpf.compile(EXPRESSION, link="RAW")}
            kept = [filters[r.dlt].run(r.data, r.wirelen) > 0 for r in complete[:readable]]
            expected = (CaptureResult(readable, sum(kept)), error.message, error.offset)
        try:
            got: tuple[object, ...] = (run_capture(EXPRESSION, path, write=out, engine=engine), None, None)
        except CaptureError as error:
            got = (error.result, error.message, error.offset)
        assert got == expected
        out.unlink(missing_ok=True)


@ENGINES
def test_corrupt_files_end_where_the_reader_says(engine: Engine, tmp_path: Path) -> None:
    """Bytes changed at random: the same packets before the damage, and the same words about it."""
    path, rng = tmp_path / "in", Random(7)
    for _ in range(60):
        data = bytearray(FILES[rng.choice(["pcap", "pcapng"])])
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(8, len(data))] = rng.choice((0, 1, 0x7F, 0xFF))
        path.write_bytes(data)
        results = []
        for how in ("interpreter", engine):
            try:
                results.append((run_capture(EXPRESSION, path, engine=how), "", 0))  # type: ignore[arg-type]
            except CaptureError as error:
                results.append((error.result, error.message, error.offset))
            except FilterError as error:
                results.append((None, str(error), 0))
        assert results[0] == results[1]


@ENGINES
def test_damaged_compression_is_a_capture_error(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "in.gz"
    path.write_bytes(gzip.compress(FILES["pcap"])[:-900])
    with pytest.raises(CaptureError, match="damaged") as caught:
        run_capture(EXPRESSION, path, engine=engine)
    assert caught.value.result is not None


@ENGINES
def test_several_files_and_several_at_a_time(engine: Engine, tmp_path: Path) -> None:
    paths, out = [tmp_path / f"{n}.pcap" for n in range(4)], tmp_path / "out"
    for number, path in enumerate(paths):
        path.write_bytes(pcap(seed=number))
    expected = [by_record(path.read_bytes()) for path in paths]
    total = CaptureResult(sum(e.packets for e in expected), sum(e.matched for e in expected))
    told: list[int] = []
    assert run_capture(EXPRESSION, paths, write=out, engine=engine, progress=told.append) == total
    assert sum(told) == sum(path.stat().st_size for path in paths)
    written = out.read_bytes()
    for make in (concurrent.futures.ThreadPoolExecutor, concurrent.futures.ProcessPoolExecutor):
        with make(2) as executor:  # type: ignore[operator]
            assert run_capture(EXPRESSION, paths, write=out, engine=engine, executor=executor) == total
        assert out.read_bytes() == written
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.pcap", "1.pcap", "2.pcap", "3.pcap", "out"]


@ENGINES
def test_files_of_different_kinds_are_not_written_into_one(engine: Engine, tmp_path: Path) -> None:
    one, other, out = tmp_path / "one", tmp_path / "other", tmp_path / "out"
    one.write_bytes(FILES["pcap"])
    other.write_bytes(FILES["pcap big-endian"])
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for executor in (None, pool):
            with pytest.raises(KbpfError, match="different kinds"):
                run_capture(EXPRESSION, [one, other], write=out, engine=engine, executor=executor)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "other"]


def test_a_failure_leaves_no_half_written_file(tmp_path: Path) -> None:
    path, out = tmp_path / "in", tmp_path / "out"
    path.write_bytes(pcap(linktype=147))
    out.write_bytes(b"before")
    with pytest.raises(FilterError, match="link type 147"):
        run_capture(EXPRESSION, path, write=out, engine="jit")
    with pytest.raises(FilterError, match="the filter is for RAW"):
        path.write_bytes(FILES["pcap"])
        run_capture(kbpf.compile("tcp", link="RAW"), path, write=out)
    assert out.read_bytes() == b"before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_what_is_no_capture_is_said(tmp_path: Path) -> None:
    path = tmp_path / "in"
    for data in (b"", b"\x01", b"hello world"):
        path.write_bytes(data)
        with pytest.raises(CaptureError, match="no pcap or pcapng"):
            run_capture("tcp", path, write=tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    with pytest.raises(FileNotFoundError):
        run_capture("tcp", tmp_path / "missing")


def test_programs_count_refuse_and_write(tmp_path: Path) -> None:
    """An XDP program that drops what is shorter than sixty bytes: its verdicts, and what it does not take."""
    shorter = (
        (0x61, 2, 1, 0, 0), (0x61, 3, 1, 4, 0), (0xBF, 0, 3, 0, 0), (0x1F, 0, 2, 0, 0),
        (0x35, 0, 0, 2, 60), (0xB7, 0, 0, 0, 0), (0x95, 0, 0, 0, 0), (0xB7, 0, 0, 0, 2), (0x95, 0, 0, 0, 0),
    )  # fmt: skip
    spec = kbpf.ProgramSpec(type="xdp", instructions=shorter)  # type: ignore[arg-type]
    path, out, sizes = tmp_path / "in", tmp_path / "out", [14, 59, 60, 13, 200, 5, 70]
    with PcapWriter(path) as writer:
        for size in sizes:
            writer.write(bytes(size))
    expected = CaptureResult(7, 3, {0: 2, 2: 3}, 2)
    with kbpf.load_program(spec, backend="emulator", engine="jit") as program:
        assert run_capture(program, path, write=out) == expected
    collection = kbpf.CollectionSpec(programs={"drop": spec})
    assert run_capture(collection, path) == expected
    with open_capture(out) as capture:
        assert [len(record.data) for record in capture] == [60, 200, 70]
    with pytest.raises(ValueError, match="no program other; there are drop"):
        run_capture(collection, path, program="other")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CaptureError) as caught:
        run_capture(collection, path)
    assert caught.value.result == CaptureResult(6, 2, {0: 2, 2: 2}, 2)


def test_counters_of_all_parts_are_added_up(tmp_path: Path) -> None:
    collection = read_object(Path(kbpf.__file__).with_name("objects") / "sockex2.bpf.o")
    paths = [tmp_path / f"{number}.pcap" for number in range(3)]
    for number, path in enumerate(paths):
        path.write_bytes(pcap(seed=number))
    whole = run_capture(collection, paths)
    with concurrent.futures.ProcessPoolExecutor(2) as executor:
        assert run_capture(collection, paths, executor=executor) == whole
    assert whole.packets == 900
    assert whole.maps


@ENGINES
def test_a_damaged_file_is_named_and_the_others_are_gone_through(engine: Engine, tmp_path: Path) -> None:
    cut, empty, good, out = tmp_path / "cut", tmp_path / "empty", tmp_path / "good", tmp_path / "out"
    cut.write_bytes(FILES["pcap"][:-3])
    empty.write_bytes(b"")
    good.write_bytes(FILES["pcap"])
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for executor in (None, pool):
            with pytest.raises(CaptureError, match=f"^{cut}: the file ends within a packet.*at byte") as caught:
                run_capture("", [cut, empty, good], write=out, engine=engine, executor=executor)
            assert caught.value.result == CaptureResult(599, 599)
            assert [error.file for error in caught.value.others] == [str(empty)]
            with open_capture(out) as capture:
                assert len(list(capture)) == 599


@ENGINES
def test_open_files_stay_open(engine: Engine, tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    path, whole = tmp_path / "in", FILES["pcap"]
    for data in (whole, gzip.compress(whole), zstandard.compress(whole)):
        path.write_bytes(data)
        with path.open("rb") as buffered, path.open("rb", buffering=0) as raw, io.BytesIO(data) as held:
            for file in (buffered, raw, held):
                assert run_capture("", file, engine=engine).packets == 300
                gc.collect()
                assert not file.closed


def test_a_pipe_that_brings_byte_after_byte_is_recognised() -> None:
    data = gzip.compress(FILES["pcap"])
    reading, writing = os.pipe()
    with concurrent.futures.ThreadPoolExecutor(1) as pool, os.fdopen(reading, "rb", buffering=0) as reader:

        def feed() -> None:
            with os.fdopen(writing, "wb", buffering=0) as writer:
                for number in range(6):
                    writer.write(data[number : number + 1])
                    while select.select([reading], [], [], 0)[0]:
                        time.sleep(0.001)
                writer.write(data[6:])

        pool.submit(feed)
        assert run_capture("", reader).packets == 300


def test_a_file_without_data_at_the_moment_is_not_at_its_end() -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.write(writing, FILES["pcap"][:1000])
    with os.fdopen(reading, "rb") as reader, os.fdopen(writing, "wb"), pytest.raises(BlockingIOError):
        run_capture("", reader)


def test_a_file_that_is_cut_off_meanwhile_is_an_error(tmp_path: Path) -> None:
    """Not the signal that touching it would be."""
    path = tmp_path / "in"
    path.write_bytes(bytes(3 << 20))
    with Windows(path) as windows:
        os.truncate(path, 100)
        with pytest.raises(CaptureError, match="shorter"):
            windows.populate(1 << 20, 1 << 20)


#: Goes through a file that is cut off to two of its eight megabytes when the filter is asked for, by when it is mapped.
CUT_OFF = """
import os, sys, kbpf
from kbpf.pcapfile import CaptureError
from kbpf.runtime.scanning import Output, Scanner

engine, path, out = sys.argv[1:]

def filter_of(dlt):
    os.truncate(path, 2 << 20)
    return kbpf.compile("ether[0] = 1 or ether[5000000] = 0")

with Output(out) as output, Scanner(filter_of, engine) as scanner:
    try:
        scanner.file(path, output)
    except CaptureError as error:
        print(scanner.packets, error)
"""


@ENGINES
@pytest.mark.parametrize("before", [1, 2])
@pytest.mark.parametrize("long", [True, False])
def test_a_record_that_is_cut_off_meanwhile_is_an_error(
    engine: Engine, before: int, long: bool, tmp_path: Path
) -> None:
    """However far it goes beyond what has been looked at; those before are there."""
    small, large = bytes([1]) + bytes(59), bytes(8 << 20)
    records = [small] * before + ([large] if long else [small] * (8 << 14))
    path, out = tmp_path / "in", tmp_path / "out"
    with PcapWriter(path, snaplen=len(large)) as writer:
        for data in records:
            writer.write(data)
    header = path.read_bytes()[:24]
    done = subprocess.run(
        [sys.executable, "-c", CUT_OFF, engine, path, out], capture_output=True, text=True, check=True
    )
    count, words = done.stdout.split(maxsplit=1)
    assert "shorter" in words
    assert int(count) == before if long else before < int(count) <= (2 << 20) // 76
    assert out.read_bytes()[:100] == (header + path.read_bytes()[24:])[:100]
    assert len(out.read_bytes()) == 24 + 76 * int(count)


@ENGINES
@pytest.mark.parametrize("size", [5 << 20, 9 << 20])
def test_a_section_header_may_be_longer_than_what_is_read_at_a_time(engine: Engine, size: int, tmp_path: Path) -> None:
    """However the file is read; and so it is where the header is cut off."""
    head = block("<", 0x0A0D0D0A, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1) + bytes(size))
    whole = head + interface("<") + 3 * enhanced("<", bytes(60), 60)
    path, packed, out = (tmp_path / name for name in ("in", "in.gz", "out"))
    for data, words in ((whole, None), (whole[: size - 100], "ends within the section header")):
        path.write_bytes(data)
        packed.write_bytes(gzip.compress(data, 1))
        for source in (path, packed, io.BytesIO(data)):
            if words is None:
                assert run_capture("len = 60", source, write=out, engine=engine).matched == 3
                assert out.read_bytes() == data
            else:
                with pytest.raises(CaptureError, match=words):
                    run_capture("", source, engine=engine)


#: Writes a match, and waits to be killed.
WAITING = """
import sys, time, kbpf
from kbpf.runtime.scanning import Output, Scanner

with Output(sys.argv[2]) as output, Scanner(lambda dlt: kbpf.compile(""), "interpreter") as scanner:
    scanner.file(sys.argv[1], output)
    print("written", flush=True)
    time.sleep(100)
"""


def test_what_is_killed_leaves_no_file(tmp_path: Path) -> None:
    """Nor does it replace one; on file systems that have files without a name, as those of tests do."""
    path, out = tmp_path / "in", tmp_path / "out"
    path.write_bytes(FILES["pcap"])
    out.write_bytes(b"before")
    with subprocess.Popen([sys.executable, "-c", WAITING, path, out], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        process.kill()
    assert sorted(tmp_path.iterdir()) == [path, out]
    assert out.read_bytes() == b"before"


def test_where_every_file_has_a_name_it_is_hidden_until_it_is_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY | os.O_WRONLY)
    path, out = tmp_path / "in", tmp_path / "out"
    path.write_bytes(FILES["pcap"])
    seen: list[Path] = []
    result = run_capture("", path, write=out, progress=lambda _: seen.extend(tmp_path.iterdir()))
    assert any(name.name.startswith(".out.") for name in seen)
    assert result.packets == 300
    assert sorted(tmp_path.iterdir()) == [path, out]
    assert out.read_bytes() == FILES["pcap"]


@ENGINES
def test_what_is_no_regular_file_is_written_to_and_links_stay(engine: Engine, tmp_path: Path) -> None:
    path, fifo, link, target = (tmp_path / name for name in ("in", "fifo", "link", "target"))
    path.write_bytes(FILES["pcap"])
    link.symlink_to("target")
    os.mkfifo(fifo)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        for executor in (None, pool):
            read = pool.submit(fifo.read_bytes)
            run_capture("", path, write=fifo, engine=engine, executor=executor)
            assert read.result() == FILES["pcap"]
            assert stat.S_ISFIFO(fifo.stat().st_mode)
            run_capture("", path, write=link, engine=engine, executor=executor)
            assert link.is_symlink()
            assert target.read_bytes() == FILES["pcap"]
            target.unlink()


def test_parts_have_names_of_their_own_and_go(tmp_path: Path) -> None:
    """Nobody else's file is overwritten, and after an error no task leaves one."""
    paths, out, other = [tmp_path / f"{n}" for n in range(3)], tmp_path / "out", tmp_path / "out.part0"
    for path in paths:
        path.write_bytes(FILES["pcap"])
    other.write_bytes(b"mine")
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        run_capture("", paths, write=out, executor=executor)
        assert other.read_bytes() == b"mine"
        out.unlink()
        with pytest.raises(FileNotFoundError):
            run_capture("", [tmp_path / "missing", *paths], write=out, engine="interpreter", executor=executor)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1", "2", "out.part0"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is missing")
@ENGINES
def test_a_full_disk_is_said_with_the_file(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(FILES["pcap"])
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        run_capture("", path, write="/dev/full", engine=engine)
