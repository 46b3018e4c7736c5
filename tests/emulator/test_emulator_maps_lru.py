"""LRU hashes: Linux leaves open which element goes, so both sides are held to what it does promise."""

from __future__ import annotations

import struct

import pytest
from mapcode import attempt, call, made, main, put, run, stack, the_map
from sides import Side

from kbpf.specs import MapSpec
from kbpf.uapi import constants as uapi

pytestmark = pytest.mark.requires("kernel")

KINDS = ["lru_hash", "lru_percpu_hash"]


@pytest.fixture(params=["kernel", "emulator"])
def side(request: pytest.FixtureRequest) -> Side:
    found: Side = request.getfixturevalue(request.param)
    return found


def spec(type: str, entries: int, flags: int = 0) -> MapSpec:
    return MapSpec(type=type, key_size=4, value_size=8, max_entries=entries, flags=flags)


def size_of_value(side: Side, type: str) -> int:
    return 8 * (side.backend.possible_cpus() if "percpu" in type else 1)


def insert(side: Side, fd: int, type: str, key: int) -> None:
    side.backend.map_update(fd, struct.pack("=I", key), bytes(size_of_value(side, type)))


def keys(side: Side, fd: int, type: str) -> set[int]:
    batch = side.backend.map_lookup_batch(fd, None, 4096, 4, size_of_value(side, type))
    return {key for (key,) in struct.iter_unpack("=I", batch.keys)}


@pytest.mark.parametrize("type", KINDS)
@pytest.mark.parametrize("flags", (0, uapi.BPF_F_NO_COMMON_LRU))
def test_a_map_never_holds_more_than_its_entries(side: Side, type: str, flags: int) -> None:
    for entries in (1, 2, 3, 10, 100, 300):
        with made(side, spec(type, entries, flags)) as (fd,):
            for key in range(3 * entries):
                insert(side, fd, type, key)
                assert key in keys(side, fd, type)
            assert len(keys(side, fd, type)) <= entries


@pytest.mark.parametrize("type", KINDS)
def test_three_entries_keep_the_last_three_of_ten(side: Side, type: str) -> None:
    with made(side, spec(type, 3)) as (fd,):
        for key in range(10):
            insert(side, fd, type, key)
        assert keys(side, fd, type) == {7, 8, 9}


@pytest.mark.parametrize("type", KINDS)
@pytest.mark.parametrize("entries", (10, 100))
def test_what_a_program_uses_again_and_again_stays(side: Side, type: str, entries: int) -> None:
    use = main(put(-8, 0), the_map(1), stack(2, -8), call("map_lookup_elem"))
    with made(side, spec(type, entries)) as (fd,):
        insert(side, fd, type, 0)
        for key in range(1, 5 * entries):
            run(side, use, [fd])
            insert(side, fd, type, key)
        assert 0 in keys(side, fd, type)


def test_a_lookup_by_user_space_is_no_use(side: Side) -> None:
    with made(side, spec("lru_hash", 3)) as (fd,):
        for key in range(10):
            insert(side, fd, "lru_hash", key)
            attempt(lambda: side.backend.map_lookup(fd, bytes(4), 8))
        assert keys(side, fd, "lru_hash") == {7, 8, 9}
