"""Programs of socket maps: where they may be attached, with links and without, and what is told of them."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest
from sides import Side
from sockmaps import ANY_VERDICT, DROP, MESSAGE, PASS, VERDICT, World, returns, said, same, two_worlds

from kbpf.specs import MapSpec, ProgramSpec

pytestmark = pytest.mark.requires("kernel")

REPLACE = 4


@pytest.fixture
def worlds(kernel: Side, emulator: Side) -> Iterator[tuple[World, World]]:
    with two_worlds(kernel, emulator) as both:
        yield both


def programs(world: World) -> list[int]:
    """Loaded for each place, for none, and of another type."""
    made = [world.load(returns(PASS), (), place) for place in (VERDICT, ANY_VERDICT, MESSAGE)]
    for type in ("sk_skb", "socket_filter"):
        spec = ProgramSpec(type=type, instructions=tuple(returns(PASS)), license="GPL")
        made.append(world.fd(world.side.backend.program_load(spec, [])))
    return made


def test_which_programs_go_where(worlds: tuple[World, World]) -> None:
    def scenario(world: World) -> Any:
        backend, answers = world.side.backend, []
        array = world.fd(backend.map_create(MapSpec(type="array", key_size=4, value_size=4, max_entries=1)))
        made = programs(world)
        for place in (VERDICT, ANY_VERDICT, MESSAGE):
            for program in made:
                for target in (world.map(), world.map("sockhash"), array, made[0], 999):
                    for flags in (0, 1, 8):
                        answers.append(world.refused(backend.link_create, program, target, place, flags))
                for target in (world.map(), world.map("sockhash"), array, made[0], 999):
                    for flags in (0, 1, 2, 8):
                        answers.append(world.refused(backend.program_attach, program, target, place, flags))
                        answers.append(world.refused(backend.program_detach, program, target, place))
        return answers

    same(worlds, scenario)


def test_there_are_no_test_runs(worlds: tuple[World, World]) -> None:
    same(worlds, lambda world: [said(world.side.backend.program_run, fd, bytes(64), b"") for fd in programs(world)[:4]])


def told(world: World, map: int, *names: int) -> list[Any]:
    """What is at the two places, programs by their place among `names`."""
    backend = world.side.backend
    ids = [backend.program_info(fd).id for fd in names]
    answers = []
    for place in (VERDICT, ANY_VERDICT, "sk_skb_stream_parser", "sk_msg_verdict"):
        found = said(backend.program_query, map, place)
        answers.append(found if isinstance(found, str) else [ids.index(id) for id in found.program_ids])
    return answers


def test_what_is_there_and_gives_way(worlds: tuple[World, World]) -> None:
    def scenario(world: World) -> Any:
        backend, map = world.side.backend, world.map()
        one, other = world.load(returns(PASS)), world.load(returns(DROP))
        for_any = world.load(returns(PASS), (), ANY_VERDICT)
        answers = [told(world, map)]

        def does(call: Any, *arguments: Any) -> None:
            answers.append([world.refused(call, *arguments), told(world, map, one, other, for_any)])

        does(backend.program_detach, None, map, VERDICT)
        does(backend.program_detach, one, map, VERDICT)
        does(backend.program_attach, one, map, VERDICT)
        does(backend.program_attach, other, map, VERDICT)
        does(backend.program_attach, one, map, VERDICT, 0, other)
        does(backend.program_attach, for_any, map, ANY_VERDICT)
        does(backend.link_create, for_any, map, ANY_VERDICT)
        does(backend.program_detach, one, map, VERDICT)
        does(backend.program_detach, other, map, VERDICT)
        does(backend.program_attach, for_any, map, ANY_VERDICT)
        does(backend.program_attach, one, map, VERDICT)
        does(backend.link_create, one, map, ANY_VERDICT)
        does(backend.link_create, other, map, ANY_VERDICT)
        does(backend.program_attach, one, map, ANY_VERDICT)
        does(backend.program_detach, one, map, ANY_VERDICT)
        does(backend.program_detach, None, map, ANY_VERDICT)
        return answers

    same(worlds, scenario)


def test_links(worlds: tuple[World, World]) -> None:
    def scenario(world: World) -> Any:
        backend, map = world.side.backend, world.map()
        one, other = world.load(returns(PASS)), world.load(returns(DROP))
        elsewhere, untyped = world.load(returns(PASS), (), ANY_VERDICT), programs(world)[3]
        link = world.fd(backend.link_create(one, map, VERDICT))
        answers: list[Any] = []

        def note(*more: Any) -> None:
            info = backend.link_info(link)
            of_map = info.details["map_id"] == backend.map_info(map).id
            ids = [backend.program_info(fd).id for fd in (one, other)]
            answers.append([info.type, info.attach_type, of_map, ids.index(info.program_id), *more])
            answers.append(told(world, map, one, other))

        note()
        for given, expected in ((other, elsewhere), (other, one), (one, None), (elsewhere, None), (untyped, None)):
            note(said(backend.link_update, link, given, expected))
        client, accepted = world.tcp()
        backend.link_update(link, other)
        world.put(map, 0, accepted)
        client.send(b"dropped")
        note(said(accepted.recv, 10), said(backend.link_detach, link), said(backend.link_detach, link))
        note(said(backend.link_update, link, one), said(backend.link_update, link, elsewhere))
        return answers

    same(worlds, scenario)


def test_a_link_keeps_its_map(worlds: tuple[World, World]) -> None:
    def scenario(world: World) -> Any:
        backend = world.side.backend
        map = backend.map_create(MapSpec(type="sockmap", key_size=4, value_size=8, max_entries=1))
        id = backend.map_info(map).id
        one = world.load(returns(PASS))
        link = backend.link_create(one, map, VERDICT)
        backend.close(map)
        again = backend.open_by_id("map", id)
        answers = [told(world, again, one)]
        backend.close(link)
        answers += [told(world, again, one)]
        backend.program_attach(one, again, VERDICT)
        backend.close(again)
        return answers

    same(worlds, scenario)


def test_which_sockets_are_put_in(worlds: tuple[World, World]) -> None:
    """TCP's; those of other families are in maps without programs only in the emulator."""

    def scenario(world: World) -> Any:
        answers = []
        for place in (VERDICT, ANY_VERDICT, MESSAGE):
            for type in ("sockmap", "sockhash"):
                map = world.map(type)
                world.run(map, returns(PASS), place=place)
                fresh, (client, accepted) = world.open(), world.tcp()
                sockets = [fresh, world.open(type=socket.SOCK_DGRAM), world.listener(), client, accepted]
                answers += [said(world.put, map, key, sock) for key, sock in enumerate(sockets)]
        return answers

    same(worlds, scenario)


def test_programs_of_other_sockets_are_refused_by_name(emulator: Side) -> None:
    with two_worlds(emulator, emulator) as (world, _):
        map, bound = world.map(), world.open(type=socket.SOCK_DGRAM)
        bound.bind(("127.0.0.1", 0))
        world.put(map, 0, bound)
        world.run(map, returns(PASS))
        with socket.socket(type=socket.SOCK_DGRAM) as real:
            real.bind(("127.0.0.1", 0))
            with pytest.raises(OSError, match="its own TCP sockets only"):
                world.put(map, 1, real)
        with pytest.raises(OSError, match="its own TCP sockets only"):
            world.put(map, 1, bound)
        with pytest.raises(OSError, match="sk_skb_stream_parser yet"):
            emulator.backend.link_create(programs(world)[0], map, "sk_skb_stream_parser")
