"""The commands of bpf(2) that are neither of maps' elements nor of loading, each on the running kernel."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.kernel import attrs
from kbpf.kernel.attrs import Attr, Info
from kbpf.kernel.backend import KernelBackend
from kbpf.kernel.btf import kernel_type
from kbpf.specs import MapSpec, PerfEvent, ProgramSpec, RawTracepoint, Uprobe
from kbpf.testing.btf_bytes import BtfBytes
from kbpf.uapi.constants import (
    BPF_F_ALLOW_MULTI,
    BPF_F_ALLOW_OVERRIDE,
    BPF_F_RDONLY_PROG,
    BPF_F_SLEEPABLE,
    BPF_STREAM_STDERR,
    BPF_STREAM_STDOUT,
    PERF_TYPE_SOFTWARE,
)
from kbpf.uapi.enums import COMMANDS
from kbpf.uapi.structs import ATTRS

pytestmark = pytest.mark.requires("kernel")

Keep = Callable[[int], int]

EXIT = Instruction(ebpf.JMP | ebpf.EXIT)
RETURNS_0 = (Instruction(ebpf.ALU64 | ebpf.MOV), EXIT)
RETURNS_1 = (Instruction(ebpf.ALU64 | ebpf.MOV, imm=1), EXIT)
ARRAY = MapSpec(type="array", key_size=4, value_size=4, max_entries=1)
FRAME = bytes(60)
MOUNTS = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
UNIFIED = next((Path(where) for _, where, kind, *_ in MOUNTS if kind == "cgroup2"), None)


def raises(number: int) -> object:
    return pytest.raises(OSError, check=lambda error: error.errno == number)


def spec(type: str, instructions: tuple[Instruction, ...] = RETURNS_0, **more: object) -> ProgramSpec:
    return ProgramSpec(type=type, instructions=instructions, **more)  # type: ignore[arg-type]


# What is sent.


def test_every_command_of_the_kernel_has_its_attributes() -> None:
    assert set(ATTRS) == set(COMMANDS)


@pytest.mark.parametrize("name", sorted(ATTRS))
def test_attributes_reach_no_further_than_the_last_field_used(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels refuse what they do not know, and so all that is longer than their own attributes must be zero."""
    sent: list[bytes] = []

    def call(number: int, command: int, address: int, size: int) -> int:
        sent.append(bytes(memory(address, size)))
        return 0

    monkeypatch.setattr(attrs.syscall, "_syscall", call)
    for field, where in ATTRS[name].fields.items():
        whole = where.size * where.count
        Attr(name, **{field: b"\xff" * whole}).issue()
        end = where.offset + whole
        assert end <= len(sent[-1]) < end + 8, field
        assert sent[-1].rstrip(b"\0")[-whole:] == b"\xff" * whole


def memory(address: int, size: int) -> bytes:
    return ctypes.string_at(address, size)


# Information.


@pytest.mark.parametrize("kind", ["bpf_map_info", "bpf_prog_info", "bpf_link_info", "bpf_btf_info"])
def test_info_is_read_as_far_as_an_older_kernel_has_it(
    kind: str, kernel: KernelBackend, keep: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    fd = {
        "bpf_map_info": lambda: keep(kernel.map_create(ARRAY)),
        "bpf_prog_info": lambda: keep(kernel.program_load(spec("xdp"), ())),
        "bpf_link_info": lambda: keep(
            kernel.event_attach(keep(kernel.program_load(spec("raw_tracepoint"), ())), RawTracepoint("sched_switch"))
        ),
        "bpf_btf_info": lambda: keep(kernel.btf_load(BtfBytes().bytes())),
    }[kind]()
    id_at = attrs.STRUCTS[kind].fields["id"]
    whole = Info(kind, fd)
    short = attrs.STRUCTS[kind]._replace(size=id_at.offset + id_at.size)
    monkeypatch.setitem(attrs.STRUCTS, kind, short)
    told = Info(kind, fd)
    assert told["id"] == whole["id"] > 0
    assert [told[name] for name, field in short.fields.items() if field.offset >= short.size and not field.bits] == [
        0 for field in short.fields.values() if field.offset >= short.size and not field.bits
    ]


def test_info_tells_of_code_counts_and_memory(kernel: KernelBackend, keep: Keep) -> None:
    fd = keep(kernel.program_load(spec("socket_filter", name="seven"), ()))
    info = kernel.program_info(fd)
    assert (info.xlated_size, info.verified_instructions, info.run_count, info.uid) == (16, 2, 0, os.getuid())
    assert info.jited_size == len(kernel.program_code(fd, jited=True)) > 0
    assert kernel.program_code(fd) == ebpf.encode(RETURNS_0)
    assert info.load_time_ns > 0 and (info.memlock or 0) >= 4096
    later = kernel.program_info(keep(kernel.program_load(spec("socket_filter"), ())))
    assert later.load_time_ns > info.load_time_ns


def test_map_info_tells_of_freezing_and_owners(kernel: KernelBackend, keep: Keep) -> None:
    fd = keep(kernel.map_create(ARRAY))
    assert not kernel.map_info(fd).frozen
    kernel.map_freeze(fd)
    assert kernel.map_info(fd).frozen
    programs = keep(kernel.map_create(MapSpec(type="prog_array", key_size=4, value_size=4, max_entries=1)))
    assert kernel.map_info(programs).owner_type == ""
    kernel.map_update(programs, bytes(4), struct.pack("=I", keep(kernel.program_load(spec("xdp"), ()))))
    info = kernel.map_info(programs)
    assert (info.owner_type, info.owner_jited) == ("xdp", True)


# BTF.


def test_btf_is_loaded_listed_and_read_back(kernel: KernelBackend, keep: Keep) -> None:
    loaded = BtfBytes().bytes()
    fd = keep(kernel.btf_load(loaded))
    info = kernel.btf_info(fd)
    assert (info.size, info.name, info.kernel) == (len(loaded), "", False)
    assert info.id in kernel.ids("btf")
    again = keep(kernel.open_by_id("btf", info.id))
    assert kernel.btf_info(again) == info
    assert kernel.btf_data(again) == loaded
    with raises(errno.EINVAL):
        kernel.btf_load(loaded[:-3])
    with raises(errno.ENOENT):
        kernel.open_by_id("btf", 2**31)


def test_the_kernels_own_btf_has_a_name(kernel: KernelBackend, keep: Keep) -> None:
    info = kernel.btf_info(keep(kernel.open_by_id("btf", 1)))
    assert (info.id, info.name, info.kernel) == (1, "vmlinux", True)
    assert info.size == Path("/sys/kernel/btf/vmlinux").stat().st_size


# Counting.


def test_runs_are_counted_while_the_descriptor_is_open(kernel: KernelBackend, keep: Keep) -> None:
    program = keep(kernel.program_load(spec("xdp"), ()))
    switch = kernel.statistics_enable()
    try:
        kernel.program_run(program, FRAME, b"", repeat=10)
        info = kernel.program_info(program)
        assert info.run_count == 10 and info.run_time_ns > 0
    finally:
        os.close(switch)


# Maps that a program keeps, text that it writes.


def test_a_program_keeps_the_map_that_is_bound_to_it(kernel: KernelBackend, keep: Keep) -> None:
    program = keep(kernel.program_load(spec("xdp"), ()))
    map = kernel.map_create(ARRAY)
    id = kernel.map_info(map).id
    kernel.program_bind_map(program, map)
    kernel.program_bind_map(program, map)
    os.close(map)
    assert kernel.program_info(program).map_ids == (id,)
    assert kernel.map_info(keep(kernel.open_by_id("map", id))).id == id
    with raises(errno.EINVAL):
        kernel.program_bind_map(program, program)


@pytest.mark.requires("linux-6.18")
def test_what_a_program_writes_is_read_from_its_stream(kernel: KernelBackend, keep: Keep) -> None:
    text = b"seven is %d\n"
    format = keep(kernel.map_create(replace(ARRAY, value_size=16, flags=BPF_F_RDONLY_PROG)))
    kernel.map_update(format, bytes(4), text.ljust(16, b"\0"))
    kernel.map_freeze(format)
    body = (
        Instruction(ebpf.ALU64 | ebpf.MOV, 1, imm=BPF_STREAM_STDOUT),
        *ebpf.ld_imm64(2, 0, ebpf.PSEUDO_MAP_IDX_VALUE),
        Instruction(ebpf.ST | ebpf.MEM | ebpf.DW, 10, 0, -8, 7),
        Instruction(ebpf.ALU64 | ebpf.MOV | ebpf.X, 3, 10),
        Instruction(ebpf.ALU64 | ebpf.ADD, 3, imm=-8),
        Instruction(ebpf.ALU64 | ebpf.MOV, 4, imm=8),
        Instruction(ebpf.ALU64 | ebpf.MOV, 5),
        Instruction(
            ebpf.JMP | ebpf.CALL, 0, ebpf.PSEUDO_KFUNC_CALL, imm=kernel_type("bpf_stream_vprintk_impl", "func")
        ),
        EXIT,
    )
    fd = keep(kernel.program_load(spec("syscall", body, flags=BPF_F_SLEEPABLE, maps=(ARRAY,)), [format]))
    # The kernel takes its memory without waiting for it, and where there is none (ENOMEM) nothing is written.
    done = kernel.program_run(fd, b"", b"").value
    assert done in (0, -errno.ENOMEM & 0xFFFFFFFF)
    read = b"".join(iter(lambda: kernel.program_stream(fd, BPF_STREAM_STDOUT, 5), b""))
    assert read == (b"seven is 7\n" if done == 0 else b"")
    assert kernel.program_stream(fd, BPF_STREAM_STDERR, 100) == b""
    with raises(errno.ENOENT):
        kernel.program_stream(fd, 3, 100)


# Iterators.


def iterator(over: str, *body: Instruction) -> ProgramSpec:
    return spec("tracing", (*body, *RETURNS_0), expected_attach_type="trace_iter", attach_to=over)


def test_an_iterator_writes_of_each_thing(kernel: KernelBackend, keep: Keep) -> None:
    """seq_write(meta->seq, "map\\n", 4) for each map: ctx is {meta, map}, meta {seq, session_id, seq_num}."""
    word = int.from_bytes(b"map\n", "little")
    body = (
        Instruction(ebpf.LDX | ebpf.MEM | ebpf.DW, 2, 1, 8),
        Instruction(ebpf.JMP | ebpf.JEQ, 2, 0, 7, 0),
        Instruction(ebpf.LDX | ebpf.MEM | ebpf.DW, 1, 1, 0),
        Instruction(ebpf.LDX | ebpf.MEM | ebpf.DW, 1, 1, 0),
        Instruction(ebpf.ST | ebpf.MEM | ebpf.W, 10, 0, -4, word),
        Instruction(ebpf.ALU64 | ebpf.MOV | ebpf.X, 2, 10),
        Instruction(ebpf.ALU64 | ebpf.ADD, 2, 0, 0, -4),
        Instruction(ebpf.ALU64 | ebpf.MOV, 3, 0, 0, 4),
        Instruction(ebpf.JMP | ebpf.CALL, imm=127),
    )
    map = keep(kernel.map_create(ARRAY))
    link = keep(kernel.iterator_link(keep(kernel.program_load(iterator("bpf_map", *body), ()))))
    assert (kernel.link_info(link).type, kernel.link_info(link).details) == ("iter", {"target_name": "bpf_map"})
    walk = keep(kernel.iterator_open(link))
    text = b"".join(iter(lambda: kernel.read(walk, 4096), b""))
    assert set(text.split()) == {b"map"}
    assert kernel.map_info(map).id in kernel.ids("map")


def test_an_iterator_goes_over_the_elements_of_a_map_or_the_threads_of_a_process(
    kernel: KernelBackend, keep: Keep
) -> None:
    tasks = keep(kernel.program_load(iterator("task"), ()))
    own = keep(kernel.iterator_link(tasks, pid=os.getpid()))
    assert kernel.link_info(own).details == {"target_name": "task", "tid": 0, "pid": os.getpid()}
    thread = keep(kernel.iterator_link(tasks, tid=os.getpid()))
    assert kernel.link_info(thread).details["tid"] == os.getpid()
    with raises(errno.EINVAL):
        kernel.iterator_link(keep(kernel.program_load(spec("xdp"), ())))
    with raises(errno.ENOENT):
        kernel.program_load(iterator("no_such_thing"), ())


# Events.


def test_a_process_tells_which_event_its_descriptor_is_of(kernel: KernelBackend, keep: Keep) -> None:
    program = keep(kernel.program_load(spec("raw_tracepoint"), ()))
    fd = keep(kernel.event_attach(program, RawTracepoint("sched_switch")))
    told = kernel.event_query(os.getpid(), fd)
    assert (told.program_id, told.type, told.name) == (
        kernel.program_info(program).id,
        "raw_tracepoint",
        "sched_switch",
    )
    with raises(524):
        kernel.event_query(os.getpid(), program)
    with raises(errno.ENOENT):
        kernel.event_query(2**30, fd)


def test_a_kernel_that_tells_nothing_of_an_event_is_not_quoted(
    kernel: KernelBackend, keep: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = keep(kernel.program_load(spec("perf_event"), ()))
    faults = PerfEvent(type=PERF_TYPE_SOFTWARE, config=2, period=1 << 30, cpu=0)
    link = keep(kernel.event_attach(program, faults))
    of = attrs.STRUCTS["bpf_link_info"].fields["perf_event.type"].offset
    read = Info.__init__

    def older(self: Info, kind: str, fd: int, **asked: int) -> None:
        read(self, kind, fd, **asked)
        self._data = self._data[:of].ljust(len(self._data), b"\0")

    monkeypatch.setattr(Info, "__init__", older)
    info = kernel.link_info(link)
    assert (info.type, info.program_id, info.details) == ("perf_event", kernel.program_info(program).id, {})


@pytest.mark.requires("linux-6.17")
def test_links_to_events_say_which(kernel: KernelBackend, keep: Keep) -> None:
    raw = keep(kernel.program_load(spec("raw_tracepoint"), ()))
    info = kernel.link_info(keep(kernel.event_attach(raw, RawTracepoint("sched_switch"), cookie=7)))
    assert (info.type, info.details) == ("raw_tracepoint", {"tp_name": "sched_switch", "cookie": 7})
    probe = keep(kernel.program_load(spec("kprobe"), ()))
    info = kernel.link_info(keep(kernel.event_attach(probe, Uprobe("/bin/bash", 0x31030, returns=True), cookie=9)))
    told = {"event": "uretprobe", "file_name": "/bin/bash", "offset": 0x31030, "cookie": 9}
    assert (info.type, info.details) == ("perf_event", told)
    timed = keep(kernel.program_load(spec("perf_event"), ()))
    faults = PerfEvent(type=PERF_TYPE_SOFTWARE, config=2, period=1 << 30, cpu=0)
    info = kernel.link_info(keep(kernel.event_attach(timed, faults, cookie=5)))
    assert info.details == {"event": "event", "type": PERF_TYPE_SOFTWARE, "config": 2, "cookie": 5}


# Places without links.


@pytest.fixture
def group() -> Iterator[int]:
    """The descriptor of a new control group."""
    assert UNIFIED is not None
    path = UNIFIED / f"kbpf-test-commands-{os.getpid()}"
    path.mkdir()
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)
    path.rmdir()


def test_a_control_group_takes_programs_without_a_link(kernel: KernelBackend, keep: Keep, group: int) -> None:
    first, second = (keep(kernel.program_load(spec("cgroup_sysctl", RETURNS_1), ())) for _ in range(2))
    ids = [kernel.program_info(fd).id for fd in (first, second)]
    kernel.program_attach(first, group, "cgroup_sysctl", BPF_F_ALLOW_OVERRIDE)
    assert kernel.program_query(group, "cgroup_sysctl").program_ids == (ids[0],)
    kernel.program_detach(None, group, "cgroup_sysctl")
    with raises(errno.ENOENT):
        kernel.program_detach(None, group, "cgroup_sysctl")
    kernel.program_attach(first, group, "cgroup_sysctl", BPF_F_ALLOW_MULTI)
    kernel.program_attach(second, group, "cgroup_sysctl", BPF_F_ALLOW_MULTI)
    assert kernel.program_query(group, "cgroup_sysctl").program_ids == tuple(ids)
    third = keep(kernel.program_load(spec("cgroup_sysctl", RETURNS_1), ()))
    kernel.program_attach(third, group, "cgroup_sysctl", BPF_F_ALLOW_MULTI, replaced=first)
    left = (kernel.program_info(third).id, ids[1])
    assert kernel.program_query(group, "cgroup_sysctl").program_ids == left
    kernel.program_detach(second, group, "cgroup_sysctl")
    kernel.program_detach(third, group, "cgroup_sysctl")


def test_a_socket_map_takes_a_verdict(kernel: KernelBackend, keep: Keep) -> None:
    map = keep(kernel.map_create(MapSpec(type="sockmap", key_size=4, value_size=4, max_entries=2)))
    verdict = keep(kernel.program_load(spec("sk_skb", RETURNS_1, expected_attach_type="sk_skb_stream_verdict"), ()))
    kernel.program_attach(verdict, map, "sk_skb_stream_verdict")
    found = kernel.program_query(map, "sk_skb_stream_verdict")
    assert found.program_ids == (kernel.program_info(verdict).id,)
    kernel.program_detach(verdict, map, "sk_skb_stream_verdict")
    assert kernel.program_query(map, "sk_skb_stream_verdict").program_ids == ()
    with raises(errno.ENOENT):
        kernel.program_detach(verdict, map, "sk_skb_stream_verdict")


@pytest.mark.parametrize("number", [errno.E2BIG, errno.EINVAL])
def test_what_older_kernels_do_not_know_of_queries_is_left_out(
    kernel: KernelBackend, keep: Keep, group: int, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Linux before 6.6 refuses attributes of a query that reach to links and revisions."""
    original = attrs.syscall.bpf
    revision = ATTRS["prog_query"].fields["link_ids"].offset

    def older(command: int, attr: bytearray) -> int:
        if command == COMMANDS["prog_query"] and any(attr[revision:]):
            raise OSError(number, "attributes of another kernel")
        return original(command, attr)

    monkeypatch.setattr(attrs.syscall, "bpf", older)
    program = keep(kernel.program_load(spec("cgroup_sysctl", RETURNS_1), ()))
    kernel.program_attach(program, group, "cgroup_sysctl")
    found = kernel.program_query(group, "cgroup_sysctl")
    assert (found.program_ids, found.link_ids) == ((kernel.program_info(program).id,), ())
    kernel.program_detach(program, group, "cgroup_sysctl")


def test_a_flow_dissector_is_put_on_a_network_namespace(kernel: KernelBackend, keep: Keep) -> None:
    returns_ok = (Instruction(ebpf.ALU64 | ebpf.MOV), EXIT)
    program = keep(kernel.program_load(spec("flow_dissector", returns_ok), ()))
    namespace = keep(os.open("/proc/self/ns/net", os.O_RDONLY))
    id = kernel.program_info(program).id
    kernel.program_attach(program, 0, "flow_dissector")
    try:
        assert kernel.program_query(namespace, "flow_dissector").program_ids == (id,)
    finally:
        kernel.program_detach(program, 0, "flow_dissector")
    assert kernel.program_query(namespace, "flow_dissector").program_ids == ()
