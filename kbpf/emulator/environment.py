"""What a program can ask of the machine around it: stand-ins that a test can set."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


def _possible_cpus() -> int:
    """Processors that Linux makes room for, which may be more than are there."""
    try:
        last = Path("/sys/devices/system/cpu/possible").read_text().strip().split(",")[-1].split("-")[-1]
        return int(last) + 1
    except (OSError, ValueError):
        return os.cpu_count() or 1


@dataclass(slots=True, kw_only=True)
class Environment:
    """The emulated machine. Set its attributes to make runs repeatable."""

    #: Processors that per-CPU values of maps made from now on have slots for.
    cpus: int = field(default_factory=_possible_cpus)
    #: The processor that programs run on, less than `cpus`.
    cpu: int = 0
    #: CLOCK_MONOTONIC in nanoseconds.
    clock: Callable[[], int] = time.monotonic_ns
    #: A random 32-bit number.
    random32: Callable[[], int] = lambda: random.getrandbits(32)
    #: Where bpf_trace_printk writes; None: nowhere.
    trace: Callable[[str], object] | None = None


#: The one that all programs run in.
environment = Environment()
