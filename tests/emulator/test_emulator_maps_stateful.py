"""Every type of map through random operations, by user space and by programs, on both sides in lockstep.

Results and errnos must be equal. Where Linux promises no order, all keys are compared instead of the next one.
``KBPF_FUZZ=full`` runs many more and longer sequences.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from mapcode import EXIT, Code, attempt, call, create, described_value, get, main, mov, stack, the_map, unless_null
from sides import CB, FRAME, Side
from test_emulator_maps_locks import locked
from test_emulator_maps_output import perf_event
from timers import with_timer

from kbpf.backend import Batch
from kbpf.emulator.backend import EmulatorBackend
from kbpf.emulator.maps import KINDS
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.specs import MapSpec, ProgramSpec
from kbpf.uapi import constants as uapi

pytestmark = [pytest.mark.requires("kernel"), pytest.mark.fuzz]

FULL = os.environ.get("KBPF_FUZZ") == "full"
EXAMPLES, STEPS = (200, 100) if FULL else (3, 40)

PAGE = mmap.PAGESIZE
SOCKET_MAPS = ("sockmap", "sockhash", "reuseport_sockarray")
UNORDERED = {"sockhash", "hash", "percpu_hash", "lru_hash", "lru_percpu_hash", "hash_of_maps", "devmap_hash"}
INNER = MapSpec(type="array", key_size=4, value_size=8, max_entries=2)
HASHED: dict[str, Any] = {"key_size": 4, "value_size": 8, "max_entries": 4}
STORAGE: dict[str, Any] = {"key_size": 4, "value_size": 8, "flags": uapi.BPF_F_NO_PREALLOC, **described_value("u64")}

SPECS = {
    "array": MapSpec(type="array", **HASHED),
    "array with a lock": locked("array"),
    "array with a timer": with_timer("array", max_entries=4),
    "array of odd size": MapSpec(type="array", **{**HASHED, "value_size": 3}),
    "percpu_array": MapSpec(type="percpu_array", **{**HASHED, "value_size": 12}),
    "hash": MapSpec(type="hash", **HASHED),
    "hash with a lock": locked("hash"),
    "hash with a timer": with_timer("hash", max_entries=4),
    "hash without preallocation": MapSpec(type="hash", **{**HASHED, "key_size": 1}, flags=uapi.BPF_F_NO_PREALLOC),
    # Whole words: a program's new element keeps in the padding of other processors what its last user left there.
    "percpu_hash": MapSpec(type="percpu_hash", **{**HASHED, "value_size": 16}),
    # Room for all keys: which one a full map drops is open.
    "lru_hash": MapSpec(type="lru_hash", **{**HASHED, "max_entries": 64}),
    "lru_percpu_hash": MapSpec(type="lru_percpu_hash", **{**HASHED, "max_entries": 64}),
    "lpm_trie": MapSpec(type="lpm_trie", **{**HASHED, "key_size": 6}, flags=uapi.BPF_F_NO_PREALLOC),
    "queue": MapSpec(type="queue", value_size=8, max_entries=3),
    "stack": MapSpec(type="stack", value_size=8, max_entries=3),
    "bloom_filter": MapSpec(type="bloom_filter", value_size=8, max_entries=3, flags=uapi.BPF_F_ZERO_SEED),
    "ringbuf": MapSpec(type="ringbuf", max_entries=4096),
    "user_ringbuf": MapSpec(type="user_ringbuf", max_entries=4096),
    "stack_trace": MapSpec(type="stack_trace", **HASHED),
    **{type: MapSpec(type=type, key_size=4, value_size=4, max_entries=3) for type in (
        "prog_array", "perf_event_array", "cgroup_array", "devmap", "devmap_hash", "cpumap", "xskmap"
    )},
    "devmap with programs": MapSpec(type="devmap", key_size=4, value_size=8, max_entries=3),
    "array_of_maps": MapSpec(type="array_of_maps", key_size=4, value_size=4, max_entries=3, inner=INNER),
    "hash_of_maps": MapSpec(type="hash_of_maps", key_size=4, value_size=4, max_entries=3, inner=INNER),
    **{type: MapSpec(type=type, **STORAGE) for type in ("sk_storage", "inode_storage", "task_storage", "cgrp_storage")},
    **{type: MapSpec(type=type, key_size=8, value_size=8) for type in ("cgroup_storage", "percpu_cgroup_storage")},
    **{type: MapSpec(type=type, key_size=4, value_size=8, max_entries=3) for type in SOCKET_MAPS},
    "read-only": MapSpec(type="hash", **HASHED, flags=uapi.BPF_F_RDONLY),
    "write-only": MapSpec(type="array", **HASHED, flags=uapi.BPF_F_WRONLY),
    "read-only for programs": MapSpec(type="array", **{**HASHED, "max_entries": 1}, flags=uapi.BPF_F_RDONLY_PROG),
}  # fmt: skip

#: Helpers that the verifier lets programs use on a type.
ELEMENTS = ("map_lookup_elem", "map_update_elem", "map_delete_elem")
PER_CPU = (*ELEMENTS, "map_lookup_percpu_elem")
ENDS = ("map_push_elem", "map_pop_elem", "map_peek_elem")
HELPERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("array", "hash", "lru_hash", "lpm_trie"), ELEMENTS),
    **dict.fromkeys(("percpu_array", "percpu_hash", "lru_percpu_hash"), PER_CPU),
    **dict.fromkeys(("array_of_maps", "hash_of_maps"), ("map_lookup_elem",)),
    "ringbuf": ("ringbuf_output", "ringbuf_query"),
    **dict.fromkeys(("queue", "stack"), ENDS),
    "bloom_filter": ("map_push_elem", "map_peek_elem"),
}  # fmt: skip
DESCRIPTOR_VALUES = {"prog_array", "perf_event_array", "cgroup_array", "array_of_maps", "hash_of_maps", "xskmap"}
THINGS = ("filter", "xdp", "inner", "other", "event", "nothing")


class Named(NamedTuple):
    """A thing that each side has a descriptor of."""

    name: str


def filled(offset: int, data: bytes) -> Code:
    """The bytes on the stack."""
    return [
        Instruction(ebpf.ST | ebpf.MEM | ebpf.B, ebpf.FP, 0, offset + i, byte - 256 if byte > 127 else byte)
        for i, byte in enumerate(data)
    ]


def use(helper: str, key: bytes, value: bytes, flags: int) -> Code:
    """Call a helper; ``cb`` gets R0 (of a lookup: 256 and the value's last byte), and the first bytes at R2 after."""
    buffer = value if helper in ENDS else key
    found = [
        Instruction(ebpf.LDX | ebpf.MEM | ebpf.B, 0, 0, len(value) - 1),
        Instruction(ebpf.ALU64 | ebpf.ADD, 0, 0, 0, 256),
    ]
    if helper.startswith("ringbuf"):
        # Its first two words are a record.
        given = [*stack(2, -16), *mov(3, 16), *mov(4, flags)] if helper == "ringbuf_output" else mov(2, flags)
        return main(filled(-16, (value + key)[:16].ljust(16, b"\0")), the_map(1), given, call(helper))
    return main(
        filled(-32, buffer + bytes(16 - len(buffer))),
        filled(-16, value[:16] + bytes(16 - len(value[:16]))),
        the_map(1),
        stack(2, -32),
        [*stack(3, -16), *mov(4, flags)] if helper == "map_update_elem" else mov(3, flags),
        call(helper),
        unless_null(0, found if value else mov(0, 1)) if "lookup" in helper else [],
        get(1, 10, -32),
        [Instruction(ebpf.STX | ebpf.MEM | ebpf.DW, 9, 1, CB + 8)],
    )  # fmt: skip


class Half:
    """One side: its map and the things that its descriptors can name."""

    def __init__(self, side: Side, spec: MapSpec) -> None:
        self.side, self.backend = side, side.backend
        self.fd = create(side, spec)
        self.things = {
            "filter": self.load("socket_filter"),
            "xdp": self.load("xdp"),
            "inner": create(side, INNER),
            "other": create(side, MapSpec(type="hash", **HASHED)),
            "event": self.event(),
            "nothing": 98765,
        }
        self.ids = {
            struct.pack("=I", id): name
            for name, id in (
                *((n, self.backend.program_info(self.things[n]).id) for n in ("filter", "xdp")),
                *((n, self.backend.map_info(self.things[n]).id) for n in ("inner", "other")),
            )
        }

    def load(self, type: str) -> int:
        return self.backend.program_load(ProgramSpec(type=type, instructions=(*mov(0, 0), EXIT)), [])

    def event(self) -> int:
        return self.backend.perf_buffer(0, 1) if isinstance(self.backend, EmulatorBackend) else perf_event(0)

    def given(self, argument: Any) -> Any:
        """An argument with the descriptors that this side has for it."""
        if isinstance(argument, Named):
            return struct.pack("=I", self.things[argument.name])
        if isinstance(argument, list):
            return b"".join(self.given(each) for each in argument)
        return argument

    def run(self, program: Code) -> bytes:
        fd = self.backend.program_load(ProgramSpec(instructions=tuple(program), type="sched_cls"), [self.fd])
        try:
            return self.backend.program_run(fd, FRAME, bytes(192)).context[CB : CB + 16]
        finally:
            self.backend.close(fd)

    def close(self) -> None:
        for fd in (self.fd, *(fd for name, fd in self.things.items() if name != "nothing")):
            os.close(fd) if fd == self.things["event"] and fd < 1 << 20 else self.backend.close(fd)


@cache
def sides() -> tuple[Side, Side]:
    from kbpf.kernel.backend import KernelBackend

    return Side(KernelBackend()), Side(EmulatorBackend())


KEYS = st.integers(0, 6)
FLAGS = st.sampled_from((0, 0, 0, 1, 2, 3, 4, 5, 6, 8, 1 << 63))
BYTES = st.integers(0, 255)


class MapMachine(RuleBasedStateMachine):
    """One map on both sides. Subclasses say which."""

    name: str

    def __init__(self) -> None:
        super().__init__()
        self.spec = SPECS[self.name]
        self.type = self.spec.type
        self.halves = [Half(side, self.spec) for side in sides()]
        cpus = self.halves[0].backend.possible_cpus()
        self.value_size = -(-self.spec.value_size // 8) * 8 * cpus if "percpu" in self.type else self.spec.value_size
        self.sockets = socket.socketpair()
        self.others = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2)]
        self.others[0].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        for each in self.others:
            each.bind(("127.0.0.1", 0))
        self.objects = [self.sockets[0].fileno(), self.sockets[1].fileno(), os.pidfd_open(os.getpid()), 98765]

    def teardown(self) -> None:
        for half in self.halves:
            half.close()
        os.close(self.objects[2])
        for each in (*self.sockets, *self.others):
            each.close()

    def key(self, number: int) -> bytes | None:
        if not self.spec.key_size:
            # One that a map without keys refuses.
            return b"\0" if number == 6 else None
        if self.type == "lpm_trie":
            length, data = ((0, 0), (1, 0x80), (8, 0x40), (9, 0x41), (16, 0xFF40), (16, 0), (17, 0))[number]
            return struct.pack("=IH", length, data)
        if self.type.endswith("_storage") and self.spec.key_size == 4:
            return struct.pack("=i", self.objects[number % 4])
        return number.to_bytes(self.spec.key_size, "little")

    def value(self, number: int) -> Any:
        if self.type in DESCRIPTOR_VALUES:
            return Named(THINGS[number % len(THINGS)])
        if self.type in SOCKET_MAPS:
            given = (*self.others, self.sockets[number // 4 % 2], None)[number % 4]
            return struct.pack("=q", given.fileno() if given else 98765)
        if self.type in ("devmap", "devmap_hash", "cpumap"):
            target = struct.pack("=I", (0, 1, 1, 987654 if self.type != "cpumap" else 16385)[number % 4])
            return target if self.value_size == 4 else [target, (Named("xdp"), bytes(4), bytes(4))[number % 3]]
        return bytes((number + i) & 255 for i in range(self.value_size))

    def both(self, command: str, *arguments: Any) -> Any:
        """The outcome of a command, the same on both sides."""
        results = []
        for half in self.halves:
            given = [half.given(argument) for argument in arguments]
            result = attempt(lambda: getattr(half.backend, command)(half.fd, *given))  # noqa: B023
            results.append(self.shown(half, result))
        assert results[1] == results[0], (command, arguments)
        return results[0]

    def shown(self, half: Half, result: Any) -> Any:
        """A result in which ids of this side are names."""
        if isinstance(result, Batch):
            size, key_size = self.value_size, self.spec.key_size
            pairs = [
                (result.keys[i * key_size : (i + 1) * key_size], half.ids.get(value, value))
                for i, value in enumerate(result.values[i * size : (i + 1) * size] for i in range(result.length))
            ]
            return (sorted(pairs), result.token) if self.type in UNORDERED else (pairs, result.token)
        return half.ids.get(result, result) if self.type in DESCRIPTOR_VALUES and isinstance(result, bytes) else result

    @rule(key=KEYS, value=BYTES, flags=FLAGS)
    def update(self, key: int, value: int, flags: int) -> None:
        self.both("map_update", self.key(key), self.value(value), flags)

    @rule(key=KEYS, value=BYTES)
    def set(self, key: int, value: int) -> None:
        self.both("map_update", self.key(key), self.value(value), 0)

    @rule(key=KEYS, flags=st.sampled_from((0, 0, 4, 1)))
    def lookup(self, key: int, flags: int) -> None:
        self.both("map_lookup", self.key(key), self.value_size, flags)

    @rule(key=KEYS)
    def delete(self, key: int) -> None:
        self.both("map_delete", self.key(key))

    @rule(key=KEYS, flags=st.sampled_from((0, 0, 4, 1)))
    def take(self, key: int, flags: int) -> None:
        self.both("map_lookup_and_delete", self.key(key), self.value_size, flags)

    @rule(key=st.none() | KEYS)
    def next_key(self, key: int | None) -> None:
        if self.type not in UNORDERED:
            self.both("map_next_key", None if key is None else self.key(key), self.spec.key_size)
            return
        assert self.all_keys(self.halves[1]) == self.all_keys(self.halves[0])

    def all_keys(self, half: Half) -> list[bytes]:
        found: list[bytes] = []
        following: Callable[[bytes | None], Any] = lambda key: attempt(  # noqa: E731
            lambda: half.backend.map_next_key(half.fd, key, self.spec.key_size)
        )
        key = following(None)
        while isinstance(key, bytes):
            found.append(key)
            key = following(key)
        return [*sorted(found), key]

    @rule(delete=st.booleans())
    def everything(self, delete: bool) -> None:
        # A bucket of a hash is never cut: there must be room for it.
        self.both("map_lookup_batch", None, 64, self.spec.key_size, self.value_size, delete)

    @precondition(lambda self: self.type not in UNORDERED)
    @rule(start=st.none() | KEYS, count=st.integers(1, 4), delete=st.booleans())
    def some(self, start: int | None, count: int, delete: bool) -> None:
        token = None if start is None else self.key(start)
        self.both("map_lookup_batch", token, count, self.spec.key_size, self.value_size, delete)

    @rule(keys=st.lists(KEYS, max_size=4), value=BYTES, flags=st.sampled_from((0, 0, 0, 1, 4)))
    def update_batch(self, keys: list[int], value: int, flags: int) -> None:
        values = [part for i in range(len(keys)) for part in (self.value(value + i),)]
        self.both("map_update_batch", [self.key(k) or b"" for k in keys], values, len(keys), flags)

    @rule(keys=st.lists(KEYS, max_size=4), flags=st.sampled_from((0, 0, 0, 1, 4)))
    def delete_batch(self, keys: list[int], flags: int) -> None:
        self.both("map_delete_batch", [self.key(k) or b"" for k in keys], len(keys), flags)

    @rule(value=BYTES)
    def missing_pointers(self, value: int) -> None:
        self.both("map_lookup", None, self.value_size)
        self.both("map_update", None, self.value(value))
        self.both("map_lookup_and_delete", None, self.value_size)

    @precondition(lambda self: self.type == "bloom_filter")
    @rule(value=BYTES)
    def contains(self, value: int) -> None:
        self.both("map_contains", self.value(value))

    @precondition(lambda self: self.type == "ringbuf")
    @rule(records=st.integers(0, 3))
    def consume(self, records: int) -> None:
        """User space goes past a few of a program's records; what lies in memory is the same."""
        seen: list[Any] = []
        for half in self.halves:
            # Nobody may write to a frozen map.
            position = attempt(lambda: half.backend.map_memory(half.fd, PAGE, 0, True))  # noqa: B023
            if isinstance(position, tuple):
                seen.append(position)
                continue
            produced = half.backend.map_memory(half.fd, 2 * PAGE, PAGE)
            consumed, end = (int.from_bytes(view[:8], "little") for view in (position, produced))
            position[:8] = min(consumed + 24 * records, end).to_bytes(8, "little")
            seen.append((consumed, end, bytes(produced[PAGE:])))
            position.release()
            produced.release()
        assert seen[1] == seen[0]

    @rule(often=st.integers(0, 15))
    def freeze(self, often: int) -> None:
        if not often:
            self.both("map_freeze")

    @precondition(lambda self: self.type in HELPERS and self.spec.value_size <= 16)
    @rule(data=st.data(), key=KEYS, value=BYTES, flags=st.sampled_from((0, 0, 0, 1, 2, 3)))
    def by_a_program(self, data: st.DataObject, key: int, value: int, flags: int) -> None:
        helpers = HELPERS[self.type]
        if self.spec.flags & uapi.BPF_F_RDONLY_PROG:
            helpers = ("map_lookup_elem",)
        helper = data.draw(st.sampled_from(helpers))
        # A map in a map has no bytes.
        size = 0 if self.type.endswith("_of_maps") else self.spec.value_size or 8
        given = bytes((value + i) & 255 for i in range(size))
        program = use(helper, self.key(key) or b"", given, flags)
        results = [attempt(lambda: half.run(program)) for half in self.halves]  # noqa: B023
        assert results[1] == results[0], helper


@pytest.fixture(autouse=True)
def one_processor() -> Iterator[None]:
    """Programs see their own processor's values: here the first one's."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {0})
    yield
    os.sched_setaffinity(0, before)


def test_every_type_of_map_goes_through_random_sequences() -> None:
    assert {spec.type for spec in SPECS.values()} == KINDS.keys()


@pytest.mark.parametrize("name", SPECS)
def test_random_sequences_have_the_kernels_results(name: str) -> None:
    machine = type("Machine", (MapMachine,), {"name": name})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
