"""Runs of programs and their time, counted while anybody holds a descriptor of BPF_ENABLE_STATS (Linux 5.8).

As in the kernel (`bpf_prog_run`) a run counts for the program that it begins with, not for those that it tail calls.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Runs:
    """What was counted of a program."""

    count: int = 0
    time_ns: int = 0

    def add(self, count: int, time_ns: int) -> None:
        self.count += count
        self.time_ns += time_ns


class Switch:
    """What is behind such a descriptor, and others that duplicate it."""

    users = 0

    def opened(self) -> None:
        Switch.users += 1

    def closed(self) -> None:
        Switch.users -= 1


@contextmanager
def counted(runs: Runs) -> Iterator[None]:
    """The block is one run."""
    start = time.perf_counter_ns()
    try:
        yield
    finally:
        runs.add(1, time.perf_counter_ns() - start)
