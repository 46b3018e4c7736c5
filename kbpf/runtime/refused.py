"""Where in a program the verifier's refusal is, from the program itself: for what the log does not show."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence

from kbpf.asm.ebpf_listing import lines
from kbpf.errors import ObjectError, VerifierError
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.specs import ProgramSpec
from kbpf.verifier_log import LogInstruction, SourceLine

_OPCODE = re.compile(r"unknown opcode ([0-9a-f]{2})\b")
# ``struct bpf_line_info``: instruction, file's name, the line's text, line << 10 | column.
_LINE_INFO = struct.Struct("=IIII")


def locate(error: VerifierError, spec: ProgramSpec) -> None:
    """Add the refused instruction's code and its source line where the log has only a number, or was cut."""
    found = error.instruction
    index = found.pc if found else _unnamed(error.reason, spec.instructions)
    if not 0 <= index < len(spec.instructions):
        return
    text = dict(lines(spec.instructions)).get(index, "")
    error.locate(LogInstruction(index, text), source(spec, index))


def _unnamed(reason: str, code: Sequence[Instruction]) -> int:
    """The instruction that a reason is about which names none: the first that it is true of; -1 where none is."""
    if reason.startswith("last insn is not an exit"):
        return len(code) - 1
    opcode = _OPCODE.match(reason)
    for index, instruction in enumerate(code):
        wide = instruction.opcode == ebpf.LD_IMM64
        if (
            opcode
            and instruction.opcode == int(opcode[1], 16)
            and (index == 0 or code[index - 1].opcode != ebpf.LD_IMM64)
        ):
            return index
        if reason.startswith("invalid bpf_ld_imm64") and wide and (index + 1 == len(code) or any(code[index + 1][:4])):
            return index
        called = instruction.opcode == ebpf.JMP | ebpf.CALL and instruction.src == ebpf.PSEUDO_CALL
        if reason.startswith("call to invalid") and called and not 0 <= index + 1 + instruction.imm < len(code):
            return index
    return -1


def source(spec: ProgramSpec, index: int) -> SourceLine | None:
    """The source line of an instruction, from the program's line info; None where it has none."""
    from kbpf.elf.btf import Btf

    records = [record for record in _LINE_INFO.iter_unpack(spec.line_info) if record[0] <= index]
    if not records:
        return None
    _, file, text, place = max(records)
    try:
        btf = Btf(spec.btf)
        return SourceLine(btf.string(text).strip(), btf.string(file).rpartition("/")[2], place >> 10)
    except ObjectError:
        return None
