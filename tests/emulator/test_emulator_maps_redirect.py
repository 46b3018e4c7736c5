"""Maps of targets for XDP, against the kernel."""

from __future__ import annotations

import os
import socket
import struct
from random import Random
from typing import Any

import pytest
from mapcode import EXIT, attempt, call, made, mov, the_map
from sides import FRAME, Side

from kbpf.specs import MapSpec, ProgramSpec

pytestmark = pytest.mark.requires("kernel")

KINDS = ["devmap", "devmap_hash", "cpumap"]
LOOPBACK = 1


def keys(side: Side, fd: int) -> list[bytes]:
    found: list[bytes] = []
    key = attempt(lambda: side.backend.map_next_key(fd, None, 4))
    while isinstance(key, bytes):
        found.append(key)
        key = attempt(lambda: side.backend.map_next_key(fd, found[-1], 4))
    return sorted(found)


@pytest.mark.parametrize(("type", "size"), [(type, size) for type in KINDS for size in (4, 8)] + [("xskmap", 4)])
def test_commands_in_random_order(kernel: Side, emulator: Side, type: str, size: int) -> None:
    rng = Random(size)
    spec = MapSpec(type=type, key_size=4, value_size=size, max_entries=3)
    with (
        made(kernel, spec) as (one,),
        made(emulator, spec) as (other,),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        open(os.devnull) as null,  # noqa: PTH123
    ):
        for _ in range(400):
            kind, key = rng.randrange(5), struct.pack("=I", rng.randrange(5))
            target = rng.choice((0, LOOPBACK, LOOPBACK, 987654, 0 if type == "xskmap" else 16385))
            program = rng.choice((0, 0, 0, 0xFFFFFFFF, 98765))
            value = struct.pack("=II", target, program)[:size]
            flags = rng.choice((0, 0, 0, 1, 2, 3, 4))
            if type == "xskmap":
                # A descriptor of nothing, or of something else than an AF_XDP socket.
                value = struct.pack("=I", rng.choice((98765, udp.fileno(), null.fileno())))
            command: tuple[str, Any] = [
                ("map_update", (key, value, flags)),
                ("map_update", (key, value, 0)),
                ("map_lookup", (key, size)),
                ("map_delete", (key,)),
                ("map_next_key", (rng.choice((key, None)), 4)),
            ][kind]
            name, arguments = command
            results = [
                attempt(lambda: getattr(side.backend, name)(fd, *arguments))  # noqa: B023
                for side, fd in ((kernel, one), (emulator, other))
            ]
            if type == "devmap_hash" and name == "map_next_key":
                # Linux promises no order.
                results = [keys(side, fd) for side, fd in ((kernel, one), (emulator, other))]
            assert results[1] == results[0], command


@pytest.mark.parametrize("type", KINDS)
def test_a_target_may_have_a_program_of_its_own(kernel: Side, emulator: Side, type: str) -> None:
    spec = MapSpec(type=type, key_size=4, value_size=8, max_entries=2)
    results = []
    for side in (kernel, emulator):
        outcomes = []
        with made(side, spec) as (fd,):
            for attach in ("xdp_devmap", "xdp_cpumap", "xdp", None):
                code = ProgramSpec(type="xdp", instructions=(*mov(0, 2), EXIT), expected_attach_type=attach)
                program = side.backend.program_load(code, [])
                value = struct.pack("=II", LOOPBACK, program)
                outcome: object = attempt(lambda: side.backend.map_update(fd, bytes(4), value))  # noqa: B023
                if outcome is None:
                    target, id = struct.unpack("=II", side.backend.map_lookup(fd, bytes(4), 8))
                    outcome = target, id == side.backend.program_info(program).id
                outcomes.append(outcome)
                side.backend.close(program)
        results.append(outcomes)
    assert results[1] == results[0]


@pytest.mark.parametrize("type", KINDS)
def test_what_redirecting_returns(kernel: Side, emulator: Side, type: str) -> None:
    """A broadcast is left out: the kernel sends a frame of the test run for it."""
    spec = MapSpec(type=type, key_size=4, value_size=4, max_entries=2)
    for index in (0, 1, 2, 7):
        for flags in (0, 1, 2, 3, 4, 16, 17, 32):
            program = [*the_map(1), *mov(2, index), *mov(3, flags), *call("redirect_map"), EXIT]
            values = []
            for side in (kernel, emulator):
                with made(side, spec) as (fd,):
                    side.backend.map_update(fd, bytes(4), struct.pack("=I", LOOPBACK))
                    loaded = side.backend.program_load(ProgramSpec(type="xdp", instructions=tuple(program)), [fd])
                    values.append(side.backend.program_run(loaded, FRAME, b"").value)
                    side.backend.close(loaded)
            assert values[1] == values[0], (index, flags)
