"""Verdicts over what TCP sockets in a map receive: the same scenario on the kernel and in the emulator."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from functools import partial
from random import Random
from typing import Any

import pytest
from mapcode import Code, call, copy, mov, stack, the_map
from sides import Side
from sockmaps import (
    ANY_VERDICT,
    DROP,
    INGRESS,
    PASS,
    VERDICT,
    I,
    World,
    comes,
    field,
    logs,
    redirects,
    returns,
    said,
    same,
    two_worlds,
    until,
    whole,
)

from kbpf.emulator.backend import EmulatorBackend
from kbpf.errors import EmulationFault
from kbpf.isa import ebpf
from kbpf.testing import generate_wild, wild

pytestmark = pytest.mark.requires("kernel")

INET4, INET6 = socket.AF_INET, socket.AF_INET6
NOEXIST, EXIST = 1, 2
RESETS = bytes((1, 0, 0, 0, 0, 0, 0, 0))


@pytest.fixture
def worlds(kernel: Side, emulator: Side) -> Iterator[tuple[World, World]]:
    with two_worlds(kernel, emulator) as both:
        yield both


def filtered(world: World, code: Code, place: str = VERDICT) -> tuple[int, Any, Any]:
    """A map with a program, and a connection whose accepted end is in it."""
    map = world.map()
    world.run(map, code, place=place)
    client, accepted = world.tcp()
    world.put(map, 0, accepted)
    return map, client, accepted


@pytest.mark.parametrize("family", [INET4, INET6])
@pytest.mark.parametrize(
    "names",
    [
        ("len", "pkt_type", "protocol", "ingress_ifindex", "ifindex", "family", "queue_mapping"),
        ("priority", "tc_index", "napi_id", "gso_segs", "gso_size", "vlan_present", "vlan_tci"),
        ("remote_ip4", "local_ip4", "remote_ip6", "local_ip6", "vlan_proto"),
    ],
)
def test_what_programs_see(worlds: tuple[World, World], family: int, names: tuple[str, ...]) -> None:
    """Of the bytes, and of the FIN behind them."""

    def scenario(world: World) -> Any:
        log, map = world.log(), world.map()
        world.run(map, [*logs("__sk_buff", *names), *returns(PASS)], [log])
        client, accepted = world.tcp(family)
        world.put(map, 0, accepted)
        client.send(b"hello")
        answers = [accepted.recv(10)]
        client.close()
        return [*answers, accepted.recv(10), world.logged(log, len(names))]

    same(worlds, scenario)


def test_the_control_block_has_sequence_numbers_and_flags(worlds: tuple[World, World]) -> None:
    def scenario(world: World) -> Any:
        log, map = world.log(), world.map()
        code: Code = [I(ebpf.ST | ebpf.MEM | ebpf.DW, ebpf.FP, 0, at) for at in range(-64, 0, 8)]
        for word in range(5):
            code += [I(ebpf.LDX | ebpf.MEM | ebpf.W, 1, 9, 48 + 4 * word)]
            code += [I(ebpf.STX | ebpf.MEM | ebpf.DW, ebpf.FP, 1, 8 * word - 64)]
        code += [*the_map(1, 0), *stack(2, -64), *mov(3, 0), *call("map_push_elem"), *returns(PASS)]
        world.run(map, code, [log])
        client, accepted = world.tcp()
        world.put(map, 0, accepted)
        for data in (b"a", b"bcd"):
            client.send(data)
            accepted.recv(10)
        client.close()
        accepted.recv(10)
        found = world.logged(log, 5)
        first = found[0][0]
        return [[seq - first, end - first, *rest] for seq, end, *rest in found]

    same(worlds, scenario)


@pytest.mark.parametrize("place", [VERDICT, ANY_VERDICT])
def test_what_is_dropped_never_comes(worlds: tuple[World, World], place: str) -> None:
    def scenario(world: World) -> Any:
        _, client, accepted = filtered(world, returns(DROP), place)
        answers = [client.send(b"hello"), said(accepted.recv, 10)]
        client.shutdown(socket.SHUT_WR)
        answers += [comes(accepted), said(accepted.recv, 10)]
        accepted.send(b"back")
        answers += [said(client.recv, 10)]
        accepted.close()
        return [*answers, said(client.recv, 10)]

    same(worlds, scenario)


def test_what_is_passed_is_read_as_ever(worlds: tuple[World, World]) -> None:
    def scenario(world: World) -> Any:
        _, client, accepted = filtered(world, returns(PASS))
        client.send(b"one")
        client.send(b"two")
        answers = [comes(accepted), said(accepted.recv, 10, socket.MSG_PEEK)]
        answers += [said(accepted.recv, 2), said(accepted.recv, 10), said(accepted.recv, 0)]
        accepted.setblocking(False)
        answers += [said(accepted.recv, 10)]
        client.send(b"three")
        client.shutdown(socket.SHUT_WR)
        return [*answers, said(accepted.recv, 3), said(accepted.recv, 10), *(said(accepted.recv, 10) for _ in "ab")]

    same(worlds, scenario)


def test_a_reset_comes_behind_what_was_passed(worlds: tuple[World, World]) -> None:
    def scenario(world: World) -> Any:
        _, client, accepted = filtered(world, returns(PASS))
        client.send(b"data")
        comes(accepted)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESETS)
        client.close()
        return [*(said(accepted.recv, 10) for _ in range(3)), said(accepted.send, b"x")]

    same(worlds, scenario)


def test_closing_with_passed_bytes_unread_resets_nothing(worlds: tuple[World, World]) -> None:
    def scenario(world: World) -> Any:
        _, client, accepted = filtered(world, returns(PASS))
        client.send(b"data")
        comes(accepted)
        accepted.close()
        return said(client.recv, 10)

    same(worlds, scenario)


@pytest.mark.parametrize("flags", [0, INGRESS])
@pytest.mark.parametrize("type", ["sockmap", "sockhash"])
def test_bytes_are_redirected_in_order(worlds: tuple[World, World], type: str, flags: int) -> None:
    """To another socket's other end, or to what it receives, before its own."""
    helper = "sk_redirect_hash" if type == "sockhash" else "sk_redirect_map"

    def scenario(world: World) -> Any:
        map, targets = world.map(), world.map(type)
        world.run(map, redirects(helper, 1, flags), [world.log(), targets])
        (client, accepted), (far, near) = world.tcp(), world.tcp()
        world.put(map, 0, accepted)
        world.put(targets, 1, near)
        reader = near if flags else far
        for number in range(5):
            client.send(bytes((number,)) * 3)
        answers = [whole(reader, 15), said(accepted.recv, 10)]
        far.send(b"own")
        client.send(b"redirected")
        until(lambda: reader.recv(10, socket.MSG_PEEK) == b"redirected")
        answers += [whole(reader, 10), whole(near, 3)]
        near.send(b"out")
        accepted.send(b"back")
        return [*answers, said(far.recv, 10), said(client.recv, 10)]

    same(worlds, scenario)


@pytest.mark.parametrize("flags", [0, INGRESS])
def test_a_fin_that_is_redirected_breaks_the_pipe(worlds: tuple[World, World], flags: int) -> None:
    def scenario(world: World) -> Any:
        map = world.map()
        world.run(map, redirects("sk_redirect_map", 1, flags), [world.log(), map])
        (client, accepted), (far, near) = world.tcp(), world.tcp()
        world.put(map, 0, accepted)
        world.put(map, 1, near)
        client.send(b"bytes")
        comes(near if flags else far)
        client.shutdown(socket.SHUT_WR)
        answers = [said(accepted.recv, 10), said(far.recv, 10), comes(near)]
        answers += [said(near.recv, 10), said(near.recv, 10), said(near.send, b"x"), said(near.send, b"y")]
        accepted.send(b"back")
        return [*answers, whole(far, 2), said(client.recv, 10)]

    same(worlds, scenario)


def test_redirects_that_lead_nowhere(worlds: tuple[World, World]) -> None:
    """Nobody there, flags that are none, a listener: dropped. The socket itself: passed, or sent back."""

    def scenario(world: World) -> Any:
        answers = []
        for key, flags, who in ((5, 0, ""), (9, 0, ""), (0, 2, ""), (0, 0, ""), (0, 1, ""), (1, 0, "l"), (1, 1, "c")):
            map = world.map()
            world.run(map, redirects("sk_redirect_map", key, flags), [world.log(), map])
            client, accepted = world.tcp()
            world.put(map, 0, accepted)
            if who:
                world.put(map, 1, client if who == "c" else world.listener())
            answers += [client.send(b"hello"), said(accepted.recv, 10), said(client.recv, 10)]
        return answers

    same(worlds, scenario)


def test_a_target_whose_connection_is_gone(worlds: tuple[World, World]) -> None:
    def scenario(world: World) -> Any:
        map, targets = world.map(), world.map()
        world.run(map, redirects("sk_redirect_map", 1), [world.log(), targets])
        (client, accepted), (far, near) = world.tcp(), world.tcp()
        world.put(map, 0, accepted)
        world.put(targets, 1, near)
        client.send(b"unread")
        comes(far)
        far.close()
        answers: list[Any] = [said(near.recv, 10), said(near.recv, 10)]
        client.send(b"more")
        answers += [until(lambda: said(near.recv, 10) == "EPIPE"), said(near.recv, 10)]
        near.close()
        return [*answers, said(world.side.backend.map_lookup, targets, b"\1\0\0\0", 8), client.send(b"nobody")]

    same(worlds, scenario)


def test_all_comes_where_the_target_is_slow(worlds: tuple[World, World]) -> None:
    block = bytes(range(256)) * 64

    def scenario(world: World) -> Any:
        map, targets = world.map(), world.map()
        world.run(map, redirects("sk_redirect_map", 0), [world.log(), targets])
        (client, accepted), (far, near) = world.tcp(), world.tcp()
        world.put(map, 0, accepted)
        world.put(targets, 0, near)
        for _ in range(40):
            client.sendall(block)
        return whole(far, 40 * len(block)) == 40 * block

    assert same(worlds, scenario)


def test_one_redirects_to_another_with_a_program(worlds: tuple[World, World]) -> None:
    def scenario(world: World) -> Any:
        first, second, targets = world.map(), world.map(), world.map()
        world.run(first, redirects("sk_redirect_map", 0), [world.log(), targets])
        world.run(second, redirects("sk_redirect_map", 1, INGRESS), [world.log(), targets])
        (client, accepted), (far, near), (_, last) = world.tcp(), world.tcp(), world.tcp()
        world.put(first, 0, accepted)
        world.put(targets, 0, near)
        world.put(second, 0, far)
        world.put(targets, 1, last)
        client.send(b"through")
        return whole(last, 7), said(far.recv, 10)

    same(worlds, scenario)


def test_what_was_there_before_is_seen_by_who_reads(worlds: tuple[World, World]) -> None:
    """Together with what comes then, in one."""

    def scenario(world: World) -> Any:
        answers: list[Any] = []
        for verdict, more in ((PASS, b""), (DROP, b""), (PASS, b"after")):
            log, map = world.log(), world.map()
            world.run(map, [*logs("__sk_buff", "len"), *returns(verdict)], [log])
            client, accepted = world.tcp()
            client.send(b"before")
            comes(accepted)
            world.put(map, 0, accepted)
            answers += [comes(accepted), more and client.send(more)]
            answers += [said(accepted.recv, 100), said(accepted.recv, 100), world.logged(log, 1)]
        return answers

    same(worlds, scenario)


def test_what_comes_before_it_is_accepted(worlds: tuple[World, World]) -> None:
    """A listener's program is not its connections'."""

    def scenario(world: World) -> Any:
        map, server = world.map(), world.listener()
        world.run(map, returns(DROP))
        world.put(map, 0, server)
        client = world.open()
        client.connect(server.getsockname())
        client.send(b"early")
        accepted = world.keep(server.accept()[0])
        return said(accepted.recv, 10), said(world.put, map, 1, server)

    same(worlds, scenario)


def test_who_comes_and_goes(worlds: tuple[World, World]) -> None:
    """A socket has the programs of when it was put in, and loses them with any element of a map that has some."""

    def scenario(world: World) -> Any:
        map, plain = world.map(), world.map()
        client, accepted = world.tcp()
        answers: list[Any] = []

        def send() -> None:
            client.send(b"data")
            answers.append(said(accepted.recv, 10))

        world.put(map, 0, accepted)
        link = world.run(map, returns(DROP))
        send()
        answers.append(said(world.put, map, 0, accepted))
        send()
        world.put(map, 0, accepted)
        answers += [said(world.put, map, 1, accepted), said(world.put, map, 2, client)]
        send()
        world.put(plain, 0, accepted)
        world.take(map, 0)
        send()
        answers += [said(world.put, plain, 0, accepted, NOEXIST), said(world.put, plain, 1, accepted, EXIST)]
        world.put(map, 0, accepted)
        world.take(plain, 0)
        send()
        world.side.backend.link_detach(link)
        send()
        answers.append(said(world.put, map, 0, accepted))
        send()
        world.take(map, 0)
        send()
        return answers

    same(worlds, scenario)


def test_an_update_that_fails_has_left_its_program(worlds: tuple[World, World]) -> None:
    def scenario(world: World) -> Any:
        answers = []
        for other in (False, True):
            map = world.map()
            client, accepted = world.tcp()
            world.put(map, 0, world.tcp()[0] if other else accepted)
            world.run(map, returns(DROP))
            answers += [said(world.put, map, 0, accepted, NOEXIST), said(world.put, map, 5, accepted, EXIST)]
            client.send(b"data")
            answers.append(said(accepted.recv, 10))
        return answers

    same(worlds, scenario)


def test_a_socket_is_in_the_map_until_it_is_closed(worlds: tuple[World, World]) -> None:
    def scenario(world: World) -> Any:
        map, client, accepted = filtered(world, returns(PASS))
        answers = []

        def look() -> None:
            found = said(world.side.backend.map_lookup, map, bytes(4), 8)
            answers.append(found if isinstance(found, str) else "there")

        for end in (client, accepted):
            end.shutdown(socket.SHUT_WR)
            look()
        comes(client)
        answers += [said(world.put, map, 1, accepted), said(world.put, map, 1, client)]
        accepted.close()
        look()
        return answers

    same(worlds, scenario)


PULL, STORE, ROOM = "skb_pull_data", "skb_store_bytes", "skb_adjust_room"
HEAD, TAIL = "skb_change_head", "skb_change_tail"


@pytest.mark.parametrize(
    "steps",
    [
        [(PULL, 3), (PULL, 0)], [(PULL, 5), (PULL, 2)], [(PULL, 6)], [(PULL, -1)], [(STORE, 1, 2, 0)],
        [(STORE, 4, 2, 0)], [(STORE, 3, 2, 2)], [(STORE, 3, 2, 8)], [(ROOM, 2, 0, 0)],
        [(ROOM, -2, 0, 0), (PULL, 3)], [(ROOM, -6, 0, 0)],
        [(ROOM, 4096, 0, 0)], [(ROOM, 4095, 0, 0)], [(ROOM, -4096, 0, 0)], [(ROOM, 1, 1, 0)], [(ROOM, 1, 0, 1)],
        [(PULL, 5), (ROOM, 2, 0, 0)], [(PULL, 4), (ROOM, -2, 0, 0)], [(HEAD, 2, 0)], [(HEAD, 2, 1)], [(HEAD, 0, 0)],
        [(HEAD, 20000, 0)], [(HEAD, 16000, 0)], [(HEAD, 2, 0), (PULL, 7)], [(TAIL, 3, 0)], [(TAIL, 8, 0)],
        [(TAIL, 5, 0)], [(TAIL, 3, 1)], [(TAIL, 20000, 0)], [(PULL, 2), (TAIL, 3, 0), (TAIL, 5, 0)],
        [(TAIL, 0, 0)], [(ROOM, -5, 0, 0)],
    ],
)  # fmt: skip
def test_bytes_are_moved_and_changed(worlds: tuple[World, World], steps: list[tuple[Any, ...]]) -> None:
    """What helpers give, what programs reach directly and how long it is afterwards, and what is read."""

    def scenario(world: World) -> Any:
        log, map = world.log(), world.map()
        code: Code = [I(ebpf.ST | ebpf.MEM | ebpf.DW, ebpf.FP, 0, at) for at in range(-80, 0, 8)]
        code += [I(ebpf.ST | ebpf.MEM | ebpf.DW, ebpf.FP, 0, -72, 0x44434241)]
        at = -64

        def keep(register: int) -> Code:
            nonlocal at
            at += 8
            return [I(ebpf.STX | ebpf.MEM | ebpf.DW, ebpf.FP, register, at - 8)]

        for helper, *arguments in steps:
            code += copy(1, 9)
            if helper == STORE:
                code += [*mov(2, arguments[0]), *stack(3, -72), *mov(4, arguments[1]), *mov(5, arguments[2])]
            else:
                code += [i for number, value in enumerate(arguments) for i in mov(2 + number, value)]
            code += [*call(helper), *keep(0), *field("__sk_buff", "data", 1), *field("__sk_buff", "data_end", 2)]
            code += [I(ebpf.ALU64 | ebpf.SUB | ebpf.X, 2, 1), *keep(2)]
        code += [*field("__sk_buff", "len", 1), *keep(1)]
        code += [*the_map(1, 0), *stack(2, -64), *mov(3, 0), *call("map_push_elem"), *returns(PASS)]
        world.run(map, code, [log])
        client, accepted = world.tcp()
        world.put(map, 0, accepted)
        client.send(b"hello")
        return said(accepted.recv, 30000), world.logged(log, 8)

    same(worlds, scenario)


def test_bytes_are_read_and_written_directly(worlds: tuple[World, World]) -> None:
    """After a pull, none before."""

    def scenario(world: World) -> Any:
        map = world.map()
        begin = [*field("__sk_buff", "data", 2), *field("__sk_buff", "data_end", 3)]
        change = [
            *copy(4, 2), I(ebpf.ALU64 | ebpf.ADD, 4, 0, 0, 3), I(ebpf.JMP | ebpf.JGT | ebpf.X, 4, 3, 3),
            I(ebpf.LDX | ebpf.MEM | ebpf.B, 4, 2, 0), I(ebpf.STX | ebpf.MEM | ebpf.B, 2, 4, 2), I(ebpf.JMP | ebpf.JA),
        ]  # fmt: skip
        pull = [*copy(1, 9), *mov(2, 3), *call("skb_pull_data")]
        world.run(map, [*begin, *change, *pull, *begin, *change, *returns(PASS)])
        client, accepted = world.tcp()
        world.put(map, 0, accepted)
        client.send(b"abcd")
        client.send(b"xy")
        return whole(accepted, 6)

    same(worlds, scenario)


def test_wild_programs_end_cleanly(emulator: Side) -> None:
    """Where they run on a socket: what they do wrong is a fault of whoever sends."""
    backend = emulator.backend
    assert isinstance(backend, EmulatorBackend)
    with two_worlds(emulator, emulator) as (world, _):
        fds = wild.one_of_each(backend, world.stack)
        rng, faults = Random("sk_skb"), 0
        for _ in range(300):
            program = generate_wild.of_type(rng, "sk_skb", fds)
            try:
                fd = backend.program_load(program.spec, fds)
            except OSError:
                continue
            backend.program(fd).budget = generate_wild.BUDGET
            map = world.map()
            world.fd(backend.link_create(fd, map, VERDICT))
            backend.close(fd)
            client, accepted = world.tcp()
            world.put(map, 0, accepted)
            accepted.setblocking(False)
            for action in (partial(client.send, b"wild"), partial(accepted.recv, 10), client.close, accepted.close):
                try:
                    said(action)
                except EmulationFault:
                    faults += 1
        assert faults > 50
