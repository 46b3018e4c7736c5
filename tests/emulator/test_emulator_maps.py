"""The emulator's maps against the kernel's: creation, and every command in random order."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

import pytest
from mapcode import attempt, create, described_value
from sides import Side

from kbpf.backend import Batch
from kbpf.emulator.maps import KINDS
from kbpf.specs import MapSpec
from kbpf.uapi import constants as uapi
from kbpf.uapi.enums import MAP_TYPES

pytestmark = pytest.mark.requires("kernel")

FLAGS = [1 << bit for bit in range(15)]


@contextmanager
def pair(kernel: Side, emulator: Side, spec: MapSpec) -> Iterator[tuple[int, int]]:
    """The same map on both sides."""
    fds = create(kernel, spec), create(emulator, spec)
    try:
        yield fds
    finally:
        kernel.backend.close(fds[0])
        emulator.backend.close(fds[1])


def creation(side: Side, spec: MapSpec) -> object:
    def try_it() -> str:
        side.backend.close(create(side, spec))
        return "created"

    return attempt(try_it)


SIZES = (0, 1, 4, 5, 8, 16, 260, 261, 32768, 32769)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_sizes_and_flags_are_checked_as_the_kernel_does(kernel: Side, emulator: Side, kind: str) -> None:
    good = MapSpec(type=kind, **GOOD[kind])
    specs = [replace(good, **change) for change in CHANGES]
    specs += [replace(good, flags=good.flags ^ flag) for flag in FLAGS]
    specs += [replace(good, flags=good.flags | first | second) for first in FLAGS for second in FLAGS]
    for spec in specs:
        assert creation(emulator, spec) == creation(kernel, spec), spec


CHANGES: list[dict[str, Any]] = [
    *({"key_size": size} for size in SIZES),
    *({"value_size": size} for size in (*SIZES, (1 << 22) - 100, 1 << 22, 1 << 23, 1 << 31)),
    *({"max_entries": count} for count in (0, 1, 2, 4096, 8192, 12288)),
    {"map_extra": 1},
    {"map_extra": 16},
]
HASHED: dict[str, Any] = {"key_size": 4, "value_size": 8, "max_entries": 5}
DESCRIPTORS = {**HASHED, "value_size": 4}
STORAGE = {"key_size": 4, "value_size": 8, "flags": uapi.BPF_F_NO_PREALLOC, **described_value("u64")}
KEYLESS = {**HASHED, "key_size": 0}
GOOD: dict[str, dict[str, Any]] = {
    "array": HASHED,
    "percpu_array": HASHED,
    "hash": HASHED,
    "percpu_hash": HASHED,
    "lru_hash": HASHED,
    "lru_percpu_hash": HASHED,
    "lpm_trie": {**HASHED, "key_size": 8, "flags": uapi.BPF_F_NO_PREALLOC},
    "prog_array": DESCRIPTORS,
    "array_of_maps": {**DESCRIPTORS, "inner": MapSpec(type="hash", **HASHED)},
    "hash_of_maps": {**DESCRIPTORS, "inner": MapSpec(type="array", **HASHED)},
    "queue": KEYLESS,
    "stack": KEYLESS,
    "bloom_filter": KEYLESS,
    "ringbuf": {"max_entries": 4096},
    "user_ringbuf": {"max_entries": 4096},
    "perf_event_array": DESCRIPTORS,
    "devmap": DESCRIPTORS,
    "devmap_hash": DESCRIPTORS,
    "cpumap": DESCRIPTORS,
    "xskmap": DESCRIPTORS,
    **dict.fromkeys(("sockmap", "sockhash", "reuseport_sockarray"), HASHED),
    **dict.fromkeys(("sk_storage", "inode_storage", "task_storage", "cgrp_storage"), STORAGE),
    "stack_trace": HASHED,
    "cgroup_array": DESCRIPTORS,
    **{key: {"key_size": 8, "value_size": 8} for key in ("cgroup_storage", "percpu_cgroup_storage")},
}


@pytest.mark.parametrize("name", ("a", "exactly_15_long", "more_than_fifteen", "a-b c", "a\0b", "é"))
def test_names_are_cut_down_alike(kernel: Side, emulator: Side, name: str) -> None:
    spec = MapSpec(type="array", name=name, **HASHED)
    with pair(kernel, emulator, spec) as fds:
        assert emulator.backend.map_info(fds[1]).name == kernel.backend.map_info(fds[0]).name


@pytest.mark.parametrize("kind", ("struct_ops", "arena"))
def test_types_that_the_emulator_has_not_are_refused_by_name(emulator: Side, kind: str) -> None:
    """All others that Linux 6.18 has are here."""
    assert set(MAP_TYPES) - set(KINDS) == {"unspec", "struct_ops", "arena"}
    with pytest.raises(OSError, match=f"no maps of type {kind} yet") as caught:
        create(emulator, MapSpec(type=kind, max_entries=1, flags=uapi.BPF_F_MMAPABLE))
    assert caught.value.errno == errno.EOPNOTSUPP


def test_types_are_linux_types(emulator: Side) -> None:
    assert creation(emulator, MapSpec(type="no_such_map", **HASHED)) == ("EINVAL", None)


class Walk:
    """A random walk of one map through all commands, on both sides."""

    def __init__(self, kernel: Side, emulator: Side, spec: MapSpec, fds: tuple[int, int], rng: Random) -> None:
        self.sides = kernel.backend, emulator.backend
        self.fds = fds
        self.spec = spec
        self.rng = rng
        cpus = kernel.backend.possible_cpus()
        self.value_size = -(-spec.value_size // 8) * 8 * cpus if "percpu" in spec.type else spec.value_size

    def both(self, command: str, *arguments: Any) -> Any:
        """The outcome of a command, the same on both sides."""
        outcomes = [
            attempt(partial(getattr(backend, command), fd, *arguments))
            for backend, fd in zip(self.sides, self.fds, strict=True)
        ]
        assert outcomes[1] == outcomes[0], (command, arguments)
        return outcomes[0]

    def key(self) -> bytes | None:
        if not self.spec.key_size:
            return None if self.rng.random() < 0.9 else b"\0"
        if self.spec.type == "lpm_trie":
            length = self.rng.choice((0, 1, 2, 3, 8, 16, 17))
            return length.to_bytes(4, "little") + self.rng.choice((b"\0\0", b"\x40\x01", b"\x80\0", b"\xc0\xff"))
        return self.rng.randrange(8).to_bytes(self.spec.key_size, "little")

    def value(self) -> bytes:
        return self.rng.randbytes(self.value_size)

    def flags(self) -> int:
        return self.rng.choice((0, 0, 0, 0, 1, 2, 3, 4, 8))

    def step(self) -> None:
        kind = self.rng.randrange(10)
        if kind < 3:
            self.both("map_update", self.key(), self.value(), self.flags())
        elif kind == 3:
            self.both("map_lookup", self.key(), self.value_size, self.rng.choice((0, 0, 0, 1, 4)))
        elif kind == 4:
            self.both("map_delete", self.key())
        elif kind == 5:
            self.both("map_lookup_and_delete", self.key(), self.value_size, self.rng.choice((0, 0, 0, 1, 4)))
        elif kind == 6:
            count = self.rng.randrange(4)
            keys = b"".join(self.key() or b"" for _ in range(count))
            values = b"".join(self.value() for _ in range(count))
            self.both("map_update_batch", keys, values, count, self.rng.choice((0, 0, 0, 1)))
        elif kind == 7:
            count = self.rng.randrange(3)
            self.both(
                "map_delete_batch", b"".join(self.key() or b"" for _ in range(count)), count, self.rng.choice((0, 0, 1))
            )
        elif kind == 8:
            self.everything(self.rng.random() < 0.2)
        else:
            self.missing_pointers()

    def everything(self, delete: bool) -> None:
        """All elements by batch and by iteration; a hash has no order."""
        contents = []
        for backend, fd in zip(self.sides, self.fds, strict=True):
            size = self.spec.key_size
            whole = attempt(partial(backend.map_lookup_batch, fd, None, 64, size, self.value_size, delete))
            if isinstance(whole, Batch):
                assert whole.token is None
                whole = sorted(
                    (
                        whole.keys[i * size : (i + 1) * size],
                        whole.values[i * self.value_size : (i + 1) * self.value_size],
                    )
                    for i in range(whole.length)
                )
            contents.append((whole, sorted(self.keys(backend, fd))))
        assert contents[1] == contents[0]

    def keys(self, backend: Any, fd: int) -> Iterator[bytes]:
        key = attempt(partial(backend.map_next_key, fd, None, self.spec.key_size))
        while isinstance(key, bytes):
            yield key
            key = attempt(partial(backend.map_next_key, fd, key, self.spec.key_size))

    def missing_pointers(self) -> None:
        self.both("map_lookup", None, self.value_size)
        self.both("map_update", None, self.value())
        self.both("map_lookup_and_delete", None, self.value_size)


WALKS = [
    MapSpec(type="array", key_size=4, value_size=8, max_entries=5),
    MapSpec(type="array", key_size=4, value_size=3, max_entries=1),
    MapSpec(type="percpu_array", key_size=4, value_size=12, max_entries=5),
    MapSpec(type="hash", key_size=4, value_size=8, max_entries=5),
    MapSpec(type="hash", key_size=1, value_size=1, max_entries=5, flags=uapi.BPF_F_NO_PREALLOC),
    MapSpec(type="percpu_hash", key_size=7, value_size=5, max_entries=5),
    # Room for all keys of the walk: which one a full map drops is open.
    MapSpec(type="lru_hash", key_size=4, value_size=8, max_entries=64),
    MapSpec(type="lru_percpu_hash", key_size=4, value_size=8, max_entries=64),
    MapSpec(type="lpm_trie", key_size=6, value_size=8, max_entries=5, flags=uapi.BPF_F_NO_PREALLOC),
    MapSpec(type="prog_array", key_size=4, value_size=4, max_entries=5),
    MapSpec(type="queue", value_size=8, max_entries=3),
    MapSpec(type="stack", value_size=8, max_entries=3),
    *(MapSpec(type=t, key_size=4, value_size=8, max_entries=5, flags=uapi.BPF_F_RDONLY) for t in ("array", "hash")),
    *(MapSpec(type=t, key_size=4, value_size=8, max_entries=5, flags=uapi.BPF_F_WRONLY) for t in ("array", "hash")),
]


@pytest.mark.parametrize("spec", WALKS, ids=lambda spec: f"{spec.type}-{spec.key_size}-{spec.value_size}-{spec.flags}")
def test_random_commands_have_the_kernels_results(kernel: Side, emulator: Side, spec: MapSpec) -> None:
    rng = Random(spec.value_size)
    for _ in range(3):
        with pair(kernel, emulator, spec) as fds:
            walk = Walk(kernel, emulator, spec, fds, rng)
            for _ in range(300):
                walk.step()
            walk.both("map_freeze")
            for _ in range(30):
                walk.step()
            walk.both("map_freeze")
