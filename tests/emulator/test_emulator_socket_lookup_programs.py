"""Programs that decide which socket a packet is for, in a network namespace and in the emulator's table."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import pytest
from mapcode import EXIT, Code, call, copy, made, mov, put, stack, the_map
from sides import Side
from socks import WORDS, Scene, lookers, looks_up, tuple_of

from kbpf.emulator.backend import EmulatorBackend
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.kernel.attrs import command
from kbpf.specs import MapSpec, ProgramSpec
from kbpf.testing.network import NetworkNamespace
from kbpf.uapi.enums import ATTACH_TYPES
from kbpf.uapi.structs import STRUCTS

pytestmark = pytest.mark.requires("kernel")

FIELDS = STRUCTS["bpf_sk_lookup"].fields
PASS, DROP = 1, 0


def assigns(key: int, flags: int, value: int) -> Code:
    """Assign the socket at a key of the map, where there is one, and return `value`."""
    return [
        *copy(9, 1), *put(-8, key), *the_map(1, 0), *stack(2, -8), *call("map_lookup_elem"),
        Instruction(ebpf.JMP | ebpf.JNE, 0, 0, 2), *mov(0, value), EXIT,
        *copy(8, 0), *copy(1, 9), *copy(2, 8), *mov(3, flags), *call("sk_assign"),
        *copy(1, 8), *call("sk_release"), *mov(0, value), EXIT,
    ]  # fmt: skip


def only(field: str, value: int, program: Code) -> Code:
    """The program, where a field of the context has this value; else let others decide."""
    where = FIELDS[field]
    return [
        Instruction(ebpf.LDX | ebpf.MEM | ebpf.W, 0, 1, where.offset),
        Instruction(ebpf.JMP32 | ebpf.JEQ, 0, 0, 2, value), *mov(0, PASS), EXIT, *program,
    ]  # fmt: skip


RETURNS = {value: [*mov(0, value), EXIT] for value in (PASS, DROP)}
CASES: dict[str, list[Code]] = {
    "pass": [RETURNS[PASS]],
    "drop": [RETURNS[DROP]],
    "assign": [assigns(0, 0, PASS)],
    "assign, but drop": [assigns(0, 0, DROP)],
    "assign one of a group": [assigns(1, 0, PASS)],
    "assign one of a group alone": [assigns(1, 2, PASS)],
    "drop, then assign": [RETURNS[DROP], assigns(0, 0, PASS)],
    "assign, then drop": [assigns(0, 0, PASS), RETURNS[DROP]],
    "assign, then another, which is refused": [assigns(0, 0, PASS), assigns(2, 0, PASS)],
    "assign, then replace": [assigns(0, 0, PASS), assigns(2, 1, PASS)],
    "assign what takes other packets": [assigns(3, 0, PASS)],
    "nothing to assign": [assigns(9, 0, PASS)],
    "by address": [only("remote_ip4", 0x0100007F, assigns(0, 0, PASS))],
    "by remote port": [only("remote_port", 0x0900, assigns(0, 0, PASS))],
    "by local port": [only("local_port", 81, assigns(0, 0, PASS))],
    "by protocol": [only("protocol", 17, RETURNS[DROP])],
    "by device": [only("ingress_ifindex", 1, RETURNS[DROP])],
}


@contextmanager
def in_namespace(side: Side, namespace: NetworkNamespace, fds: Sequence[int]) -> Iterator[None]:
    target = os.open(f"/run/netns/{namespace.name}", os.O_RDONLY)
    with ExitStack() as links:
        links.callback(os.close, target)
        for fd in fds:
            link = command("link_create", prog_fd=fd, target_fd=target, attach_type=ATTACH_TYPES["sk_lookup"])
            links.callback(os.close, link)
        yield


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_programs_decide(kernel: Side, emulator: Side, scene: Scene, protocol: str, case: str) -> None:
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM

    def waiting(address: str, port: int, shares: bool = False) -> socket.socket:
        opened = scene.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shares)
        opened.bind((address, port))
        if protocol == "tcp":
            opened.listen()
        scene.listed(opened)
        return opened

    targets = [
        waiting("127.0.0.1", 1000), waiting("127.0.0.1", 1001, shares=True), waiting("::", 1002),
        waiting("::1", 1003),
    ]  # fmt: skip
    waiting("127.0.0.1", 80)
    waiting("0.0.0.0", 81)
    waiting("::", 82)
    if protocol == "udp":
        connected = scene.udp("127.0.0.1", 83)
        connected.connect(("127.0.0.1", 9))
        scene.listed(connected)
    questions = [tuple_of("127.0.0.1", port, "127.0.0.1", local) for port in (9, 10) for local in range(80, 85)]
    questions += [tuple_of("::1", 9, "::1", local) for local in range(80, 85)]
    sockmap = MapSpec(type="sockmap", key_size=4, value_size=8, max_entries=16)
    with made(kernel, sockmap) as (one,), made(emulator, sockmap) as (other,):
        loaded: list[list[int]] = []
        for side, fd in ((kernel, one), (emulator, other)):
            for key, target in enumerate(targets):
                side.backend.map_update(fd, struct.pack("=I", key), struct.pack("=q", target.fileno()))
            specs = [
                ProgramSpec(type="sk_lookup", expected_attach_type="sk_lookup", instructions=tuple(program))
                for program in CASES[case]
            ]
            loaded.append([side.backend.program_load(spec, [fd]) for spec in specs])
        assert isinstance(emulator.backend, EmulatorBackend)
        scene.table.programs += [emulator.backend.program(fd) for fd in loaded[1]]
        with in_namespace(kernel, scene.namespace, loaded[0]):
            for size in (12, 36):
                program = looks_up(f"sk_lookup_{protocol}", size, WORDS)
                with lookers(kernel, emulator, scene.namespace, program) as (truth, got):
                    for question in questions:
                        if len(question) == size:
                            assert got(question) == truth(question), question.hex()
        for side, fds in zip((kernel, emulator), loaded, strict=True):
            for fd in fds:
                side.backend.close(fd)
