"""A plugin for the public bpf_conformance suite: ``kbpf-conformance [MEMORY] [--jit]``.

The suite gives a program's bytes as hexadecimal digits on standard input and, where a test has memory, its bytes as an
argument; the program finds the memory's address in R1 and its length in R2. What it leaves in R0, all 64 bits, is
printed as hexadecimal digits. The program is run as it is, without the checks that Linux makes when it is loaded: what
reaches outside the memory and the stack, or does not end, is an error.

    bpf_conformance_runner --test_file_directory tests --plugin_path kbpf-conformance --plugin_options "--jit"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from kbpf.backend import Engine, LoadRefused
from kbpf.emulator import checks, engines, helpers
from kbpf.emulator.context import SkBuff
from kbpf.emulator.interpreter import BUDGET, link
from kbpf.emulator.memory import Region
from kbpf.emulator.packet import Packet
from kbpf.emulator.semantics import factory, variant
from kbpf.errors import EmulationFault, KbpfError
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction, ld_imm64

_CALL, _EXIT = ebpf.JMP | ebpf.CALL, ebpf.JMP | ebpf.EXIT


class _Bare:
    """A `kbpf.emulator.interpreter.Subject` without a packet to speak of."""

    budget = BUDGET

    def packet(self, data: bytes, length: int) -> Packet:
        return Packet(buffer=b"")

    def context(self, packet: Packet) -> SkBuff:
        return SkBuff(packet)


def run(program: bytes, memory: bytes = b"", engine: Engine = "interpreter") -> int:
    """R0 after running `program`, an array of ``struct bpf_insn``, over a copy of `memory`.

    Raises `ValueError` for what is no program, and `kbpf.EmulationFault`.
    """
    instructions = ebpf.decode(program)
    _check(instructions)
    values, result = Region(bytearray(memory)), Region(bytearray(8))
    # The program is a function, so that all of R0 can be kept, and may end without an exit.
    start = [
        *ld_imm64(1, values.address if memory else 0),
        *ld_imm64(2, len(memory)),
        Instruction(_CALL, 0, ebpf.PSEUDO_CALL, 0, 4),
        *ld_imm64(1, result.address),
        Instruction(ebpf.STX | ebpf.MEM | ebpf.DW, 1, 0),
        Instruction(_EXIT),
    ]
    code = link([*start, *instructions, Instruction(_EXIT)], helpers=helpers.functions("socket_filter"))
    code.engine = engine
    engines.execute(code, _Bare(), Packet(buffer=b""), b"")
    return int.from_bytes(result.buffer, sys.byteorder)


def _check(instructions: Sequence[Instruction]) -> None:
    """Raise `ValueError` for what the interpreter cannot link."""
    second = False
    for pc, instruction in enumerate(instructions):
        opcode, dst, src, off, imm = instruction
        if second:
            second = False
            continue
        second = opcode == ebpf.LD_IMM64
        if max(dst, src) >= ebpf.REGISTERS:
            raise ValueError(f"instruction {pc}: there is no register R{max(dst, src)}")
        if opcode == _CALL and src == 0:
            if imm not in helpers.functions("socket_filter"):
                raise ValueError(f"instruction {pc}: there is no helper {imm}")
        elif opcode not in (ebpf.LD_IMM64, _CALL, _EXIT) and factory(*variant(instruction), False) is None:
            raise ValueError(f"instruction {pc}: unknown opcode {opcode:#04x}")
        jumps = opcode & 7 in (ebpf.JMP, ebpf.JMP32) and opcode != _EXIT and (opcode != _CALL or src)
        target = pc + 1 + (imm if opcode in (_CALL, ebpf.JMP32 | ebpf.JA) else off)
        if jumps and not 0 <= target <= len(instructions):
            raise ValueError(f"instruction {pc}: a jump out of the program")
        if (opcode == _CALL and src > ebpf.PSEUDO_CALL) or (opcode == ebpf.LD_IMM64 and src):
            raise ValueError(f"instruction {pc}: there is nothing of the kernel's to refer to")
    if second or not instructions:
        raise ValueError("the program ends within an instruction" if second else "there is no program")
    try:
        checks.check_layout([*instructions, Instruction(_EXIT)])
    except LoadRefused as refused:
        raise ValueError(refused.log.strip()) from None


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status: 1, with a line on standard error, where the program has no result."""
    parser = argparse.ArgumentParser(
        prog="kbpf-conformance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("memory", nargs="?", default="", help="the memory's bytes, as hexadecimal digits")
    parser.add_argument("--jit", action="store_true", help="run it in native code")
    # The suite has given an empty argument for memory, and for options, where there are none.
    options = parser.parse_args([each for each in (sys.argv[1:] if arguments is None else arguments) if each])
    try:
        # Python has none where the descriptor is closed.
        if sys.stdin is None:
            raise ValueError("the program is read from standard input, which is closed")
        program, memory = bytes.fromhex(sys.stdin.read()), bytes.fromhex(options.memory)
        print(f"{run(program, memory, 'jit' if options.jit else 'interpreter'):x}")
    except (ValueError, OSError, EmulationFault, KbpfError) as error:
        print(f"kbpf-conformance: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
