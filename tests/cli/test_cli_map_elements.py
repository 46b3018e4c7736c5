"""``kbpf map get``, ``set`` and ``watch``: one element at a time, and counters over time."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

import kbpf
from kbpf.testing.btf_bytes import BtfBytes

pytestmark = pytest.mark.requires("kernel")
TYPES = BtfBytes()
TYPED = {"btf": TYPES.bytes(), "btf_key_type_id": TYPES.int, "btf_value_type_id": TYPES.u64}


def made(type: str, **spec: Any) -> Any:
    return kbpf.BpfMap.create(kbpf.MapSpec(type=type, **spec), "kernel")


@pytest.fixture
def counters() -> Iterator[Any]:
    with made("hash", key_size=4, value_size=8, max_entries=8, name="counters", **TYPED) as map:
        yield map


def test_set_and_get_an_element(cli, counters) -> None:
    which = ("id", str(counters.id))
    assert cli("map", "set", *which, "key", "-7", "value", "0x20")[:2] == (0, "")
    assert cli("map", "get", *which, "key", "-7").out == "32\n"
    found = json.loads(cli("map", "get", *which, "key", "-7", "--json").out)
    assert found["formatted"] == {"key": -7, "value": 32}
    # As bpftool takes them.
    assert cli("map", "get", *which, "key", "hex", "f9", "ff", "ff", "ff").out == "32\n"
    assert cli("map", "set", *which, "key", "1", "0", "0", "0", "value", "2", *"0000000").status == 0
    assert cli("map", "get", *which, "key", "1").out == "2\n"


def bpftool(*arguments: str) -> Any:
    done = subprocess.run(["bpftool", "-j", *arguments], capture_output=True, check=True)
    return json.loads(done.stdout)


INNER = kbpf.MapSpec(type="array", key_size=4, value_size=4, max_entries=1)


@pytest.mark.requires("bpftool")
@pytest.mark.parametrize(
    ("type", "spec", "key", "value"),
    [
        ("hash", {**TYPED, "value_size": 8}, 1, 2),
        ("hash", {"value_size": 5}, b"\1\0\0\2", b"hello"),
        ("percpu_array", {**TYPED, "value_size": 8, "max_entries": 1}, 0, None),
        ("percpu_hash", {"value_size": 3}, b"\1\0\0\2", None),
        ("lpm_trie", {"key_size": 8, "value_size": 4, "flags": 1}, "10.0.0.0/8", b"\1\2\3\4"),
        ("array_of_maps", {"value_size": 4, "inner": INNER, "max_entries": 1}, 0, "map"),
        ("hash_of_maps", {"value_size": 4, "inner": INNER}, b"\0\0\0\1", "map"),
        ("hash", {"value_size": 8}, None, None),
    ],
)
def test_elements_are_dumped_as_bpftool_dumps_them(cli, type: str, spec: dict[str, Any], key: Any, value: Any) -> None:
    spec = {"key_size": 4, "max_entries": 4} | spec
    with made(type, **spec) as map, kbpf.Map.create(INNER, "kernel") as inner:
        if map.per_cpu:
            element = map.element_codec
            value = [
                element.decode(bytes([cpu + 1] * element.size))
                for cpu in range(len(map.value_codec.decode(bytes(map.value_codec.size))))
            ]
        if key is not None:
            map[key] = inner if value == "map" else value
        which = ("id", str(map.id))
        told, theirs = json.loads(cli("map", "dump", *which, "--json").out), bpftool("map", "dump", *which)
        # It gives meaning only where BTF does.
        for one in told if not map.info.btf_id else []:
            one.pop("formatted", None)
        assert told == theirs and [list(one) for one in told] == [list(one) for one in theirs]
        for one in theirs:
            data = ("key", "hex", *(byte.removeprefix("0x") for byte in one["key"]))
            got = json.loads(cli("map", "get", *which, *data, "--json").out)
            if not map.info.btf_id:
                got.pop("formatted", None)
            assert got == bpftool("map", "lookup", *which, *data)


@pytest.mark.requires("bpftool")
def test_the_next_of_a_queue_is_told_as_bpftool_tells_it(cli) -> None:
    with made("queue", value_size=4, max_entries=2) as map:
        map.push(b"\1\2\3\4")
        which = ("id", str(map.id))
        assert json.loads(cli("map", "get", *which, "--json").out) == bpftool("map", "peek", *which)


def test_a_long_dump_is_written_while_it_is_read(cli) -> None:
    entries = 2500
    with made("hash", key_size=4, value_size=8, max_entries=entries, **TYPED) as map:
        map.update_many({index: index for index in range(entries)})
        which = ("id", str(map.id))
        lines = cli("map", "dump", *which).out.splitlines()
        assert lines[0] == "unnamed (hash)" and lines[1].split() == ["key", "value"]
        assert sorted(int(line.split()[0]) for line in lines[2:]) == list(range(entries))
        told = json.loads(cli("map", "dump", *which, "--json").out)
        assert sorted(one["formatted"]["key"] for one in told) == list(range(entries))


def test_a_dump_is_not_held_in_memory(cli, counters, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []

    def endless(map: Any) -> Iterator[tuple[bytes, bytes]]:
        while len(written) < 10:
            yield bytes(4), bytes(8)
        raise kbpf.BpfError(5, "read on")

    monkeypatch.setattr(type(counters), "raw_items", endless)
    monkeypatch.setattr("kbpf.cli.output.sys.stdout.write", written.append)
    assert cli("map", "dump", "id", str(counters.id), "--json").status == 1
    assert len(json.loads("".join(written) + "]")) == 10


@pytest.mark.requires("bpftool")
def test_what_is_set_bpftool_finds(cli, counters) -> None:
    id = str(counters.id)
    assert cli("map", "set", "id", id, "key", "258", "value", "7").status == 0
    found = bpftool("map", "lookup", "id", id, "key", "2", "1", "0", "0")
    assert found["formatted"] == {"key": 258, "value": 7}


@pytest.mark.requires("bpftool")
@pytest.mark.parametrize(
    "words", ["01 00 00 00", "010 0 0 0", "0x1 0 0 0", "hex 0a 0b 0c 0d", "hex 1 0 0 0", "0 0 0 255"]
)
def test_bytes_are_read_as_bpftool_reads_them(cli, words: str) -> None:
    with made("hash", key_size=4, value_size=4, max_entries=8) as map:
        which = ("id", str(map.id), "key", *words.split())
        assert cli("map", "set", *which, "value", "hex", "1", "2", "3", "4").status == 0
        assert bpftool("map", "lookup", *which)["value"] == ["0x01", "0x02", "0x03", "0x04"]
        assert json.loads(cli("map", "get", *which, "--json").out)["key"] == bpftool("map", "lookup", *which)["key"]
        assert "3 bytes where 4 are wanted" in cli("map", "get", "id", str(map.id), "key", "1", "0", "0").err


def test_bpftools_flags_may_stand_behind_the_value(cli, counters) -> None:
    which = ("map", "set", "id", str(counters.id), "key", "5", "value", "1")
    assert "has no key 5" in cli(*which, "exist").err
    assert cli(*which, "noexist").status == cli(*which, "any").status == cli(*which, "exist").status == 0
    assert "EEXIST" in cli(*which, "noexist").err


def test_what_is_not_there_is_said_in_a_line(cli, counters) -> None:
    which = ("id", str(counters.id))
    assert cli("map", "get", *which, "key", "5")[::2] == (1, 'Error: map "counters" has no key 5.\n')
    assert "has no key 5" in cli("map", "set", *which, "key", "5", "value", "1", "--if", "there").err
    assert cli("map", "set", *which, "key", "5", "value", "1", "--if", "new").status == 0
    assert "EEXIST" in cli("map", "set", *which, "key", "5", "value", "1", "--if", "new").err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("get",), "give key KEY"),
        (("get", "key"), "Behind the map stands key KEY."),
        (("get", "value", "1"), "Behind the map stands key KEY."),
        (("get", "key", "x"), "does not fit 4 bytes"),
        (("get", "key", "1", "2"), "does not fit"),
        (("get", "key", "hex", "1"), "1 bytes where 4 are wanted"),
        (("get", "key", "hex", "xy"), "hex xy"),
        (("set", "key", "1"), "give key KEY and value VALUE"),
        (("set", "value", "1", "key", "1"), "give key KEY and value VALUE"),
    ],
)
def test_wrong_words_are_wrong_usage(cli, counters, words: tuple[str, ...], said: str) -> None:
    command, *rest = words
    done = cli("map", command, "id", str(counters.id), *rest)
    assert done.status == 2
    assert said in done.err


def test_networks_and_bytes_are_keys_too(cli) -> None:
    with made("lpm_trie", key_size=8, value_size=4, max_entries=8, flags=1) as map:
        which = ("id", str(map.id))
        assert cli("map", "set", *which, "key", "10.0.0.0/8", "value", "1").status == 0
        assert cli("map", "get", *which, "key", "10.1.2.3").out == "01000000\n"
        (element,) = json.loads(cli("map", "dump", *which, "--json").out)
        assert element["formatted"] == {"key": "10.0.0.0/8", "value": "01000000"}


def test_fields_have_names(cli) -> None:
    types = BtfBytes()
    value = types.structure("traffic", 8, ("packets", types.int, 0), ("drops", types.int, 4))
    described = {"btf": types.bytes(), "btf_key_type_id": types.int, "btf_value_type_id": value}
    with made("array", key_size=4, value_size=8, max_entries=2, **described) as map:
        which = ("id", str(map.id))
        assert cli("map", "set", *which, "key", "1", "value", "packets=5", "drops=2").status == 0
        assert cli("map", "get", *which, "key", "1").out == "packets=5 drops=2\n"
        assert cli("map", "set", *which, "key", "0", "value", "3", "4").status == 0
        found = json.loads(cli("map", "get", *which, "key", "0", "--json").out)
        assert found["formatted"]["value"] == {"packets": 3, "drops": 4}


def test_each_processor_gets_the_value(cli) -> None:
    with made("percpu_array", key_size=4, value_size=4, max_entries=2) as map:
        assert cli("map", "set", "id", str(map.id), "key", "1", "value", "7").status == 0
        assert {bytes(value) for value in map[1]} == {b"\7\0\0\0"}


def test_a_queue_has_no_keys(cli) -> None:
    with made("queue", value_size=4, max_entries=1) as map:
        which = ("id", str(map.id))
        assert "is empty" in cli("map", "get", *which).err
        assert "nothing is new" in cli("map", "set", *which, "value", "7", "--if", "new").err
        assert cli("map", "set", *which, "value", "7").status == 0
        assert cli("map", "get", *which).out == "07000000\n"
        assert "it holds 1 entries" in cli("map", "set", *which, "value", "7").err
        assert "give nothing behind it" in cli("map", "get", *which, "key", "1").err
        for command in ("dump", "watch"):
            assert "has no keys" in cli("map", command, *which).err


def test_maps_and_programs_are_stored_by_what_names_them(cli) -> None:
    inner = kbpf.MapSpec(type="array", key_size=4, value_size=4, max_entries=1)
    with (
        made("array_of_maps", key_size=4, value_size=4, max_entries=2, inner=inner) as outer,
        made("array", key_size=4, value_size=4, max_entries=1) as one,
    ):
        which = ("id", str(outer.id))
        assert cli("map", "set", *which, "key", "1", "value", "id", str(one.id)).status == 0
        assert cli("map", "get", *which, "key", "1").out == f"{one.id}\n"
        assert "id N or pinned PATH" in cli("map", "set", *which, "key", "1", "value", "name", "x").err


def test_watch_writes_what_changes(cli, counters, monkeypatch: pytest.MonkeyPatch) -> None:
    counters[1] = 5
    counters[2] = 5
    whole = type(counters).snapshot
    readings = []

    def reading(map: Any) -> Any:
        # Somebody counts between the first reading and the second.
        if readings:
            counters[1] = 8
            counters.pop(2, None)
        readings.append(1)
        return whole(map)

    monkeypatch.setattr(type(counters), "snapshot", reading)
    done = cli("map", "watch", "id", str(counters.id), "--interval", "0.01", "--count", "2", "--json")
    first, second = map(json.loads, done.out.splitlines())
    rate = first["changed"][0].pop("rate")
    assert 0 < rate <= 3 / 0.01
    assert (first["changed"], first["removed"]) == ([{"key": 1, "value": 8, "delta": 3}], [2])
    assert (second["changed"], second["removed"]) == ([], [])
    readings.clear()
    counters[1] = 5
    counters[2] = 5
    lines = cli("map", "watch", "id", str(counters.id), "--interval", "0.01", "--count", "1").out.splitlines()
    assert lines[0] == "counters (hash)"
    assert lines[1].split() == ["key", "value", "delta", "a", "second"]
    assert lines[2].split()[:3] == ["1", "8", "3"]
    assert lines[3].split() == ["2", "-", "-", "-"]


def test_watching_bytes_says_what_is_wrong(cli) -> None:
    with made("hash", key_size=4, value_size=8, max_entries=8, name=f"b{os.getpid()}") as map:
        map[bytes(4)] = bytes(8)
        assert cli("map", "watch", "id", str(map.id), "--interval", "0.01", "--count", "1").status == 0
