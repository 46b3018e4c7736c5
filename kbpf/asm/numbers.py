"""Classic instructions written as numbers: what ``tcpdump -dd`` and ``-ddd`` print, and iptables takes."""

from __future__ import annotations

import re

from kbpf.errors import FilterError
from kbpf.isa.cbpf import Instruction, check_fields

_BRACES = re.compile(r"\{([^{}]*)\}")


def parse_numbers(text: str) -> tuple[Instruction, ...]:
    """Read instructions from text.

    Either C initialisers (``{ 0x28, 0, 0, 0x0000000c },``), or a count and then ``code jt jf k`` for each, separated
    by line ends or commas (``4,48 0 0 9,...``). Numbers are decimal, or hexadecimal after ``0x``. Raises
    `FilterError` naming what cannot be read.
    """
    groups = _BRACES.findall(text)
    if groups:
        return tuple(_instruction(group.replace(",", " "), index) for index, group in enumerate(groups))
    count, *rows = [row for row in re.split(r"[,\n]", text) if row.strip()] or [""]
    if not count.strip().isdecimal():
        raise FilterError(f"{count.strip()!r} is no count of instructions")
    if int(count) != len(rows):
        raise FilterError(f"{count.strip()} instructions are announced, and {len(rows)} follow")
    return tuple(_instruction(row, index) for index, row in enumerate(rows))


def _instruction(row: str, index: int) -> Instruction:
    try:
        code, jt, jf, k = (int(word, 0) for word in row.split())
    except ValueError:
        raise FilterError(f"instruction {index}: {row.strip()!r} is not four numbers") from None
    instruction = Instruction(code, jt, jf, k)
    check_fields(index, instruction)
    return instruction
