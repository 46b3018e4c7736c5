"""The socket that a packet belongs to, in programs of the types that see it."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from mapcode import EXIT, Code, call, copy, made, mov, the_map
from sides import FRAME, Side
from socks import COMMON, MAPS, OUT, WORDS, element, here, keep_result, looker

from kbpf.emulator.sockets import wrap
from kbpf.errors import EmulationFault
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.specs import ProgramSpec
from kbpf.uapi.structs import STRUCTS

pytestmark = pytest.mark.requires("kernel")

SK = STRUCTS["__sk_buff"].fields["sk"].offset
SIX = bytes(12) + b"\x86\xdd" + struct.pack("!IHBB", 6 << 28, 8, 17, 64) + bytes(range(1, 33)) + bytes(8)
OTHER = bytes(12) + b"\x88\xb5" + bytes(60)


def with_socket(body: Code, before: Code = []) -> Code:  # noqa: B006
    """`body` with the packet's socket in R8 and the value of the second map in R7; returns whether there was one."""
    return [
        *copy(9, 1), *element(1), *copy(7, 0),
        Instruction(ebpf.LDX | ebpf.MEM | ebpf.DW, 8, 9, SK), *before,
        Instruction(ebpf.JMP | ebpf.JNE, 8, 0, 2), *mov(0, 0), EXIT,
        *body, *mov(0, 1), EXIT,
    ]  # fmt: skip


FULL: Code = [*copy(1, 8), *call("sk_fullsock"), *copy(8, 0)]


@pytest.mark.parametrize("type", ["socket_filter", "sched_cls", "sched_act", "cgroup_skb", "lwt_in", "lwt_xmit"])
@pytest.mark.parametrize("frame", [FRAME, SIX, OTHER], ids=["ipv4", "ipv6", "other"])
def test_a_test_run_has_a_socket_of_no_protocol(kernel: Side, emulator: Side, type: str, frame: bytes) -> None:
    results = []
    for side in (kernel, emulator):
        with looker(side, with_socket(COMMON), here, type) as look:
            results.append(look(b"", frame))
    assert results[1] == results[0]
    assert results[0][0] == 1


@pytest.mark.parametrize("type", ["sched_cls", "cgroup_skb"])
@pytest.mark.parametrize("frame", [FRAME, SIX, OTHER], ids=["ipv4", "ipv6", "other"])
def test_it_is_a_full_socket(kernel: Side, emulator: Side, type: str, frame: bytes) -> None:
    guarded = [Instruction(ebpf.JMP | ebpf.JEQ, 8, 0, len(FULL)), *FULL]
    results = []
    for side in (kernel, emulator):
        with looker(side, with_socket(WORDS, guarded), here, type) as look:
            results.append(look(b"", frame))
    assert results[1] == results[0]
    assert results[0][0] == 1


@pytest.mark.parametrize("type", ["sched_cls", "cgroup_skb"])
@pytest.mark.parametrize("view", ["tcp_sock", "get_listener_sock", "skc_to_tcp_sock", "skc_to_unix_sock"])
def test_it_is_of_no_kind(kernel: Side, emulator: Side, type: str, view: str) -> None:
    results = []
    for side in (kernel, emulator):
        with looker(side, with_socket([*copy(1, 8), *call(view), *keep_result(0)]), here, type) as look:
            results.append(look(b""))
    assert results[1] == results[0]


@pytest.mark.parametrize("helper", ["get_socket_uid", "get_socket_cookie"])
@pytest.mark.parametrize("type", ["socket_filter", "sched_cls", "cgroup_skb"])
def test_each_run_has_a_socket_of_its_own(kernel: Side, emulator: Side, type: str, helper: str) -> None:
    program = with_socket([*copy(1, 9), *call(helper), *keep_result(0)])
    for side in (kernel, emulator):
        with looker(side, program, here, type) as look:
            first, second = (look(b"")[1:3] for _ in range(2))
        assert (first == second) == (helper == "get_socket_uid")
        if helper == "get_socket_uid":
            assert first == (0, 0)
        else:
            assert any(first)


@pytest.mark.parametrize("flags", [0, 1])
def test_a_test_run_assigns_no_socket(kernel: Side, emulator: Side, flags: int) -> None:
    full = [Instruction(ebpf.JMP | ebpf.JEQ, 8, 0, len(FULL)), *FULL]
    program = with_socket([*copy(1, 9), *copy(2, 8), *mov(3, flags), *call("sk_assign"), *keep_result(0)], full)
    results = []
    for side in (kernel, emulator):
        with looker(side, program, here) as look:
            results.append(look(b""))
    assert results[1] == results[0]


@pytest.mark.parametrize("helper", ["sk_fullsock", "tcp_sock", "sk_release", "get_listener_sock"])
@pytest.mark.parametrize("wild", [mov(1, 0), mov(1, 12345), copy(1, 9), copy(1, ebpf.FP), the_map(1, 0)])
def test_what_is_no_socket_faults(emulator: Side, helper: str, wild: Code) -> None:
    program = with_socket([*wild, *call(helper)])
    with looker(emulator, program, here) as look, pytest.raises(EmulationFault):
        look(b"")


@pytest.mark.parametrize("of_socket, level", [("sk_cgroup_id", 0), ("sk_ancestor_cgroup_id", 0)])
def test_it_is_in_the_control_group_of_the_process(kernel: Side, emulator: Side, of_socket: str, level: int) -> None:
    current = "get_current_cgroup_id" if of_socket == "sk_cgroup_id" else "get_current_ancestor_cgroup_id"
    body = [
        *copy(1, 8), *mov(2, level), *call(of_socket), *copy(6, 0),
        *mov(1, level), *call(current), Instruction(ebpf.ALU64 | ebpf.XOR | ebpf.X, 0, 6), *keep_result(0),
        Instruction(ebpf.STX | ebpf.MEM | ebpf.DW, 7, 6, 8),
    ]  # fmt: skip
    for side in (kernel, emulator):
        with looker(side, with_socket(body), here, "cgroup_skb") as look:
            there, different, _, group, *_ = look(b"")
        assert (there, different) == (1, 0)
        assert group


def test_a_socket_that_was_not_looked_up_is_not_released(emulator: Side) -> None:
    program = with_socket([*copy(1, 8), *call("sk_release")])
    with looker(emulator, program, here) as look, pytest.raises(EmulationFault, match="not held"):
        look(b"")


def receivers() -> Iterator[tuple[str, socket.socket, Callable[[], object]]]:
    """Sockets that a filter can be put on, and how something comes to them."""
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"), (socket.AF_INET6, "::")):
        with socket.socket(family, socket.SOCK_DGRAM) as one, socket.socket(family, socket.SOCK_DGRAM) as other:
            one.bind((address, 0))
            to = "::1" if address == "::" else address
            yield f"udp {address}", one, partial(other.sendto, b"data", (to, one.getsockname()[1]))
            one.connect((to, other.getsockname()[1]))
            yield f"connected udp {address}", one, partial(other.sendto, b"data", one.getsockname())
    echo = bytes((8, 0, 0xF7, 0xFE, 0, 1, 0, 0))
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as one:
        yield "raw", one, partial(one.sendto, echo, ("127.0.0.1", 0))
    for kind in (socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
        one, other = socket.socketpair(socket.AF_UNIX, kind)
        with one, other:
            yield f"unix {kind}", one, partial(other.send, b"data")
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as one:
        one.bind((0, 0))
        yield "netlink", one, partial(one.send, struct.pack("=IHHIIB3x", 20, 18, 0x301, 1, 0, 0))


def test_a_filter_sees_the_socket_that_receives(kernel: Side, emulator: Side) -> None:
    uid = [*copy(1, 9), *call("get_socket_uid"), *keep_result(80)]
    cookie = [*copy(1, 9), *call("get_socket_cookie"), *keep_result(88)]
    program = with_socket([*COMMON, *uid, *cookie])
    for name, one, send in receivers():
        one.settimeout(5)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, 3)
        results = []
        for side in (kernel, emulator):
            with made(side, *MAPS) as fds:
                spec = ProgramSpec(type="socket_filter", instructions=tuple(with_value(program)), license="GPL")
                fd = side.backend.program_load(spec, fds)
                end = one if side is kernel else wrap(one)
                side.backend.socket_attach_bpf(end, fd)
                send()
                end.recv(2048)
                results.append(memoryview(side.backend.map_lookup(fds[1], bytes(4), OUT)).cast("I").tolist())
                side.backend.socket_detach(end)
                side.backend.close(fd)
        assert results[1] == results[0], name
        assert any(results[0][22:24]), name


def with_value(program: Code) -> Code:
    """The program, which is to keep all of a packet."""
    return [Instruction(ebpf.ALU64 | ebpf.MOV, 0, 0, 0, 0xFFFF) if i == mov(0, 1)[0] else i for i in program]
