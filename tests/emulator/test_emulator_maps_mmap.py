"""Arrays whose values user space maps (BPF_F_MMAPABLE), against the kernel."""

from __future__ import annotations

import mmap

import pytest
from mapcode import attempt, made
from sides import Side

from kbpf.specs import MapSpec
from kbpf.uapi import constants as uapi

pytestmark = pytest.mark.requires("kernel")

PAGE = mmap.PAGESIZE
SPEC = MapSpec(type="array", key_size=4, value_size=12, max_entries=300, flags=uapi.BPF_F_MMAPABLE)


def test_values_are_16_bytes_apart_and_seen_both_ways(kernel: Side, emulator: Side) -> None:
    results = []
    for side in (kernel, emulator):
        with made(side, SPEC) as (fd,):
            memory = side.backend.map_memory(fd, 2 * PAGE, 0, True)
            for key in (0, 1, 255, 256, 299):
                side.backend.map_update(fd, key.to_bytes(4, "little"), bytes(range(key % 7, key % 7 + 12)))
            memory[20:23] = b"abc"
            results.append((bytes(memory), side.backend.map_lookup(fd, b"\1\0\0\0", 12)))
            memory.release()
    assert results[1] == results[0]


@pytest.mark.parametrize("flags", (0, uapi.BPF_F_RDONLY, uapi.BPF_F_WRONLY, uapi.BPF_F_RDONLY_PROG))
@pytest.mark.parametrize("mappable", (False, True))
def test_what_may_be_mapped(kernel: Side, emulator: Side, flags: int, mappable: bool) -> None:
    results = []
    spec = MapSpec(
        type="array", key_size=4, value_size=12, max_entries=300, flags=flags | (uapi.BPF_F_MMAPABLE if mappable else 0)
    )
    for side in (kernel, emulator):
        with made(side, spec) as (fd,):
            results.append(
                [
                    attempt(lambda: side.backend.map_memory(fd, size, offset, writable).release())  # noqa: B023
                    for size, offset in ((PAGE, 0), (PAGE, PAGE), (2 * PAGE, 0), (3 * PAGE, 0), (PAGE, 2 * PAGE))
                    for writable in (False, True)
                ]
            )
    assert results[1] == results[0]


@pytest.mark.parametrize("type", ("hash", "percpu_array", "queue"))
def test_other_types_are_not_mapped(kernel: Side, emulator: Side, type: str) -> None:
    spec = MapSpec(type=type, key_size=0 if type == "queue" else 4, value_size=8, max_entries=4)
    results = []
    for side in (kernel, emulator):
        with made(side, spec) as (fd,):
            results.append(attempt(lambda: side.backend.map_memory(fd, PAGE)))  # noqa: B023
    assert results[1] == results[0]


def test_freezing_waits_for_writers_and_keeps_new_ones_out(kernel: Side, emulator: Side) -> None:
    results = []
    for side in (kernel, emulator):
        with made(side, SPEC) as (fd,):
            reader = side.backend.map_memory(fd, PAGE)
            writer = side.backend.map_memory(fd, PAGE, 0, True)
            outcome = [attempt(lambda: side.backend.map_freeze(fd))]  # noqa: B023
            writer.release()
            del writer
            outcome.append(attempt(lambda: side.backend.map_freeze(fd)))  # noqa: B023
            for writable in (False, True):
                outcome.append(
                    attempt(lambda: side.backend.map_memory(fd, PAGE, 0, writable).release())  # noqa: B023
                )
            reader.release()
        results.append(outcome)
    assert results[1] == results[0]
