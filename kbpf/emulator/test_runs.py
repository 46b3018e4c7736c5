"""BPF_PROG_TEST_RUN, for each type of program that Linux runs that way."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from typing import TypeAlias

from kbpf.emulator import (
    engines,
    flow_dissector,
    test_run,
    test_run_netfilter,
    test_run_sk_lookup,
    test_run_tracing,
    test_run_xdp,
)
from kbpf.emulator.context import ACCESS
from kbpf.emulator.maps.base import refused
from kbpf.emulator.maps.cgroup import values_of_a_test
from kbpf.emulator.program import Program
from kbpf.emulator.statistics import Switch
from kbpf.errors import ENOTSUPP
from kbpf.runs import RawRun, RunOptions

#: Takes the program, data, context and how to run it; raises `OSError` with the kernel's errno.
Runner: TypeAlias = Callable[[Program, bytes, bytes, RunOptions], RawRun]

_ONCE = RunOptions()
#: Packets that native code is given at once: all are given again behind one that it cannot run.
_AT_ONCE = 4096

RUNNERS: dict[str, Runner] = {
    **dict.fromkeys(ACCESS, test_run.run),
    "xdp": test_run_xdp.run,
    "flow_dissector": flow_dissector.test_run,
    "netfilter": test_run_netfilter.test_run,
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


def values(program: Program, packets: list[bytes], context: bytes) -> array[int]:
    """What the program returns for one packet after the other, each run as by itself; raises what `run` raises.

    `context` is that of every run. Where it says nothing, and the program is one that native code can run so, a call
    of native code runs them all.
    """
    usual = not any(context) and bool(context) == (program.type != "xdp")
    native = engines.test_runs_of(program, len(packets)) if usual else None
    out = array("I")
    while len(out) < len(packets):
        if native is not None:
            start = time.perf_counter_ns()
            done = native.run(program, packets[len(out) : len(out) + _AT_ONCE])
            if Switch.users:
                program.runs.add(len(done), time.perf_counter_ns() - start)
            out.extend(done)
        if len(out) < len(packets):
            try:
                out.append(run(program, packets[len(out)], context).value)
            except OSError as error:
                error.done = out  # type: ignore[attr-defined]  # what the seam says
                raise
    return out
