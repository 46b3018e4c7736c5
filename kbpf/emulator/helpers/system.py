"""Helpers that ask the machine: time, randomness, processor, process. Tests set `environment` to fix the answers."""

from __future__ import annotations

import errno
import os
import re
import threading
from pathlib import Path

from kbpf.emulator.environment import environment
from kbpf.emulator.interpreter import HelperFunction, Run
from kbpf.emulator.memory import M32

#: A conversion of bpf_trace_printk; its arguments are integers.
_CONVERSION = re.compile(rb"%(?:%|[#0 +-]*\d*(l{0,2})([diux]))")


def trace_printk(run: Run, text: int, size: int, first: int, second: int, third: int) -> int:
    """Integers only: the format must end in NUL, and pointers and strings are refused with EINVAL."""
    raw = run.read(text, size & M32)
    if not raw.endswith(b"\0"):
        return -errno.EINVAL
    raw = raw.split(b"\0")[0]
    arguments = iter((first, second, third))
    out, at = [], 0
    for match in _CONVERSION.finditer(raw):
        out.append(raw[at : match.start()].decode(errors="replace"))
        at = match.end()
        if match[0] == b"%%":
            out.append("%")
            continue
        value = next(arguments, None)
        if value is None:
            return -errno.EINVAL
        bits = 64 if match[1] else 32
        value &= (1 << bits) - 1
        if match[2] in b"di" and value >> bits - 1:
            value -= 1 << bits
        out.append(match[0].replace(match[1], b"").decode().replace("u", "d") % value)
    rest = raw[at:]
    if b"%" in b"".join([rest, *_CONVERSION.split(raw)[::3]]):
        return -errno.EINVAL
    line = "".join(out) + rest.decode(errors="replace")
    if environment.trace is not None:
        environment.trace(line)
    return len(line.encode())


def get_current_comm(run: Run, buffer: int, size: int, *_: int) -> int:
    size &= M32
    run.check_writable(buffer, size)
    if not size:
        return -errno.EINVAL
    try:
        name = Path("/proc/self/comm").read_bytes().rstrip(b"\n")[: size - 1]
    except OSError:
        name = b""
    run.write(buffer, name + bytes(size - len(name)))
    return 0


HELPERS: dict[str, HelperFunction] = {
    "ktime_get_ns": lambda run, *_: environment.clock(),
    "ktime_get_boot_ns": lambda run, *_: environment.clock(),
    "ktime_get_coarse_ns": lambda run, *_: environment.clock(),
    "get_prandom_u32": lambda run, *_: environment.random32(),
    "get_smp_processor_id": lambda run, *_: environment.cpu,
    "get_numa_node_id": lambda run, *_: 0,
    "get_current_pid_tgid": lambda run, *_: os.getpid() << 32 | threading.get_native_id(),
    "get_current_uid_gid": lambda run, *_: os.getgid() << 32 | os.getuid(),
    "get_current_comm": get_current_comm,
    "trace_printk": trace_printk,
}
