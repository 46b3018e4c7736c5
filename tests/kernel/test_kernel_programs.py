"""Program commands on the running kernel."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable

import pytest

from kbpf.backend import LoadRefused
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.kernel import attrs, programs
from kbpf.kernel.attrs import Info
from kbpf.kernel.backend import KernelBackend
from kbpf.specs import MapSpec, ProgramSpec
from kbpf.uapi.structs import STRUCTS

pytestmark = pytest.mark.requires("kernel")

Keep = Callable[[int], int]

EXIT = Instruction(ebpf.JMP | ebpf.EXIT)
#: Linux gives programs the address of a value only where an array has a single one.
ARRAY = MapSpec(type="array", key_size=4, value_size=8, max_entries=1)
FRAME = bytes(12) + b"\x08\x00" + bytes(range(50))


def mov(dst: int, imm: int) -> Instruction:
    return Instruction(ebpf.ALU64 | ebpf.MOV | ebpf.K, dst, 0, 0, imm)


def move(dst: int, src: int) -> Instruction:
    return Instruction(ebpf.ALU64 | ebpf.MOV | ebpf.X, dst, src)


def returns(value: int, **more: object) -> ProgramSpec:
    return ProgramSpec(instructions=(mov(0, value), EXIT), **more)  # type: ignore[arg-type]


def test_info_says_what_was_loaded(kernel: KernelBackend, keep: Keep) -> None:
    info = kernel.program_info(keep(kernel.program_load(returns(7, name="count it"), ())))
    assert (info.type, info.name, info.map_ids, info.gpl_compatible) == ("socket_filter", "count_it", (), True)
    assert info.id > 0 and len(info.tag) == 8
    closed = kernel.program_info(keep(kernel.program_load(returns(7, license="Proprietary"), ())))
    assert not closed.gpl_compatible and closed.tag == info.tag


def test_maps_by_index_become_the_given_maps(kernel: KernelBackend, keep: Keep) -> None:
    maps = [keep(kernel.map_create(ARRAY)), keep(kernel.map_create(ARRAY))]
    kernel.map_update(maps[1], bytes(4), struct.pack("=Q", 41))
    spec = ProgramSpec(
        instructions=(
            *ebpf.ld_imm64(1, 0, ebpf.PSEUDO_MAP_IDX),
            *ebpf.ld_imm64(2, 1, ebpf.PSEUDO_MAP_IDX_VALUE),
            Instruction(ebpf.LDX | ebpf.MEM | ebpf.DW, 0, 2),
            EXIT,
        ),
        maps=(ARRAY, ARRAY),
    )
    fd = keep(kernel.program_load(spec, maps))
    assert set(kernel.program_info(fd).map_ids) == {kernel.map_info(map).id for map in maps}
    assert kernel.program_run(fd, FRAME, b"").value == 41


def test_the_offset_into_a_map_value_is_kept(kernel: KernelBackend, keep: Keep) -> None:
    map = keep(kernel.map_create(ARRAY))
    kernel.map_update(map, bytes(4), struct.pack("=II", 1, 2))
    spec = ProgramSpec(
        instructions=(
            *ebpf.ld_imm64(2, 4 << 32, ebpf.PSEUDO_MAP_IDX_VALUE),
            Instruction(ebpf.LDX | ebpf.MEM | ebpf.W, 0, 2),
            EXIT,
        ),
        maps=(ARRAY,),
    )
    assert kernel.program_run(keep(kernel.program_load(spec, [map])), FRAME, b"").value == 2


def test_a_map_that_is_not_there_is_refused_by_name(kernel: KernelBackend) -> None:
    spec = ProgramSpec(instructions=(*ebpf.ld_imm64(1, 3, ebpf.PSEUDO_MAP_IDX), mov(0, 0), EXIT))
    with pytest.raises(LoadRefused, match="map 3 of 0") as raised:
        kernel.program_load(spec, ())
    assert raised.value.errno == errno.EINVAL


def test_a_refusal_carries_the_verifiers_log(kernel: KernelBackend) -> None:
    with pytest.raises(LoadRefused) as raised:
        kernel.program_load(ProgramSpec(instructions=(EXIT,)), ())
    assert raised.value.errno == errno.EACCES
    assert "R0 !read_ok" in raised.value.log


def test_a_long_log_comes_whole(kernel: KernelBackend) -> None:
    steps = [Instruction(ebpf.ALU64 | ebpf.ADD | ebpf.K, 0, 0, 0, 1)] * 6000
    with pytest.raises(LoadRefused) as raised:
        kernel.program_load(ProgramSpec(instructions=(mov(0, 0), *steps, move(1, 9), EXIT)), (), log_level=2)
    assert len(raised.value.log) > 1 << 16
    assert "\n0: (b7) r0 = 0" in raised.value.log
    assert "R9 !read_ok" in raised.value.log


def test_a_program_type_that_linux_does_not_have_is_einval(kernel: KernelBackend) -> None:
    with pytest.raises(LoadRefused, match="no_such") as raised:
        kernel.program_load(returns(0, type="no_such_type"), ())
    assert raised.value.errno == errno.EINVAL


def test_an_attach_type_is_taken_by_name_or_number(kernel: KernelBackend, keep: Keep) -> None:
    for attach_type in ("cgroup_inet_egress", 1):
        spec = returns(3, type="cgroup_skb", expected_attach_type=attach_type)
        keep(kernel.program_load(spec, ()))
    with pytest.raises(LoadRefused):  # Ingress may return 0 and 1 only.
        kernel.program_load(returns(3, type="cgroup_skb", expected_attach_type="cgroup_inet_ingress"), ())


def test_function_and_line_info_reach_the_kernel(kernel: KernelBackend, keep: Keep) -> None:
    integer = struct.pack("=IIII", 1, 1 << 24, 4, 1 << 24 | 32)
    prototype = struct.pack("=III", 0, 13 << 24, 1)
    function = struct.pack("=III", 5, 12 << 24, 2)
    body, strings = integer + prototype + function, b"\0int\0f\0a.c\0return 0;\0"
    blob = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(body), len(body), len(strings)) + body + strings
    described = returns(
        0, btf=blob, func_info=struct.pack("=II", 0, 3), line_info=struct.pack("=IIII", 0, 7, 11, 3 << 10 | 1)
    )
    info = Info("bpf_prog_info", keep(kernel.program_load(described, ())))
    assert info["btf_id"] > 0
    assert (info["nr_func_info"], info["nr_line_info"]) == (1, 1)


def test_a_run_gives_value_packet_and_time(kernel: KernelBackend, keep: Keep) -> None:
    fd = keep(kernel.program_load(returns(-1), ()))
    done = kernel.program_run(fd, FRAME, b"", repeat=100)
    # Linux takes the Ethernet header off for a socket filter, and puts one of zeros back.
    assert (done.value, done.data, done.context) == (0xFFFFFFFF, bytes(14) + FRAME[14:], b"")
    assert done.duration_ns >= 0


def test_a_run_gives_back_the_context_that_it_was_given(kernel: KernelBackend, keep: Keep) -> None:
    layout = STRUCTS["__sk_buff"]
    cb, mark = layout.fields["cb"].offset, layout.fields["mark"].offset
    spec = ProgramSpec(
        instructions=(
            Instruction(ebpf.LDX | ebpf.MEM | ebpf.W, 0, 1, mark),
            # Older verifiers take no constant that is stored into a context.
            mov(2, 77),
            Instruction(ebpf.STX | ebpf.MEM | ebpf.W, 1, 2, cb),
            EXIT,
        )
    )
    fd = keep(kernel.program_load(spec, ()))
    short = bytes(mark) + struct.pack("=I", 0x1234)
    done = kernel.program_run(fd, FRAME, short)
    assert done.value == 0x1234
    assert len(done.context) == layout.size and done.context[cb : cb + 4] == struct.pack("=I", 77)


def test_a_program_may_grow_the_packet(kernel: KernelBackend, keep: Keep) -> None:
    adjust_head = 44
    spec = ProgramSpec(
        type="xdp", instructions=(mov(2, -100), Instruction(ebpf.JMP | ebpf.CALL, imm=adjust_head), EXIT)
    )
    fd = keep(kernel.program_load(spec, ()))
    assert len(kernel.program_run(fd, FRAME, b"").data) == len(FRAME) + 100


def test_programs_without_a_packet_run_too(kernel: KernelBackend, keep: Keep) -> None:
    add_one = (
        Instruction(ebpf.LDX | ebpf.MEM | ebpf.DW, 2, 1),
        Instruction(ebpf.ALU64 | ebpf.ADD | ebpf.K, 2, 0, 0, 1),
        Instruction(ebpf.STX | ebpf.MEM | ebpf.DW, 1, 2),
        mov(0, 9),
        EXIT,
    )
    sleepable = 1 << 4
    in_place = keep(kernel.program_load(ProgramSpec(type="syscall", flags=sleepable, instructions=add_one), ()))
    done = kernel.program_run(in_place, b"", struct.pack("=Q", 41))
    assert (done.value, done.data, done.context) == (9, b"", struct.pack("=Q", 42))
    raw = ProgramSpec(type="raw_tracepoint", instructions=(Instruction(ebpf.LDX | ebpf.MEM | ebpf.DW, 0, 1), EXIT))
    assert kernel.program_run(keep(kernel.program_load(raw, ())), b"", struct.pack("=Q", 5)).value == 5


def test_packets_that_the_kernel_does_not_run_are_einval(kernel: KernelBackend, keep: Keep) -> None:
    fd = keep(kernel.program_load(returns(0), ()))
    for data in (b"", bytes(13), bytes(3713)):
        with pytest.raises(OSError) as raised:
            kernel.program_run(fd, data, b"")
        assert raised.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    "number", [pytest.param(0, marks=pytest.mark.requires("linux-6.14")), errno.E2BIG, errno.EINVAL]
)
def test_a_kernel_that_takes_no_count_of_maps_is_told_of_each(
    kernel: KernelBackend, keep: Keep, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    sent: list[str] = []

    def command(name: str, /, **values: int | bytes) -> int:
        if name == "prog_load" and "fd_array_cnt" in values and number:
            # Linux before 6.14: what it does not know must be zero.
            raise OSError(number, "attributes of another kernel")
        sent.append(name)
        return attrs.command(name, **values)

    monkeypatch.setattr(programs, "command", command)
    monkeypatch.setattr(programs, "command_with_token", command)
    maps = [kernel.map_create(ARRAY), kernel.map_create(ARRAY)]
    ids = tuple(kernel.map_info(map).id for map in maps)
    program = keep(kernel.program_load(returns(0, maps=(ARRAY, ARRAY)), maps))
    for map in maps:
        os.close(map)
    assert kernel.program_info(program).map_ids == ids
    assert sent == ["prog_load", *(["prog_bind_map"] * 2 if number else [])]
