"""What is loaded, as it is listed, opened and counted, on both backends alike."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import kbpf
from kbpf.emulator import add_cgroup, remove_cgroup
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.runtime import inventory
from kbpf.runtime.backends import get_backend
from kbpf.specs import MapSpec, ProgramSpec
from kbpf.testing.btf_bytes import BtfBytes
from kbpf.testing.requirements import available

EXIT = Instruction(ebpf.JMP | ebpf.EXIT)
RETURNS_0 = (Instruction(ebpf.ALU64 | ebpf.MOV), EXIT)
RETURNS_1 = (Instruction(ebpf.ALU64 | ebpf.MOV, imm=1), EXIT)
HASH = MapSpec(type="hash", key_size=4, value_size=8, max_entries=7, name="counts")
PROGRAMS = MapSpec(type="prog_array", key_size=4, value_size=4, max_entries=1)
#: What the emulator has no word for: memory, native code, and what the verifier did.
UNSAID = {"memlock": None, "jited_size": 0, "verified_instructions": 0}


def uses_map(type: str = "socket_filter") -> ProgramSpec:
    named = (*ebpf.ld_imm64(1, 0, ebpf.PSEUDO_MAP_IDX), *RETURNS_0)
    return ProgramSpec(type=type, name="user", instructions=named, maps=(HASH,))


def comparable(info: Any) -> Any:
    """Without ids and times, which are each machine's own."""
    own = {name: 0 for name in ("id", "load_time_ns", "btf_id") if hasattr(info, name)}
    own |= {name: value for name, value in UNSAID.items() if hasattr(info, name)}
    if hasattr(info, "tag") and not available("linux-6.18"):
        own["tag"] = b""  # Of SHA-1 there.
    return replace(info, **own, **({"map_ids": ()} if hasattr(info, "map_ids") else {}))


@pytest.mark.requires("kernel")
def test_both_backends_tell_the_same_of_programs_and_maps() -> None:
    told = []
    for backend in ("kernel", "emulator"):
        with kbpf.load_program(uses_map(), backend=backend) as program:
            told.append((comparable(program.info), comparable(program.maps[0].info), program.xlated()[1:]))
            assert program.info.map_ids == (program.maps[0].id,)
            assert program.info.load_time_ns > 0
    assert told[0] == told[1]


def test_programs_maps_and_links_are_listed_by_rising_id(backend: Any) -> None:
    with kbpf.load_program(uses_map(), backend=backend) as program:
        programs, maps = list(kbpf.programs(backend)), list(kbpf.maps(backend))
        assert program.info in programs
        assert program.maps[0].info.id in [info.id for info in maps]
        for listed in (programs, maps, list(kbpf.links(backend))):
            ids = [info.id for info in listed]
            assert ids == sorted(set(ids))
    assert program.name not in [info.name for info in kbpf.programs(backend) if info.id == programs[-1].id]


def test_what_vanishes_while_it_is_listed_is_left_out(backend: Any) -> None:
    maps = [kbpf.Map.create(HASH, backend) for _ in range(3)]
    ids = [map.id for map in maps]
    listing = kbpf.maps(backend)
    seen = [next(listing)]
    while seen[-1].id < ids[0]:
        seen.append(next(listing))
    maps[1].close()
    rest = [info.id for info in listing]
    assert ids[1] not in rest and ids[2] in rest
    for map in maps:
        map.close()


def test_a_listing_survives_others_that_make_and_close(backend: Any) -> None:
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            kbpf.Map.create(HASH, backend).close()

    thread = threading.Thread(target=churn)
    with kbpf.Map.create(HASH, backend) as kept:
        id = kept.id
        thread.start()
        try:
            for _ in range(20):
                assert id in [info.id for info in kbpf.maps(backend)]
        finally:
            stop.set()
            thread.join()


def test_runs_are_counted_only_while_statistics_are_on(backend: Any) -> None:
    with kbpf.load_program(ProgramSpec(type="xdp", instructions=RETURNS_0), backend=backend) as program:
        assert (program.info.run_count, program.info.run_time_ns) == (0, 0)
        with kbpf.statistics(backend):
            program.run(bytes(60), repeat=10)
            program.run_all([bytes(60)] * 5)
            info = program.info
            assert info.run_count == 15 and info.run_time_ns > 0
        program.run(bytes(60))
        assert program.info.run_count in (15, 16)  # Somebody else may count on the kernel.


def test_native_code_is_counted_too() -> None:
    pytest.importorskip("llvmlite")
    spec = ProgramSpec(type="xdp", instructions=RETURNS_0)
    with kbpf.load_program(spec, backend="emulator", engine="jit") as program, kbpf.statistics("emulator"):
        program.run_all([bytes(60)] * 100)
        program.run(bytes(60))
        assert program.info.run_count == 101


def test_a_tail_call_counts_for_the_program_that_made_it(backend: Any) -> None:
    calls = (
        *ebpf.ld_imm64(2, 0, ebpf.PSEUDO_MAP_IDX),
        Instruction(ebpf.ALU64 | ebpf.MOV, 3),
        Instruction(ebpf.JMP | ebpf.CALL, imm=12),
        *RETURNS_0,
    )
    first = kbpf.load_program(ProgramSpec(type="xdp", instructions=calls, maps=(PROGRAMS,)), backend=backend)
    second = kbpf.load_program(ProgramSpec(type="xdp", instructions=RETURNS_0), backend=backend)
    with first, second, kbpf.statistics(backend):
        assert first.maps[0].info.owner_type == "xdp"
        first.maps[0].update_element(bytes(4), second.fileno().to_bytes(4, "little"))
        first.run(bytes(60))
        assert (first.info.run_count, second.info.run_count) == (1, 0)


def test_a_map_is_bound_to_a_program(backend: Any) -> None:
    with kbpf.load_program(ProgramSpec(type="xdp", instructions=RETURNS_0), backend=backend) as program:
        with kbpf.Map.create(HASH, backend) as map:
            id = map.id
            program.bind_map(map)
            program.bind_map(map)
        assert program.info.map_ids == (id,)
        with kbpf.Map.open(id=id, backend=backend) as again:
            assert again.name == "counts"


def test_maps_that_no_instruction_names_stay_with_the_program(backend: Any) -> None:
    """They come first, whatever the order of the spec; last where the kernel is given them one by one."""
    names_the_first = (*ebpf.ld_imm64(2, 0, ebpf.PSEUDO_MAP_IDX), *RETURNS_0)
    with kbpf.Map.create(HASH, backend) as named, kbpf.Map.create(HASH, backend) as spare:
        ids = named.id, spare.id
        spec = ProgramSpec(type="xdp", instructions=names_the_first, maps=(HASH, HASH, HASH))
        program = kbpf.load_program(spec, [named, spare, spare], backend=backend)
    with program:
        one_by_one = backend == "kernel" and not available("linux-6.14")
        assert program.info.map_ids == (ids if one_by_one else ids[::-1])
        kbpf.Map.open(id=ids[1], backend=backend).close()


@pytest.mark.requires("linux-6.14")
def test_there_are_at_most_64_maps_with_those_that_no_instruction_names(backend: Any) -> None:
    spec = ProgramSpec(type="socket_filter", instructions=RETURNS_0, maps=(HASH,) * 65)
    with ExitStack() as stack:
        maps = [stack.enter_context(kbpf.Map.create(HASH, backend)) for _ in range(65)]
        kbpf.load_program(spec, [*maps[:64], maps[0]], backend=backend).close()
        with pytest.raises(kbpf.VerifierError, match="limit of 64"):
            kbpf.load_program(spec, maps, backend=backend)


def test_programs_that_use_an_array_of_programs_are_of_one_type(backend: Any) -> None:
    def uses(type: str) -> ProgramSpec:
        named = (*ebpf.ld_imm64(2, 0, ebpf.PSEUDO_MAP_IDX), *RETURNS_0)
        return ProgramSpec(type=type, instructions=named, maps=(PROGRAMS,))

    with kbpf.Map.create(PROGRAMS, backend) as table:
        assert table.info.owner_type == ""
        with kbpf.load_program(uses("xdp"), [table], backend):
            assert table.info.owner_type == "xdp"
            with pytest.raises(kbpf.VerifierError) as refused:
                kbpf.load_program(uses("sched_cls"), [table], backend)
            assert refused.value.errno == errno.EINVAL
            kbpf.load_program(uses("xdp"), [table], backend).close()


def test_btf_has_an_id_while_a_map_or_program_has_it(backend: Any) -> None:
    btf = BtfBytes()
    described = replace(HASH, btf=btf.bytes(), btf_key_type_id=btf.int, btf_value_type_id=btf.u64)
    with kbpf.Map.create(described, backend) as map:
        info = map.info
        assert info.btf_id > 0
        assert (info.btf_key_type_id, info.btf_value_type_id) == (btf.int, btf.u64)
        [listed] = [told for told in kbpf.btfs(backend) if told.id == info.btf_id]
        assert (listed.size, listed.name, listed.kernel) == (len(btf.bytes()), "", False)
    # The kernel lets it go a moment later.
    for _ in range(500):
        if info.btf_id not in [told.id for told in kbpf.btfs(backend)]:
            return
        time.sleep(0.01)
    pytest.fail("the BTF stays")


@pytest.mark.requires("kernel")
def test_the_kernels_own_btf_has_a_name() -> None:
    assert "vmlinux" in [told.name for told in kbpf.btfs("kernel") if told.kernel]


@pytest.fixture
def group(backend: Any) -> Iterator[str]:
    """The directory of a new control group."""
    if backend == "emulator":
        yield add_cgroup("/sys/fs/cgroup/inventory").path
        remove_cgroup("/sys/fs/cgroup/inventory")
        return
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    path = Path(next(where for _, where, kind, *_ in mounts if kind == "cgroup2")) / f"kbpf-test-{os.getpid()}"
    path.mkdir()
    yield str(path)
    path.rmdir()


def test_a_link_is_opened_by_id_and_by_pin(backend: Any, group: str) -> None:
    path = f"/sys/fs/bpf/kbpf-test-link-{os.getpid()}"
    with kbpf.load_program(ProgramSpec(type="cgroup_sysctl", instructions=RETURNS_1), backend=backend) as program:
        with program.attach(group) as made:
            info = made.info
            made.pin(path)
        with kbpf.Link.open(path=path, backend=backend) as pinned, kbpf.Link.open(id=info.id, backend=backend) as link:
            assert isinstance(link, kbpf.CgroupLink)
            assert link.info == pinned.info == info
            assert info in list(kbpf.links(backend))
            assert link.attached is None
            with link.program() as found:
                assert found.id == program.id
            with kbpf.Link.open(fd=link.fileno(), backend=backend) as third:
                assert third.id == info.id
            get_backend(backend).unpin(path)
        with pytest.raises(kbpf.BpfError, match="ENOENT"):
            kbpf.Link.open(id=info.id, backend=backend)
        with pytest.raises(kbpf.BpfError, match="ENOENT"):
            kbpf.Link.open(path=path, backend=backend)
        with pytest.raises(TypeError, match="exactly one"):
            kbpf.Link.open(path=path, id=1, backend=backend)


def test_pins_are_found_by_what_is_pinned(backend: Any) -> None:
    first, second, third = (f"/sys/fs/bpf/kbpf-test-pins-{os.getpid()}-{number}" for number in range(3))
    seam = get_backend(backend)
    array = MapSpec(type="array", key_size=4, value_size=4, max_entries=1)
    program = kbpf.load_program(ProgramSpec(instructions=RETURNS_0), backend=backend)
    with kbpf.Map.create(array, backend) as map, program as one:
        before = [inventory.pins(kind, backend) for kind in ("map", "program", "link")]
        map.pin(first)
        map.pin(second)
        one.pin(third)
        try:
            maps, programs, links = [inventory.pins(kind, backend) for kind in ("map", "program", "link")]
            assert sorted(maps[map.id]) == [first, second]
            assert programs[one.id] == [third]
            assert links == before[2]
        finally:
            for path in (first, second, third):
                seam.unpin(path)
        assert map.id not in inventory.pins("map", backend)


def test_values_are_read_as_the_bytes_that_they_are(backend: Any) -> None:
    spec = MapSpec(type="percpu_array", key_size=4, value_size=3, max_entries=2)
    with kbpf.Map.create(spec, backend) as map:
        slots = map.value_codec.size // 8
        map[1] = [b"abc"] * slots
        assert map.raw_value(b"\1\0\0\0") == b"abc\0\0\0\0\0" * slots
        assert dict(map.raw_items()) == {bytes(4): bytes(8 * slots), b"\1\0\0\0": b"abc\0\0\0\0\0" * slots}
        with pytest.raises(KeyError):
            map.raw_value(b"\2\0\0\0")


def test_a_program_is_no_link(backend: Any) -> None:
    program = kbpf.load_program(ProgramSpec(type="xdp", instructions=RETURNS_0), backend=backend)
    with program, pytest.raises(kbpf.BpfError, match="EINVAL"):
        kbpf.Link.open(fd=program.fileno(), backend=backend)


@pytest.mark.requires("kernel")
@pytest.mark.requires("linux-6.17")
def test_links_to_events_tell_the_same_on_both_backends() -> None:
    told = []
    for backend in ("kernel", "emulator"):
        found = []
        for type, source in (
            ("raw_tracepoint", kbpf.RawTracepoint("sched_switch")),
            ("kprobe", kbpf.Uprobe("/bin/bash", 0x31030, returns=True)),
            ("perf_event", kbpf.PerfEvent(type=1, config=2, period=1 << 30, cpu=0)),
        ):
            program = kbpf.load_program(ProgramSpec(type=type, instructions=RETURNS_0), backend=backend)
            with program, program.attach(source, cookie=7) as link:
                info = next(info for info in kbpf.links(backend) if info.program_id == program.id)
                with kbpf.Link.open(fd=link.fileno(), backend=backend) as opened:
                    assert opened.info == info
                    with pytest.raises(kbpf.BpfError) as refused:
                        opened.update(program)
                    with pytest.raises(kbpf.NotSupportedError):
                        opened.detach()
                found.append((replace(info, id=0, program_id=0), refused.value.errno))
        told.append(found)
    assert told[0] == told[1]


@pytest.mark.requires("linux-6.17")
def test_the_streams_of_a_program_that_writes_nothing_are_empty(backend: Any) -> None:
    with kbpf.load_program(ProgramSpec(type="xdp", instructions=RETURNS_0), backend=backend) as program:
        assert program.read_stream() == program.read_stream("stdout") == ""


@pytest.mark.requires("kernel")
def test_an_iterator_walks_as_often_as_it_is_read() -> None:
    """bpf_seq_write(ctx->meta->seq, "x", 1) for each program."""
    write = (
        Instruction(ebpf.LDX | ebpf.MEM | ebpf.DW, 2, 1, 8),
        Instruction(ebpf.JMP | ebpf.JEQ, 2, 0, 7),
        Instruction(ebpf.LDX | ebpf.MEM | ebpf.DW, 1, 1),
        Instruction(ebpf.LDX | ebpf.MEM | ebpf.DW, 1, 1),
        Instruction(ebpf.ST | ebpf.MEM | ebpf.W, 10, 0, -4, ord("x")),
        Instruction(ebpf.ALU64 | ebpf.MOV | ebpf.X, 2, 10),
        Instruction(ebpf.ALU64 | ebpf.ADD, 2, imm=-4),
        Instruction(ebpf.ALU64 | ebpf.MOV, 3, imm=1),
        Instruction(ebpf.JMP | ebpf.CALL, imm=127),
        *RETURNS_0,
    )
    spec = ProgramSpec(
        type="tracing", expected_attach_type="trace_iter", attach_to="bpf_prog", instructions=write, name="each"
    )
    with kbpf.load_program(spec, backend="kernel") as program, program.iterator() as walks:
        assert walks.info.details == {"target_name": "bpf_prog"}
        for _ in range(2):
            assert set(walks.read()) == {ord("x")}
    other = kbpf.load_program(ProgramSpec(type="xdp", instructions=RETURNS_0), backend="kernel")
    with other, pytest.raises(kbpf.BpfError, match="EINVAL"):
        other.iterator()
