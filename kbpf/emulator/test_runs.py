"""BPF_PROG_TEST_RUN, for each type of program that Linux runs that way."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from kbpf.backend import RawRun, RunOptions
from kbpf.emulator import flow_dissector, test_run, test_run_sk_lookup, test_run_tracing, test_run_xdp
from kbpf.emulator.context import ACCESS
from kbpf.emulator.maps.base import refused
from kbpf.emulator.maps.cgroup import values_of_a_test
from kbpf.emulator.program import Program
from kbpf.errors import ENOTSUPP

#: Takes the program, data, context and how to run it; raises `OSError` with the kernel's errno.
Runner: TypeAlias = Callable[[Program, bytes, bytes, RunOptions], RawRun]

_ONCE = RunOptions()

RUNNERS: dict[str, Runner] = {
    **dict.fromkeys(ACCESS, test_run.run),
    "xdp": test_run_xdp.run,
    "flow_dissector": flow_dissector.test_run,
    "sk_lookup": test_run_sk_lookup.test_run,
    "raw_tracepoint": test_run_tracing.raw_tracepoint,
    "syscall": test_run_tracing.syscall,
}


def run(program: Program, data: bytes, context: bytes, options: RunOptions = _ONCE) -> RawRun:
    """Run as the command does; raises `OSError` with the kernel's errno, and `EmulationFault`."""
    runner = RUNNERS.get(program.type)
    if runner is None:
        raise refused(ENOTSUPP)
    with values_of_a_test():
        return runner(program, data, context, options)
