"""How fast does native code compute, memory checks on? Goal: 0.85 of the time of the running kernel's JIT.

    python benchmarks/jit_loops.py [--rounds N]

Each loop is one program, loaded in the kernel and in the emulator, and run by BPF_PROG_TEST_RUN with `repeat` on both,
in turns. In the emulator the time is taken around native code, without the 10 to 20 us in which Python sets up each
of its runs; in the kernel a program that returns at once takes nothing that counts. Medians of processor time, the
ratio of each, and the ratios' geometric mean. Needs root.

Where each step waits for the last one (xorshift, the tables), no compiler makes the processor wait less: there the
checks would show.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterable
from unittest import mock

import kbpf
from kbpf.emulator.jit import program
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction as I
from kbpf.isa.ebpf import ld_imm64
from kbpf.specs import MapSpec, ProgramSpec
from kbpf.uapi.structs import STRUCTS

WIDE, EXIT = ebpf.ALU64, I(ebpf.JMP | ebpf.EXIT)
REPEAT = 40


def k(op: int, dst: int, value: int = 0) -> I:
    return I(WIDE | op, dst, 0, 0, value)


def x(op: int, dst: int, src: int) -> I:
    return I(WIDE | op | ebpf.X, dst, src)


def loop(setup: Iterable[I], body: Iterable[I], times: int) -> tuple[I, ...]:
    """The body for R1 from 0 on; R0 is what comes out."""
    inner = [*body, k(ebpf.ADD, 1, 1)]
    return (*setup, k(ebpf.MOV, 1), *inner, I(ebpf.JMP | ebpf.JLT, 1, 0, -len(inner) - 1, times), EXIT)


def shifted(by: int, op: int = ebpf.LSH) -> list[I]:
    """R0 ^= R0 shifted."""
    return [x(ebpf.MOV, 3, 0), k(op, 3, by), x(ebpf.XOR, 0, 3)]


def words(count: int) -> list[I]:
    return [I(ebpf.ST | ebpf.MEM | ebpf.DW, 10, 0, -8 * (n + 1), 7 * n + 1) for n in range(count)]


FIELDS = STRUCTS["__sk_buff"].fields
DATA, DATA_END = FIELDS["data"].offset, FIELDS["data_end"].offset
LOADED, STORED = I(ebpf.LDX | ebpf.MEM | ebpf.DW, 5, 4), I(ebpf.STX | ebpf.MEM | ebpf.DW, 4, 5)
LOOPS = {
    "xorshift": loop([k(ebpf.MOV, 0, 1)], [*shifted(13), *shifted(7, ebpf.RSH), *shifted(17)], 60_000),
    "crc32, bit by bit": loop(
        [k(ebpf.MOV, 0, -1)],
        [
            x(ebpf.XOR, 0, 1),
            *[
                x(ebpf.MOV, 3, 0), k(ebpf.AND, 3, 1), k(ebpf.NEG, 3), k(ebpf.AND, 3, 0x6DB88320), k(ebpf.RSH, 0, 1),
                x(ebpf.XOR, 0, 3),
            ] * 8,
        ],
        18_000,
    ),
    "division": loop(
        [k(ebpf.MOV, 0, 7)],
        [
            x(ebpf.MOV, 3, 0), k(ebpf.ADD, 3, 12345), k(ebpf.DIV, 3, 1000), x(ebpf.ADD, 0, 3), k(ebpf.MUL, 0, 31),
            k(ebpf.MOD, 0, 65521),
        ],
        60_000,
    ),
    "words on the stack": loop(
        [k(ebpf.MOV, 0, 1), *words(8)],
        [
            step
            for n in range(8)
            for step in (
                I(ebpf.LDX | ebpf.MEM | ebpf.DW, 3, 10, -8 * (n + 1)), x(ebpf.ADD, 0, 3),
                I(ebpf.STX | ebpf.MEM | ebpf.DW, 10, 0, -8 * (n + 1)),
            )
        ],
        30_000,
    ),
    "a table on the stack": loop(
        [k(ebpf.MOV, 0, 1), *words(32)],
        [
            x(ebpf.MOV, 3, 0), k(ebpf.AND, 3, 31), k(ebpf.LSH, 3, 3), x(ebpf.MOV, 4, 10), k(ebpf.ADD, 4, -256),
            x(ebpf.ADD, 4, 3), LOADED, x(ebpf.ADD, 5, 1), STORED, x(ebpf.XOR, 0, 5), *shifted(13),
            *shifted(7, ebpf.RSH), k(ebpf.MUL, 0, 0x27D4EB2F),
        ],
        40_000,
    ),
    "a histogram in an array": loop(
        [k(ebpf.MOV, 0, 1), *ld_imm64(6, 0, ebpf.PSEUDO_MAP_IDX_VALUE)],
        [
            x(ebpf.MOV, 3, 1), k(ebpf.MUL, 3, 0x61C88647), k(ebpf.RSH, 3, 5), k(ebpf.AND, 3, 1023), k(ebpf.LSH, 3, 3),
            x(ebpf.MOV, 4, 6), x(ebpf.ADD, 4, 3), LOADED, k(ebpf.ADD, 5, 1), STORED, x(ebpf.ADD, 0, 5),
        ],
        60_000,
    ),
    "bytes of the packet": loop(
        [
            k(ebpf.MOV, 0), I(ebpf.LDX | ebpf.MEM | ebpf.W, 7, 1, DATA),
            I(ebpf.LDX | ebpf.MEM | ebpf.W, 8, 1, DATA_END),
        ],
        [
            x(ebpf.MOV, 3, 1), k(ebpf.AND, 3, 31), x(ebpf.MOV, 4, 7), x(ebpf.ADD, 4, 3), x(ebpf.MOV, 5, 4),
            k(ebpf.ADD, 5, 16), I(ebpf.JMP | ebpf.JGT | ebpf.X, 5, 8, 4 * 16 + 2),
            *[
                step
                for n in range(16)
                for step in (
                    I(ebpf.LDX | ebpf.MEM | ebpf.B, 5, 4, n), x(ebpf.ADD, 0, 5), k(ebpf.LSH, 5, n), x(ebpf.XOR, 0, 5),
                )
            ],
        ],
        8_000,
    ),
}  # fmt: skip
ARRAY = MapSpec(type="array", key_size=4, value_size=8192, max_entries=1)
FRAME = bytes(64)


def load(instructions: tuple[I, ...], backend: str) -> kbpf.Program:
    maps = (ARRAY,) if any(each.opcode == ebpf.LD_IMM64 for each in instructions) else ()
    spec = ProgramSpec(type="sched_cls", instructions=instructions, maps=maps)
    return kbpf.load_program(spec, backend=backend, engine="jit")


class InNative:
    """Nanoseconds of processor time in native code, of programs that are loaded meanwhile."""

    def __init__(self) -> None:
        self.spent = 0
        real = program._FUNCTION

        def timed(address: int) -> Callable[..., int]:
            function = real(address)

            def call(*arguments: int) -> int:
                start = time.process_time_ns()
                try:
                    return int(function(*arguments))
                finally:
                    self.spent += time.process_time_ns() - start

            return call

        self.patch = mock.patch.object(program, "_FUNCTION", timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    ratios = []
    in_native = InNative()
    with in_native.patch:
        for name, loop in LOOPS.items():
            with load(loop, "kernel") as kernel, load(loop, "emulator") as ours:
                assert kernel.run(FRAME).value == ours.run(FRAME).value
                times: list[list[float]] = [[], []]
                for _ in range(rounds):
                    start, in_native.spent = time.process_time_ns(), 0
                    kernel.run(FRAME, repeat=REPEAT)
                    times[0].append((time.process_time_ns() - start) / REPEAT)
                    ours.run(FRAME, repeat=REPEAT)
                    times[1].append(in_native.spent / REPEAT)
            theirs, mine = map(statistics.median, times)
            ratios.append(mine / theirs)
            print(f"{name:26} {mine / 1e3:8.1f} us   {ratios[-1]:5.2f} of the kernel's {theirs / 1e3:.1f} us")
    mean = math.exp(statistics.mean(map(math.log, ratios)))
    print(f"geometric mean: {mean:.2f} of the time of the kernel's JIT")


if __name__ == "__main__":
    main()
