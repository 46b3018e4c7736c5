"""Runs of a program that a user asks for: what is given and what comes out, and the steps of one."""

from __future__ import annotations

from typing import NamedTuple

from kbpf.isa.ebpf import Instruction


class RawRun(NamedTuple):
    """What BPF_PROG_TEST_RUN gives: the return value, data and context afterwards, mean nanoseconds of a run."""

    value: int
    data: bytes
    context: bytes
    duration_ns: int


class RunOptions(NamedTuple):
    """How BPF_PROG_TEST_RUN runs a program: its attributes besides data and context, each 0 where it is not used."""

    repeat: int = 1
    #: BPF_F_TEST_RUN_ON_CPU, BPF_F_TEST_XDP_LIVE_FRAMES, BPF_F_TEST_SKB_CHECKSUM_COMPLETE.
    flags: int = 0
    cpu: int = 0
    batch_size: int = 0


class MemoryAccess(NamedTuple):
    """Memory that an instruction touched: where in a region, how many bytes, and whether they were written.

    Regions are "context", "stack", "packet", "flow_keys" and "map". The stack's offset 0 is its lowest byte.
    """

    region: str
    offset: int
    size: int
    written: bool


class TraceStep(NamedTuple):
    """One instruction of a run, at index `pc`: the registers whose values it changed, and the memory it touched.

    `program` is the id of the program that it is of: after a tail call another one than at first. `depth` counts the
    functions that wait for this one to return.
    """

    pc: int
    instruction: Instruction
    registers: dict[int, int]
    memory: tuple[MemoryAccess, ...]
    program: int
    depth: int
