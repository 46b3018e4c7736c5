"""Programs that record what they find, and the hooks of a real control group that the kernel runs them in."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sides import Side

from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction, ld_imm64
from kbpf.specs import MapSpec, ProgramSpec
from kbpf.uapi.enums import HELPERS
from kbpf.uapi.structs import STRUCTS

I = Instruction  # noqa: E741
#: Where control groups of version 2 are.
CGROUPS = next(
    (Path(mount.split()[1]) for mount in Path("/proc/self/mounts").read_text().splitlines() if " cgroup2 " in mount),
    Path("/sys/fs/cgroup"),
)
SIZES = {1: ebpf.B, 2: ebpf.H, 4: ebpf.W, 8: ebpf.DW}
EXIT = I(ebpf.JMP | ebpf.EXIT)
#: The context is kept here, and what is recorded goes there.
CONTEXT, RECORD = 6, 7


def returns(value: int) -> list[Instruction]:
    return [I(ebpf.ALU64 | ebpf.MOV, 0, 0, 0, value), EXIT]


def load(offset: int, size: int) -> list[Instruction]:
    """A field of the context into R0."""
    return [I(ebpf.LDX | ebpf.MEM | SIZES[size], 0, CONTEXT, offset)]


def parts(struct_name: str, *names: str) -> list[list[Instruction]]:
    """Loads of every size at every offset of these fields that the sizes divide."""
    steps = []
    for name in names:
        field = STRUCTS[struct_name].fields[name]
        for at in range(field.offset, field.offset + max(field.size * field.count, 4)):
            steps += [load(at, size) for size in (1, 2, 4) if at % size == 0]
    return steps


def whole(struct_name: str, *names: str) -> list[list[Instruction]]:
    fields = STRUCTS[struct_name].fields
    return [
        load(fields[name].offset + index * fields[name].size, fields[name].size)
        for name in names
        for index in range(fields[name].count)
    ]


def direct_bytes(struct_name: str, start: str, end: str, count: int) -> list[list[Instruction]]:
    """Each byte of what two fields point to the start and the end of, plus 256; 0 behind its end."""
    fields = STRUCTS[struct_name].fields
    return [
        [
            *load(fields[start].offset, 8),
            I(ebpf.ALU64 | ebpf.MOV | ebpf.X, 1, 0),
            I(ebpf.LDX | ebpf.MEM | ebpf.DW, 2, CONTEXT, fields[end].offset),
            I(ebpf.ALU64 | ebpf.MOV | ebpf.X, 3, 1),
            I(ebpf.ALU64 | ebpf.ADD, 3, 0, 0, at + 1),
            I(ebpf.ALU64 | ebpf.MOV, 0, 0, 0, 0),
            I(ebpf.JMP | ebpf.JGT | ebpf.X, 3, 2, 2, 0),
            I(ebpf.LDX | ebpf.MEM | ebpf.B, 0, 1, at),
            I(ebpf.ALU64 | ebpf.ADD, 0, 0, 0, 256),
        ]
        for at in range(count)
    ]


def call(name: str, *arguments: int | str | tuple[int, int]) -> list[Instruction]:
    """Call a helper: numbers, ``"context"``, or registers and offsets such as the frame's (10, -8)."""
    code = []
    for register, given in enumerate(arguments, 1):
        if given == "context":
            code.append(I(ebpf.ALU64 | ebpf.MOV | ebpf.X, register, CONTEXT))
        elif isinstance(given, tuple):
            code += [I(ebpf.ALU64 | ebpf.MOV | ebpf.X, register, given[0])]
            code += [I(ebpf.ALU64 | ebpf.ADD, register, 0, 0, given[1])]
        else:
            assert isinstance(given, int)
            code += ld_imm64(register, given & (1 << 64) - 1)
    return [*code, I(ebpf.JMP | ebpf.CALL, 0, 0, 0, HELPERS[name])]


def on_stack(data: bytes, at: int) -> list[Instruction]:
    """Put bytes on the stack, at R10 plus `at`, padded to a multiple of eight."""
    code = []
    for offset in range(0, len(data), 8):
        word = int.from_bytes(data[offset : offset + 8].ljust(8, b"\0"), "little")
        code += [*ld_imm64(1, word), I(ebpf.STX | ebpf.MEM | ebpf.DW, 10, 1, at + offset)]
    return code


class Recorder:
    """A program that does things and keeps, of each, the 64 bits of R0; it counts its runs.

    `only` is a field of four bytes, by its offset, and the value it must have: else the program does nothing.
    """

    def __init__(
        self,
        side: Side,
        type: str,
        attach_type: str,
        steps: Sequence[Sequence[Instruction]],
        value: int = 1,
        only: tuple[int, int] | None = None,
    ) -> None:
        self.side = side
        self.attach_type = attach_type
        self.size = 8 * (len(steps) + 1)
        self.map = side.backend.map_create(MapSpec(type="array", key_size=4, value_size=self.size, max_entries=1))
        code = [I(ebpf.ALU64 | ebpf.MOV | ebpf.X, CONTEXT, 1)]
        if only is not None:
            code += [*load(only[0], 4), I(ebpf.JMP | ebpf.JEQ, 0, 0, 2, only[1]), *returns(value)]
        code += [*ld_imm64(RECORD, self.map, ebpf.PSEUDO_MAP_VALUE)]
        for number, step in enumerate(steps, 1):
            code += [*step, I(ebpf.STX | ebpf.MEM | ebpf.DW, RECORD, 0, 8 * number)]
        code += [
            I(ebpf.ALU64 | ebpf.MOV, 1, 0, 0, 1),
            I(ebpf.STX | ebpf.ATOMIC | ebpf.DW, RECORD, 1, 0, ebpf.ADD),
            *returns(value),
        ]
        spec = ProgramSpec(type=type, instructions=tuple(code), expected_attach_type=attach_type)
        try:
            self.fd = side.backend.program_load(spec, [])
        except BaseException:
            side.backend.close(self.map)
            raise

    def recorded(self) -> tuple[int, ...]:
        """How often it ran, and what it kept the last time."""
        return struct.unpack(f"={self.size // 8}Q", self.side.backend.map_lookup(self.map, bytes(4), self.size))

    def close(self) -> None:
        self.side.backend.close(self.fd)
        self.side.backend.close(self.map)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def real_group() -> Iterator[int]:
    """A control group that this process is in meanwhile: a descriptor of it."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    before = next(line.split(":", 2)[2] for line in lines if line.startswith("0::"))
    group = CGROUPS / f"kbpf-test-{os.getpid()}"
    group.mkdir()
    (group / "cgroup.procs").write_text(str(os.getpid()))
    descriptor = os.open(group, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
        (CGROUPS / before.lstrip("/") / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


@contextmanager
def attached(group: int, recorder: Recorder) -> Iterator[None]:
    """The kernel's program, in a hook of the group."""
    backend = recorder.side.backend
    link = backend.link_create(recorder.fd, group, recorder.attach_type)
    try:
        yield
    finally:
        backend.close(link)
