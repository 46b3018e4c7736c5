"""UDP sockets that run the hooks of their control group: the same scenario on the kernel and in the emulator."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest
from cgroupworld import ADDR, HERE, INET4, INET6, World, address_of, free_ports, replace, said, same, two_worlds
from hooks import Recorder, call, load, on_stack, returns, whole
from sides import Side

from kbpf import emulator as emulated
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction, ld_imm64
from kbpf.uapi.structs import STRUCTS

pytestmark = pytest.mark.requires("kernel")

I = Instruction  # noqa: E741


@pytest.fixture
def worlds(kernel: Side, emulator: Side) -> Iterator[tuple[World, World]]:
    with two_worlds(kernel, emulator) as both:
        yield both


@pytest.mark.parametrize("family", [INET4, INET6])
def test_what_programs_see_of_calls(worlds: tuple[World, World], family: int) -> None:
    version, here = (4 if family == INET4 else 6), HERE[family]
    ports = free_ports(family, 2)

    def scenario(world: World) -> Any:
        recorders = [
            world.record("cgroup_sock", "cgroup_inet_sock_create", whole("bpf_sock", "family", "type", "protocol")),
            world.record("cgroup_sock_addr", f"cgroup_inet{version}_bind", address_of(version)),
            world.record(
                "cgroup_sock", f"cgroup_inet{version}_post_bind", whole("bpf_sock", f"src_ip{version}", "src_port")
            ),
            world.record("cgroup_sock_addr", f"cgroup_inet{version}_connect", address_of(version)),
            world.record(
                "cgroup_sock_addr", f"cgroup_udp{version}_sendmsg", address_of(version, f"msg_src_ip{version}")
            ),
            world.record("cgroup_sock_addr", f"cgroup_udp{version}_recvmsg", address_of(version)),
            world.record("cgroup_sock_addr", f"cgroup_inet{version}_getsockname", address_of(version)),
            world.record("cgroup_sock_addr", f"cgroup_inet{version}_getpeername", address_of(version)),
        ]
        end, sender = world.open(family), world.open(family)
        for made, port in zip((end, sender), ports, strict=True):
            made.bind((here, port))
        sender.sendto(b"one", (here, ports[0]))
        end.recvfrom(10)
        sender.connect((here, ports[0]))
        sender.send(b"two")
        end.recv(10)
        sender.getsockname()
        sender.getpeername()
        return [recorder.recorded() for recorder in recorders]

    same(worlds, scenario)


@pytest.mark.parametrize("hook", ["bind", "connect", "sendmsg"])
@pytest.mark.parametrize("family", [INET4, INET6])
def test_calls_are_refused(worlds: tuple[World, World], hook: str, family: int) -> None:
    version, here = (4 if family == INET4 else 6), HERE[family]

    def scenario(world: World) -> Any:
        name = f"cgroup_udp{version}_sendmsg" if hook == "sendmsg" else f"cgroup_inet{version}_{hook}"
        end = world.open(family)
        end.bind((here, 0))
        target = end.getsockname()
        world.attach("cgroup_sock_addr", name, returns(0))
        other = world.open(family)
        return [
            said(other.bind, (here, 0)),
            said(other.sendto, b"x", target),
            said(other.connect, target),
            said(other.send, b"y"),
        ]

    same(worlds, scenario)


def test_sockets_that_may_not_be_made_or_keep_their_address(worlds: tuple[World, World]) -> None:
    def scenario(world: World) -> Any:
        end = world.open()
        link = world.attach("cgroup_sock", "cgroup_inet4_post_bind", returns(0))
        answers = [said(end.bind, ("127.0.0.1", 0)), end.getsockname()]
        world.side.backend.link_detach(link)
        answers.append(said(end.bind, ("127.0.0.1", 0)))
        world.attach("cgroup_sock", "cgroup_inet_sock_create", returns(0))
        return [*answers, said(world.socket, INET4, socket.SOCK_DGRAM)]

    same(worlds, scenario)


def test_a_new_socket_gets_its_mark_from_a_program(worlds: tuple[World, World]) -> None:
    offset = STRUCTS["bpf_sock"].fields["mark"].offset

    def scenario(world: World) -> Any:
        code = [*ld_imm64(2, 0x1234), I(ebpf.STX | ebpf.MEM | ebpf.W, 1, 2, offset), *returns(1)]
        world.attach("cgroup_sock", "cgroup_inet_sock_create", code)
        marks = world.record("cgroup_skb", "cgroup_inet_egress", whole("__sk_buff", "mark"))
        end, sender = world.open(), world.open()
        end.bind(("127.0.0.1", 0))
        sender.sendto(b"x", end.getsockname())
        return sender.getsockopt(socket.SOL_SOCKET, socket.SO_MARK), end.recv(10), marks.recorded()

    same(worlds, scenario)


@pytest.mark.parametrize("family", [INET4, INET6])
def test_calls_are_sent_elsewhere(worlds: tuple[World, World], family: int) -> None:
    """To a port that nobody listens at, but the program knows better."""
    version, here = (4 if family == INET4 else 6), HERE[family]
    words = [0x0100007F] if version == 4 else [0, 0, 0, 0x01000000]

    def scenario(world: World) -> Any:
        end = world.open(family)
        end.bind((here, 0))
        port = end.getsockname()[1]
        world.attach("cgroup_sock_addr", f"cgroup_udp{version}_sendmsg", replace(version, words, port))
        world.attach("cgroup_sock_addr", f"cgroup_inet{version}_connect", replace(version, words, port))
        sender, other = world.open(family), world.open(family)
        sender.sendto(b"one", (here, 9))
        other.connect((here, 9))
        other.send(b"two")
        answers = [said(end.recv, 10), said(end.recv, 10), other.getpeername()[1] == port]
        world.attach("cgroup_sock_addr", f"cgroup_udp{version}_recvmsg", replace(version, words, 77))
        world.attach("cgroup_sock_addr", f"cgroup_inet{version}_getpeername", replace(version, words, 78))
        world.attach("cgroup_sock_addr", f"cgroup_inet{version}_getsockname", replace(version, words, 79))
        for data in (b"three", b"four", b"five"):
            other.send(data)
        view = bytearray(10)
        return [
            *answers,
            said(end.recvfrom, 10),
            said(end.recvfrom_into, view),
            said(end.recvmsg, 10)[3],
            other.getpeername(),
            other.getsockname(),
        ]

    same(worlds, scenario)


def test_a_datagram_is_sent_from_another_address(worlds: tuple[World, World]) -> None:
    source = ADDR["msg_src_ip4"].offset

    def scenario(world: World) -> Any:
        end, sender = world.open(), world.open()
        end.bind(("127.0.0.1", 0))
        answers = []
        for address in (0x0900007F, 0x04030201):
            code = [*ld_imm64(2, address), I(ebpf.STX | ebpf.MEM | ebpf.W, 1, 2, source), *returns(1)]
            link = world.attach("cgroup_sock_addr", "cgroup_udp4_sendmsg", code)
            sent = said(sender.sendto, b"x", end.getsockname())
            came = said(end.recvfrom, 10)
            answers.append((sent, came if isinstance(came, str) else came[1][0]))
            world.side.backend.link_detach(link)
        return answers

    same(worlds, scenario)


@pytest.mark.parametrize("family", [INET4, INET6])
@pytest.mark.parametrize(
    ("hook", "value"), [("ingress", 0), ("ingress", 1), *(("egress", value) for value in range(4))]
)
def test_packets(worlds: tuple[World, World], family: int, hook: str, value: int) -> None:
    """Both ends see a packet from its network header on, of the length that it has there."""
    first, ports = STRUCTS["__sk_buff"].fields["cb"].offset, free_ports(family, 2)
    bytes_of = [
        [*call("skb_load_bytes", "context", at, (10, -8), 1), I(ebpf.LDX | ebpf.MEM | ebpf.B, 0, 10, -8)]
        for at in (0, 6, 9, 20, 40)
    ]
    zero = [I(ebpf.ST | ebpf.MEM | ebpf.DW, 10, 0, -8), I(ebpf.ALU64 | ebpf.MOV, 0, 0, 0, 0)]

    def scenario(world: World) -> Any:
        fields = whole("__sk_buff", "len", "protocol", "family", "ifindex", "pkt_type", "vlan_present")
        recorder = world.record("cgroup_skb", f"cgroup_inet_{hook}", [zero, load(first, 4), *fields, *bytes_of], value)
        end, sender = world.open(family), world.open(family)
        for made, port in zip((end, sender), ports, strict=True):
            made.bind((HERE[family], port))
        answers = [said(sender.sendto, b"datagram", end.getsockname()), said(end.recv, 10)]
        return [*answers, recorder.recorded()]

    same(worlds, scenario)


def test_sockets_that_go(worlds: tuple[World, World]) -> None:
    def scenario(world: World) -> Any:
        steps = whole("bpf_sock", "family", "type", "protocol", "mark")
        recorder = world.record("cgroup_sock", "cgroup_inet_sock_release", steps)
        made = world.socket(INET4, socket.SOCK_DGRAM)
        before = recorder.recorded()[0]
        made.close()
        made.close()
        return before, recorder.recorded()

    same(worlds, scenario)


def test_sockets_stay_in_the_group_that_they_were_made_in(worlds: tuple[World, World]) -> None:
    """A program on a group that a socket's process came to later is not its own."""
    world = worlds[1]
    outside = emulated.add_cgroup("/sys/fs/cgroup/elsewhere")
    try:
        with outside.entered():
            made = world.open()
        world.attach("cgroup_sock_addr", "cgroup_inet4_bind", returns(0))
        made.bind(("127.0.0.1", 0))
        assert said(world.open().bind, ("127.0.0.1", 0)) == 1
    finally:
        emulated.remove_cgroup(outside.path)


def sockaddr(family: int, address: str, port: int) -> bytes:
    packed = socket.inet_pton(INET6 if ":" in address else INET4, address)
    start = family.to_bytes(2, "little") + port.to_bytes(2, "big")
    return (start + packed if len(packed) == 4 else start + bytes(4) + packed).ljust(32, b"\0")


@pytest.mark.parametrize("family", [INET4, INET6])
def test_a_program_binds_before_a_socket_connects(worlds: tuple[World, World], family: int) -> None:
    version, here = (4 if family == INET4 else 6), HERE[family]
    (port,) = free_ports(family, 1)
    mine = "127.0.0.7" if version == 4 else "::1"
    tries = [
        (sockaddr(family, mine, 0), 32),
        (sockaddr(family, mine, port), 32),
        (sockaddr(family, "192.0.2.1" if version == 4 else "2001:db8::1", 0), 32),
        (sockaddr(0, mine, 0), 32),
        (sockaddr(1, mine, 0), 32),
        *((sockaddr(family, mine, 0), size) for size in (1, 2, 15, 16, 23, 24, 28)),
    ]

    def scenario(world: World) -> Any:
        answers = []
        end = world.open(family)
        end.bind((here, 0))
        for given, size in tries:
            step = [*on_stack(given, -32), *call("bind", "context", (10, -32), size)]
            again = [*on_stack(given, -32), *call("bind", "context", (10, -32), size)]
            with Recorder(world.side, "cgroup_sock_addr", f"cgroup_inet{version}_connect", [step, again]) as recorder:
                link = world.groups.attach(recorder.fd, recorder.attach_type)
                sender = world.open(family)
                connected = said(sender.connect, end.getsockname())
                world.side.backend.close(link)
                name = sender.getsockname()
                answers.append((recorder.recorded(), connected, name[0], name[1] == port))
                sender.close()
        return answers

    same(worlds, scenario)
