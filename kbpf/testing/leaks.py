"""What a process can leave behind: descriptors, child processes, pins and network namespaces.

A BPF link, program or map lives by a descriptor or a pin, so these show it. Pins under /sys/fs/bpf and named network
namespaces are the machine's and may be somebody else's, so `leaked` looks again for a while before it accuses:
what goes away by itself was not leaked. What `kbpf.testing.network` made for another process that still runs is
that one's.
"""

from __future__ import annotations

import gc
import os
import re
import time
from pathlib import Path
from typing import NamedTuple

BPFFS = Path("/sys/fs/bpf")
NETWORK_NAMESPACES = Path("/run/netns")

#: Descriptors that Python and its libraries open once and keep.
_KEPT = re.compile(r"/dev/(null|u?random|pts/\d+|tty)$")


class Snapshot(NamedTuple):
    """Descriptions by kind; a descriptor's number is part of its description, so a reused number is seen."""

    descriptors: frozenset[str]
    pins: frozenset[str]
    children: frozenset[str]
    namespaces: frozenset[str]

    def minus(self, before: Snapshot) -> Snapshot:
        return Snapshot(*(now - then for now, then in zip(self, before, strict=True)))


def descriptors() -> frozenset[str]:
    """This process's open descriptors as ``"7 socket:[1234]"``."""
    seen = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
        except OSError:  # the descriptor that listed the folder
            continue
        if not _KEPT.match(target):
            seen.add(f"{entry.name} {target}")
    return frozenset(seen)


def _pins() -> frozenset[str]:
    return frozenset(
        os.path.join(folder, name)  # noqa: PTH118  (os.walk is over strings)
        for folder, folders, files in os.walk(BPFFS)
        for name in (*folders, *files)
    )


def _children() -> frozenset[str]:
    seen = set()
    for thread in Path("/proc/self/task").iterdir():
        try:
            seen.update((thread / "children").read_text().split())
        except OSError:  # the thread ended, or the kernel was built without this file
            continue
    return frozenset(f"process {number}" for number in seen)


def _namespaces() -> frozenset[str]:
    try:
        return frozenset(path.name for path in NETWORK_NAMESPACES.iterdir() if not _is_others(path.name))
    except OSError:
        return frozenset()


def _is_others(namespace: str) -> bool:
    made = re.match(r"kbpf-test-(\d+)-", namespace)
    return made is not None and int(made[1]) != os.getpid() and Path("/proc", made[1]).exists()


def snapshot() -> Snapshot:
    """What is open and attached now."""
    return Snapshot(descriptors(), _pins(), _children(), _namespaces())


def leaked(before: Snapshot, patience: float = 2.0) -> Snapshot:
    """What came since `before` and stays: unreachable objects are collected first, and `patience` seconds waited."""
    gc.collect()
    deadline = time.monotonic() + patience
    while any(extra := snapshot().minus(before)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return extra
