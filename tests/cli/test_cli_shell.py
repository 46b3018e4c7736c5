"""The command among others: pipes that end, files that are full or closed, signals, and the exit status of each."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

import kbpf

pytestmark = pytest.mark.requires("kernel")
KBPF = f"{sys.executable} -c 'from kbpf.cli.main import main; main()'"
TO_SOMEBODY_WHO_LEAVES = "| head -c 5 >/dev/null; echo ${PIPESTATUS[0]}"


def shell(line: str) -> tuple[str, str]:
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.strip(), done.stderr


@pytest.fixture
def long() -> Iterator[kbpf.Map]:
    """A map whose dump fills a pipe many times."""
    entries = 50_000
    with kbpf.Map.create(kbpf.MapSpec(type="hash", key_size=4, value_size=4, max_entries=entries), "kernel") as map:
        map.update_many({index.to_bytes(4, "little"): bytes(4) for index in range(entries)})
        yield map


@pytest.mark.parametrize("json", ["", "--json"])
def test_a_reader_may_leave(long: kbpf.Map, json: str) -> None:
    assert shell(f"{KBPF} map dump id {long.id} {json} {TO_SOMEBODY_WHO_LEAVES}") == ("1", "")


@pytest.mark.parametrize("words", ["map show", "map dump", "map dump --json"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_what_finds_no_room_fails_and_says_so(long: kbpf.Map, words: str, unbuffered: str) -> None:
    assert shell(f"PYTHONUNBUFFERED={unbuffered} {KBPF} {words} id {long.id} >/dev/full; echo $?") == (
        "1",
        "kbpf: [Errno 28] No space left on device\n",
    )


@pytest.mark.parametrize("words", ["map show", "map dump", "map dump --json"])
def test_nobody_need_read(long: kbpf.Map, words: str) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{KBPF} {words} id {long.id} >&-"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("words", "number", "status"),
    [
        ("map watch", signal.SIGINT, 0),
        ("map watch", signal.SIGTERM, 0),
        ("map dump", signal.SIGINT, 130),
    ],
)
def test_an_interrupt_ends_what_goes_on_in_order(long: kbpf.Map, words: str, number: int, status: int) -> None:
    command = [sys.executable, "-c", "from kbpf.cli.main import main; main()", *words.split(), "id", str(long.id)]
    command += ["--interval", "0.05"] if words == "map watch" else ["--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None and running.stderr is not None
        # It runs, and fills a pipe that nobody reads, or goes on.
        running.stdout.read(1)
        time.sleep(0.1)
        running.send_signal(number)
        _, said = running.communicate(timeout=30)
    assert (running.returncode, said.decode().strip()) == (status, "")
