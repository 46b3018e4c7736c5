"""Where in a program the verifier's refusal is, from the program itself: for what the log does not show."""

from __future__ import annotations

import struct

from kbpf.asm.ebpf_listing import lines
from kbpf.errors import ObjectError, VerifierError
from kbpf.specs import ProgramSpec
from kbpf.verifier_log import LogInstruction, SourceLine

# ``struct bpf_line_info``: instruction, file's name, the line's text, line << 10 | column.
_LINE_INFO = struct.Struct("=IIII")


def locate(error: VerifierError, spec: ProgramSpec) -> None:
    """Add the refused instruction's code and its source line where the log has only a number, or was cut."""
    found = error.instruction
    index = found.pc if found else -1
    if error.reason.startswith("last insn is not an exit"):
        index = len(spec.instructions) - 1
    if not 0 <= index < len(spec.instructions):
        return
    text = dict(lines(spec.instructions)).get(index, "")
    error.locate(LogInstruction(index, text), source(spec, index))


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
