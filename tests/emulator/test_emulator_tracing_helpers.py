"""Helpers that ask for the thread and the event, in raw tracepoints' test runs, against the kernel."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import pytest
from mapcode import Code, call, copy, described, function_address, get, link_functions, made, mov, put, stack
from sides import FRAME, Side

from kbpf.emulator import Area, Event, environment
from kbpf.emulator import events as emulated_events
from kbpf.emulator.backend import EmulatorBackend
from kbpf.emulator.task import Task, current_task
from kbpf.emulator.tracing import Value
from kbpf.errors import EmulationFault
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction, ld_imm64
from kbpf.specs import MapSpec, ProgramSpec
from kbpf.uapi import constants as uapi
from kbpf.uapi.enums import HELPERS

pytestmark = pytest.mark.requires("kernel")

I = Instruction  # noqa: E741
EXIT = I(ebpf.JMP | ebpf.EXIT)
#: Bytes of the answer's value: 96 words of what calls write, then what they give.
ROOM, RESULTS = 1024, 768
#: "context", "task", a map by index, a place in the answer, or a number.
Argument: TypeAlias = "str | int | tuple[str, int]"
Call: TypeAlias = "tuple[str, tuple[Argument, ...]]"
M64 = (1 << 64) - 1
USER, KERNEL_ONLY = uapi.BPF_F_USER_STACK, 0


@pytest.fixture(autouse=True)
def _own_threads() -> Iterator[None]:
    before = environment.tasks, environment.branches, environment.signals
    environment.tasks, environment.signals = {}, []
    yield
    environment.tasks, environment.branches, environment.signals = before


def program(calls: Sequence[Call], answer: int) -> Code:
    """Make the calls one after the other; the answer is the map at this index."""
    out = [*copy(7, 1), *ld_imm64(6, answer, ebpf.PSEUDO_MAP_IDX_VALUE)]
    if any("task" in arguments for _, arguments in calls):
        out += [*call("get_current_task_btf"), *copy(8, 0)]
    for number, (helper, arguments) in enumerate(calls):
        for register, argument in enumerate(arguments, 1):
            if isinstance(argument, int):
                out += ld_imm64(register, argument)
            elif argument == "context":
                out += copy(register, 7)
            elif argument == "task":
                out += copy(register, 8)
            elif argument[0] == "map":
                out += ld_imm64(register, int(argument[1]), ebpf.PSEUDO_MAP_IDX)
            else:
                out += [*copy(register, 6), I(ebpf.ALU64 | ebpf.ADD, register, 0, 0, int(argument[1]))]
        out += [*call(helper), I(ebpf.STX | ebpf.MEM | ebpf.DW, 6, 0, RESULTS + 8 * number)]
    return [*out, *mov(0, 0), EXIT]


def at(offset: int) -> tuple[str, int]:
    return "at", offset


def answers(
    side: Side, calls: Sequence[Call], maps: Sequence[int] = (), type: str = "raw_tracepoint"
) -> tuple[list[int], bytes]:
    """What the calls give, signed, and what they have written into bytes of 0xAA."""
    answer = side.backend.map_create(MapSpec(name="a", type="array", key_size=4, value_size=ROOM, max_entries=1))
    side.backend.map_update(answer, bytes(4), b"\xaa" * ROOM)
    code = program(calls, len(maps))
    flags = uapi.BPF_F_SLEEPABLE if type == "syscall" else 0
    fd = side.backend.program_load(ProgramSpec(type=type, instructions=tuple(code), flags=flags), [*maps, answer])
    try:
        side.backend.program_run(fd, b"" if type in ("raw_tracepoint", "syscall") else FRAME, b"")
        found = side.backend.map_lookup(answer, bytes(4), ROOM)
    finally:
        side.backend.close(fd)
        side.backend.close(answer)
    return list(struct.unpack_from(f"={len(calls)}q", found, RESULTS)), found[:RESULTS]


#: What bpf_get_stack and bpf_get_task_stack are asked after the whole stack: bytes and flags.
ASKED = [
    (64, 0),
    (64, 2),
    (16, 1),
    (0, 0),
    (64, 200),
    (60, 0),
    (64, 0x400),
    (64, 1 << 32),
    (64, uapi.BPF_F_USER_BUILD_ID),
]


def words(data: bytes, count: int) -> tuple[int, ...]:
    return struct.unpack_from(f"={count}Q", data)


@pytest.mark.parametrize("helper", ["get_stack", "get_task_stack"])
@pytest.mark.parametrize("user", [KERNEL_ONLY, USER])
def test_stacks_are_cut_and_skipped_as_in_the_kernel(kernel: Side, emulator: Side, helper: str, user: int) -> None:
    """In one run, so that there is one stack; the emulator's thread gets what the kernel's had."""
    first = "context" if helper == "get_stack" else "task"
    for size, flags in ASKED:
        calls: list[Call] = [(helper, (first, at(0), 640, user)), (helper, (first, at(640), size, flags | user))]
        results, data = answers(kernel, calls)
        whole = words(data, results[0] // 8)
        assert whole
        task = current_task()
        task.kernel_stack, task.user_stack = ((), whole) if user else (whole, ())
        task.areas = areas()
        found = answers(emulator, calls)
        assert found[0] == results, (size, flags)
        # The innermost frames tell where in the program the helper was called.
        open_frames = 0 if user or results[1] < 0 else max(4 - (flags & uapi.BPF_F_SKIP_FIELD_MASK), 0)
        assert found[1][640 + 8 * open_frames :] == data[640 + 8 * open_frames :], (size, flags)


def test_a_thread_in_the_kernel_has_no_user_stack_to_take(emulator: Side) -> None:
    current_task().user_stack = (1, 2)
    current_task().set_registers(cs=0x10)
    assert answers(emulator, [("get_task_stack", ("task", at(0), 64, USER))])[0] == [-errno.EFAULT]


def build_id(path: str) -> bytes:
    from elftools.elf.elffile import ELFFile

    with Path(path).open("rb") as file:
        for section in ELFFile(file).iter_sections():  # type: ignore[no-untyped-call]
            if section.name == ".note.gnu.build-id":
                return bytes.fromhex(next(section.iter_notes())["n_desc"])
    return b""


def areas() -> tuple[Area, ...]:
    """This process's memory, with the build ids of the files that are mapped."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        limits, rights, offset, _, _, *path = line.split()
        start, end = (int(limit, 16) for limit in limits.split("-"))
        id = build_id(path[0]) if path and path[0].startswith("/") and "x" in rights else b""
        found.append(Area(start, end, id, int(offset, 16)))
    return tuple(found)


def test_user_stacks_by_build_id(kernel: Side, emulator: Side) -> None:
    flags = USER | uapi.BPF_F_USER_BUILD_ID
    calls: list[Call] = [("get_stack", ("context", at(0), 64, USER)), ("get_stack", ("context", at(64), 256, flags))]
    results, data = answers(kernel, calls)
    current_task().user_stack = words(data, results[0] // 8)
    current_task().areas = areas()
    assert data[64:68] == (1).to_bytes(4, "little"), "libc has a build id"
    assert answers(emulator, calls) == (results, data)


def stack_ids(side: Side, flags: Sequence[int], wanted: MapSpec) -> tuple[list[int], bytes, list[bytes]]:
    """The ids of a run's stacks, the run's user stack, and keys and values afterwards."""
    fd = side.backend.map_create(wanted)
    calls: list[Call] = [("get_stackid", ("context", ("map", 0), flag)) for flag in flags]
    calls.append(("get_stack", ("context", at(0), 640, USER)))
    try:
        ids, whole = answers(side, calls, [fd])
        keys, key = [], None
        while True:
            try:
                key = side.backend.map_next_key(fd, key, 4)
            except OSError as error:
                assert error.errno == errno.ENOENT
                break
            keys.append(key)
        assert sorted(keys) == keys
        values = [key + side.backend.map_lookup(fd, key, wanted.value_size) for key in keys]
        for key in keys:
            side.backend.map_delete(fd, key)
            with pytest.raises(OSError) as caught:
                side.backend.map_lookup(fd, key, wanted.value_size)
            assert caught.value.errno == errno.ENOENT
    finally:
        side.backend.close(fd)
    return ids, whole[: ids[-1]], values


@pytest.mark.parametrize("entries", [1, 3, 4, 64])
@pytest.mark.parametrize(
    "flags",
    [
        [USER],
        [USER, USER],
        [USER, USER | 1],
        [USER, USER | 1 | uapi.BPF_F_REUSE_STACKID],
        [USER, USER | uapi.BPF_F_FAST_STACK_CMP],
        [USER | 200],
        [USER | 0x800],
        [USER | 1 << 32],
    ],
)
def test_stacks_have_the_kernels_ids(kernel: Side, emulator: Side, flags: list[int], entries: int) -> None:
    wanted = MapSpec(name="stacks", type="stack_trace", key_size=4, value_size=80, max_entries=entries)
    truth = stack_ids(kernel, flags, wanted)
    current_task().user_stack = words(truth[1], len(truth[1]) // 8)
    assert stack_ids(emulator, flags, wanted) == truth


@pytest.mark.parametrize("entries", [1, 2, 64])
def test_stack_maps_by_build_id(kernel: Side, emulator: Side, entries: int) -> None:
    wanted = MapSpec(
        name="stacks",
        type="stack_trace",
        key_size=4,
        value_size=96,
        max_entries=entries,
        flags=uapi.BPF_F_STACK_BUILD_ID,
    )
    for flags in ([USER], [USER, USER], [USER, USER | 1], [USER, USER | 1 | uapi.BPF_F_REUSE_STACKID]):
        truth = stack_ids(kernel, flags, wanted)
        current_task().user_stack = words(truth[1], len(truth[1]) // 8)
        current_task().areas = areas()
        assert stack_ids(emulator, flags, wanted) == truth


#: Calls that give the same whatever the machine.
SAME: dict[str, list[Call]] = {
    "no branches are kept": [
        ("get_branch_snapshot", (at(0), size, flags)) for size, flags in ((48, 0), (48, 1), (0, 0), (20, 0))
    ],
    "no cookie": [("get_attach_cookie", ("context",))],
    "signals": [(name, (signal,)) for name in ("send_signal", "send_signal_thread") for signal in (0, 65, 0xFFFFFFFF)],
    "nothing to read": [
        (name, (at(16 * number), 8, address))
        for name in ("probe_read", "probe_read_str", "probe_read_kernel", "probe_read_kernel_str")
        for number, address in enumerate(
            (0, 0x7FFF_FFFF_EFFF, 0x7FFF_FFFF_F000, 0x8000_0000_0000, 1 << 56, 1 << 63, M64)
        )
    ],
    "nothing to read of the user's": [
        (name, (at(16 * number), 8, address))
        for name in ("probe_read_user", "probe_read_user_str")
        for number, address in enumerate((0, 0x7FFF_FFFF_F000, 0x8000_0000_0000, 1 << 63, M64))
    ],
    "reads of nothing": [
        (name, (at(0), 0, 0)) for name in ("probe_read", "probe_read_str", "probe_read_user", "probe_read_kernel")
    ],
}


@pytest.mark.parametrize("name", SAME)
def test_it_gives_what_the_kernel_gives(kernel: Side, emulator: Side, name: str) -> None:
    assert answers(emulator, SAME[name]) == answers(kernel, SAME[name])


@pytest.mark.parametrize("type", ["raw_tracepoint", "socket_filter", "xdp", "sched_cls"])
def test_programs_of_all_types_get_the_thread(kernel: Side, emulator: Side, type: str) -> None:
    """The same one under both names, whose registers are the user's."""
    calls: list[Call] = [
        ("get_current_task", ()),
        ("get_current_task_btf", ()),
        ("task_pt_regs", ("task",)),
        ("get_task_stack", ("task", at(0), 64, 0x400)),
        ("get_branch_snapshot", (at(64), 48, 0)),
    ]
    current_task().user_stack = (1,)
    for side in (kernel, emulator):
        results, _ = answers(side, calls, type=type)
        assert results[0] == results[1] != 0
        assert results[2] not in (0, results[0])
        assert results[3:] == [-errno.EINVAL, -errno.ENOENT]


def test_the_threads_registers_are_read_by_probes(kernel: Side, emulator: Side) -> None:
    """Where user space's segment is: known, and the same on all sides."""
    code = [
        *ld_imm64(6, 0, ebpf.PSEUDO_MAP_IDX_VALUE),
        *call("get_current_task_btf"),
        *copy(1, 0),
        *call("task_pt_regs"),
        *copy(3, 0),
        *copy(1, 6),
        *mov(2, 168),
        *call("probe_read_kernel"),
        EXIT,
    ]
    for side in (kernel, emulator):
        answer = side.backend.map_create(MapSpec(name="a", type="array", key_size=4, value_size=168, max_entries=1))
        fd = side.backend.program_load(ProgramSpec(type="raw_tracepoint", instructions=tuple(code)), [answer])
        assert side.backend.program_run(fd, b"", b"").value == 0
        registers = words(side.backend.map_lookup(answer, bytes(4), 168), 21)
        assert (registers[17], registers[20]) == (0x33, 0x2B)
        side.backend.close(fd)
        side.backend.close(answer)


def find(address: int, flags: int = 0) -> tuple[Code, dict[str, bytes]]:
    """bpf_find_vma, whose callback puts the area's limits into the map."""
    caller = [
        *call("get_current_task_btf"),
        *copy(1, 0),
        *ld_imm64(2, address),
        *function_address(3, 1),
        *put(-8, 0),
        *put(-16, 0),
        *stack(4, -16),
        *mov(5, flags),
        *call("find_vma"),
        *ld_imm64(1, 0, ebpf.PSEUDO_MAP_IDX_VALUE),
        *get(2, 10, -16),
        I(ebpf.STX | ebpf.MEM | ebpf.DW, 1, 2, 0),
        *get(2, 10, -8),
        I(ebpf.STX | ebpf.MEM | ebpf.DW, 1, 2, 8),
        EXIT,
    ]
    callback = [
        *get(1, 2, 0),
        I(ebpf.STX | ebpf.MEM | ebpf.DW, 3, 1, 0),
        *get(1, 2, 8),
        I(ebpf.STX | ebpf.MEM | ebpf.DW, 3, 1, 8),
        *mov(0, 0),
        EXIT,
    ]
    code, starts = link_functions(caller, callback)
    return code, described(starts, parameters=3)


def test_areas_of_memory_are_found(kernel: Side, emulator: Side) -> None:
    mine = current_task()
    mine.areas = areas()
    libc = next(area for area in mine.areas if area.build_id)
    asked = [(libc.start, 0), (libc.end - 1, 0), (libc.start + 5, 1), (0, 0), (M64 >> 1, 0)]
    for address, flags in asked:
        code, info = find(address, flags)
        found = []
        for side in (kernel, emulator):
            answer = side.backend.map_create(MapSpec(name="a", type="array", key_size=4, value_size=16, max_entries=1))
            spec = ProgramSpec(type="raw_tracepoint", instructions=tuple(code), **info)  # type: ignore[arg-type]
            fd = side.backend.program_load(spec, [answer])
            value = side.backend.program_run(fd, b"", b"").value
            found.append((value, words(side.backend.map_lookup(answer, bytes(4), 16), 2)))
            side.backend.close(fd)
            side.backend.close(answer)
        assert found[0] == found[1], (hex(address), flags)


def test_the_function_is_for_probes_alone(kernel: Side, emulator: Side) -> None:
    for type in ("tracepoint", "raw_tracepoint", "perf_event", "kprobe"):
        spec = ProgramSpec(type=type, instructions=(*call("get_func_ip"), EXIT))
        errors = []
        for side in (kernel, emulator):
            try:
                side.backend.close(side.backend.program_load(spec, []))
                errors.append(0)
            except OSError as error:
                errors.append(error.errno or -1)
        assert errors[0] == errors[1] == (0 if type == "kprobe" else 524)


def test_what_user_space_has_is_read(kernel: Side, emulator: Side) -> None:
    text = ctypes.create_string_buffer(b"the user's text")
    start = ctypes.addressof(text)
    names = ("probe_read", "probe_read_user", "probe_read_str", "probe_read_user_str")
    calls: list[Call] = [
        (name, (at(32 * number), size, start)) for size in (4, 16, 32) for number, name in enumerate(names)
    ]
    before = environment.user_memory
    environment.user_memory = lambda address, size: ctypes.string_at(address, size)
    try:
        assert answers(emulator, calls) == answers(kernel, calls)
    finally:
        environment.user_memory = before


def test_sleepable_programs_copy_from_user_space(kernel: Side, emulator: Side) -> None:
    text = ctypes.create_string_buffer(b"the user's text")
    start = ctypes.addressof(text)
    calls: list[Call] = [("copy_from_user", (at(16 * number), size, start)) for number, size in enumerate((0, 4, 16))]
    calls += [("copy_from_user", (at(64), 16, 0x1000)), ("copy_from_user", (at(80), 0, 0x1000))]
    calls += [
        ("copy_from_user_task", (at(96 + 16 * number), size, address, "task", flags))
        for number, (size, address, flags) in enumerate(
            ((16, start, 0), (16, start, 1), (16, 0x1000, 0), (0, 0x1000, 0), (0, 0x1000, 1))
        )
    ]
    calls += [("probe_read", (at(200), 16, start)), ("get_stack", ("context", at(224), 60, 0))]
    before = environment.user_memory
    environment.user_memory = lambda address, size: ctypes.string_at(address, size) if address >= start else None
    try:
        assert answers(emulator, calls, type="syscall") == answers(kernel, calls, type="syscall")
    finally:
        environment.user_memory = before


@pytest.mark.parametrize("size", [1, 8, 13])
def test_samples_have_no_packet_behind_them(kernel: Side, emulator: Side, size: int) -> None:
    """From processor 0: to its own buffer, with what would be a packet's length, to no slot, and to an empty one."""
    flags = (0, 1 << 32, 5 << 32, 1 << 52, 99, 1)
    calls: list[Call] = [("perf_event_output", ("context", ("map", "0"), flag, at(0), size)) for flag in flags]
    found = []
    for side in (kernel, emulator):
        slots = side.backend.possible_cpus()
        wanted = MapSpec(name="e", type="perf_event_array", key_size=4, value_size=4, max_entries=slots)
        answer = MapSpec(name="a", type="array", key_size=4, value_size=ROOM, max_entries=1)
        with made(side, wanted, answer) as maps:
            buffer = side.backend.perf_buffer(0)
            memory = side.backend.map_memory(buffer, 9 * mmap.PAGESIZE, writable=True)
            side.backend.map_update(maps[0], bytes(4), struct.pack("=I", buffer))
            side.backend.map_update(maps[1], bytes(4), b"\xaa" * ROOM)
            spec = ProgramSpec(type="raw_tracepoint", instructions=tuple(program(calls, 1)))
            fd = side.backend.program_load(spec, maps)
            side.backend.program_run(fd, b"", b"", flags=uapi.BPF_F_TEST_RUN_ON_CPU, cpu=0)
            value = side.backend.map_lookup(maps[1], bytes(4), ROOM)
            record = bytes(memory[mmap.PAGESIZE : mmap.PAGESIZE + 12 + size])
            found.append((struct.unpack_from(f"={len(calls)}q", value, RESULTS), record))
            memory.release()
            side.backend.close(fd)
            side.backend.close(buffer)
    assert found[0] == found[1]
    assert found[0][0][:2] == (0, -errno.EINVAL)


# What no test run reaches on the kernel: events that a test makes.


def asked(type: str, event: Event, *calls: Call) -> tuple[list[int], bytes]:
    backend = EmulatorBackend()
    answer = backend.map_create(MapSpec(name="a", type="array", key_size=4, value_size=ROOM, max_entries=1))
    fd = backend.program_load(ProgramSpec(type=type, instructions=tuple(program(calls, 0))), [answer])
    emulated_events.run_event(backend.program(fd), event=event)
    found = backend.map_lookup(answer, bytes(4), ROOM)
    return list(struct.unpack_from(f"={len(calls)}q", found, RESULTS)), found[:RESULTS]


def test_an_event_has_a_cookie_and_a_function() -> None:
    event = Event(cookie=0x1234, function=0xFFFF_FFFF_8100_0000)
    asks: list[Call] = [("get_attach_cookie", ("context",)), ("get_func_ip", ("context",))]
    assert asked("kprobe", event, *asks)[0] == [0x1234, 0xFFFF_FFFF_8100_0000 - (1 << 64)]


def test_an_event_has_a_count_and_branches() -> None:
    event = Event(value=Value(7, 8, 9), branches=bytes(range(48)))
    sizes = [(48, 0), (24, 0), (20, 0), (0, 1), (48, 2)]
    calls: list[Call] = [("perf_prog_read_value", ("context", at(0), size)) for size in (24, 16)]
    calls += [("read_branch_records", ("context", at(64), size, flags)) for size, flags in sizes]
    results, data = asked("perf_event", event, *calls)
    assert results == [0, -errno.EINVAL, 48, 24, -errno.EINVAL, 48, -errno.EINVAL]
    assert data[64:112] == bytes(range(48))
    assert data[:24] == bytes(16) + (9).to_bytes(8, "little"), "the call that failed clears its sixteen bytes"
    without: list[Call] = [("read_branch_records", ("context", at(0), 24, 0))]
    assert asked("perf_event", Event(), *without)[0] == [-errno.ENOENT]


def test_branches_that_the_processor_has_taken(emulator: Side) -> None:
    environment.branches = bytes(range(72))
    results, data = answers(emulator, [("get_branch_snapshot", (at(0), 50, 0))])
    assert (results, data[:50]) == ([48], bytes(range(48)) + b"\xaa\xaa")


def test_another_threads_user_stack_is_not_there(emulator: Side) -> None:
    """A handle of another thread, as a program would have it from elsewhere."""
    other = Task(pid=os.getpid() + 1, tgid=1, user_stack=(1,), kernel_stack=(2, 3))
    calls: list[Call] = [("get_task_stack", (other.address, at(0), 16, flags)) for flags in (USER, 0)]
    assert answers(emulator, calls)[0] == [-errno.EOPNOTSUPP, 16]


def test_what_is_no_thread_faults(emulator: Side) -> None:
    for wrong in (0, 1 << 40, HELPERS["loop"]):
        with pytest.raises(EmulationFault):
            answers(emulator, [("task_pt_regs", (wrong,))])
