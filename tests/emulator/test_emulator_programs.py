"""Loading, BPF_PROG_TEST_RUN, the context and helpers, against the kernel."""

from __future__ import annotations

import errno
import struct
from typing import Any

import pytest
from sides import CB, FRAME, Outcome, Side, with_result

from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction, ld_imm64
from kbpf.specs import MapSpec, ProgramSpec
from kbpf.uapi.constants import BPF_F_SLEEPABLE
from kbpf.uapi.structs import STRUCTS

pytestmark = pytest.mark.requires("kernel")

I = Instruction  # noqa: E741
EXIT = I(ebpf.JMP | ebpf.EXIT)
ZERO = I(ebpf.ALU64 | ebpf.MOV | ebpf.K)
MOV_X = ebpf.ALU64 | ebpf.MOV | ebpf.X
CALL = ebpf.JMP | ebpf.CALL
FIELDS = STRUCTS["__sk_buff"].fields


def loaded(side: Side, *program: Instruction, **spec: Any) -> str:
    try:
        fd = side.backend.program_load(ProgramSpec(instructions=program, **spec), [])
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error.errno))
    side.backend.close(fd)
    return "loaded"


REFUSED: dict[str, tuple[Instruction, ...]] = {
    "empty": (),
    "no exit": (ZERO,),
    "unreachable": (ZERO, EXIT, ZERO, EXIT),
    "jump past the end": (ZERO, I(ebpf.JMP | ebpf.JA, 0, 0, 1), EXIT),
    "jump before the start": (ZERO, I(ebpf.JMP | ebpf.JEQ, 0, 0, -3), EXIT),
    "jump into a wide load": (ZERO, I(ebpf.JMP | ebpf.JEQ, 0, 0, 1), *ld_imm64(0, 1), EXIT),
    "half a wide load": (ZERO, I(ebpf.LD_IMM64), EXIT),
    "wide load with junk": (I(ebpf.LD_IMM64), I(0, 1), EXIT),
    "wide load of an unknown kind": (*ld_imm64(0, 1, 9), EXIT),
    "bad descriptor": (*ld_imm64(1, 987654, ebpf.PSEUDO_MAP_FD), ZERO, EXIT),
    "index without maps": (*ld_imm64(1, 0, ebpf.PSEUDO_MAP_IDX), ZERO, EXIT),
    "unknown opcode": (I(0x8F), EXIT),
    "register 11": (I(MOV_X, 11, 1), EXIT),
    "write to the frame pointer": (ZERO, I(MOV_X, 10, 0), EXIT),
    "division by zero": (ZERO, I(ebpf.ALU64 | ebpf.DIV), EXIT),
    "shift too far": (ZERO, I(ebpf.ALU | ebpf.LSH, 0, 0, 0, 32), EXIT),
    "negative shift": (ZERO, I(ebpf.ALU64 | ebpf.ARSH, 0, 0, 0, -1), EXIT),
    "junk in add": (ZERO, I(ebpf.ALU64 | ebpf.ADD, 0, 1), EXIT),
    "junk in mov": (I(MOV_X, 0, 1, 0, 1), EXIT),
    "sign extension of 24 bits": (I(MOV_X, 0, 1, 24), EXIT),
    "division with offset 2": (ZERO, I(ebpf.ALU64 | ebpf.DIV, 0, 0, 2, 1), EXIT),
    "byte order of 24 bits": (ZERO, I(ebpf.ALU | ebpf.END, 0, 0, 0, 24), EXIT),
    "junk in neg": (ZERO, I(ebpf.ALU64 | ebpf.NEG, 0, 0, 0, 1), EXIT),
    "junk in a load": (I(ebpf.LDX | ebpf.MEM | ebpf.W, 0, 1, 0, 1), EXIT),
    "junk in a jump": (ZERO, I(ebpf.JMP | ebpf.JEQ | ebpf.X, 0, 0, 0, 1), EXIT),
    "junk in goto": (ZERO, I(ebpf.JMP | ebpf.JA, 1), EXIT),
    "junk in exit": (ZERO, I(ebpf.JMP | ebpf.EXIT, 0, 0, 0, 1)),
    "junk in a call": (I(CALL, 1, 0, 0, 7), EXIT),
    "sign-extending load of 64 bits": (I(ebpf.LDX | ebpf.MEMSX | ebpf.DW, 0, 1), EXIT),
    "packet load of 64 bits": (I(MOV_X, 6, 1), I(ebpf.LD | ebpf.ABS | ebpf.DW), EXIT),
    "atomic on a byte": (ZERO, I(ebpf.STX | ebpf.ATOMIC | ebpf.B, 10, 0, -8), EXIT),
    "unknown atomic": (ZERO, I(ebpf.STX | ebpf.ATOMIC | ebpf.W, 10, 0, -8, 0x10), EXIT),
    "call out of the program": (I(CALL, 0, 1, 0, 5), EXIT),
    "recursion": (I(CALL, 0, 1, 0, 1), EXIT, I(CALL, 0, 1, 0, -1), EXIT),
    "helper 0": (I(CALL), EXIT),
    "helper that does not exist": (I(CALL, 0, 0, 0, 9999), EXIT),
    "helper of another type": (I(CALL, 0, 0, 0, 44), EXIT),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_the_kernels_errno(kernel: Side, emulator: Side, name: str) -> None:
    expected = loaded(kernel, *REFUSED[name])
    assert expected != "loaded"
    assert loaded(emulator, *REFUSED[name]) == expected


def test_gpl_helpers_want_a_gpl_licence(kernel: Side, emulator: Side) -> None:
    body = (
        *ld_imm64(1, 0x0A21),
        I(ebpf.STX | ebpf.MEM | ebpf.DW, 10, 1, -8),
        I(MOV_X, 1, 10),
        I(ebpf.ALU64 | ebpf.ADD, 1, 0, 0, -8),
        I(ebpf.ALU64 | ebpf.MOV, 2, 0, 0, 8),
        I(CALL, 0, 0, 0, 6),
        EXIT,
    )
    for licence in ("GPL", "Dual MIT/GPL", "MIT", "Proprietary", "gpl", ""):
        assert loaded(emulator, *body, license=licence) == loaded(kernel, *body, license=licence), licence


def test_what_the_emulator_lacks_is_refused_by_name(emulator: Side) -> None:
    system_calls = ProgramSpec(type="syscall", flags=BPF_F_SLEEPABLE, instructions=(I(CALL, 0, 0, 0, 166), EXIT))
    with pytest.raises(OSError, match="bpf_sys_bpf#166"):
        emulator.backend.program_load(system_calls, [])
    with pytest.raises(OSError, match="programs of type lsm"):
        emulator.backend.program_load(ProgramSpec(type="lsm", instructions=(ZERO, EXIT)), [])


READABLE = [
    "len",
    "pkt_type",
    "mark",
    "queue_mapping",
    "protocol",
    "vlan_present",
    "vlan_tci",
    "vlan_proto",
    "priority",
    "ingress_ifindex",
    "ifindex",
    "tc_index",
    "hash",
    "napi_id",
    "gso_segs",
    "gso_size",
]


@pytest.mark.parametrize("field", READABLE)
def test_context_fields_read_as_in_the_kernel(kernel: Side, emulator: Side, field: str) -> None:
    context = bytearray(192)
    for name, value in {
        "mark": 0x12345678,
        "priority": 7,
        "ingress_ifindex": 1,
        "gso_segs": 3,
        "gso_size": 1000,
    }.items():
        struct.pack_into("=I", context, FIELDS[name].offset, value)
    for size, step in ((ebpf.W, 4), (ebpf.H, 2), (ebpf.B, 1)):
        for at in range(0, 4, step):
            program = with_result([I(ebpf.LDX | ebpf.MEM | size, 0, 1, FIELDS[field].offset + at)])
            assert emulator.run(program, FRAME, bytes(context)) == kernel.run(program, FRAME, bytes(context)), (
                size,
                at,
            )


def test_the_control_block_is_read_and_written_in_any_size(kernel: Side, emulator: Side) -> None:
    context = bytearray(192)
    context[CB : CB + 20] = bytes(range(1, 21))
    for size, width in ((ebpf.B, 1), (ebpf.H, 2), (ebpf.W, 4), (ebpf.DW, 8)):
        for at in range(0, 20 - width + 1, width):
            program = [
                I(ebpf.LDX | ebpf.MEM | size, 2, 1, CB + at),
                I(ebpf.ALU64 | ebpf.ADD, 2, 0, 0, 1),
                I(ebpf.STX | ebpf.MEM | size, 1, 2, CB + at),
                ZERO,
                EXIT,
            ]
            assert emulator.run(program, FRAME, bytes(context)) == kernel.run(program, FRAME, bytes(context)), (
                width,
                at,
            )


def run_raw(side: Side, data: bytes, context: bytes) -> Any:
    fd = side.backend.program_load(ProgramSpec(instructions=(I(ebpf.LDX | ebpf.MEM | ebpf.W, 0, 1), EXIT)), [])
    try:
        return side.backend.program_run(fd, data, context)[:3]
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error.errno))
    finally:
        side.backend.close(fd)


@pytest.mark.parametrize("ethertype", (0x0800, 0x86DD, 0x0806, 0x0010, 0x8100, 0x05FF, 0x0600))
def test_data_sizes(kernel: Side, emulator: Side, ethertype: int) -> None:
    for size in (0, 13, 14, 15, 33, 34, 53, 54, 60, 3711, 3712, 3713, 5000):
        data = (bytes(12) + ethertype.to_bytes(2, "big") + bytes(5000))[:size]
        assert run_raw(emulator, data, b"") == run_raw(kernel, data, b""), size


@pytest.mark.parametrize("field", FIELDS)
def test_context_in(kernel: Side, emulator: Side, field: str) -> None:
    for value in (1, 2, 70, 0xFFFF, 0x10000, 0x10001):
        context = bytearray(192)
        size = FIELDS[field].size
        context[FIELDS[field].offset : FIELDS[field].offset + size] = (value & (1 << 8 * size) - 1).to_bytes(
            size, "little"
        )
        if field == "ingress_ifindex" or (field == "ifindex" and value > 1):
            continue
        assert run_raw(emulator, FRAME, bytes(context)) == run_raw(kernel, FRAME, bytes(context)), value


@pytest.mark.parametrize("size", (1, 8, 100, 191, 192, 193, 4096, 4097))
def test_context_sizes(kernel: Side, emulator: Side, size: int) -> None:
    for context in (bytes(size), bytes(size - 1) + b"\1"):
        ours, theirs = run_raw(emulator, FRAME, context), run_raw(kernel, FRAME, context)
        assert (ours if isinstance(ours, str) else ours[:2]) == (theirs if isinstance(theirs, str) else theirs[:2])


@pytest.mark.parametrize("target", (bytes(6), b"\xff" * 6, b"\1" + bytes(5), b"\2" + bytes(5)))
def test_packet_type_by_address(kernel: Side, emulator: Side, target: bytes) -> None:
    program = [I(ebpf.LDX | ebpf.MEM | ebpf.W, 0, 1, FIELDS["pkt_type"].offset), EXIT]
    assert emulator.run(program, target + FRAME[6:]) == kernel.run(program, target + FRAME[6:])


@pytest.mark.parametrize("helper", (26, 68))
def test_loading_bytes(kernel: Side, emulator: Side, helper: int) -> None:
    length = len(FRAME) - 14
    for offset in (
        0,
        1,
        12,
        14,
        length - 8,
        length - 7,
        length,
        length + 6,
        length + 7,
        0xFFFF,
        0x10000,
        0x7FFFFFFF,
        -1,
    ):
        for start in (0, 1, 2) if helper == 68 else (0,):
            program = with_result(
                [
                    I(ebpf.ST | ebpf.MEM | ebpf.DW, 10, 0, -8, -1),
                    I(ebpf.ALU64 | ebpf.MOV, 2, 0, 0, offset),
                    I(MOV_X, 3, 10),
                    I(ebpf.ALU64 | ebpf.ADD, 3, 0, 0, -8),
                    I(ebpf.ALU64 | ebpf.MOV, 4, 0, 0, 8),
                    I(ebpf.ALU64 | ebpf.MOV, 5, 0, 0, start),
                    I(CALL, 0, 0, 0, helper),
                    I(ebpf.LDX | ebpf.MEM | ebpf.DW, 1, 10, -8),
                    I(ebpf.ALU64 | ebpf.XOR | ebpf.X, 0, 1),
                ]
            )
            assert emulator.run(program) == kernel.run(program), (offset, start)


def on_map(side: Side, spec: MapSpec, *programs: list[Instruction]) -> list[Any]:
    """Run programs over one map that has two elements; what they gave, and what user space then sees."""
    fd = side.backend.map_create(spec)
    outcomes: list[Any] = []
    try:
        size = side.backend.possible_cpus() * 8 if spec.type.startswith("percpu") else 8
        for key in (0, 1):
            side.backend.map_update(fd, struct.pack("=I", key), bytes([key + 1]) * size)
        for program in programs:
            loaded = side.backend.program_load(
                ProgramSpec(instructions=tuple(i if i != MAP[0] else i._replace(imm=fd) for i in program)), []
            )
            outcomes.append(side.backend.program_run(loaded, FRAME, bytes(192))[::2])
            side.backend.close(loaded)
        for key in range(6):
            try:
                value = side.backend.map_lookup(fd, struct.pack("=I", key), size)
                # Which processor ran the program is open.
                outcomes.append(sorted(value[i : i + 8] for i in range(0, size, 8)))
            except OSError as error:
                outcomes.append(error.errno)
    finally:
        side.backend.close(fd)
    return outcomes


MAP = ld_imm64(1, 0x7EEDBEEF, ebpf.PSEUDO_MAP_FD)


def arguments(key: int, value: int = 0, flags: int = 0) -> list[Instruction]:
    """R1 is the map, R2 points to the key, R3 to the value, R4 are flags."""
    return [
        I(ebpf.ST | ebpf.MEM | ebpf.W, 10, 0, -4, key),
        I(ebpf.ST | ebpf.MEM | ebpf.DW, 10, 0, -16, value),
        *MAP,
        I(MOV_X, 2, 10),
        I(ebpf.ALU64 | ebpf.ADD, 2, 0, 0, -4),
        I(MOV_X, 3, 10),
        I(ebpf.ALU64 | ebpf.ADD, 3, 0, 0, -16),
        I(ebpf.ALU64 | ebpf.MOV, 4, 0, 0, flags),
    ]


MAPS = ("array", "percpu_array", "hash", "percpu_hash")


@pytest.mark.parametrize("type", MAPS)
def test_programs_change_maps_as_in_the_kernel(kernel: Side, emulator: Side, type: str) -> None:
    spec = MapSpec(type=type, key_size=4, value_size=8, max_entries=4)
    add = [
        *arguments(1),
        I(CALL, 0, 0, 0, 1),
        I(ebpf.JMP | ebpf.JEQ, 0, 0, 2),
        I(ebpf.ALU64 | ebpf.MOV, 1, 0, 0, 5),
        I(ebpf.STX | ebpf.ATOMIC | ebpf.DW, 0, 1, 0, 0),
        ZERO,
    ]
    updates = [
        with_result([*arguments(key, 77, flags), I(CALL, 0, 0, 0, 2)])
        for flags in (0, 1, 2, 3, 4)
        for key in (0, 3, 4, 5)
    ]
    deletes = [with_result([*arguments(key), I(CALL, 0, 0, 0, 3)]) for key in (0, 5)]
    programs = [with_result(add), *updates, *deletes]
    assert on_map(emulator, spec, *programs) == on_map(kernel, spec, *programs)


@pytest.mark.parametrize("type", ("array", "hash"))
@pytest.mark.parametrize("change", (2, 3))
def test_a_pointer_outlives_its_element(kernel: Side, emulator: Side, type: str, change: int) -> None:
    """Look up, then update or delete the element, then read and write through the old pointer."""
    body = [
        *arguments(1),
        I(CALL, 0, 0, 0, 1),
        I(ebpf.JMP | ebpf.JEQ, 0, 0, 15),
        I(MOV_X, 7, 0),
        *arguments(1, 55),
        I(CALL, 0, 0, 0, change),
        I(ebpf.LDX | ebpf.MEM | ebpf.DW, 0, 7),
        I(ebpf.ST | ebpf.MEM | ebpf.W, 7, 0, 0, 99),
    ]
    spec = MapSpec(type=type, key_size=4, value_size=8, max_entries=4)
    skip = len(body) - body.index(I(ebpf.JMP | ebpf.JEQ, 0, 0, 15)) - 1
    body[body.index(I(ebpf.JMP | ebpf.JEQ, 0, 0, 15))] = I(ebpf.JMP | ebpf.JEQ, 0, 0, skip)
    program = with_result(body)
    assert on_map(emulator, spec, program) == on_map(kernel, spec, program)


def test_values_are_data_by_direct_address(kernel: Side, emulator: Side) -> None:
    for side in (kernel, emulator):
        fd = side.backend.map_create(MapSpec(type="array", key_size=4, value_size=16, max_entries=1))
        write = (
            *ld_imm64(1, fd | 8 << 32, ebpf.PSEUDO_MAP_VALUE),
            I(ebpf.ST | ebpf.MEM | ebpf.W, 1, 0, 0, 5),
            ZERO,
            EXIT,
        )
        assert side.run(write) == Outcome(context=side.run(write).context)
        assert side.backend.map_lookup(fd, bytes(4), 16) == bytes(8) + b"\5" + bytes(7)
        side.backend.close(fd)


def test_the_tag_is_the_kernels(kernel: Side, emulator: Side) -> None:
    tags = []
    for side in (kernel, emulator):
        fd = side.backend.map_create(MapSpec(type="array", key_size=4, value_size=16, max_entries=1))
        program = side.backend.program_load(
            ProgramSpec(instructions=(*ld_imm64(1, fd | 4 << 32, 2), *ld_imm64(1, 0, 5), ZERO, EXIT)), [fd]
        )
        tags.append(side.backend.program_info(program).tag)
        side.backend.close(program)
        side.backend.close(fd)
    assert tags[0] == tags[1]


@pytest.mark.parametrize("index", (0, 1, 9, 1 << 32))
def test_a_program_may_tail_call_itself_33_times(kernel: Side, emulator: Side, index: int) -> None:
    increment = (
        I(ebpf.LDX | ebpf.MEM | ebpf.W, 2, 1, CB),
        I(ebpf.ALU64 | ebpf.ADD, 2, 0, 0, 1),
        I(ebpf.STX | ebpf.MEM | ebpf.W, 1, 2, CB),
    )
    outcomes = []
    for side in (kernel, emulator):
        fd = side.backend.map_create(MapSpec(type="prog_array", key_size=4, value_size=4, max_entries=2))
        call = (*ld_imm64(2, fd, ebpf.PSEUDO_MAP_FD), *ld_imm64(3, index), I(CALL, 0, 0, 0, 12))
        body = (*increment, *call, I(ebpf.ALU64 | ebpf.MOV, 0, 0, 0, 9), EXIT)
        program = side.backend.program_load(ProgramSpec(instructions=body), [])
        side.backend.map_update(fd, bytes(4), struct.pack("=I", program))
        outcomes.append(side.backend.program_run(program, FRAME, bytes(192))[::2])
        side.backend.map_delete(fd, bytes(4))
        side.backend.close(program)
        side.backend.close(fd)
    assert outcomes[1] == outcomes[0]
    assert outcomes[0][1][CB] == (34 if index in (0, 1 << 32) else 1)
