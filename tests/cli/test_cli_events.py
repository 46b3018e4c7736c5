"""``kbpf events``, on a map of the kernel."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import kbpf

pytestmark = pytest.mark.requires("kernel")

OBJECT = Path(kbpf.__file__).with_name("objects") / "events.bpf.o"
PACKET = bytes(12) + b"\x08\x00" + b"E".ljust(46, b"\0")


@pytest.fixture
def loaded() -> Iterator[kbpf.Collection]:
    """Three events wait."""
    with kbpf.load(OBJECT, backend="kernel") as collection:
        for _ in range(3):
            collection.programs["watch"].run(PACKET)
        yield collection


def test_events_are_printed_until_there_are_enough(cli, loaded):
    which = ("events", "id", str(loaded.maps["events"].id))
    done = cli(*which, "--type", "8xIHH", "--count", "2")
    assert (done.status, done.err) == (0, "")
    assert done.out.splitlines() == ["[46 2048 0]"] * 2


def test_events_are_printed_for_a_time(cli, loaded):
    done = cli("events", "id", str(loaded.maps["events"].id), "--duration", "0.1", "--json")
    assert done.status == 0
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert [len(bytes.fromhex(line)) for line in lines] == [16] * 3


def test_a_wrong_type_is_wrong_usage(cli, loaded):
    done = cli("events", "id", str(loaded.maps["events"].id), "--type", "y")
    assert done.status == 2
    assert "is no format of struct" in done.err


def test_a_map_without_events_is_wrong_usage(cli, loaded):
    done = cli("events", "id", str(loaded.maps["dropped"].id))
    assert done.status == 2
    assert "events come from ringbuf and perf_event_array" in done.err
