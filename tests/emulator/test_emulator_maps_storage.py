"""Values of sockets, files, processes and control groups, against the kernel."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from mapcode import attempt, described_value, made
from sides import Side

from kbpf.specs import MapSpec
from kbpf.uapi import constants as uapi

pytestmark = pytest.mark.requires("kernel")

KINDS = ["sk_storage", "inode_storage", "task_storage", "cgrp_storage"]
CGROUPS = [Path(line.split()[1]) for line in Path("/proc/mounts").read_text().splitlines() if " cgroup2 " in line]


@pytest.fixture
def descriptors(tmp_path: Path) -> Iterator[list[int]]:
    """Two sockets and a duplicate, two files, a process, a control group, and nothing."""
    one, other = socket.socketpair()
    paths = [tmp_path, tmp_path / "file", *CGROUPS[:1]]
    (tmp_path / "file").touch()
    opened = [os.dup(one.fileno()), *(os.open(path, os.O_RDONLY) for path in paths), os.pidfd_open(os.getpid())]
    yield [one.fileno(), other.fileno(), *opened, 98765, -1]
    for fd in opened:
        os.close(fd)
    one.close()
    other.close()


@pytest.mark.parametrize("type", KINDS)
def test_commands_in_random_order(kernel: Side, emulator: Side, type: str, descriptors: list[int]) -> None:
    rng = Random(type)
    spec = MapSpec(type=type, key_size=4, value_size=8, flags=uapi.BPF_F_NO_PREALLOC, **described_value("u64"))
    with made(kernel, spec) as (one,), made(emulator, spec) as (other,):
        for _ in range(400):
            key = struct.pack("=i", rng.choice(descriptors))
            command: tuple[str, Any] = [
                ("map_update", (key, rng.randbytes(8), rng.choice((0, 1, 2, 3, 4, 8)))),
                ("map_update", (key, rng.randbytes(8), 0)),
                ("map_lookup", (key, 8)),
                ("map_delete", (key,)),
                ("map_next_key", (key, 4)),
                ("map_lookup_and_delete", (key, 8)),
            ][rng.randrange(6)]
            name, arguments = command
            results = [
                attempt(lambda: getattr(side.backend, name)(fd, *arguments))  # noqa: B023
                for side, fd in ((kernel, one), (emulator, other))
            ]
            assert results[1] == results[0], command
