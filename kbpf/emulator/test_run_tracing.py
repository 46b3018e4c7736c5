"""BPF_PROG_TEST_RUN of programs without a packet: raw tracepoints (Linux 5.10) and `syscall` programs (5.14).

The counterpart of bpf_prog_test_run_raw_tp and bpf_prog_test_run_syscall (net/bpf/test_run.c). For a raw tracepoint the
context is its arguments; a `syscall` program shares its context with who runs it.
"""

from __future__ import annotations

import errno

from kbpf.emulator.environment import environment
from kbpf.emulator.interpreter import Context
from kbpf.emulator.maps.base import refused
from kbpf.emulator.packet import Packet
from kbpf.emulator.program import Program
from kbpf.emulator.tracing import MOST_ARGUMENTS, SyscallContext, TracingContext
from kbpf.runs import RawRun, RunOptions
from kbpf.uapi.constants import BPF_F_TEST_RUN_ON_CPU

#: U16_MAX.
_MOST_CONTEXT = 0xFFFF


def raw_tracepoint(program: Program, data: bytes, context: bytes, options: RunOptions) -> RawRun:
    """Run as the command does; raises `OSError` with the kernel's errno, and `EmulationFault`.

    With BPF_F_TEST_RUN_ON_CPU on a processor: ENXIO where there is no such one.
    """
    if data or options.repeat > 1 or options.batch_size:
        raise refused(errno.EINVAL)
    if not program.context_end <= len(context) <= 8 * MOST_ARGUMENTS:
        raise refused(errno.EINVAL)
    here = cpu = environment.cpu
    if options.flags & BPF_F_TEST_RUN_ON_CPU:
        cpu = options.cpu
        if not 0 <= cpu < environment.cpus:
            raise refused(errno.ENXIO)
    elif options.cpu:
        raise refused(errno.EINVAL)
    environment.cpu = cpu
    try:
        return RawRun(_run(program, TracingContext(program.type, context)), b"", context, 0)
    finally:
        environment.cpu = here


def syscall(program: Program, data: bytes, context: bytes, options: RunOptions) -> RawRun:
    """Run as the command does; raises `OSError` with the kernel's errno, and `EmulationFault`."""
    if data or options.repeat > 1 or options.flags or options.batch_size:
        raise refused(errno.EINVAL)
    if not program.context_end <= len(context) <= _MOST_CONTEXT:
        raise refused(errno.EINVAL)
    shared = SyscallContext(context)
    value = _run(program, shared)
    return RawRun(value, b"", bytes(shared.memory), 0)


def _run(program: Program, context: Context) -> int:
    return program.execute(Packet(buffer=b""), b"", context)
