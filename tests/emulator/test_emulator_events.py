"""Programs on tracepoints, uprobes and perf events: what happens on the kernel, made to happen in the emulator."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mapcode import Code, call, copy, mov, stack
from sides import Side

import kbpf
from kbpf import PerfEvent, RawTracepoint, Tracepoint, Uprobe
from kbpf.elf.executable import function_offset
from kbpf.emulator import Event, current_task, environment, fire
from kbpf.emulator.memory import Region
from kbpf.emulator.tracepoints import argument_count
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction, ld_imm64
from kbpf.specs import EventSource, MapSpec, ProgramSpec
from kbpf.uapi.constants import BPF_F_SLEEPABLE, BPF_F_USER_STACK, PERF_COUNT_SW_PAGE_FAULTS, PERF_TYPE_SOFTWARE

pytestmark = pytest.mark.requires("kernel")

I = Instruction  # noqa: E741
EXIT = I(ebpf.JMP | ebpf.EXIT)
LDX, STX = ebpf.LDX | ebpf.MEM, ebpf.STX | ebpf.MEM
ROOM = 128
RENAME, RAW_RENAME = Tracepoint("task", "task_rename"), RawTracepoint("task_rename")
TRACEFS = Path("/sys/kernel/tracing")
COOKIE = 0x1234_5678_9ABC


@pytest.fixture(scope="module", autouse=True)
def _tracefs() -> Iterator[None]:
    mounted = (TRACEFS / "events").is_dir()
    if not mounted:
        subprocess.run(["mount", "-t", "tracefs", "nodev", TRACEFS], check=True)
    yield
    if not mounted:
        subprocess.run(["umount", TRACEFS], check=True)


@pytest.fixture(autouse=True)
def _own_machine() -> Iterator[None]:
    names = ("pid_tgid", "tasks", "tracepoints", "raw_tracepoints")
    before = {name: getattr(environment, name) for name in names}
    environment.tasks, environment.tracepoints, environment.raw_tracepoints = {}, {}, {}
    yield
    for name, value in before.items():
        setattr(environment, name, value)


def libc() -> str:
    return next(line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/libc.so" in line)


def labs() -> int:
    """Where a function of libc is, in its file."""
    return function_offset(libc(), "labs")


def recorder(*body: Code, thread: int, helper: str = "get_attach_cookie") -> Code:
    """Count at 0 of the map's value, what a helper gives of the context at 8; the body has the value in R6."""
    flat = [instruction for piece in body for instruction in piece]
    rest = [
        *ld_imm64(6, 0, ebpf.PSEUDO_MAP_IDX_VALUE),
        *mov(1, 1),
        I(ebpf.STX | ebpf.ATOMIC | ebpf.DW, 6, 1, 0, ebpf.ADD),
        *copy(1, 9),
        *call(helper),
        I(STX | ebpf.DW, 6, 0, 8),
        *flat,
    ]
    return [
        *copy(9, 1),
        *call("get_current_pid_tgid"),
        *mov(1, thread),
        # The other threads' events are none of ours.
        I(ebpf.JMP32 | ebpf.JNE | ebpf.X, 0, 1, len(rest)),
        *rest,
        *mov(0, 0),
        EXIT,
    ]


def keep(context_offset: int, at: int, size: int = ebpf.DW) -> Code:
    """A field of the context into the value."""
    return [I(LDX | size, 1, 9, context_offset), I(STX | size, 6, 1, at)]


@contextmanager
def attached(side: Side, type: str, code: Sequence[Instruction], source: EventSource, cookie: int = 0) -> Iterator[Any]:
    """A program on an event; what it yields reads the map's value."""
    backend = side.backend
    value = backend.map_create(MapSpec(name="v", type="array", key_size=4, value_size=ROOM, max_entries=1))
    program = backend.program_load(ProgramSpec(type=type, instructions=tuple(code)), [value])
    link = backend.event_attach(program, source, cookie)
    # The link holds the program.
    backend.close(program)
    try:
        yield lambda: backend.map_lookup(value, bytes(4), ROOM)
    finally:
        backend.close(link)
        backend.close(value)


@contextmanager
def renamed(new: str) -> Iterator[str]:
    """This thread under another name; gives the old one."""
    comm = Path(f"/proc/self/task/{threading.get_native_id()}/comm")
    old = comm.read_text().rstrip("\n")
    comm.write_text(new)
    try:
        yield old
    finally:
        comm.write_text(old)


def text(field: bytes) -> bytes:
    """What is behind the NUL of a name is open."""
    return field.split(b"\0")[0]


def test_a_tracepoints_record(kernel: Side, emulator: Side) -> None:
    thread = threading.get_native_id()
    code = recorder(*(keep(at, 16 + at - 8, ebpf.H) for at in range(8, 46, 2)), thread=thread)
    score = int(Path("/proc/self/oom_score_adj").read_text())
    with attached(kernel, "tracepoint", code, RENAME, COOKIE) as value, renamed("kbpf new") as old:
        truth = value()
    with attached(emulator, "tracepoint", code, RENAME, COOKIE) as value:
        fields = {"pid": thread, "oldcomm": old, "newcomm": "kbpf new", "oom_score_adj": score}
        assert fire(RENAME, fields) == (0,)
        ours = value()
    assert truth[:8] == ours[:8] == (1).to_bytes(8, "little")
    assert truth[8:20] == ours[8:20]
    assert [text(truth[at : at + 16]) for at in (20, 36)] == [text(ours[at : at + 16]) for at in (20, 36)]
    assert truth[52:54] == ours[52:54]


def test_a_raw_tracepoints_arguments(kernel: Side, emulator: Side) -> None:
    """The second one is where the new name is."""
    read_name = [*copy(1, 6), I(ebpf.ALU64 | ebpf.ADD, 1, imm=16), *mov(2, 16), I(LDX | ebpf.DW, 3, 9, 8)]
    code = recorder(read_name, call("probe_read_kernel_str"), [I(STX | ebpf.DW, 6, 0, 40)],
                    thread=threading.get_native_id())  # fmt: skip
    with attached(kernel, "raw_tracepoint", code, RAW_RENAME, COOKIE) as value, renamed("kbpf new"):
        truth = value()
    with attached(emulator, "raw_tracepoint", code, RAW_RENAME, COOKIE) as value:
        name = Region(b"kbpf new\0")
        assert fire(RAW_RENAME, {"args": [0, name.address]}) == (0,)
        ours = value()
    assert truth == ours
    assert text(truth[16:32]) == b"kbpf new"


CHILD = """
import ctypes, sys
labs = ctypes.CDLL(None).labs
labs.argtypes = [ctypes.c_long]
labs.restype = ctypes.c_long
print("ready", flush=True)
sys.stdin.readline()
labs(-1234567890123)
print("done", flush=True)
sys.stdin.readline()
"""
DI, AX, IP = 112, 80, 128


@pytest.mark.parametrize("returns", [False, True])
def test_a_uprobe_on_a_function_of_a_child(kernel: Side, emulator: Side, returns: bool) -> None:
    with subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdout.readline()
        source = Uprobe(libc(), labs(), returns=returns, pid=child.pid)
        code = recorder(
            keep(AX if returns else DI, 16),
            keep(IP, 24),
            [*copy(1, 9), *call("get_func_ip"), I(STX | ebpf.DW, 6, 0, 32)],
            [*copy(1, 9), *copy(2, 6), I(ebpf.ALU64 | ebpf.ADD, 2, imm=40), *mov(3, 8), *mov(4, BPF_F_USER_STACK)],
            [*call("get_stack"), I(STX | ebpf.DW, 6, 0, 48)],
            thread=child.pid,
        )
        with attached(kernel, "kprobe", code, source, COOKIE) as value:
            child.stdin.write(b"\n")
            child.stdin.flush()
            child.stdout.readline()
            truth = value()
        count, _, register, ip, function = struct.unpack_from("=5Q", truth)
        assert (count, register) == (1, 1234567890123 if returns else (1 << 64) - 1234567890123)
        assert function & 0xFFF == source.offset & 0xFFF
        assert (ip == function) is not returns
        environment.pid_tgid = lambda: child.pid << 32 | child.pid
        with attached(emulator, "kprobe", code, source, COOKIE) as value:
            current_task().user_stack = words = struct.unpack_from("=Q", truth, 40)
            assert returns or words == (ip,), "the innermost frame is where the probe is"
            registers = {"ax" if returns else "di": register, "ip": ip}
            assert fire(Uprobe(source.path, source.offset, returns), registers, Event(function=function)) == (0,)
            assert value() == truth
            environment.pid_tgid = lambda: 1 << 32 | 1
            assert fire(source, registers) == (), "another process"
        child.stdin.write(b"\n")
        child.stdin.flush()


def test_a_perf_event_of_page_faults(kernel: Side, emulator: Side) -> None:
    thread = threading.get_native_id()
    source = PerfEvent(type=PERF_TYPE_SOFTWARE, config=PERF_COUNT_SW_PAGE_FAULTS, period=1, pid=thread)
    page = mmap.mmap(-1, mmap.PAGESIZE)
    where = (ctypes.c_char * mmap.PAGESIZE).from_buffer(page)
    expected = ctypes.addressof(where)
    code = faults(thread, expected)
    with attached(kernel, "perf_event", code, source, COOKIE) as value:
        where[0] = b"x"
        truth = value()
    with attached(emulator, "perf_event", code, source, COOKIE) as value:
        assert fire(source, {"sample_period": 1, "addr": expected}) == (0,)
        ours = value()
    del where
    page.close()
    assert truth == ours
    assert truth[16:48] == struct.pack("=QQqq", 1, expected, 0, -errno.EINVAL)


def faults(thread: int, address: int) -> Code:
    """Keep period and address of a fault at that address, and what helpers give that ask for the event.

    Of what was counted only whether it could be read: the event goes on counting.
    """
    asked = [("perf_prog_read_value", size, 0) for size in (24, 16)]
    asked += [("read_branch_records", size, flags) for size, flags in ((24, 0), (20, 0), (24, 1), (24, 2))]
    kept = [*keep(168, 16), *keep(176, 24)]
    for number, (helper, size, flags) in enumerate(asked):
        kept += [*copy(1, 9), *stack(2, -24), *mov(3, size), *mov(4, flags), *call(helper)]
        kept.append(I(STX | ebpf.DW, 6, 0, 32 + 8 * number))
    return [
        I(LDX | ebpf.DW, 3, 1, 176),
        *ld_imm64(2, address),
        I(ebpf.JMP | ebpf.JEQ | ebpf.X, 3, 2, 2),
        *mov(0, 0),
        EXIT,
        *recorder(kept, thread=thread),
    ]


#: Sources, and programs of which type.
PLACES: dict[str, tuple[str, Any]] = {
    "tracepoint": ("tracepoint", lambda: RENAME),
    "unknown tracepoint": ("tracepoint", lambda: Tracepoint("task", "none")),
    "unknown system": ("tracepoint", lambda: Tracepoint("none", "task_rename")),
    "raw tracepoint": ("raw_tracepoint", lambda: RAW_RENAME),
    "unknown raw tracepoint": ("raw_tracepoint", lambda: RawTracepoint("none")),
    "raw tracepoint without a name": ("raw_tracepoint", lambda: RawTracepoint("")),
    "uprobe": ("kprobe", lambda: Uprobe(libc(), labs())),
    "uprobe of this process": ("kprobe", lambda: Uprobe(libc(), labs(), pid=os.getpid())),
    "uprobe of no process": ("kprobe", lambda: Uprobe(libc(), labs(), pid=99_999_999)),
    "uprobe on a return": ("kprobe", lambda: Uprobe(libc(), labs(), returns=True)),
    "uprobe on no file": ("kprobe", lambda: Uprobe("/nowhere", 0)),
    "uprobe on a folder": ("kprobe", lambda: Uprobe("/tmp", 0)),  # any folder
    "uprobe on a device": ("kprobe", lambda: Uprobe("/dev/null", 0)),
    "uprobe without a path": ("kprobe", lambda: Uprobe("", 0)),
    "uprobe behind the file": ("kprobe", lambda: Uprobe(libc(), 1 << 40)),
    "perf event": ("perf_event", lambda: PerfEvent(type=1, config=0, period=1 << 30, cpu=0)),
    "perf event of a process": ("perf_event", lambda: PerfEvent(type=1, config=1, period=1 << 30, pid=os.getpid())),
    "unknown perf event": ("perf_event", lambda: PerfEvent(type=1, config=99, period=1, cpu=0)),
    "unknown type of perf event": ("perf_event", lambda: PerfEvent(type=99, config=0, period=1, cpu=0)),
    "perf event on no processor": ("perf_event", lambda: PerfEvent(type=1, config=0, period=1, cpu=77)),
    "perf event of no process": ("perf_event", lambda: PerfEvent(type=1, config=0, period=1, pid=99_999_999)),
}
TYPES = ("tracepoint", "raw_tracepoint", "raw_tracepoint_writable", "kprobe", "perf_event", "socket_filter")


def refusals(side: Side, type: str, code: Code, source: EventSource, times: int = 1, **spec: Any) -> list[int]:
    """The errnos of attaching a program, so many times at once; 0 where it goes."""
    program = side.backend.program_load(ProgramSpec(type=type, instructions=tuple(code), **spec), [])
    links, found = [], []
    for _ in range(times):
        try:
            links.append(side.backend.event_attach(program, source))
            found.append(0)
        except OSError as error:
            found.append(error.errno or -1)
    for fd in (*links, program):
        side.backend.close(fd)
    return found


@pytest.mark.parametrize("place", PLACES)
def test_where_programs_may_be_attached(kernel: Side, emulator: Side, place: str) -> None:
    fitting, source = PLACES[place][0], PLACES[place][1]()
    for type in TYPES:
        truth = refusals(kernel, type, [*mov(0, 0), EXIT], source, times=2)
        assert refusals(emulator, type, [*mov(0, 0), EXIT], source, times=2) == truth, type
        assert truth[0] or type == fitting or "raw" in place


def test_programs_may_not_read_more_than_there_is(kernel: Side, emulator: Side) -> None:
    for at in range(8, 64, 2):
        code = [I(LDX | ebpf.H, 0, 1, at), EXIT]
        truth = refusals(kernel, "tracepoint", code, RENAME)
        assert refusals(emulator, "tracepoint", code, RENAME) == truth == [0 if at < 46 else errno.EACCES], at
    for name in ("task_rename", "sched_switch", "sys_enter", "sched_process_exit", "signal_generate"):
        for number in range(12):
            code = [I(LDX | ebpf.DW, 0, 1, 8 * number), EXIT]
            truth = refusals(kernel, "raw_tracepoint", code, RawTracepoint(name))
            assert refusals(emulator, "raw_tracepoint", code, RawTracepoint(name)) == truth, (name, number)
    assert argument_count(RAW_RENAME) == 2


def test_sleepable_probes_are_attached(kernel: Side, emulator: Side) -> None:
    place, code = Uprobe(libc(), labs()), [*mov(0, 0), EXIT]
    for side in (kernel, emulator):
        assert refusals(side, "kprobe", code, place, flags=BPF_F_SLEEPABLE) == [0]


def test_at_most_64_programs_are_on_a_tracepoint(kernel: Side, emulator: Side) -> None:
    found = []
    for side in (kernel, emulator):
        code = (*mov(0, 0), EXIT)
        programs = [side.backend.program_load(ProgramSpec(type="tracepoint", instructions=code), []) for _ in range(65)]
        links = []
        for number, program in enumerate(programs):
            try:
                links.append(side.backend.event_attach(program, RENAME))
            except OSError as error:
                found.append((number, error.errno))
        for fd in (*links, *programs):
            side.backend.close(fd)
    assert found == [(64, errno.E2BIG)] * 2


# The library's own words for it.


@pytest.mark.parametrize("backend", ["kernel", "emulator"])
def test_programs_are_attached_and_detached(backend: str) -> None:
    thread = threading.get_native_id()
    spec = ProgramSpec(
        type="tracepoint",
        instructions=tuple(recorder(thread=thread)),
        maps=(MapSpec(name="v", type="array", key_size=4, value_size=ROOM, max_entries=1),),
    )

    def happen() -> None:
        with renamed("kbpf new"):
            if backend == "emulator":
                fire(RENAME)

    def counted(program: kbpf.Program) -> int:
        return int.from_bytes(bytes(program.maps[0][0])[:8], "little")

    with kbpf.load_program(spec, backend=backend) as program:
        with program.attach(RENAME, cookie=7) as link:
            assert link.source == RENAME
            assert link.backend == backend
            happen()
            before = counted(program)
            assert before >= 1
            with pytest.raises(kbpf.BpfError) as caught:
                program.attach(RENAME)
            assert caught.value.errno == errno.EEXIST
            link.detach()
        more = ProgramSpec(type="tracepoint", instructions=(I(LDX | ebpf.DW, 0, 1, 48), EXIT))
        refused = pytest.raises(kbpf.PermissionDeniedError, match="more than the event's record")
        with kbpf.load_program(more, backend=backend) as reader, refused:
            reader.attach(RENAME)
        after = counted(program)
        happen()
        assert counted(program) == after


@pytest.mark.parametrize("backend", ["kernel", "emulator"])
def test_functions_are_found_by_name(backend: str) -> None:
    spec = ProgramSpec(type="kprobe", instructions=(*mov(0, 0), EXIT))
    with kbpf.load_program(spec, backend=backend) as program:
        with program.attach(Uprobe(libc(), "labs")) as link:
            assert link.source == Uprobe(libc(), labs())
        with pytest.raises(kbpf.ObjectError, match="no function"):
            program.attach(Uprobe(libc(), "no_such_function"))


@pytest.mark.parametrize("backend", ["kernel", "emulator"])
def test_raw_tracepoints_run_with_arguments(backend: str) -> None:
    code = (I(LDX | ebpf.DW, 0, 1, 8), EXIT)
    with kbpf.load_program(ProgramSpec(type="raw_tracepoint", instructions=code), backend=backend) as program:
        assert program.run(context=[1, -2]).value == 0xFFFF_FFFE
        with pytest.raises(kbpf.BpfError):
            program.run(context=[1])
        with pytest.raises(ValueError, match="no fields"):
            program.run(context={"mark": 1})
    swap = (I(LDX | ebpf.W, 0, 1, 0), I(ebpf.ST | ebpf.MEM | ebpf.W, 1, 0, 0, 5), EXIT)
    spec = ProgramSpec(type="syscall", instructions=swap, flags=BPF_F_SLEEPABLE)
    with kbpf.load_program(spec, backend=backend) as program:
        done = program.run(context=(9).to_bytes(4, "little"))
        assert (done.value, done.context) == (9, (5).to_bytes(4, "little"))


# What needs no kernel.


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Uprobe("/bin/sh\0", 0),
        lambda: Uprobe("/bin/sh", -1),
        lambda: Uprobe("/bin/sh", 0, pid=0),
        lambda: PerfEvent(type=1, config=0, period=1),
        lambda: PerfEvent(type=1, config=0, period=-1, cpu=0),
        lambda: PerfEvent(type=1, config=0, period=1, pid=-1),
        lambda: PerfEvent(type=1 << 32, config=0, period=1, cpu=0),
    ],
)
def test_events_that_there_cannot_be(wrong: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"NUL|not in|of a process"):
        wrong()


FORK = """name: fork
ID: 366
format:
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;
\tfield:unsigned char common_preempt_count;\toffset:3;\tsize:1;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

\tfield:__data_loc char[] parent_comm;\toffset:8;\tsize:4;\tsigned:0;
\tfield:pid_t parent_pid;\toffset:12;\tsize:4;\tsigned:1;
\tfield:unsigned long args[2];\toffset:16;\tsize:16;\tsigned:0;

print fmt: ""
"""


def test_formats_are_given_by_a_test(emulator: Side) -> None:
    """What is dynamic lies behind the fields, and is read from there by a probe."""
    source = Tracepoint("test", "fork")
    environment.tracepoints[source] = FORK
    code = [
        *copy(9, 1),
        *ld_imm64(6, 0, ebpf.PSEUDO_MAP_IDX_VALUE),
        *keep(8, 8, ebpf.W),
        *keep(12, 12, ebpf.W),
        *keep(24, 16),
        I(LDX | ebpf.H, 3, 9, 8),
        I(ebpf.ALU64 | ebpf.ADD | ebpf.X, 3, 9),
        *copy(1, 6),
        I(ebpf.ALU64 | ebpf.ADD, 1, imm=24),
        *mov(2, 16),
        *call("probe_read_kernel_str"),
        *copy(7, 0),
        *copy(3, 9),
        I(ebpf.ALU64 | ebpf.ADD, 3, imm=12),
        *copy(1, 6),
        I(ebpf.ALU64 | ebpf.ADD, 1, imm=40),
        *mov(2, 20),
        *call("probe_read_kernel"),
        *copy(0, 7),
        EXIT,
    ]
    with attached(emulator, "tracepoint", code, source) as value:
        fields: Mapping[str, Any] = {"parent_comm": "init", "parent_pid": -5, "args": [1, 2]}
        assert fire(source, fields) == (5,)
        assert value()[8:40] == struct.pack("=IiQ16s", 32 | 5 << 16, -5, 2, b"init")
        assert value()[40:60] == struct.pack("=iQQ", -5, 1, 2)
        for wrong in ({"nothing": 1}, {"parent_pid": 1 << 40}, {"args": [1, 2, 3]}, {"args": [1 << 64]}):
            with pytest.raises(ValueError, match=r"field|fit|bytes"):
                fire(source, wrong)
    with pytest.raises(OSError) as caught:
        fire(Tracepoint("test", "none"))
    assert caught.value.errno == errno.ENOENT


def test_writable_raw_tracepoints_change_what_they_get(emulator: Side) -> None:
    environment.raw_tracepoints["test"] = 2
    code = (I(LDX | ebpf.DW, 2, 1, 0), I(ebpf.ST | ebpf.MEM | ebpf.W, 2, 0, 4, 77), *mov(0, 0), EXIT)
    fd = emulator.backend.program_load(ProgramSpec(type="raw_tracepoint_writable", instructions=code), [])
    from kbpf.emulator.events import run_event

    program = emulator.backend.program(fd)  # type: ignore[attr-defined]  # the emulator's
    done = run_event(program, {"buffer": bytes(8), "args": [0, 1]})
    assert done.context == {"buffer": struct.pack("=II", 0, 77)}
    emulator.backend.close(fd)
