"""Traffic control gives packets that come in to sockets, against the kernel's on loopback of a network namespace."""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

import pytest
from hosts import Host, outcome, received, same_on_both
from mapcode import Code, call, copy, made, mov, stack
from sides import FRAME, Side
from socks import MAPS, OUT, Scene, keep_result, looks_up, tuple_of

from kbpf.emulator.backend import EmulatorBackend
from kbpf.emulator.packet import Packet
from kbpf.isa import cbpf, ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.kernel.attrs import command
from kbpf.specs import ProgramSpec
from kbpf.testing.network import NetworkNamespace
from kbpf.uapi.enums import ATTACH_TYPES
from kbpf.uapi.structs import STRUCTS

pytestmark = pytest.mark.requires("kernel")

SK = STRUCTS["__sk_buff"].fields["sk"].offset
LOOPBACK = 1


def assigns(flags: int) -> Code:
    """Assign the socket, and keep the result, the packet's cookie before and after, and whether its socket is it."""
    return [
        *copy(1, 9), *call("get_socket_cookie"), *keep_result(0),
        *copy(1, 9), *copy(2, 8), *mov(3, flags), *call("sk_assign"), *keep_result(8),
        *copy(1, 9), *call("get_socket_cookie"), *keep_result(16),
        Instruction(ebpf.LDX | ebpf.MEM | ebpf.DW, 1, 9, SK), *mov(0, 1),
        Instruction(ebpf.JMP | ebpf.JEQ | ebpf.X, 1, 8, 1), *mov(0, 0), *keep_result(24),
    ]  # fmt: skip


@pytest.mark.parametrize("flags", [0, 1])
@pytest.mark.parametrize("name", ["udp", "udp that shares", "listener", "client", "child"])
def test_a_packet_that_comes_in_is_given_to_a_socket(
    kernel: Side, emulator: Side, scene: Scene, name: str, flags: int
) -> None:
    kind = socket.SOCK_DGRAM if name.startswith("udp") else socket.SOCK_STREAM
    bound = scene.socket(socket.AF_INET, kind)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, name == "udp that shares")
    bound.bind(("127.0.0.1", 80))
    question = tuple_of("127.0.0.1", 9, "127.0.0.1", 80)
    if kind == socket.SOCK_STREAM:
        bound.listen()
        client = scene.socket(socket.AF_INET, kind)
        client.connect(("127.0.0.1", 80))
        child = scene.own(bound.accept()[0])
        scene.listed(client)
        scene.listed(child, accepted=True)
        port = client.getsockname()[1]
        if name == "client":
            question = tuple_of("127.0.0.1", 80, "127.0.0.1", port)
        elif name == "child":
            question = tuple_of("127.0.0.1", port, "127.0.0.1", 80)
    scene.listed(bound)
    program = looks_up("sk_lookup_udp" if kind == socket.SOCK_DGRAM else "sk_lookup_tcp", 12, assigns(flags))
    results = []
    for side in (kernel, emulator):
        with made(side, *MAPS) as fds:
            side.backend.map_update(fds[0], bytes(4), question.ljust(36, b"\0"))
            spec = ProgramSpec(type="sched_cls", instructions=tuple(program), license="GPL")
            fd = side.backend.program_load(spec, fds)
            if side is kernel:
                scene.namespace.call(receive, fd)
            else:
                assert isinstance(side.backend, EmulatorBackend)
                packet = Packet(buffer=bytearray(FRAME), mac=0, network=14, ifindex=LOOPBACK, at_ingress=True)
                side.backend.program(fd).run_packet(packet)
            results.append(memoryview(side.backend.map_lookup(fds[1], bytes(4), OUT)).cast("q").tolist())
            side.backend.close(fd)
    assert results[1] == results[0]
    assert results[0][3] == (not flags)


def receive(program: int) -> None:
    """Let a packet come in by loopback, where the program waits."""
    attach_type = ATTACH_TYPES["tcx_ingress"]
    link = command("link_create", prog_fd=program, target_fd=LOOPBACK, attach_type=attach_type)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, 253) as sender:
            sender.sendto(b"data", ("127.0.0.1", 0))
            sender.settimeout(5)
            sender.recv(100)
    finally:
        os.close(link)


def assigns_port(port: int, helper: str = "sk_lookup_udp") -> Code:
    """Give every packet to the socket that is bound to 127.0.0.1 at `port`, if one is."""
    question = tuple_of("0.0.0.0", 0, "127.0.0.1", port)
    words = [int.from_bytes(question[at : at + 4], sys.byteorder) for at in range(0, 12, 4)]
    return [
        *copy(9, 1),
        *(Instruction(ebpf.ST | ebpf.MEM | ebpf.W, 10, 0, 4 * at - 12, signed(word)) for at, word in enumerate(words)),
        *copy(1, 9), *stack(2, -12), *mov(3, 12), *mov(4, -1), *mov(5, 0), *call(helper),
        Instruction(ebpf.JMP | ebpf.JEQ, 0, 0, 8),
        *copy(8, 0), *copy(1, 9), *copy(2, 8), *mov(3, 0), *call("sk_assign"), *copy(1, 8), *call("sk_release"),
        *mov(0, 0), *mov(0, 0), Instruction(ebpf.JMP | ebpf.EXIT),
    ]  # fmt: skip


def byte_is(offset: int, value: int, otherwise: Code) -> Code:
    """Go on if the packet's byte is that; R9 is the context."""
    return [
        *copy(1, 9), *mov(2, offset), *stack(3, -1), *mov(4, 1), *call("skb_load_bytes"),
        Instruction(ebpf.LDX | ebpf.MEM | ebpf.B, 1, 10, -1),
        Instruction(ebpf.JMP | ebpf.JEQ, 1, 0, len(otherwise), value), *otherwise,
    ]  # fmt: skip


def signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("attach_type", ["tcx_ingress", "tcx_egress"])
def test_an_assigned_packet_goes_to_its_socket_or_its_group(
    netns: NetworkNamespace, count: int, attach_type: str
) -> None:
    def scenario(host: Host) -> Any:
        group, other = [host.open() for _ in range(count)], host.udp(port=81)
        for one in group:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            one.bind(("127.0.0.1", 80))
        place = [cbpf.stmt(cbpf.LD | cbpf.B | cbpf.ABS, 0), cbpf.stmt(cbpf.RET | cbpf.A)]
        host.backend.socket_attach_reuseport_filter(group[0], cbpf.encode(place))
        spec = ProgramSpec(type="sched_cls", instructions=tuple(assigns_port(80)), license="GPL")
        fd = host.backend.program_load(spec, [])
        link = host.backend.link_create(fd, LOOPBACK, attach_type)
        with host.udp() as sender:
            # Where nobody listens, and where somebody else does.
            for port in (82, 81):
                for data in (b"\0", b"\2"):
                    outcome(sender.sendto, data, ("127.0.0.1", port))
            found = [received(one) for one in (*group, other)]
            group[0].connect(("127.0.0.1", 9))
            outcome(sender.sendto, b"\0later", ("127.0.0.1", 82))
            found += [received(one) for one in (*group, other)]
        for each in (link, fd):
            host.backend.close(each)
        return found

    same_on_both(netns, scenario)


def test_a_connection_to_another_port_is_given_to_a_listener(netns: NetworkNamespace) -> None:
    leave = [*mov(0, 0), Instruction(ebpf.JMP | ebpf.EXIT)]
    # A SYN to port 82, by the protocol, the port's low byte and the flags.
    filters = [i for at, value in ((23, 6), (37, 82), (47, 2)) for i in byte_is(at, value, leave)]
    lookup = assigns_port(80, "sk_lookup_tcp")
    code = [*lookup[:1], *filters, *lookup[1:]]

    def scenario(host: Host) -> Any:
        listener = host.open(type=socket.SOCK_STREAM)
        listener.bind(("127.0.0.1", 80))
        listener.listen()
        spec = ProgramSpec(type="sched_cls", instructions=tuple(code), license="GPL")
        fd = host.backend.program_load(spec, [])
        link = host.backend.link_create(fd, LOOPBACK, "tcx_ingress")
        client = host.open(type=socket.SOCK_STREAM)
        client.connect(("127.0.0.1", 82))
        child = host.keep(listener.accept()[0])
        child.sendall(b"to the client")
        client.sendall(b"to the server")
        found = [child.getsockname(), client.getpeername(), child.recv(100), client.recv(100)]
        other = host.open(type=socket.SOCK_STREAM)
        found.append(outcome(other.connect, ("127.0.0.1", 83)))
        for each in (link, fd):
            host.backend.close(each)
        return found

    same_on_both(netns, scenario)
