"""Keys and values as what a user says they are; every fact holds on both backends."""

from __future__ import annotations

import ctypes
import errno
import sys
from dataclasses import dataclass
from typing import Annotated

import pytest

import kbpf
from kbpf.types import Int
from kbpf.uapi.constants import BPF_F_WRONLY


@dataclass(frozen=True)
class Flow:
    host: Annotated[int, "I"]
    port: Annotated[int, "H"]


class Counts(ctypes.Structure):
    _fields_ = (("packets", ctypes.c_uint32), ("bytes", ctypes.c_uint64))


def of(backend, key, value, type="hash", **spec):
    return kbpf.Map.create(kbpf.MapSpec(type=type, max_entries=8, **spec), backend, key=key, value=value)


def test_sizes_are_those_of_the_types(backend):
    with of(backend, "<IH", Counts) as map:
        assert (map.shape.key_size, map.shape.value_size) == (6, 16)
    with of(backend, Flow, Int(name="u64", size=8)) as map:
        assert (map.shape.key_size, map.shape.value_size) == (8, 8)


def test_formats_give_tuples_and_single_numbers(backend):
    with of(backend, "<IH", ">I") as map:
        map[(1, 2)] = 3
        assert (map[1, 2], map.snapshot(), list(map)) == (3, {(1, 2): 3}, [(1, 2)])
        with pytest.raises(KeyError):
            map[1, 3]
        with pytest.raises(ValueError, match="does not fit"):
            map[1, 1 << 16]


def test_a_number_is_looked_up_by_its_bytes_too(backend):
    with of(backend, Int(name="u32", size=4), "=Q") as map:
        map[5] = 50
        assert (map[b"\5\0\0\0"], map[5]) == (50, 50)
        for wrong in (-1, 1 << 32, "5", None):
            with pytest.raises(ValueError, match="does not fit"):
                map[wrong]
    with of(backend, Int(name="u32", size=4), "=Q", flags=BPF_F_WRONLY) as map:
        for key in (5, b"\5\0\0\0"):
            with pytest.raises(kbpf.PermissionDeniedError, match="may not be read"):
                map[key]


def test_raw_keys_have_the_length_of_keys(backend):
    """The kernel reads as many bytes as keys have, also behind shorter ones."""
    with of(backend, "I", "Q") as map:
        map[5] = 50
        assert map.raw_value(b"\5\0\0\0") == (50).to_bytes(8, sys.byteorder)
        for wrong in (b"", b"\5", b"\5\0\0\0\0"):
            with pytest.raises(ValueError, match=f"a key of {len(wrong)} bytes"):
                map.raw_value(wrong)


def test_ctypes_and_dataclasses_go_in_and_come_out(backend):
    with of(backend, Flow, Counts) as map:
        map[Flow(10, 80)] = Counts(1, 2)
        map[Flow(11, 80)] = (3, 4)
        assert map[Flow(10, 80)].bytes == 2
        assert {key: (value.packets, value.bytes) for key, value in map.items()} == {
            Flow(10, 80): (1, 2), Flow(11, 80): (3, 4),
        }  # fmt: skip
        assert map.pop(Flow(11, 80)).packets == 3


def test_per_cpu_values_of_any_type(backend):
    with of(backend, "I", "HH", "percpu_hash") as map:
        cpus = len(map.value_codec.decode(bytes(map.value_codec.size)))
        map[1] = [(number, 1) for number in range(cpus)]
        assert map[1] == tuple((number, 1) for number in range(cpus))
        assert map[1].sum() == (sum(range(cpus)), cpus)


def test_an_opened_map_has_the_types_that_are_given(backend):
    with of(backend, "I", "Q") as map:
        map[1] = 7
        with kbpf.Map.open(fd=map.fileno(), backend=backend, key="I", value="II") as same:
            assert same.snapshot() == {1: (7, 0)}
        with pytest.raises(ValueError, match="4 bytes where there are 8"):
            kbpf.Map.open(fd=map.fileno(), backend=backend, value="I")


def test_with_types_sees_the_same_map(backend):
    with of(backend, "I", "Q") as map:
        map[1] = 7
        seen = map.with_types(value="II")
        assert (seen[1], seen.fileno(), map[1]) == ((7, 0), map.fileno(), 7)
        seen[2] = (1, 1)
        assert map[2] == (1 << 32) + 1
        again = seen.with_types(key="HH")
        assert again[1, 0] == (7, 0)
        seen.close()
        assert (seen.closed, map.closed, again[2, 0]) == (True, False, (1, 1))
        # One that is dropped leaves nothing open.
        map.with_types(value="8s")
        with pytest.raises(ValueError, match="4 bytes where there are 8"):
            map.with_types(value="I")
    assert again.closed
    with pytest.raises(kbpf.BpfError) as refused:
        again[1, 0]
    assert refused.value.errno == errno.EBADF


def test_a_collection_gives_its_maps_other_types(backend):
    spec = kbpf.CollectionSpec(maps={"x": kbpf.MapSpec(type="hash", key_size=4, value_size=8, max_entries=4, name="x")})
    with kbpf.Collection.from_spec(spec, backend) as loaded:
        loaded.maps["x"][bytes(4)] = bytes(8)
        assert loaded.maps["x"].with_types(key="I", value="Q").snapshot() == {0: 0}


def test_a_queue_has_values_of_a_type(backend):
    with kbpf.Queue.create(kbpf.MapSpec(type="queue", max_entries=2), backend, value=Flow) as queue:
        queue.push(Flow(1, 2))
        assert queue.with_types(value="8s").peek() == bytes([1, 0, 0, 0, 2, 0, 0, 0])
        assert queue.pop() == Flow(1, 2)
