"""sock_ops programs that put connections into maps, against the kernel's over loopback."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import pytest
from hooks import CONTEXT, Recorder, attached, on_stack, real_group
from mapcode import call, copy, made, mov, stack
from sides import Side

from kbpf.emulator.backend import EmulatorBackend
from kbpf.emulator.events import run_event
from kbpf.emulator.process_sock import sock_of
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction, ld_imm64
from kbpf.specs import MapSpec
from kbpf.uapi import constants as uapi

pytestmark = pytest.mark.requires("kernel")


@pytest.fixture(scope="module")
def group() -> Iterator[int]:
    with real_group() as descriptor:
        yield descriptor


def update(helper: str, fd: int, key: int, flags: int) -> list[Instruction]:
    return [
        *on_stack(struct.pack("=I", key), -8), *copy(1, CONTEXT), *ld_imm64(2, fd, ebpf.PSEUDO_MAP_FD), *stack(3, -8),
        *mov(4, flags), *call(helper),
    ]  # fmt: skip


@pytest.mark.parametrize(("type", "helper"), [("sockmap", "sock_map_update"), ("sockhash", "sock_hash_update")])
@pytest.mark.parametrize(
    "op",
    [uapi.BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, uapi.BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB,
     uapi.BPF_SOCK_OPS_TCP_LISTEN_CB, uapi.BPF_SOCK_OPS_TCP_CONNECT_CB],
)  # fmt: skip
def test_a_connection_is_put_into_a_map(
    kernel: Side, emulator: Side, group: int, type: str, helper: str, op: int
) -> None:
    spec = MapSpec(type=type, key_size=4, value_size=8, max_entries=2)
    asked = [(0, 2), (0, 1), (0, 1), (0, 2), (1, 0), (1, 3), (2, 0)]
    with made(kernel, spec) as (fd,):
        steps = [update(helper, fd, key, flags) for key, flags in asked]
        with Recorder(kernel, "sock_ops", "cgroup_sock_ops", steps, only=(0, op)) as recorder:
            with attached(group, recorder), socket.create_server(("127.0.0.1", 0)) as listener:
                client = socket.create_connection(listener.getsockname())
                accepted, _ = listener.accept()
                truth, there = recorder.recorded(), contents(kernel, fd)
            end = {
                uapi.BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB: accepted, uapi.BPF_SOCK_OPS_TCP_LISTEN_CB: listener,
            }.get(op, client)  # fmt: skip
            assert truth[0] == 1
            with client, accepted, made(emulator, spec) as (other,):
                # The listener is closed by now, and was to be asked before.
                sock = sock_of((client if end is listener else end).fileno())
                steps = [update(helper, other, key, flags) for key, flags in asked]
                with Recorder(emulator, "sock_ops", "cgroup_sock_ops", steps, only=(0, op)) as recorder:
                    assert isinstance(emulator.backend, EmulatorBackend)
                    run_event(emulator.backend.program(recorder.fd), {"op": op}, sock=sock)
                    assert recorder.recorded() == truth
                    assert [found is None for found in contents(emulator, other)] == [found is None for found in there]
                    if end is not listener:
                        assert contents(emulator, other) == there


def contents(side: Side, fd: int) -> list[bytes | None]:
    found: list[bytes | None] = []
    for key in range(2):
        try:
            found.append(side.backend.map_lookup(fd, struct.pack("=I", key), 8))
        except FileNotFoundError:
            found.append(None)
    return found
