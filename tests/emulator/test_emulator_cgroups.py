"""What programs in the hooks of control groups do to system calls, and in which order they run, against the kernel."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from random import Random
from typing import NamedTuple

import pytest
from groups import Nested, emulated_groups, real_groups
from hooks import call, returns
from sides import Side

from kbpf.emulator import cgroup_hooks
from kbpf.emulator.packet import Packet
from kbpf.emulator.sock import Sock
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction, ld_imm64
from kbpf.specs import MapSpec, ProgramSpec
from kbpf.uapi.constants import BPF_F_PREORDER
from kbpf.uapi.structs import STRUCTS

pytestmark = pytest.mark.requires("kernel")

I = Instruction  # noqa: E741


class Step(NamedTuple):
    """A program in the hook of one of two groups, which are one in the other."""

    inner: bool
    value: int
    set: int | None = None
    flags: int = 0


def body(step: Step, map: int, number: int) -> list[Instruction]:
    """Write the number down behind those of programs that ran before; set what the call returns; say yes or no."""
    code = [
        *ld_imm64(1, map, ebpf.PSEUDO_MAP_VALUE),
        I(ebpf.LDX | ebpf.MEM | ebpf.DW, 2, 1, 0),
        I(ebpf.ALU64 | ebpf.MUL, 2, 0, 0, 16),
        I(ebpf.ALU64 | ebpf.ADD, 2, 0, 0, number),
        I(ebpf.STX | ebpf.MEM | ebpf.DW, 1, 2, 0),
    ]
    if step.set is not None:
        code += call("set_retval", step.set)
    return [*code, *returns(step.value)]


@contextmanager
def programs(side: Side, groups: Nested, steps: Sequence[Step], attach_type: str) -> Iterator[Callable[[], int]]:
    """Attach them; gives what tells their order."""
    backend = side.backend
    with ExitStack() as stack:
        map = backend.map_create(MapSpec(type="array", key_size=4, value_size=8, max_entries=1))
        stack.callback(backend.close, map)
        for number, step in enumerate(steps, 1):
            code = tuple(body(step, map, number))
            fd = backend.program_load(
                ProgramSpec(type="cgroup_sock_addr", instructions=code, expected_attach_type=attach_type), []
            )
            stack.callback(backend.close, fd)
            link = groups.attach(fd, attach_type, inner=step.inner, flags=step.flags)
            stack.callback(backend.close, link)
        yield lambda: int.from_bytes(backend.map_lookup(map, bytes(4), 8), "little")


def said(call: Callable[..., object], *arguments: object) -> int:
    """The errno of a call; 0 where it succeeds."""
    try:
        call(*arguments)
    except OSError as error:
        return error.errno or -1
    return 0


def test_every_program_runs_and_the_first_no_counts(kernel: Side, emulator: Side) -> None:
    with real_groups(kernel) as real, emulated_groups(emulator) as ours:
        for seed in range(150):
            rng = Random(seed)
            steps = [
                Step(
                    rng.random() < 0.5,
                    rng.choice((0, 1, 1, 2, 3)),
                    rng.choice((None, None, -5, -4095, 0)),
                    BPF_F_PREORDER if rng.random() < 0.3 else 0,
                )
                for _ in range(rng.randrange(1, 6))
            ]
            with (
                programs(kernel, real, steps, "cgroup_inet4_bind") as order,
                socket.socket(type=socket.SOCK_DGRAM) as end,
            ):
                truth = said(end.bind, ("127.0.0.1", 0)), order()
            with programs(emulator, ours, steps, "cgroup_inet4_bind") as order:
                sock = Sock(family=2, type=2, protocol=17)
                cgroup_hooks.sock_create(sock)
                found = said(cgroup_hooks.bind, sock, bytes((127, 0, 0, 1)), 0), order()
            assert found == truth, steps


def stores(attach_type: str, address: bytes, port: int) -> list[Instruction]:
    """Put another address and port in place of what is there, and say yes."""
    fields = STRUCTS["bpf_sock_addr"].fields
    code = [I(ebpf.ALU64 | ebpf.MOV | ebpf.X, 6, 1)]
    start = fields["user_ip4" if len(address) == 4 else "user_ip6"].offset
    words = [(start + at, int.from_bytes(address[at : at + 4], "little")) for at in range(0, len(address), 4)]
    for offset, value in (*words, (fields["user_port"].offset, socket.htons(port))):
        code += [*ld_imm64(1, value), I(ebpf.STX | ebpf.MEM | ebpf.W, 6, 1, offset)]
    return [*code, *returns(1)]


@contextmanager
def attached(side: Side, groups: Nested, type: str, attach_type: str, code: Sequence[Instruction]) -> Iterator[None]:
    fd = side.backend.program_load(
        ProgramSpec(type=type, instructions=tuple(code), expected_attach_type=attach_type), []
    )
    try:
        link = groups.attach(fd, attach_type)
        try:
            yield
        finally:
            side.backend.close(link)
    finally:
        side.backend.close(fd)


@pytest.mark.parametrize(("family", "elsewhere"), [(socket.AF_INET, "127.0.0.2"), (socket.AF_INET6, "::1")])
def test_addresses_are_replaced(kernel: Side, emulator: Side, family: int, elsewhere: str) -> None:
    version, packed, port = (4 if family == socket.AF_INET else 6), socket.inet_pton(family, elsewhere), 4242
    home = "127.0.0.1" if version == 4 else "::1"
    shown = (elsewhere, port) if version == 4 else (elsewhere, port, 0, 0)
    sock = Sock(family=family, type=2, protocol=17)
    given = socket.inet_pton(family, home), 9
    with real_groups(kernel) as real, emulated_groups(emulator) as ours:
        cgroup_hooks.sock_create(sock)
        for what, hook in (
            ("getsockname", cgroup_hooks.getsockname),
            ("getpeername", cgroup_hooks.getpeername),
            ("connect", cgroup_hooks.connect),
        ):
            attach_type = f"cgroup_inet{version}_{what}"
            code = stores(attach_type, packed, port)
            with socket.socket(family, socket.SOCK_DGRAM) as end:
                if what != "connect":
                    end.connect((home, 9))
                with attached(kernel, real, "cgroup_sock_addr", attach_type, code):
                    if what == "connect":
                        end.connect((home, 9))
                    found = end.getsockname() if what == "getsockname" else end.getpeername()
                assert found == shown
            with attached(emulator, ours, "cgroup_sock_addr", attach_type, code):
                assert hook(sock, *given) == (packed, port)
            assert hook(sock, *given) == given


def test_datagrams_go_elsewhere_and_come_from_elsewhere(kernel: Side, emulator: Side) -> None:
    away = bytes((127, 0, 0, 2))
    sock = Sock(family=2, type=2, protocol=17)
    with real_groups(kernel) as real, emulated_groups(emulator) as ours:
        cgroup_hooks.sock_create(sock)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end, socket.socket(type=socket.SOCK_DGRAM) as sender:
            end.bind(("127.0.0.2", 0))
            port = end.getsockname()[1]
            code = stores("cgroup_udp4_sendmsg", away, port)
            source = STRUCTS["bpf_sock_addr"].fields["msg_src_ip4"].offset
            first = [*ld_imm64(2, 0x0300007F), I(ebpf.STX | ebpf.MEM | ebpf.W, 1, 2, source)]
            with attached(kernel, real, "cgroup_sock_addr", "cgroup_udp4_sendmsg", first + code):
                sender.sendto(b"x", ("127.0.0.1", 9))
            with attached(kernel, real, "cgroup_sock_addr", "cgroup_udp4_recvmsg", stores("", away, 77)):
                sender.sendto(b"y", ("127.0.0.2", port))
                end.settimeout(1)
                # Both are shown where recvfrom says that they come from; only the first was sent so.
                assert end.recvfrom(10) == (b"x", ("127.0.0.2", 77))
            assert end.recvfrom(10) == (b"y", ("127.0.0.1", sender.getsockname()[1]))
            with attached(emulator, ours, "cgroup_sock_addr", "cgroup_udp4_sendmsg", first + code):
                left, sent_from = cgroup_hooks.sendmsg(sock, bytes((127, 0, 0, 1)), 9, bytes(4))
            assert (left, sent_from) == ((away, port), bytes((127, 0, 0, 3)))
            with attached(emulator, ours, "cgroup_sock_addr", "cgroup_udp4_recvmsg", stores("", away, 77)):
                assert cgroup_hooks.recvmsg(sock, bytes((127, 0, 0, 3)), 9) == (away, 77)


@pytest.mark.parametrize("value", [0, 1, 2, 3])
def test_packets_that_leave(kernel: Side, emulator: Side, value: int) -> None:
    """2 and 3 say that the network is congested, too; whether a packet passes is the lowest bit."""
    packet = Packet(buffer=bytes(14) + b"\x45" + bytes(27), offset=14, network=14, protocol=0x0800)
    sock = Sock(family=2, type=2, protocol=17)
    found: tuple[int, bool]
    with real_groups(kernel) as real, emulated_groups(emulator) as ours:
        cgroup_hooks.sock_create(sock)
        with socket.socket(type=socket.SOCK_DGRAM) as end, socket.socket(type=socket.SOCK_DGRAM) as sender:
            end.bind(("127.0.0.1", 0))
            end.settimeout(0.2)
            with attached(kernel, real, "cgroup_skb", "cgroup_inet_egress", returns(value)):
                truth = said(sender.sendto, b"x", end.getsockname()), said(end.recv, 10) == 0
        with attached(emulator, ours, "cgroup_skb", "cgroup_inet_egress", returns(value)):
            try:
                found = 0, cgroup_hooks.egress(sock, packet)
            except OSError as error:
                found = error.errno or -1, False
    assert found == truth


@pytest.mark.parametrize("value", [0, 1])
def test_packets_that_come(kernel: Side, emulator: Side, value: int) -> None:
    """Programs see the packet from its network header on, whatever the socket's filter sees."""
    code = [I(ebpf.LDX | ebpf.MEM | ebpf.W, 2, 1, 0), I(ebpf.ALU64 | ebpf.MOV, 0, 0, 0, 1 - value),
            I(ebpf.JMP | ebpf.JNE, 2, 0, 1, 29), I(ebpf.ALU64 | ebpf.MOV, 0, 0, 0, value),
            I(ebpf.JMP | ebpf.EXIT)]  # fmt: skip
    packet = Packet(buffer=bytes(14) + b"\x45" + bytes(28), offset=34, network=14, protocol=0x0800)
    sock = Sock(family=2, type=2, protocol=17)
    with real_groups(kernel) as real, emulated_groups(emulator) as ours:
        cgroup_hooks.sock_create(sock)
        with socket.socket(type=socket.SOCK_DGRAM) as end, socket.socket(type=socket.SOCK_DGRAM) as sender:
            end.bind(("127.0.0.1", 0))
            end.settimeout(0.2)
            with attached(kernel, real, "cgroup_skb", "cgroup_inet_ingress", code):
                sender.sendto(b"x", end.getsockname())
                arrived = said(end.recv, 10) == 0
        with attached(emulator, ours, "cgroup_skb", "cgroup_inet_ingress", code):
            assert cgroup_hooks.ingress(sock, packet) == arrived == bool(value)
    assert (packet.offset, packet.length) == (34, 9)


def test_a_bound_socket_may_be_refused(kernel: Side, emulator: Side) -> None:
    sock = Sock(family=2, type=2, protocol=17, local=bytes((127, 0, 0, 1)), local_port=9)
    with real_groups(kernel) as real, emulated_groups(emulator) as ours:
        cgroup_hooks.sock_create(sock)
        hook = "cgroup_inet4_post_bind"
        refuses = attached(kernel, real, "cgroup_sock", hook, returns(0))
        with refuses, socket.socket(type=socket.SOCK_DGRAM) as end:
            # It has nothing to give back: another try is refused alike.
            truth = said(end.bind, ("127.0.0.1", 0)), said(end.bind, ("127.0.0.1", 0))
        with attached(emulator, ours, "cgroup_sock", hook, returns(0)):
            assert (said(cgroup_hooks.post_bind, sock),) * 2 == truth


def test_a_socket_may_not_be_made(kernel: Side, emulator: Side) -> None:
    with real_groups(kernel) as real, emulated_groups(emulator) as ours:
        with attached(kernel, real, "cgroup_sock", "cgroup_inet_sock_create", returns(0)):
            truth = said(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
        with attached(emulator, ours, "cgroup_sock", "cgroup_inet_sock_create", returns(0)):
            assert said(cgroup_hooks.sock_create, Sock(family=2, type=2, protocol=17)) == truth
