"""Values of sockets, by programs and by descriptor, against the kernel."""

from __future__ import annotations

import socket
import struct
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hosts import Host, outcome, same_on_both
from mapcode import Code, attempt, call, copy, described_value, made, mov, put, stack, the_map, unless_null
from sides import Side
from socks import Scene, here, keep_result, looker, looks_up, tuple_of

from kbpf.errors import EmulationFault
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.specs import MapSpec
from kbpf.testing.network import NetworkNamespace
from kbpf.uapi import constants as uapi

pytestmark = pytest.mark.requires("kernel")

STORAGE = MapSpec(type="sk_storage", key_size=4, value_size=8, flags=uapi.BPF_F_NO_PREALLOC, **described_value("u64"))


def storage_of(value: Code, flags: int) -> Code:
    """Get the value, add 1 to it, and keep what was there."""
    took = [
        Instruction(ebpf.LDX | ebpf.MEM | ebpf.DW, 1, 0),
        *copy(2, 1),
        Instruction(ebpf.ALU64 | ebpf.ADD, 2, 0, 0, 1),
        Instruction(ebpf.STX | ebpf.MEM | ebpf.DW, 0, 2),
        *copy(0, 1),
        *keep_result(0),
    ]
    return [*the_map(1, 2), *copy(2, 8), *value, *mov(4, flags), *call("sk_storage_get"), *unless_null(0, took)]


DELETE: Code = [*the_map(1, 2), *copy(2, 8), *call("sk_storage_delete"), *keep_result(0)]
INITIAL: Code = [*put(-24, 100), *stack(3, -24)]
PROGRAMS = {
    "get": storage_of(mov(3, 0), 0),
    "get or create": storage_of(mov(3, 0), 1),
    "get or create as given": storage_of(INITIAL, 1),
    "get with wrong flags": storage_of(INITIAL, 2),
    "delete": DELETE,
    "delete and look at what was there": [
        *the_map(1, 2), *copy(2, 8), *mov(3, 0), *mov(4, 1), *call("sk_storage_get"), *unless_null(0, [
            *copy(6, 0), *the_map(1, 2), *copy(2, 8), *call("sk_storage_delete"),
            Instruction(ebpf.LDX | ebpf.MEM | ebpf.DW, 0, 6), *keep_result(0),
        ]),
    ],
}  # fmt: skip


@pytest.mark.parametrize("type", ["sched_cls", "cgroup_skb"])
def test_programs_and_descriptors_reach_the_same_values(kernel: Side, emulator: Side, scene: Scene, type: str) -> None:
    rng = Random(type)
    sockets = [scene.udp("127.0.0.1", port) for port in (1, 2, 3)]
    for opened in sockets:
        scene.listed(opened)
    seen: list[list[Any]] = []
    for side, run in ((kernel, scene.namespace.call), (emulator, here)):
        rng.seed(type)
        results: list[Any] = []
        seen.append(results)
        with made(side, STORAGE) as (storage,):
            for _ in range(300):
                number = rng.randrange(3)
                key = struct.pack("=i", sockets[number].fileno())
                action = rng.choice((*PROGRAMS, "map_update", "map_lookup", "map_delete"))
                if action in PROGRAMS:
                    program = looks_up("sk_lookup_udp", 12, PROGRAMS[action])
                    with looker(side, program, run, type, (storage,)) as look:
                        results.append((action, look(tuple_of("127.0.0.1", 9, "127.0.0.1", number + 1))))
                else:
                    given = {"map_update": (rng.randbytes(8), rng.choice((0, 1, 2))), "map_lookup": (8,)}.get(
                        action, ()
                    )
                    command = getattr(side.backend, action)
                    results.append((action, attempt(lambda: command(storage, key, *given))))  # noqa: B023
    assert seen[1] == seen[0]


def test_a_value_is_one_sockets(emulator: Side) -> None:
    with made(emulator, STORAGE) as (storage,), socket.socket() as one, socket.socket() as other:
        emulator.backend.map_update(storage, struct.pack("=i", one.fileno()), b"12345678")
        with pytest.raises(FileNotFoundError):
            emulator.backend.map_lookup(storage, struct.pack("=i", other.fileno()), 8)
        with one.dup() as again:
            assert emulator.backend.map_lookup(storage, struct.pack("=i", again.fileno()), 8) == b"12345678"


@pytest.mark.parametrize("wild", [0, 1])
def test_only_such_maps_have_values_of_sockets(emulator: Side, scene: Scene, wild: int) -> None:
    scene.listed(scene.udp("127.0.0.1", 1))
    body = [*the_map(1, wild), *copy(2, 8), *mov(3, 0), *mov(4, 1), *call("sk_storage_get")]
    with looker(emulator, looks_up("sk_lookup_udp", 12, body), here) as look, pytest.raises(EmulationFault):
        look(tuple_of("127.0.0.1", 9, "127.0.0.1", 1))


@pytest.mark.parametrize("flags", [0, uapi.BPF_F_CLONE])
def test_connections_begin_with_the_values_of_their_listener(netns: NetworkNamespace, flags: int) -> None:
    def scenario(host: Host) -> Any:
        backend = host.backend
        storage = backend.map_create(replace(STORAGE, flags=STORAGE.flags | flags))

        def value(target: Any) -> Any:
            return outcome(backend.map_lookup, storage, struct.pack("=i", target.fileno()), 8)

        def give(target: Any, data: bytes) -> None:
            backend.map_update(storage, struct.pack("=i", target.fileno()), data)

        listener = host.open(type=socket.SOCK_STREAM)
        listener.bind(("127.0.0.1", 7000))
        listener.listen()
        children = []
        found: list[Any] = []
        for data in (None, b"12345678", b"abcdefgh"):
            if data is not None:
                give(listener, data)
            client = host.open(type=socket.SOCK_STREAM)
            client.connect(("127.0.0.1", 7000))
            # It is the connection's own from the handshake on, not from accept(2) on.
            give(listener, b"too late")
            children.append(host.keep(listener.accept()[0]))
            found += [value(client), value(children[-1])]
        give(children[0], b"my value")
        found += map(value, (*children, listener))
        backend.close(storage)
        return found

    same_on_both(netns, scenario)
