"""``kbpf run`` over files that are whole, and that are not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

import kbpf
from kbpf.pcapfile import PcapWriter, open_capture
from kbpf.testing.generate_packets import frame


@pytest.fixture
def capture(tmp_path: Path) -> Path:
    path, rng = tmp_path / "in.pcap", Random("run")
    with PcapWriter(path) as writer:
        for _ in range(200):
            writer.write(frame(rng))
    return path


def expected(path: Path) -> int:
    with open_capture(path) as records:
        return sum(record.data[12:14] == b"\x08\x06" for record in records)


def test_run_says_how_many_match(cli, capture: Path) -> None:
    assert cli("run", "arp", str(capture)).out == f"{expected(capture)} of 200 packets match\n"
    assert cli("run", "arp", str(capture), "--count").out == f"{expected(capture)}\n"
    told = json.loads(cli("run", "arp", str(capture), str(capture), "--json", "--jobs", "2").out)
    assert (told["packets"], told["matched"]) == (400, 2 * expected(capture))


def test_run_writes_what_matches(cli, capture: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.pcap"
    assert cli("run", "arp", str(capture), "-w", str(out)).status == 0
    with open_capture(out) as records:
        assert len(list(records)) == expected(capture) == expected(out)


def test_run_reads_standard_input(capture: Path) -> None:
    code = "from kbpf.cli.main import main; main()"
    with capture.open("rb") as file:
        command = [sys.executable, "-c", code, "run", "--count", "arp", "-"]
        done = subprocess.run(command, stdin=file, capture_output=True, text=True, check=True)
    assert done.stdout == f"{expected(capture)}\n"


def test_run_counts_what_is_readable_before_it_says_what_is_wrong(cli, capture: Path) -> None:
    capture.write_bytes(capture.read_bytes()[:-5])
    done = cli("run", "", str(capture))
    assert done.out == "199 of 199 packets match\n"
    assert done.status == 1
    assert "the file ends within a packet" in done.err


def test_run_says_where_an_expression_is_wrong(cli, capture: Path) -> None:
    done = cli("run", "tcp and and", str(capture))
    assert (done.status, done.out) == (2, "")
    assert "^" in done.err


def test_run_runs_a_program_and_shows_its_maps(cli, capture: Path, tmp_path: Path) -> None:
    object, other = str(Path(kbpf.__file__).with_name("objects") / "sockex1.bpf.o"), tmp_path / "other.pcap"
    other.write_bytes(capture.read_bytes())
    with open_capture(capture) as records:
        usual = [record.data for record in records]
    with kbpf.load(object, backend="emulator") as collection:
        for frame in usual:
            collection.programs["count"].run(frame)
        counted = collection.maps["bytes"].snapshot()
    alone = json.loads(cli("run", object, str(capture), "--json").out)
    assert (alone["packets"], alone["values"], alone["refused"]) == (200, {"4294967295": 200}, 0)
    assert {row["key"]: row["value"] for row in alone["maps"]["bytes"]} == counted
    both = json.loads(cli("run", object, str(capture), str(other), "--jobs", "2", "--json").out)
    assert {row["key"]: row["value"] for row in both["maps"]["bytes"]} == {k: 2 * v for k, v in counted.items()}
    assert "bytes (array" in cli("run", object, str(capture)).out
    assert cli("run", object, str(capture), "--program", "no").status == 2


def test_run_writes_packets_alone_to_standard_output(capture: Path) -> None:
    command = [sys.executable, "-c", "from kbpf.cli.main import main; main()", "run", "arp", str(capture), "-w", "-"]
    done = subprocess.run(command, capture_output=True, check=True)
    with open_capture(done.stdout) as records:
        assert len(list(records)) == expected(capture)
    assert done.stderr == f"{expected(capture)} of 200 packets match\n".encode()


def test_run_names_every_file_that_is_damaged(cli, capture: Path, tmp_path: Path) -> None:
    cut, empty = tmp_path / "cut", tmp_path / "empty"
    cut.write_bytes(capture.read_bytes()[:-5])
    empty.write_bytes(b"")
    for jobs in ("1", "3"):
        done = cli("run", "", str(cut), str(empty), str(capture), "--count", "--jobs", jobs)
        assert (done.status, done.out) == (1, "399\n")
        assert [line.split(": ")[1] for line in done.err.splitlines()] == [str(cut), str(empty)]
