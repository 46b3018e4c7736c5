"""Programs that hand events to user space, and what runs them."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import kbpf
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction, ld_imm64
from kbpf.uapi.enums import HELPERS

Code = list[Instruction]
FP = ebpf.FP
#: Where `__sk_buff.cb` starts.
CB = 48
#: Where the data of an event lie on the stack; events have fewer bytes.
DATA, MOST = -256, 256
RETURN = Instruction(ebpf.JMP | ebpf.EXIT)


def mov(register: int, value: int) -> Instruction:
    return Instruction(ebpf.ALU64 | ebpf.MOV, register, 0, 0, value)


def copy(register: int, source: int) -> Instruction:
    return Instruction(ebpf.ALU64 | ebpf.MOV | ebpf.X, register, source)


def add(register: int, value: int) -> Instruction:
    return Instruction(ebpf.ALU64 | ebpf.ADD, register, 0, 0, value)


def load(register: int, source: int, offset: int, size: int = ebpf.DW) -> Instruction:
    return Instruction(ebpf.LDX | ebpf.MEM | size, register, source, offset)


def store(register: int, offset: int, source: int) -> Instruction:
    return Instruction(ebpf.STX | ebpf.MEM | ebpf.DW, register, source, offset)


def call(helper: str) -> Instruction:
    return Instruction(ebpf.JMP | ebpf.CALL, 0, 0, 0, HELPERS[helper])


def the_map(register: int, index: int = 0) -> Code:
    return list(ld_imm64(register, index, ebpf.PSEUDO_MAP_IDX))


def end_if_null(register: int, value: int = 0) -> Code:
    return [Instruction(ebpf.JMP | ebpf.JNE, register, 0, 2), mov(0, value), RETURN]


def _prepared() -> Code:
    """The context in R6; the number from ``cb[0]`` at the start of the data, their size in R8, flags in R9."""
    return [
        copy(6, 1),
        load(7, 6, CB, ebpf.W),
        load(8, 6, CB + 4, ebpf.W),
        Instruction(ebpf.ALU64 | ebpf.AND, 8, 0, 0, MOST - 1),
        load(9, 6, CB + 8, ebpf.W),
        *(Instruction(ebpf.ST | ebpf.MEM | ebpf.DW, FP, 0, at) for at in range(DATA, DATA + MOST, 8)),
        store(FP, DATA, 7),
    ]


#: Output of the event that the context says.
TO_RING: Code = [
    *_prepared(), *the_map(1), copy(2, FP), add(2, DATA), copy(3, 8), copy(4, 9), call("ringbuf_output"), RETURN,
]  # fmt: skip
TO_PERF: Code = [
    *_prepared(), copy(1, 6), *the_map(2), *ld_imm64(3, 0xFFFFFFFF),
    copy(4, FP), add(4, DATA), copy(5, 8), call("perf_event_output"), RETURN,
]  # fmt: skip


def reserved(commit: str, flags: int = 0, between: Sequence[Instruction] = ()) -> Code:
    """An event of 16 bytes with the number twice, reserved, and then committed; 1 where there was no room."""
    return [
        load(7, 1, CB, ebpf.W), *the_map(1), mov(2, 16), mov(3, 0), call("ringbuf_reserve"), *end_if_null(0, 1),
        copy(6, 0), store(6, 0, 7), store(6, 8, 7), *between,
        copy(1, 6), mov(2, flags), call(commit), mov(0, 0), RETURN,
    ]  # fmt: skip


#: The processor's number, and how many events it has sent: no number is left out. The second map counts per processor.
NUMBERED: Code = [
    Instruction(ebpf.ST | ebpf.MEM | ebpf.W, FP, 0, -4), *the_map(1, 1), copy(2, FP), add(2, -4),
    call("map_lookup_elem"), *end_if_null(0, 2), copy(7, 0),
    *the_map(1), mov(2, 16), mov(3, 0), call("ringbuf_reserve"), *end_if_null(0, 1), copy(8, 0),
    call("get_smp_processor_id"), store(8, 0, 0), load(1, 7, 0), store(8, 8, 1), add(1, 1), store(7, 0, 1),
    copy(1, 8), mov(2, 0), call("ringbuf_submit"), mov(0, 0), RETURN,
]  # fmt: skip


class Sender:
    """A map, and a program that sends what it is told."""

    def __init__(self, map: kbpf.BpfMap, program: kbpf.Program) -> None:
        self.map = map
        self.program = program

    def send(self, number: int = 0, size: int = 16, flags: int = 0) -> int:
        """What the program returns: 0 where there was room."""
        context = bytearray(192)
        struct.pack_into("=III", context, CB, number, size, flags)
        return self.program.run(bytes(64), bytes(context)).value


@contextmanager
def sender(backend: str, code: Code, size: int = 1 << 16, maps: Sequence[kbpf.BpfMap] = ()) -> Iterator[Sender]:
    perf = code is TO_PERF
    spec = kbpf.MapSpec(type="perf_event_array", key_size=4, value_size=4) if perf else ring(size)
    with kbpf.BpfMap.create(spec, backend=backend) as map, program_of(backend, code, [map, *maps]) as program:
        yield Sender(map, program)


def ring(size: int) -> kbpf.MapSpec:
    return kbpf.MapSpec(type="ringbuf", max_entries=size, name="events")


def program_of(backend: str, code: Code, maps: Sequence[kbpf.BpfMap], **spec: bytes) -> kbpf.Program:
    specs = tuple(
        kbpf.MapSpec(
            type=map.type,
            key_size=map.shape.key_size,
            value_size=map.shape.value_size,
            max_entries=map.shape.max_entries,
        )
        for map in maps
    )
    made = kbpf.ProgramSpec(instructions=tuple(code), maps=specs, **spec)
    return kbpf.load_program(made, list(maps), backend=backend)
