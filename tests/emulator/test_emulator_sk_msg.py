"""Verdicts over what TCP sockets in a map send: the same scenario on the kernel and in the emulator."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from functools import partial
from random import Random
from typing import Any

import pytest
from mapcode import EXIT, Code, call, copy, mov, stack, the_map
from sides import Side
from sockmaps import (
    DROP,
    INGRESS,
    MESSAGE,
    PASS,
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


@pytest.fixture
def worlds(kernel: Side, emulator: Side) -> Iterator[tuple[World, World]]:
    with two_worlds(kernel, emulator) as both:
        yield both


def filtered(world: World, code: Code) -> tuple[int, Any, Any]:
    """A map with a program, and a connection whose first end is in it."""
    map = world.map()
    world.run(map, code, place=MESSAGE)
    client, accepted = world.tcp()
    world.put(map, 0, client)
    return map, client, accepted


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_what_programs_see(worlds: tuple[World, World], family: int) -> None:
    names = ("family", "remote_ip4", "local_ip4", "remote_ip6", "local_ip6", "size", "remote_port", "local_port")

    def scenario(world: World) -> Any:
        log, map = world.log(), world.map()
        world.run(map, [*logs("sk_msg_md", *names), *returns(PASS)], [log], MESSAGE)
        client, accepted = world.tcp(family)
        world.put(map, 0, client)
        answers = [client.send(b"hello"), client.sendmsg([b"ab", b"cde"]), client.send(b""), whole(accepted, 10)]
        ports = [socket.htons(client.getpeername()[1]) << 16, client.getsockname()[1]]
        return [*answers, [[found[:6], found[6:] == ports] for found in world.logged(log, 8)]]

    same(worlds, scenario)


def test_what_is_dropped_is_not_sent(worlds: tuple[World, World]) -> None:
    def scenario(world: World) -> Any:
        _, client, accepted = filtered(world, returns(DROP))
        answers = [said(client.send, b"hello"), said(accepted.recv, 10), said(client.send, b"")]
        accepted.send(b"back")
        answers += [said(client.recv, 10)]
        client.shutdown(socket.SHUT_WR)
        answers += [said(client.send, b"hello"), said(accepted.recv, 10)]
        _, client, accepted = filtered(world, returns(7))
        return [*answers, said(client.send, b"hello"), said(accepted.recv, 10)]

    same(worlds, scenario)


def test_the_program_is_not_asked_again_after_a_drop(worlds: tuple[World, World]) -> None:
    def scenario(world: World) -> Any:
        code = [
            *field("sk_msg_md", "data", 2), *field("sk_msg_md", "data_end", 3), *copy(4, 2),
            I(ebpf.ALU64 | ebpf.ADD, 4, 0, 0, 1), I(ebpf.JMP | ebpf.JGT | ebpf.X, 4, 3, 2),
            I(ebpf.LDX | ebpf.MEM | ebpf.B, 5, 2, 0), I(ebpf.JMP | ebpf.JNE, 5, 0, 2, ord("x")), *returns(DROP),
            *returns(PASS),
        ]  # fmt: skip
        _, client, accepted = filtered(world, code)
        sent = [said(client.send, data) for data in (b"one", b"two", b"xthree", b"four", b"five")]
        return sent, whole(accepted, 6), said(accepted.recv, 10)

    same(worlds, scenario)


def test_what_is_passed_is_sent_as_ever(worlds: tuple[World, World]) -> None:
    def scenario(world: World) -> Any:
        _, client, accepted = filtered(world, returns(PASS))
        client.sendall(b"z" * 300000)
        answers: list[Any] = [len(whole(accepted, 300000))]
        client.shutdown(socket.SHUT_WR)
        answers += [said(client.send, b"x"), said(client.send, b"x"), said(accepted.recv, 10)]
        _, client, accepted = filtered(world, returns(PASS))
        accepted.close()
        comes(client)
        client.send(b"x")
        return [*answers, until(lambda: said(client.send, b"x") == "EPIPE"), said(client.recv, 10)]

    same(worlds, scenario)


@pytest.mark.parametrize("flags", [0, INGRESS])
@pytest.mark.parametrize("type", ["sockmap", "sockhash"])
def test_messages_are_redirected(worlds: tuple[World, World], type: str, flags: int) -> None:
    """To another socket's other end, or to what it receives."""
    helper = "msg_redirect_hash" if type == "sockhash" else "msg_redirect_map"

    def scenario(world: World) -> Any:
        map, targets = world.map(), world.map(type)
        world.run(map, redirects(helper, 1, flags), [world.log(), targets], MESSAGE)
        (client, accepted), (far, near) = world.tcp(), world.tcp()
        world.put(map, 0, client)
        world.put(targets, 1, near)
        reader, other = (near, far) if flags else (far, near)
        answers = [[client.send(data) for data in (b"one", b"two", b"three")], whole(reader, 11)]
        answers += [said(end.recv, 10) for end in (accepted, other, client)]
        far.send(b"own")
        near.send(b"out")
        answers += [said(near.recv, 10), said(far.recv, 10)]
        near.close()
        answers += [said(client.send, b"nobody"), said(client.send, b"nobody")]
        client.close()
        return [*answers, said(accepted.recv, 10)]

    same(worlds, scenario)


def test_a_target_whose_connection_is_gone(worlds: tuple[World, World]) -> None:
    def scenario(world: World) -> Any:
        map = world.map()
        world.run(map, redirects("msg_redirect_map", 1), [world.log(), map], MESSAGE)
        (client, _), (far, near) = world.tcp(), world.tcp()
        world.put(map, 0, client)
        world.put(map, 1, near)
        far.close()
        comes(near)
        client.send(b"x")
        return until(lambda: said(client.send, b"x") == "EPIPE"), said(near.recv, 10)

    same(worlds, scenario)


def test_redirects_that_lead_nowhere(worlds: tuple[World, World]) -> None:
    """Nobody there, flags that are none, a listener: dropped. The socket itself, and its other end."""

    def scenario(world: World) -> Any:
        answers = []
        for key, flags, who in (
            (5, 0, ""), (9, 0, ""), (0, 2, ""), (0, 0, ""), (0, 1, ""), (1, 0, "l"), (1, 1, "a"), (1, 0, "a"),
        ):  # fmt: skip
            map = world.map()
            world.run(map, redirects("msg_redirect_map", key, flags), [world.log(), map], MESSAGE)
            client, accepted = world.tcp()
            world.put(map, 0, client)
            if who:
                world.put(map, 1, accepted if who == "a" else world.listener())
            answers += [said(client.send, b"hello"), said(accepted.recv, 10), said(client.recv, 10)]
        return answers

    same(worlds, scenario)


def test_who_comes_and_goes(worlds: tuple[World, World]) -> None:
    """The program stays as long as the socket is in any map."""

    def scenario(world: World) -> Any:
        map, client, accepted = filtered(world, returns(DROP))
        plain = world.map()
        answers = [said(world.put, map, 1, client)]
        world.put(plain, 0, client)
        world.take(map, 0)
        answers += [said(client.send, b"a"), said(accepted.recv, 10)]
        world.take(plain, 0)
        return [*answers, said(client.send, b"b"), said(accepted.recv, 10)]

    same(worlds, scenario)


def test_one_map_has_programs_for_both_directions(worlds: tuple[World, World]) -> None:
    def scenario(world: World) -> Any:
        map = world.map()
        world.run(map, returns(PASS), place=MESSAGE)
        world.run(map, returns(DROP))
        client, accepted = world.tcp()
        world.put(map, 0, client)
        answers = [said(client.send, b"out"), said(accepted.recv, 10)]
        accepted.send(b"in")
        return [*answers, said(client.recv, 10)]

    same(worlds, scenario)


APPLY, CORK, PULL = "msg_apply_bytes", "msg_cork_bytes", "msg_pull_data"
PUSH, POP = "msg_push_data", "msg_pop_data"


def kept(steps: list[tuple[Any, ...]], value: int) -> Code:
    """Note down what each helper gives, what is reached directly after it, and the size in the end."""
    code: Code = [I(ebpf.ST | ebpf.MEM | ebpf.DW, ebpf.FP, 0, at) for at in range(-64, 0, 8)]
    at = -64
    for helper, *arguments in steps:
        code += [*copy(1, 9), *(i for number, given in enumerate(arguments) for i in mov(2 + number, given))]
        code += [*call(helper), I(ebpf.STX | ebpf.MEM | ebpf.DW, ebpf.FP, 0, at)]
        code += [*field("sk_msg_md", "data", 1), *field("sk_msg_md", "data_end", 2)]
        code += [I(ebpf.ALU64 | ebpf.SUB | ebpf.X, 2, 1), I(ebpf.STX | ebpf.MEM | ebpf.DW, ebpf.FP, 2, at + 8)]
        at += 16
    code += [*field("sk_msg_md", "size", 1), I(ebpf.STX | ebpf.MEM | ebpf.DW, ebpf.FP, 1, at)]
    return [*code, *the_map(1, 0), *stack(2, -64), *mov(3, 0), *call("map_push_elem"), *mov(0, value), EXIT]


def judged(world: World, steps: list[tuple[Any, ...]], value: int, sends: list[bytes]) -> tuple[Any, ...]:
    """What the program has noted down, what was sent, and what has come."""
    log, map = world.log(), world.map()
    world.run(map, kept(steps, value), [log], MESSAGE)
    client, accepted = world.tcp()
    world.put(map, 0, client)
    sent = [said(client.send, data) for data in sends]
    return world.logged(log, 8), sent, whole(accepted, 100)


@pytest.mark.parametrize("value", [PASS, DROP])
@pytest.mark.parametrize(
    ("steps", "sends"),
    [
        ([(APPLY, 3)], [b"abcdefgh", b"ij"]), ([(APPLY, 10)], [b"abcdefgh", b"ij", b"kl"]),
        ([(CORK, 10)], [b"abcdefgh", b"ij", b"kl"]), ([(CORK, 10)], [b"abcdefgh", b"ijklmnopq"]),
        ([(CORK, 10)], [b"abc", b"def", b"gh", b"ij", b"klm", b"n"]), ([(CORK, 5)], [b"abcdefgh", b"ij"]),
        ([(PULL, 0, 5, 0)], [b"abcdefgh"]), ([(PULL, 2, 5, 0)], [b"abcdefgh"]), ([(PULL, 0, 9, 0)], [b"abcdefgh"]),
        ([(PULL, 5, 2, 0)], [b"abcdefgh"]), ([(PULL, 0, 8, 1)], [b"abcdefgh"]), ([(PULL, 3, 3, 0)], [b"abcdefgh"]),
        ([(POP, 0, 3, 0)], [b"abcdefgh"]), ([(POP, 2, 3, 0)], [b"abcdefgh"]), ([(POP, 5, 3, 0)], [b"abcdefgh"]),
        ([(POP, 5, 4, 0)], [b"abcdefgh"]), ([(POP, 0, 8, 0)], [b"abcdefgh"]), ([(POP, 0, 0, 0)], [b"abcdefgh"]),
        ([(POP, 0, 3, 1)], [b"abcdefgh"]), ([(POP, 2, 3, 0), (PULL, 1, 5, 0)], [b"abcdefgh"]),
        ([(PUSH, 2, 3, 0), (POP, 1, 5, 0)], [b"abcdefgh"]), ([(PUSH, 2, 3, 0), (POP, 2, 3, 0)], [b"abcdefgh"]),
        ([(PUSH, 9, 3, 0)], [b"abcdefgh"]), ([(PUSH, 0, 0, 0)], [b"abcdefgh"]), ([(PUSH, 0, 3, 1)], [b"abcdefgh"]),
    ],
)  # fmt: skip
def test_messages_are_cut_and_held_back(
    worlds: tuple[World, World], steps: list[tuple[Any, ...]], sends: list[bytes], value: int
) -> None:
    same(worlds, lambda world: judged(world, steps, value, sends))


@pytest.mark.parametrize("at", [0, 2, 8])
@pytest.mark.parametrize("value", [PASS, DROP])
def test_bytes_are_put_in(worlds: tuple[World, World], at: int, value: int) -> None:
    """Linux does not say what they are."""

    def scenario(world: World) -> Any:
        noted, sent, came = judged(world, [(PUSH, at, 3, 0), (PULL, 0, 11, 0)], value, [b"abcdefgh"])
        return noted, sent, len(came), came[:at] + came[at + 3 :]

    same(worlds, scenario)


def test_bytes_are_written_directly(worlds: tuple[World, World]) -> None:
    def scenario(world: World) -> Any:
        code = [
            *copy(1, 9), *mov(2, 2), *mov(3, 5), *mov(4, 0), *call("msg_pull_data"),
            *field("sk_msg_md", "data", 2), *field("sk_msg_md", "data_end", 3), *copy(4, 2),
            I(ebpf.ALU64 | ebpf.ADD, 4, 0, 0, 3), I(ebpf.JMP | ebpf.JGT | ebpf.X, 4, 3, 2),
            I(ebpf.LDX | ebpf.MEM | ebpf.B, 4, 2, 0), I(ebpf.STX | ebpf.MEM | ebpf.B, 2, 4, 2),
            *returns(PASS),
        ]  # fmt: skip
        _, client, accepted = filtered(world, code)
        return client.send(b"abcdefgh"), whole(accepted, 8)

    same(worlds, scenario)


def test_wild_programs_end_cleanly(emulator: Side) -> None:
    """Where they run on a socket: what they do wrong is a fault of whoever sends."""
    backend = emulator.backend
    assert isinstance(backend, EmulatorBackend)
    with two_worlds(emulator, emulator) as (world, _):
        fds = wild.one_of_each(backend, world.stack)
        rng, faults = Random("sk_msg"), 0
        for _ in range(300):
            program = generate_wild.of_type(rng, "sk_msg", fds)
            try:
                fd = backend.program_load(program.spec, fds)
            except OSError:
                continue
            backend.program(fd).budget = generate_wild.BUDGET
            map = world.map()
            world.fd(backend.link_create(fd, map, MESSAGE))
            backend.close(fd)
            client, accepted = world.tcp()
            world.put(map, 0, client)
            accepted.setblocking(False)
            for action in (partial(client.send, b"wild"), partial(client.send, b"more"), partial(accepted.recv, 10)):
                try:
                    said(action)
                except EmulationFault:
                    faults += 1
            client.close()
            accepted.close()
        assert faults > 50
