"""Contexts and helpers of programs in a control group's hooks, against the kernel's on sockets of its own."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from collections.abc import Iterator

import pytest
from hooks import Recorder, attached, call, load, parts, real_group, whole
from sides import Side

from kbpf.emulator import events
from kbpf.emulator.sock import Sock
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.uapi.structs import STRUCTS

pytestmark = pytest.mark.requires("kernel")

I = Instruction  # noqa: E741
INET4, INET6 = socket.AF_INET, socket.AF_INET6
PORT = 0x1234


@pytest.fixture(scope="module")
def group() -> Iterator[int]:
    with real_group() as descriptor:
        yield descriptor


def run_in_emulator(recorder: Recorder, fields: dict[str, object], sock: Sock) -> events.EventRun:
    program = recorder.side.backend.program(recorder.fd)  # type: ignore[attr-defined]
    return events.run_event(program, fields, sock=sock)


CONNECT: list[tuple[str, int, int, str]] = [
    ("cgroup_inet4_connect", INET4, socket.SOCK_DGRAM, "127.0.0.1"),
    ("cgroup_inet4_connect", INET4, socket.SOCK_STREAM, "127.9.8.7"),
    ("cgroup_inet6_connect", INET6, socket.SOCK_DGRAM, "::1"),
    ("cgroup_inet6_connect", INET6, socket.SOCK_DGRAM, "::ffff:127.0.0.1"),
    ("cgroup_udp4_sendmsg", INET4, socket.SOCK_DGRAM, "127.0.0.1"),
    ("cgroup_udp6_sendmsg", INET6, socket.SOCK_DGRAM, "::1"),
    ("cgroup_udp4_sendmsg", INET6, socket.SOCK_DGRAM, "::ffff:127.0.0.1"),
    ("cgroup_inet4_bind", INET4, socket.SOCK_STREAM, "127.0.0.1"),
    ("cgroup_inet6_bind", INET6, socket.SOCK_DGRAM, "::1"),
]


@pytest.mark.parametrize(("attach_type", "family", "type", "address"), CONNECT)
def test_addresses_from_user_space(
    kernel: Side, emulator: Side, group: int, attach_type: str, family: int, type: int, address: str
) -> None:
    version = 4 if "4" in attach_type else 6
    names = [f"user_ip{version}", "user_port"]
    if "sendmsg" in attach_type:
        names.append(f"msg_src_ip{version}")
    steps = whole("bpf_sock_addr", "user_family", "family", "type", "protocol") + parts("bpf_sock_addr", *names)
    if version == 6:
        steps += [load(STRUCTS["bpf_sock_addr"].fields["user_ip6"].offset + at, 8) for at in (0, 8)]
    method = attach_type.rpartition("_")[2]
    with Recorder(kernel, "cgroup_sock_addr", attach_type, steps, 0) as recorder, attached(group, recorder):
        with socket.socket(family, type) as end, pytest.raises(PermissionError):
            end.sendto(b"x", (address, PORT)) if method == "sendmsg" else getattr(end, method)((address, PORT))
        truth = recorder.recorded()
    packed = (
        socket.inet_pton(INET4, address[7:] if address.startswith("::ffff:") else address)
        if version == 4
        else (socket.inet_pton(INET6, address))
    )
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    fields = {f"user_ip{version}": words if version == 6 else words[0], "user_port": socket.htons(PORT)}
    protocol = socket.IPPROTO_TCP if type == socket.SOCK_STREAM else socket.IPPROTO_UDP
    with Recorder(emulator, "cgroup_sock_addr", attach_type, steps, 0) as recorder:
        result = run_in_emulator(recorder, fields, Sock(family=family, type=type, protocol=protocol))
        assert recorder.recorded() == truth
    assert result.value == 0
    assert result.context[f"user_ip{version}"] == fields[f"user_ip{version}"]


def test_a_program_sends_a_connection_elsewhere(kernel: Side, emulator: Side, group: int) -> None:
    """What is stored of the address is loaded again, and used; of the port two bytes are kept."""
    fields = STRUCTS["bpf_sock_addr"].fields
    with socket.socket(INET4, socket.SOCK_STREAM) as listener:
        listener.bind(("127.0.0.2", 0))
        listener.listen()
        port = listener.getsockname()[1]
        store = [
            I(ebpf.ALU | ebpf.MOV, 1, 0, 0, 0x7F | 2 << 24),
            I(ebpf.STX | ebpf.MEM | ebpf.W, 6, 1, fields["user_ip4"].offset),
            I(ebpf.ALU | ebpf.MOV, 1, 0, 0, 0x7777 << 16 | socket.htons(port)),
            I(ebpf.STX | ebpf.MEM | ebpf.W, 6, 1, fields["user_port"].offset),
            I(ebpf.ALU | ebpf.MOV, 0, 0, 0, 0),
        ]
        steps = [store, *parts("bpf_sock_addr", "user_ip4", "user_port")]
        with Recorder(kernel, "cgroup_sock_addr", "cgroup_inet4_connect", steps) as recorder:
            with attached(group, recorder), socket.create_connection(("127.0.0.1", 9)) as end:
                assert end.getpeername() == ("127.0.0.2", port)
            truth = recorder.recorded()
    with Recorder(emulator, "cgroup_sock_addr", "cgroup_inet4_connect", steps) as recorder:
        result = run_in_emulator(recorder, {}, Sock(family=INET4, type=1, protocol=6))
        assert recorder.recorded() == truth
    assert result.context == {"user_ip4": 0x0200007F, "user_port": socket.htons(port)}


SOCK_FIELDS = ("family", "type", "protocol", "dst_port", "dst_ip4", "dst_ip6", "state", "rx_queue_mapping")


@pytest.mark.parametrize("family", [INET4, INET6])
@pytest.mark.parametrize("type", [socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW])
def test_a_socket_is_made(kernel: Side, emulator: Side, group: int, family: int, type: int) -> None:
    fields = STRUCTS["bpf_sock"].fields
    store = [
        step
        for name, value in (("mark", 0x1234567), ("priority", 77), ("bound_dev_if", 1))
        for step in (
            I(ebpf.ALU64 | ebpf.MOV, 1, 0, 0, value),
            I(ebpf.STX | ebpf.MEM | ebpf.W, 6, 1, fields[name].offset),
            I(ebpf.ALU64 | ebpf.MOV, 0, 0, 0, 0),
        )
    ]
    setters = whole("bpf_sock", "bound_dev_if", "mark", "priority")
    steps = [*setters]
    for name in SOCK_FIELDS:
        steps += whole("bpf_sock", name)
    for name in ("family", "type", "protocol", "state", "rx_queue_mapping"):
        steps += [load(fields[name].offset, size) for size in (1, 2)]
    steps += [store, *setters]
    protocol = {1: socket.IPPROTO_TCP, 2: socket.IPPROTO_UDP, 3: 253}[type]
    with Recorder(kernel, "cgroup_sock", "cgroup_inet_sock_create", steps) as recorder, attached(group, recorder):
        with socket.socket(family, type, 253 if type == socket.SOCK_RAW else 0) as end:
            assert end.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) == 0x1234567
            assert end.getsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY) == 77
        truth = recorder.recorded()
    with Recorder(emulator, "cgroup_sock", "cgroup_inet_sock_create", steps) as recorder:
        result = run_in_emulator(recorder, {}, Sock(family=family, type=type, protocol=protocol))
        assert recorder.recorded() == truth
    assert result.context == {"bound_dev_if": 1, "mark": 0x1234567, "priority": 77}


@pytest.mark.parametrize(("family", "address"), [(INET4, "127.0.0.5"), (INET6, "::1")])
def test_a_socket_is_bound(kernel: Side, emulator: Side, group: int, family: int, address: str) -> None:
    version = 4 if family == INET4 else 6
    attach_type = f"cgroup_inet{version}_post_bind"
    steps = parts("bpf_sock", f"src_ip{version}") + whole("bpf_sock", "src_port", *SOCK_FIELDS)
    with Recorder(kernel, "cgroup_sock", attach_type, steps) as recorder, attached(group, recorder):
        with socket.socket(family, socket.SOCK_DGRAM) as end:
            end.bind((address, 0))
            port = end.getsockname()[1]
        truth = recorder.recorded()
    sock = Sock(family=family, type=2, protocol=17, local=socket.inet_pton(family, address), local_port=port)
    with Recorder(emulator, "cgroup_sock", attach_type, steps) as recorder:
        run_in_emulator(recorder, {}, sock)
        assert recorder.recorded() == truth


@pytest.mark.parametrize("value", [0, -errno.ENOMEM, -4095, -4096, 5, -0x80000000, 0x7FFFFFFF, 1 << 32])
def test_what_the_system_call_returns(kernel: Side, emulator: Side, group: int, value: int) -> None:
    steps = [call("get_retval"), call("set_retval", value), call("get_retval")]
    with Recorder(kernel, "cgroup_sock_addr", "cgroup_inet4_bind", steps) as recorder, attached(group, recorder):
        with socket.socket(INET4, socket.SOCK_DGRAM) as end, contextlib.suppress(OSError):
            end.bind(("127.0.0.1", 0))
        truth = recorder.recorded()
    with Recorder(emulator, "cgroup_sock_addr", "cgroup_inet4_bind", steps) as recorder:
        run_in_emulator(recorder, {}, Sock(family=INET4, type=2, protocol=17))
        assert recorder.recorded() == truth


@pytest.mark.parametrize(
    ("type", "attach_type"), [("cgroup_sock", "cgroup_inet_sock_create"), ("cgroup_sock_addr", "cgroup_inet4_bind")]
)
def test_cookies(kernel: Side, emulator: Side, group: int, type: str, attach_type: str) -> None:
    """A socket's stays the same; that of its namespace is the one of the context and, here, of no context."""
    steps = [
        call("get_socket_cookie", "context"),
        call("get_socket_cookie", "context"),
        call("get_netns_cookie", "context"),
        call("get_netns_cookie", 0),
    ]
    found = []
    with Recorder(kernel, type, attach_type, steps) as recorder, attached(group, recorder):
        with socket.socket(INET4, socket.SOCK_DGRAM) as end:
            end.bind(("127.0.0.1", 0))
            assert struct.unpack("=Q", end.getsockopt(socket.SOL_SOCKET, 57, 8))[0] == recorder.recorded()[1]
        found.append(recorder.recorded())
    sock = Sock(family=INET4, type=2, protocol=17)
    with Recorder(emulator, type, attach_type, steps) as recorder:
        run_in_emulator(recorder, {}, sock)
        found.append(recorder.recorded())
        assert found[1][1] == sock.cookie
    for _, first, second, netns, none in found:
        assert first == second != 0
        assert netns == none != 0
