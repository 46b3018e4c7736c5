"""Adding to a value without losing what others add: by a small program, since bpf(2) has no command that does it.

The program finds the value and adds with one atomic instruction, so neither programs nor processes come between. It is
of type ``syscall`` (Linux 5.14), run by BPF_PROG_TEST_RUN with the key and the number as its context.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.runtime.program import Program, load_program
from kbpf.specs import MapSpec, ProgramSpec
from kbpf.uapi.constants import BPF_F_SLEEPABLE

if TYPE_CHECKING:
    from kbpf.runtime.map import Map

_WIDTHS = {8: ebpf.DW, 4: ebpf.W, 2: ebpf.H, 1: ebpf.B}
_MAP_LOOKUP_ELEM = 1
#: What is left of the stack is for the program itself.
MOST_KEY = 448


def load_adder(map: Map) -> Program:
    """The program for a map: its context is the number, as 8 bytes, and the key; it returns 1 where that is missing."""
    size = map.shape.key_size
    if size > MOST_KEY:
        raise TypeError(
            f"keys of {map.label} are longer than {MOST_KEY} bytes, which a program's stack has no room for"
        )
    stack = -(-size // 8) * 8
    code = [Instruction(ebpf.ALU64 | ebpf.MOV | ebpf.X, 6, 1)]
    at = 0
    while at < size:
        width = next(width for width in _WIDTHS if width <= size - at)
        load, store = ebpf.LDX | ebpf.MEM | _WIDTHS[width], ebpf.STX | ebpf.MEM | _WIDTHS[width]
        code += [Instruction(load, 0, 6, 8 + at), Instruction(store, 10, 0, at - stack)]
        at += width
    add = ebpf.STX | ebpf.ATOMIC | (ebpf.DW if map.shape.value_size == 8 else ebpf.W)
    code += [
        *ebpf.ld_imm64(1, 0, ebpf.PSEUDO_MAP_IDX),
        Instruction(ebpf.ALU64 | ebpf.MOV | ebpf.X, 2, 10),
        Instruction(ebpf.ALU64 | ebpf.ADD, 2, imm=-stack),
        Instruction(ebpf.JMP | ebpf.CALL, imm=_MAP_LOOKUP_ELEM),
        Instruction(ebpf.JMP | ebpf.JNE, 0, 0, 2, 0),
        Instruction(ebpf.ALU64 | ebpf.MOV, 0, imm=1),
        Instruction(ebpf.JMP | ebpf.EXIT),
        Instruction(ebpf.LDX | ebpf.MEM | ebpf.DW, 1, 6, 0),
        Instruction(add, 0, 1, 0, ebpf.ADD),
        Instruction(ebpf.ALU64 | ebpf.MOV, 0, imm=0),
        Instruction(ebpf.JMP | ebpf.EXIT),
    ]
    wanted = MapSpec(type=map.type, key_size=size, value_size=map.shape.value_size)
    spec = ProgramSpec(type="syscall", name="kbpf_add", flags=BPF_F_SLEEPABLE, instructions=tuple(code), maps=(wanted,))
    return load_program(spec, [map], backend=map.backend)
