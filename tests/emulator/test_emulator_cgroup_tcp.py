"""TCP sockets that run the hooks of their control group: the same scenario on the kernel and in the emulator."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest
from cgroupworld import HERE, INET4, INET6, World, address_of, free_ports, replace, said, same, two_worlds
from hooks import Recorder, call, on_stack, returns, whole
from sides import Side

pytestmark = pytest.mark.requires("kernel")

STREAM = socket.SOCK_STREAM


@pytest.fixture
def worlds(kernel: Side, emulator: Side) -> Iterator[tuple[World, World]]:
    with two_worlds(kernel, emulator) as both:
        yield both


def listener(world: World, family: int = INET4, port: int = 0) -> Any:
    made = world.open(family, STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind((HERE[family], port))
    made.listen()
    return made


@pytest.mark.parametrize("family", [INET4, INET6])
def test_what_programs_see_of_calls(worlds: tuple[World, World], family: int) -> None:
    version, here = (4 if family == INET4 else 6), HERE[family]
    ports = free_ports(family, 2, STREAM)

    def scenario(world: World) -> Any:
        sock, addr = "cgroup_sock", "cgroup_sock_addr"
        own = ("family", "type", "protocol")
        recorders = [
            world.record(sock, "cgroup_inet_sock_create", whole("bpf_sock", *own)),
            world.record(addr, f"cgroup_inet{version}_bind", address_of(version)),
            world.record(sock, f"cgroup_inet{version}_post_bind", whole("bpf_sock", f"src_ip{version}", "src_port")),
            world.record(addr, f"cgroup_inet{version}_connect", address_of(version)),
            world.record(addr, f"cgroup_inet{version}_getpeername", address_of(version)),
            world.record(sock, "cgroup_inet_sock_release", whole("bpf_sock", *own, "mark")),
        ]
        seen = []

        def note() -> None:
            seen.append([recorder.recorded() for recorder in recorders])

        server, client = listener(world, family, ports[0]), world.open(family, STREAM)
        note()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        client.bind((here, ports[1]))
        note()
        client.connect((here, ports[0]))
        note()
        accepted = server.accept()[0]
        note()
        # Not before: Python asks the kernel for the name of each socket that it accepts.
        recorders.append(world.record(addr, f"cgroup_inet{version}_getsockname", address_of(version)))
        answers = [client.getsockname(), client.getpeername(), accepted.getsockname(), accepted.getpeername()]
        note()
        for end in (accepted, client, server):
            end.close()
            note()
        return answers, seen

    same(worlds, scenario)


@pytest.mark.parametrize("hook", ["bind", "connect", "post_bind"])
@pytest.mark.parametrize("family", [INET4, INET6])
def test_calls_are_refused(worlds: tuple[World, World], hook: str, family: int) -> None:
    version, here = (4 if family == INET4 else 6), HERE[family]

    def scenario(world: World) -> Any:
        server, other = listener(world, family), world.open(family, STREAM)
        link = world.attach(
            "cgroup_sock" if hook == "post_bind" else "cgroup_sock_addr", f"cgroup_inet{version}_{hook}", returns(0)
        )
        answers = [
            said(other.bind, (here, 0)),
            other.getsockname()[1] != 0,
            said(other.connect, server.getsockname()),
            said(other.getpeername) == server.getsockname(),
        ]
        world.side.backend.link_detach(link)
        third = world.open(family, STREAM)
        return [*answers, said(third.bind, (here, 0)), said(third.connect, server.getsockname())]

    same(worlds, scenario)


@pytest.mark.parametrize("family", [INET4, INET6])
def test_calls_are_sent_elsewhere(worlds: tuple[World, World], family: int) -> None:
    """To a port that nobody listens at, but the program knows better."""
    version, here = (4 if family == INET4 else 6), HERE[family]
    words = [0x0100007F] if version == 4 else [0, 0, 0, 0x01000000]
    (mine,) = free_ports(family, 1, STREAM)

    def scenario(world: World) -> Any:
        server = listener(world, family)
        port = server.getsockname()[1]
        world.attach("cgroup_sock_addr", f"cgroup_inet{version}_connect", replace(version, words, port))
        world.attach("cgroup_sock_addr", f"cgroup_inet{version}_bind", replace(version, words, mine))
        client = world.open(family, STREAM)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        client.bind((here, 7))
        client.connect((here, 9))
        answers = [client.getpeername()[1] == port, client.getsockname()]
        world.attach("cgroup_sock_addr", f"cgroup_inet{version}_getpeername", replace(version, words, 78))
        world.attach("cgroup_sock_addr", f"cgroup_inet{version}_getsockname", replace(version, words, 79))
        accepted, address = server.accept()
        with accepted:
            return [*answers, address, accepted.getpeername(), accepted.getsockname(), client.getpeername()]

    same(worlds, scenario)


def sockaddr(family: int, address: str, port: int) -> bytes:
    packed = socket.inet_pton(INET6 if ":" in address else INET4, address)
    start = family.to_bytes(2, "little") + port.to_bytes(2, "big")
    return (start + packed if len(packed) == 4 else start + bytes(4) + packed).ljust(32, b"\0")


@pytest.mark.parametrize("family", [INET4, INET6])
def test_a_program_binds_before_a_socket_connects(worlds: tuple[World, World], family: int) -> None:
    version = 4 if family == INET4 else 6
    (port,) = free_ports(family, 1, STREAM)
    mine = "127.0.0.7" if version == 4 else "::1"

    def scenario(world: World) -> Any:
        server, answers = listener(world, family), []
        for given in (0, port):
            step = [*on_stack(sockaddr(family, mine, given), -32), *call("bind", "context", (10, -32), 32)]
            with Recorder(world.side, "cgroup_sock_addr", f"cgroup_inet{version}_connect", [step, step]) as recorder:
                link = world.groups.attach(recorder.fd, recorder.attach_type)
                client = world.open(family, STREAM)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes((1, 0, 0, 0, 0, 0, 0, 0)))
                connected = said(client.connect, server.getsockname())
                world.side.backend.close(link)
                name = client.getsockname()
                answers.append((recorder.recorded(), connected, name[0], name[1] == port, name[1] != 0))
                client.close()
        return answers

    same(worlds, scenario)


@pytest.mark.parametrize("family", [INET4, INET6])
def test_an_accepted_connection_is_in_its_listeners_group(worlds: tuple[World, World], family: int) -> None:
    def scenario(world: World) -> Any:
        server, client = listener(world, family), world.open(family, STREAM)
        client.connect(server.getsockname())
        accepted = world.keep(server.accept()[0])
        recorder = world.record("cgroup_skb", "cgroup_inet_egress", whole("__sk_buff", "family"))
        link = world.attach("cgroup_skb", "cgroup_inet_ingress", returns(0))
        accepted.send(b"lost")
        answers = [said(client.recv, 10), recorder.recorded()[0] > 0]
        world.side.backend.link_detach(link)
        return answers

    same(worlds, scenario)


@pytest.mark.parametrize("family", [INET4, INET6])
def test_who_has_gone_again_is_accepted_with_its_address(worlds: tuple[World, World], family: int) -> None:
    version = 4 if family == INET4 else 6

    def scenario(world: World) -> Any:
        server, client = listener(world, family), world.open(family, STREAM)
        recorder = world.record("cgroup_sock_addr", f"cgroup_inet{version}_getpeername", address_of(version)[:5])
        client.connect(server.getsockname())
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes((1, 0, 0, 0, 0, 0, 0, 0)))
        name = client.getsockname()
        client.close()
        accepted, address = server.accept()
        world.keep(accepted)
        return address == name, said(accepted.getpeername), said(accepted.recv, 10), recorder.recorded()

    same(worlds, scenario)


def test_ipv4_on_an_ipv6_socket_is_ipv6s_affair(worlds: tuple[World, World]) -> None:
    (port,) = free_ports(INET4, 1, STREAM)

    def scenario(world: World) -> Any:
        server, client = listener(world), world.open(INET6, STREAM)
        addr = "cgroup_sock_addr"
        recorders = [
            world.record(addr, f"cgroup_inet{version}_{hook}", address_of(version)[:5])
            for version in (4, 6)
            for hook in ("bind", "connect", "getpeername")
        ]
        recorders += [
            world.record("cgroup_sock", f"cgroup_inet{version}_post_bind", whole("bpf_sock", "family", "src_port"))
            for version in (4, 6)
        ]
        recorders.append(world.record("cgroup_skb", "cgroup_inet_egress", whole("__sk_buff", "family", "protocol")))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        client.bind(("::ffff:127.0.0.1", port))
        client.connect(("::ffff:127.0.0.1", server.getsockname()[1]))
        return client.getpeername()[0], [recorder.recorded() for recorder in recorders]

    same(worlds, scenario)
