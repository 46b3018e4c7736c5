"""Maps of maps and bloom filters, against the kernel."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from random import Random

import pytest
from mapcode import Code, attempt, call, copy, get, made, main, mov, put, run, stack, the_map, unless_null
from sides import Side

from kbpf.specs import MapSpec
from kbpf.uapi import constants as uapi

pytestmark = pytest.mark.requires("kernel")

INNER = MapSpec(type="array", key_size=4, value_size=8, max_entries=2)
OUTER = [
    MapSpec(type=type, key_size=4, value_size=4, max_entries=3, inner=INNER)
    for type in ("array_of_maps", "hash_of_maps")
]


def number(value: int) -> bytes:
    return struct.pack("=I", value)


@contextmanager
def on_both(kernel: Side, emulator: Side, *specs: MapSpec) -> Iterator[list[tuple[Side, tuple[int, ...]]]]:
    with made(kernel, *specs) as one, made(emulator, *specs) as other:
        yield [(kernel, one), (emulator, other)]


TEMPLATES = {
    "array": INNER,
    "percpu_array": replace(INNER, type="percpu_array"),
    "hash": replace(INNER, type="hash"),
    "prog_array": replace(INNER, type="prog_array", value_size=4),
    "queue": replace(INNER, type="queue", key_size=0),
    "bloom_filter": replace(INNER, type="bloom_filter", key_size=0),
    "ringbuf": MapSpec(type="ringbuf", max_entries=4096),
    "lpm_trie": replace(INNER, type="lpm_trie", key_size=8, flags=uapi.BPF_F_NO_PREALLOC),
    "perf_event_array": replace(INNER, type="perf_event_array", value_size=4),
    "stack_trace": replace(INNER, type="stack_trace"),
    "array_of_maps": OUTER[0],
    "hash_of_maps": OUTER[1],
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("outer", OUTER, ids=lambda spec: spec.type)
def test_templates_and_the_maps_that_may_take_their_place(
    kernel: Side, emulator: Side, outer: MapSpec, name: str
) -> None:
    template = TEMPLATES[name]
    changes = [
        template,
        replace(template, max_entries=template.max_entries * 2),
        replace(template, value_size=template.value_size * 2),
        replace(template, flags=template.flags ^ uapi.BPF_F_INNER_MAP),
        replace(template, flags=template.flags ^ uapi.BPF_F_RDONLY),
        INNER,
        TEMPLATES["hash"],
    ]
    results = []
    for side in (kernel, emulator):

        def tried(side: Side = side) -> list[object]:
            outcomes: list[object] = []
            with made(side, replace(outer, inner=template)) as (fd,):
                for change in changes:

                    def update(change: MapSpec = change) -> None:
                        with made(side, change) as (inner,):
                            side.backend.map_update(fd, bytes(4), number(inner))

                    outcomes.append(attempt(update))
            return outcomes

        results.append(attempt(tried))
    assert results[1] == results[0]


def test_an_array_that_may_have_any_size_inside(kernel: Side, emulator: Side) -> None:
    template = replace(INNER, flags=uapi.BPF_F_INNER_MAP)
    for outer in OUTER:
        results = []
        for side in (kernel, emulator):
            with made(side, replace(outer, inner=template), template, replace(template, max_entries=9)) as fds:
                results.append([attempt(lambda: side.backend.map_update(fds[0], bytes(4), number(i))) for i in fds])  # noqa: B023
        assert results[0] == results[1] == [("EINVAL", None), None, None]


@pytest.mark.parametrize("outer", OUTER, ids=lambda spec: spec.type)
def test_ids_come_out_where_descriptors_went_in(kernel: Side, emulator: Side, outer: MapSpec) -> None:
    with on_both(kernel, emulator, outer, INNER) as sides:
        for side, (fd, inner) in sides:
            backend = side.backend
            id = number(backend.map_info(inner).id)
            backend.map_update(fd, number(1), number(inner))
            assert backend.map_lookup(fd, number(1), 4) == id
            batch = backend.map_lookup_batch(fd, None, 3, 4, 4)
            assert (batch.keys, batch.values, batch.token) == (number(1), id, None)


@pytest.mark.parametrize("outer", OUTER, ids=lambda spec: spec.type)
def test_commands_in_random_order(kernel: Side, emulator: Side, outer: MapSpec) -> None:
    rng = Random(3)
    with on_both(kernel, emulator, outer, INNER, TEMPLATES["hash"]) as sides:
        for _ in range(400):
            kind, key, which = rng.randrange(7), number(rng.randrange(5)), rng.randrange(4)
            flags = rng.choice((0, 0, 0, 1, 2, 3, 4))
            results = []
            for side, (fd, good, bad) in sides:
                backend = side.backend
                value = number((good, good, bad, 0xFFFF)[which])
                ids = {number(backend.map_info(good).id): b"good", b"": b""}
                if kind < 3:
                    result = attempt(lambda: backend.map_update(fd, key, value, flags))  # noqa: B023
                elif kind == 3:
                    result = attempt(lambda: ids[backend.map_lookup(fd, key, 4)])  # noqa: B023
                elif kind == 4:
                    result = attempt(lambda: backend.map_delete(fd, key))  # noqa: B023
                elif kind == 5:
                    result = attempt(lambda: backend.map_lookup_and_delete(fd, key, 4))  # noqa: B023
                else:
                    result = attempt(lambda: backend.map_update_batch(fd, key, value, 1))  # noqa: B023
                results.append(result)
            assert results[1] == results[0], (kind, key, which, flags)


def into_inner(key: int) -> Code:
    """Look the inner map up, then its first value, and count there; R0 is the count."""
    count = [*get(7, 0), *put(0, 41, 0), *copy(0, 7)]
    inner = [*copy(1, 0), *put(-16, 0), *stack(2, -16), *call("map_lookup_elem"), *unless_null(0, count)]
    return main(put(-8, key), the_map(1), stack(2, -8), call("map_lookup_elem"), unless_null(0, inner))


@pytest.mark.parametrize("outer", OUTER, ids=lambda spec: spec.type)
def test_programs_reach_the_inner_map(kernel: Side, emulator: Side, outer: MapSpec) -> None:
    with on_both(kernel, emulator, outer, INNER) as sides:
        for side, (fd, inner) in sides:
            side.backend.map_update(fd, number(1), number(inner))
            assert [run(side, into_inner(key), [fd]) for key in (0, 1, 1)] == [0, 0, 41]
            assert side.backend.map_lookup(inner, number(0), 8) == struct.pack("=Q", 41)


BLOOM = MapSpec(type="bloom_filter", value_size=8, max_entries=40)


@pytest.mark.parametrize("size", (1, 3, 4, 8, 12, 13, 16, 28, 36, 37))
@pytest.mark.parametrize("hashes", (0, 1, 3, 15))
def test_a_bloom_filter_without_seed_answers_as_the_kernel_does(
    kernel: Side, emulator: Side, size: int, hashes: int
) -> None:
    rng = Random(size)
    spec = replace(BLOOM, value_size=size, map_extra=hashes, flags=uapi.BPF_F_ZERO_SEED)
    values = [rng.randbytes(size) for _ in range(40)]
    asked = values + [rng.randbytes(size) for _ in range(200)]
    answers = []
    with on_both(kernel, emulator, spec) as sides:
        for side, (fd,) in sides:
            for value in values:
                side.backend.map_update(fd, None, value)
            answers.append([side.backend.map_contains(fd, value) for value in asked])
    assert answers[1] == answers[0]
    assert all(answers[0][:40])


def test_commands_that_a_bloom_filter_has_not(kernel: Side, emulator: Side) -> None:
    with on_both(kernel, emulator, BLOOM) as sides:
        results = [
            [
                attempt(lambda: side.backend.map_contains(fd, bytes(8))),  # noqa: B023
                *(attempt(lambda: side.backend.map_update(fd, None, bytes(8), f)) for f in (1, 2, 3, 4, 0)),  # noqa: B023
                attempt(lambda: side.backend.map_update(fd, b"1", bytes(8))),  # noqa: B023
                attempt(lambda: side.backend.map_lookup(fd, b"1", 8)),  # noqa: B023
                attempt(lambda: side.backend.map_lookup(fd, None, 8)),  # noqa: B023
                attempt(lambda: side.backend.map_delete(fd, None)),  # type: ignore[arg-type]  # noqa: B023
                attempt(lambda: side.backend.map_next_key(fd, None, 0)),  # noqa: B023
                attempt(lambda: side.backend.map_lookup_and_delete(fd, None, 8)),  # noqa: B023
                attempt(lambda: side.backend.map_lookup_batch(fd, None, 8, 0, 8)),  # noqa: B023
            ]
            for side, (fd,) in sides
        ]
    assert results[1] == results[0]


def test_programs_push_into_a_bloom_filter_and_peek(kernel: Side, emulator: Side) -> None:
    push = main(put(-8, 5), the_map(1), stack(2, -8), mov(3, 0), call("map_push_elem"))
    peek = {value: main(put(-8, value), the_map(1), stack(2, -8), call("map_peek_elem")) for value in (5, 6)}
    with on_both(kernel, emulator, replace(BLOOM, flags=uapi.BPF_F_ZERO_SEED)) as sides:
        results = [
            [run(side, peek[5], fds), run(side, push, fds), run(side, peek[5], fds), run(side, peek[6], fds)]
            for side, fds in sides
        ]
    assert results[1] == results[0]
    assert results[0][:3] == [2**64 - 2, 0, 0]
