"""Maps about control groups, against the kernel: who is in a group, and the values of attached programs."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
from mapcode import EXIT, Code, attempt, call, copy, get, made, main, mov, put, run, stack, the_map
from sides import CB, FRAME, Side
from test_emulator_maps_storage import CGROUPS

from kbpf.backend import LoadRefused
from kbpf.emulator import environment
from kbpf.emulator.backend import EmulatorBackend
from kbpf.emulator.events import run_event
from kbpf.emulator.packet import Packet
from kbpf.errors import EmulationFault
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.specs import MapSpec, ProgramSpec
from kbpf.uapi import constants as uapi
from kbpf.uapi.enums import ATTACH_TYPES

pytestmark = [
    pytest.mark.requires("kernel"),
    pytest.mark.skipif(not CGROUPS or not os.access(CGROUPS[0], os.W_OK), reason="no cgroup2 that may be written to"),
]

I = Instruction  # noqa: E741
GROUPS = MapSpec(type="cgroup_array", key_size=4, value_size=4, max_entries=3)
STORAGE = ("cgroup_storage", "percpu_cgroup_storage")


def index(number: int) -> bytes:
    return struct.pack("=i", number)


class Group(NamedTuple):
    """A control group of version 2: its path, a descriptor of it, and its id."""

    path: Path
    fd: int
    id: int


@pytest.fixture
def group() -> Iterator[Group]:
    """A group with nobody in it."""
    path = CGROUPS[0] / f"kbpf-test-{os.getpid()}"
    path.mkdir()
    fd = os.open(path, os.O_RDONLY)
    try:
        yield Group(path, fd, os.fstat(fd).st_ino)
    finally:
        os.close(fd)
        path.rmdir()


@pytest.fixture
def inside(group: Group) -> Iterator[Group]:
    """A group with this process in it, in the emulator too."""
    own = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    before = environment.cgroup_id, environment.cgroup_ancestors
    (group.path / "cgroup.procs").write_text(str(os.getpid()))
    environment.cgroup_id, environment.cgroup_ancestors = group.id, (CGROUPS[0].stat().st_ino,)
    try:
        yield group
    finally:
        environment.cgroup_id, environment.cgroup_ancestors = before
        (CGROUPS[0] / own.lstrip("/") / "cgroup.procs").write_text(str(os.getpid()))


@pytest.mark.parametrize("type", ("cgroup_array", *STORAGE))
def test_what_may_be_created(kernel: Side, emulator: Side, type: str) -> None:
    sizes = (0, 1, 4, 8, 12, 16, 20, 65407, 65408, 32768, 32769)
    given = [{"key_size": key, "value_size": value} for key in sizes for value in sizes]
    size = 4 if type == "cgroup_array" else 8
    given += [{"key_size": size, "value_size": size, "flags": 1 << bit} for bit in range(20)]
    given += [{"key_size": size, "value_size": size, "flags": flags} for flags in (0x18, 0x180)]
    given += [{"key_size": size, "value_size": size, "max_entries": n, "map_extra": e} for n in (0, 1) for e in (0, 1)]
    for spec in given:
        spec = {"max_entries": int(type == "cgroup_array"), **spec}
        results = []
        for side in (kernel, emulator):
            result = attempt(lambda: side.backend.map_create(MapSpec(type=type, **spec)))  # noqa: B023
            if isinstance(result, int):
                side.backend.close(result)
            results.append("made" if isinstance(result, int) else result)
        assert results[1] == results[0], spec


@pytest.fixture
def descriptors(tmp_path: Path, group: Group) -> Iterator[list[int]]:
    """Two groups, one of version 1 where there is such, a file in a group, others, and nothing."""
    one, other = socket.socketpair()
    first_version = [
        Path(line.split()[1]) for line in Path("/proc/mounts").read_text().splitlines() if " cgroup " in line
    ]
    paths = [CGROUPS[0], *first_version[:1], group.path / "cgroup.procs", tmp_path]
    opened = [os.open(path, os.O_RDONLY) for path in paths]
    yield [group.fd, *opened, one.fileno(), 98765, -1]
    for fd in opened:
        os.close(fd)
    one.close()
    other.close()


def test_commands_on_groups_in_random_order(kernel: Side, emulator: Side, descriptors: list[int]) -> None:
    rng = Random(1)
    with made(kernel, GROUPS) as (one,), made(emulator, GROUPS) as (other,):
        for _ in range(400):
            key, value = index(rng.randrange(5)), index(rng.choice(descriptors))
            name, arguments = rng.choice(
                (
                    ("map_update", (key, value, rng.choice((0, 0, 0, 1, 2, 4)))),
                    ("map_lookup", (key, 4)),
                    ("map_delete", (key,)),
                    ("map_next_key", (rng.choice((None, key)), 4)),
                    ("map_lookup_and_delete", (key, 4)),
                    ("map_update_batch", (key, value, 1)),
                    ("map_lookup_batch", (None, 2, 4, 4)),
                )
            )
            results = [
                attempt(lambda: getattr(side.backend, name)(fd, *arguments))  # noqa: B023
                for side, fd in ((kernel, one), (emulator, other))
            ]
            assert results[1] == results[0], (name, arguments)


@pytest.mark.parametrize("helper", ("current_task_under_cgroup", "skb_under_cgroup"))
def test_who_is_in_a_group(kernel: Side, emulator: Side, inside: Group, helper: str) -> None:
    """In the group itself, in the root around it, not in another; no group there, no such index."""
    sibling = CGROUPS[0] / f"kbpf-test-{os.getpid()}-other"
    sibling.mkdir()
    fds = [inside.fd, *(os.open(path, os.O_RDONLY) for path in (CGROUPS[0], sibling))]
    try:
        for number, fd in [*enumerate(fds), (3, -1), (-1, -1)]:
            arguments = [*copy(1, 9), *the_map(2), *mov(3, number % 3 if fd < 0 else 0)]
            if helper.startswith("current"):
                arguments = [*the_map(1), *mov(2, number if fd < 0 else 0)]
            results = []
            for side in (kernel, emulator):
                with made(side, GROUPS) as (map,):
                    if fd >= 0:
                        side.backend.map_update(map, index(0), index(fd))
                    results.append(run(side, main(arguments, call(helper)), [map], type="sched_cls"))
            assert results[1] == results[0], number
    finally:
        for fd in fds[1:]:
            os.close(fd)
        sibling.rmdir()


def test_packets_of_no_socket_are_in_no_group(emulator: Side) -> None:
    backend = emulator.backend
    assert isinstance(backend, EmulatorBackend)
    program = [*copy(1, 1), *the_map(2), *mov(3, 0), *call("skb_under_cgroup"), EXIT]
    with made(emulator, GROUPS) as maps:
        fd = backend.program_load(ProgramSpec(type="sched_cls", instructions=tuple(program)), maps)
        assert backend.program(fd).run_packet(Packet(buffer=FRAME)) == 2**32 - 2
        backend.close(fd)


def storage(type: str, key_size: int = 8, **changes: Any) -> MapSpec:
    return MapSpec(**{"type": type, "key_size": key_size, "value_size": 8, **changes})


def count(map: int) -> Code:
    """Add 1 to the value, which R0 is then."""
    return [
        *the_map(1, map),
        *mov(2, 0),
        *call("get_local_storage"),
        *get(1, 0),
        I(ebpf.ALU64 | ebpf.ADD, 1, 0, 0, 1),
        I(ebpf.STX | ebpf.MEM | ebpf.DW, 0, 1),
        *copy(0, 1),
    ]


def accepting(*pieces: Code) -> Code:
    """`main` that lets packets through."""
    return [*main(*pieces)[:-2], *mov(0, 1), EXIT]


def test_a_test_run_has_a_value_of_its_own(kernel: Side, emulator: Side) -> None:
    """For all its repetitions; the map stays empty."""
    results = []
    for side in (kernel, emulator):
        with made(side, *map_of_each_kind()) as maps:
            spec = ProgramSpec(type="cgroup_skb", instructions=tuple(accepting(count(0), count(0), count(1))))
            fd = side.backend.program_load(spec, maps)
            runs = [side.backend.program_run(fd, FRAME, bytes(192), repeat) for repeat in (1, 5, 1)]
            side.backend.close(fd)
            left = [attempt(lambda: side.backend.map_next_key(map, None, 8)) for map in maps]  # noqa: B023
            results.append(([each.context[CB : CB + 8] for each in runs], left))
    assert results[1] == results[0]


def map_of_each_kind() -> list[MapSpec]:
    return [storage(type) for type in STORAGE]


@pytest.mark.parametrize("maps", ((0, 0), (0, 1), (0, 2), (1, 3), (0, 0, 1)))
@pytest.mark.parametrize("type", ("cgroup_skb", "socket_filter"))
def test_a_program_has_one_of_each_kind(kernel: Side, emulator: Side, maps: tuple[int, ...], type: str) -> None:
    results = []
    for side in (kernel, emulator):
        with made(side, *map_of_each_kind(), *map_of_each_kind()) as fds:
            program = [*(i for map in maps for i in the_map(1, map)), *mov(0, 0), EXIT]
            try:
                side.backend.close(side.backend.program_load(ProgramSpec(type=type, instructions=tuple(program)), fds))
                results.append((0, ""))
            except LoadRefused as error:
                results.append((error.errno or 0, error.log.splitlines()[0]))
    assert results[1] == results[0]


#: Attach types of programs that count the sockets that are made.
MADE, RELEASED = "cgroup_inet_sock_create", "cgroup_inet_sock_release"


class Attached(NamedTuple):
    """Programs that count what happens to sockets in a group, attached in this order, and their maps."""

    maps: tuple[int, ...]
    #: Make a socket of the group, and let it go.
    happen: Callable[[], None]


@pytest.fixture
def attached(kernel: Side, emulator: Side, inside: Group, request: pytest.FixtureRequest) -> Iterator[list[Attached]]:
    """On the kernel and in the emulator, with keys of the size that the test names."""
    from kbpf.kernel.attrs import command

    specs = [storage(type, request.param) for type in STORAGE]
    code = [*count(0), *count(1), *mov(0, 1), EXIT]
    loaded: list[tuple[Side, int, str]] = []
    sides = []
    with made(kernel, *specs) as one, made(emulator, *specs) as other:
        for side, maps in ((kernel, one), (emulator, other)):
            for at in (MADE, RELEASED):
                spec = ProgramSpec(type="cgroup_sock", instructions=tuple(code), expected_attach_type=at)
                loaded.append((side, side.backend.program_load(spec, maps), at))
        for _, fd, at in loaded[:2]:
            command("prog_attach", target_fd=inside.fd, attach_bpf_fd=fd, attach_type=ATTACH_TYPES[at])
        backend = emulator.backend
        assert isinstance(backend, EmulatorBackend)
        programs = [backend.program(fd) for _, fd, _ in loaded[2:]]
        sides.append(Attached(one, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()))
        sides.append(Attached(other, lambda: [run_event(program) for program in programs] and None))
        yield sides
        for _, fd, at in loaded[:2]:
            command("prog_detach", target_fd=inside.fd, attach_bpf_fd=fd, attach_type=ATTACH_TYPES[at])
        for side, fd, _ in loaded:
            side.backend.close(fd)


@pytest.mark.parametrize("attached", (8, 16), indirect=True)
def test_the_values_of_attached_programs(
    kernel: Side, emulator: Side, attached: list[Attached], inside: Group, request: pytest.FixtureRequest
) -> None:
    """One for the group, or one for each attach type too; user space reads, writes and goes through them."""
    size = request.node.callspec.params["attached"]
    keys = [struct.pack("=QII", inside.id, ATTACH_TYPES[at], pad)[:size] for at in (MADE, RELEASED) for pad in (0, 9)]
    keys += [bytes(size), struct.pack("=QII", inside.id, 7, 0)[:size]]
    outcomes = []
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {0})
    for side, has in zip((kernel, emulator), attached, strict=True):
        outcome: list[Any] = []
        for _ in range(3):
            has.happen()
        for map, spec in zip(has.maps, STORAGE, strict=True):
            whole = 8 * side.backend.possible_cpus() if "percpu" in spec else 8
            key = None
            for _ in range(4):
                key = attempt(lambda: side.backend.map_next_key(map, key, size))  # noqa: B023
                outcome.append(key)
                if not isinstance(key, bytes):
                    break
            for key in keys:
                outcome.append(attempt(lambda: side.backend.map_next_key(map, key, size)))  # noqa: B023
                outcome.append(attempt(lambda: side.backend.map_lookup(map, key, whole)))  # noqa: B023
                outcome += [
                    attempt(lambda: side.backend.map_update(map, key, bytes([flags]) * whole, flags))  # noqa: B023
                    for flags in (0, 1, 2, 3, 4, 6, 8)
                ]
                outcome.append(attempt(lambda: side.backend.map_delete(map, key)))  # noqa: B023
                outcome.append(attempt(lambda: side.backend.map_lookup_and_delete(map, key, whole)))  # noqa: B023
            has.happen()
            outcome += [attempt(lambda: side.backend.map_lookup(map, key, whole)) for key in keys]  # noqa: B023
        outcomes.append(outcome)
    os.sched_setaffinity(0, before)
    assert outcomes[1] == outcomes[0]


def test_what_the_verifier_would_have_refused_faults(emulator: Side) -> None:
    array = MapSpec(type="array", key_size=4, value_size=8, max_entries=1)
    for body in (
        [*the_map(1, 0), *mov(2, 1), *call("get_local_storage")],
        [*the_map(1, 1), *mov(2, 0), *call("get_local_storage")],
        [*the_map(1, 0), *mov(2, 0), *call("current_task_under_cgroup")],
        [*put(-8, 0), *the_map(1, 0), *stack(2, -8), *call("map_lookup_elem")],
    ):
        with made(emulator, storage("cgroup_storage"), array) as maps, pytest.raises(EmulationFault):
            run(emulator, accepting(body), maps, type="cgroup_skb")


def test_programs_write_where_the_map_lets_them(emulator: Side) -> None:
    with made(emulator, storage("cgroup_storage", flags=uapi.BPF_F_RDONLY_PROG)) as maps, pytest.raises(EmulationFault):
        run(emulator, accepting(count(0)), maps, type="cgroup_skb")
