"""Many elements at once, counters, and what changes over time; every fact holds on both backends."""

from __future__ import annotations

import errno
import threading
import time
from dataclasses import dataclass
from typing import Annotated

import pytest

import kbpf
from kbpf.backend import Batch
from kbpf.errors import ENOTSUPP
from kbpf.runtime.backends import get_backend
from kbpf.runtime.maps.watch import change
from kbpf.uapi.constants import BPF_F_NO_PREALLOC, BPF_F_RDONLY_PROG, BPF_F_WRONLY_PROG


def of(backend, type="hash", max_entries=8, key="I", value="Q", **spec):
    return kbpf.Map.create(kbpf.MapSpec(type=type, max_entries=max_entries, **spec), backend, key=key, value=value)


@pytest.fixture(params=["batches", "one by one"])
def commands(backend, request, monkeypatch):
    """Both backends, with the batch commands, and as a kernel before 5.6 that has none."""
    if request.param == "one by one":

        def refused(*_: object, **__: object) -> Batch:
            raise OSError(errno.EINVAL, "")

        for name in ("map_lookup_batch", "map_update_batch", "map_delete_batch"):
            monkeypatch.setattr(type(get_backend(backend)), name, refused)
    return backend


@pytest.mark.parametrize("type", ["hash", "percpu_hash", "lru_hash", "array"])
def test_many_go_in_and_come_out(commands, type):
    with of(commands, type, 300) as map:
        one = map.value_codec.decode(bytes(map.value_codec.size))
        elements = {
            number: number if one == 0 else (number,) * len(one) for number in range(300 if type == "array" else 200)
        }
        map.update_many(elements)
        assert dict(map.items()) == map.snapshot() == elements
        assert (len(map), set(map), map.snapshot().complete) == (len(elements), set(elements), True)
        map.update([(1, elements[2])])
        assert map[1] == elements[2]


def test_many_are_deleted_as_far_as_they_are_there(commands):
    with of(commands, max_entries=100) as map:
        map.update_many({number: number for number in range(0, 100, 2)})
        assert map.delete_many(range(50)) == 25
        assert map.delete_many([7, 50, 50, 9]) == 1
        assert map.delete_many([]) == 0
        assert set(map) == set(range(52, 100, 2))
        map.clear()
        assert (len(map), bool(map)) == (0, True)


@pytest.mark.parametrize("type", ["hash", "percpu_hash", "lru_hash", "lpm_trie"])
def test_draining_takes_all_out(commands, type):
    more = {"key": None, "key_size": 8, "flags": BPF_F_NO_PREALLOC} if type == "lpm_trie" else {}
    with of(commands, type, 300, **more) as map:
        assert map.drain() == []
        slots = len(map.value_codec.decode(bytes(map.value_codec.size))) if map.per_cpu else 0
        names = [f"10.0.{number}.0/24" if more else number for number in range(100)]
        map.update_many((name, (index,) * slots if slots else index) for index, name in enumerate(names))
        before = map.snapshot()
        assert len(before) == 100
        assert dict(map.drain()) == before
        assert (len(map), map.drain()) == (0, [])


def test_what_stays_is_not_drained(backend):
    with of(backend, "array") as map, pytest.raises(kbpf.BpfError, match="stay"):
        map.drain()
    with of(backend) as map:
        map[1] = 1
        map.freeze()
        with pytest.raises(kbpf.PermissionDeniedError, match="frozen"):
            map.drain()
        assert map[1] == 1


@pytest.mark.parametrize("counts", [1, 4])
def test_what_threads_drain_comes_once(backend, counts, monkeypatch):
    monkeypatch.setattr("kbpf.runtime.maps.walk.BATCH_BYTES", 64)
    with of(backend, max_entries=2000) as map:
        map.update_many({number: number for number in range(2000)})
        parts = []
        threads = [threading.Thread(target=lambda: parts.append(map.drain())) for _ in range(counts)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(key for part in parts for key, _ in part) == list(range(2000))


def test_what_is_stored_again_while_the_map_is_drained_is_not_lost(backend, monkeypatch):
    seam, again = type(get_backend(backend)), []
    whole = seam.map_lookup_batch

    def meanwhile(self, fd, *arguments):
        found = whole(self, fd, *arguments)
        # Twice, somebody stores what has just been taken: behind the walk, or before it.
        if found.length and len(again) < 2:
            self.map_update_batch(fd, found.keys, found.values, found.length)
            again.append(found.length)
        return found

    monkeypatch.setattr("kbpf.runtime.maps.walk.BATCH_BYTES", 12 * 50)
    monkeypatch.setattr(seam, "map_lookup_batch", meanwhile)
    with of(backend, max_entries=2000) as map:
        map.update_many(dict.fromkeys(range(500), 1))
        taken = map.drain()
        assert sum(value for _, value in taken) + len(map) == 500 + sum(again)
        assert {key for key, _ in taken} == set(range(500))


def test_keys_that_are_missing_cost_no_copies_of_those_behind_them(backend, monkeypatch):
    asked = []
    whole = type(get_backend(backend)).map_delete_batch

    def seen(self, fd, keys, count, *more):
        asked.append(count)
        return whole(self, fd, keys, count, *more)

    monkeypatch.setattr(type(get_backend(backend)), "map_delete_batch", seen)
    with of(backend, max_entries=400) as map:
        map.update_many({number: number for number in range(200, 400)})
        assert map.delete_many(range(400)) == 200
        assert len(map) == 0
    assert sum(asked) < 3 * 400 and len(asked) < 220


def test_a_full_map_keeps_what_came_before_the_refusal(commands):
    with of(commands, max_entries=4) as map:
        with pytest.raises(kbpf.MapFullError, match="it holds 4 entries"):
            map.update_many((number, number) for number in range(10))
        assert map.snapshot() == {number: number for number in range(4)}
        # One that is there has room.
        map.update_many({3: 30})
        assert map[3] == 30


def test_refusals_of_many_say_why(commands):
    with of(commands) as map:
        map.freeze()
        for use in (lambda: map.update_many({1: 1, 2: 2}), lambda: map.delete_many([1, 2])):
            with pytest.raises(kbpf.PermissionDeniedError, match="frozen"):
                use()


def test_taking_leaves_nothing(commands):
    with of(commands) as map:
        map.update({1: 10, 2: 20})
        assert map.pop(1) == 10
        assert map.pop(1, "gone") == "gone"
        with pytest.raises(KeyError, match="1"):
            map.pop(1)
        assert map.popitem() == (2, 20)
        with pytest.raises(KeyError, match="empty"):
            map.popitem()


def test_setdefault_stores_what_is_not_there(backend):
    with of(backend) as map:
        assert (map.setdefault(1, 5), map.setdefault(1, 6), map[1]) == (5, 5, 5)


def test_a_bucket_larger_than_a_batch_is_read(backend, monkeypatch):
    monkeypatch.setattr("kbpf.runtime.maps.walk.BATCH_BYTES", 1)
    sizes = []
    whole = type(get_backend(backend)).map_lookup_batch

    def seen(self, fd, token, count, *more, **named):
        sizes.append(count)
        return whole(self, fd, token, count, *more, **named)

    monkeypatch.setattr(type(get_backend(backend)), "map_lookup_batch", seen)
    with of(backend, max_entries=500) as map:
        map.update_many({number: number for number in range(500)})
        assert map.snapshot() == {number: number for number in range(500)}
    # In the kernel some bucket had several, and the batch of one no room for them.
    assert sizes[0] == 1 and (backend == "emulator" or max(sizes) > 1)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_batch_that_never_fits_is_an_error_and_no_endless_loop(backend, monkeypatch, error):
    def refused(*_: object, **__: object) -> Batch:
        raise OSError(error, "")

    monkeypatch.setattr(type(get_backend(backend)), "map_lookup_batch", refused)
    with of(backend) as map, pytest.raises(kbpf.BpfError, match="read map") as caught:
        map.snapshot()
    assert caught.value.errno == error


def test_a_walk_that_others_keep_sending_back_ends_and_says_so(backend, monkeypatch):
    """Key by key, a deleted key sends the walk to the start: here every one is gone before the next is asked for."""
    with of(backend, "lpm_trie", 4, key=None, value="I", key_size=8, flags=1) as map:
        map["10.0.0.0/8"] = 1

        def refused(*_: object, **__: object) -> Batch:
            raise OSError(ENOTSUPP, "")

        known = get_backend(backend)
        first = known.map_next_key(map.fileno(), None, 8)
        monkeypatch.setattr(type(known), "map_lookup_batch", refused)
        assert map.snapshot().complete
        monkeypatch.setattr(type(known), "map_next_key", lambda *_: first)
        assert (map.snapshot(), map.snapshot().complete) == ({next(iter(map)): 1}, False)


@pytest.mark.parametrize("type", ["hash", "lru_hash", "array", "percpu_hash", "percpu_array"])
@pytest.mark.parametrize("value", ["i", "q"])
def test_increments_add_up(backend, type, value):
    with of(backend, type, value=value) as map:
        for by in (1, 5, -3):
            map.increment(2, by)
        assert (map[2].sum() if "percpu" in type else map[2]) == 3
        if "array" in type:
            with pytest.raises(KeyError):
                map.increment(8)
        else:
            map.update_many({key: map.value_codec.decode(bytes(map.value_codec.size)) for key in range(10, 17)})
            if type == "hash":
                with pytest.raises(kbpf.MapFullError):
                    map.increment(20)
        map.with_types(value=value).increment(2)
        assert (map[2].sum() if "percpu" in type else map[2]) == 4


def test_increments_take_keys_of_any_length_and_wrap(backend):
    with of(backend, key="11s", value="I") as map:
        map.increment(b"hello world", (1 << 32) - 1)
        map.increment(b"hello world", 2)
        assert map.snapshot() == {b"hello world": 1}


def test_what_is_no_number_is_not_incremented(backend):
    with of(backend, value="HH8s") as map, pytest.raises(TypeError, match="no numbers of 4 or 8 bytes"):
        map.increment(1)
    with of(backend, "array", flags=BPF_F_RDONLY_PROG) as map, pytest.raises(kbpf.KbpfError):
        map.increment(1)
    map = of(backend)
    map.close()
    with pytest.raises(kbpf.BpfError, match="closed"):
        map.increment(1)


@dataclass(frozen=True)
class Traffic:
    name: Annotated[bytes, "4s"]
    packets: Annotated[int, "I"]
    bytes: Annotated[int, "Q"]


@pytest.mark.parametrize("flag", [BPF_F_RDONLY_PROG, BPF_F_WRONLY_PROG])
@pytest.mark.parametrize("there", [True, False])
def test_what_programs_may_not_read_and_write_is_not_incremented(backend, flag, there):
    with of(backend, flags=flag) as map:
        if there:
            map[1] = 5
        with pytest.raises(kbpf.PermissionDeniedError, match="_PROG"):
            map.increment(1)
        assert map.get(1) == (5 if there else None)


def test_the_prefix_that_a_program_finds_may_be_another(backend):
    with of(backend, "lpm_trie", key=None, key_size=8, flags=BPF_F_NO_PREALLOC) as map:
        map["10.0.0.0/8"] = 5
        with pytest.raises(TypeError, match="longest prefix"):
            map.increment("10.1.0.0/16")


def test_watching_gives_what_changed(backend):
    with of(backend) as map:
        map.update({1: 10, 2: 20, 3: 30})
        changes = map.watch(0.01)
        start = time.monotonic()
        assert next(changes).deltas == {}
        map[1] = 15
        map[4] = 4
        del map[3]
        found = next(changes)
        assert (found.deltas, found.removed, found.values) == ({1: 5, 4: 4}, (3,), {1: 15, 2: 20, 4: 4})
        assert found.rates[1] == 5 / found.elapsed
        assert time.monotonic() - start >= 0.02
        map[1] = 3
        assert next(changes).deltas == {1: -12}
        assert len(list(map.watch(0.001, count=3))) == 3
        with pytest.raises(ValueError, match="interval"):
            map.watch(0)


def test_a_reader_that_is_late_misses_times_and_shifts_none(backend):
    with of(backend) as map:
        start = time.monotonic()
        changes = map.watch(0.05)
        next(changes)
        time.sleep(0.12)
        next(changes)
        # Times are the start's, 0.05 apart: the third is the first that was not over.
        assert (time.monotonic() - start) // 0.05 >= 4


def test_structs_and_per_cpu_values_change_by_their_numbers(backend):
    with of(backend, value=Traffic) as map:
        map[1] = Traffic(b"web\0", 1, 100)
        before = map.snapshot()
        map[1] = Traffic(b"web\0", 3, 400)
        map[2] = Traffic(b"dns\0", 1, 50)
        found = change(before, map.snapshot(), 2.0)
        assert found.deltas == {1: Traffic(b"web\0", 2, 300), 2: Traffic(b"dns\0", 1, 50)}
        assert found.rates == {1: Traffic(b"web\0", 1.0, 150.0), 2: Traffic(b"dns\0", 0.5, 25.0)}
    with of(backend, "percpu_hash") as map:
        cpus = len(map.value_codec.decode(bytes(map.value_codec.size)))
        map[1] = [1] * cpus
        before = map.snapshot()
        map[1] = [3] * cpus
        assert change(before, map.snapshot(), 1.0).deltas == {1: 2 * cpus}


def test_bytes_do_not_change_by_numbers(backend):
    with of(backend, value="8s") as map:
        changes = map.watch(0.001)
        next(changes)
        map[1] = b"text"
        with pytest.raises(TypeError, match="with_types"):
            next(changes)
