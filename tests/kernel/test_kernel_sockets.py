"""Filters on sockets and packet sockets, on the running kernel."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kbpf.isa import cbpf
from kbpf.isa.ebpf import Instruction
from kbpf.kernel.backend import KernelBackend
from kbpf.specs import SOCKET_LAYOUTS, ProgramSpec
from kbpf.uapi.constants import ARPHRD_NONE, ETH_P_IP

KEEP_ALL = cbpf.encode([cbpf.stmt(cbpf.RET | cbpf.K, 0xFFFFFFFF)])
DROP_ALL = cbpf.encode([cbpf.stmt(cbpf.RET | cbpf.K, 0)])
PROGRAM = ProgramSpec(instructions=(Instruction(0xB7), Instruction(0x95)))

needs_root = pytest.mark.requires("kernel")
IPPROTO_MPTCP = 262


@pytest.fixture
def udp() -> Iterator[socket.socket]:
    """A UDP socket that is connected to itself."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.bind(("127.0.0.1", 0))
        made.connect(made.getsockname())
        yield made


@pytest.fixture
def program(kernel: KernelBackend) -> Iterator[int]:
    fd = kernel.program_load(PROGRAM, ())
    yield fd
    os.close(fd)


def failing(action: Callable[..., object], *arguments: object) -> int:
    """The errno that this raises."""
    with pytest.raises(OSError) as raised:
        action(*arguments)
    return raised.value.errno or 0


@pytest.mark.parametrize(
    ("family", "type", "protocol", "name"),
    [
        (socket.AF_INET, socket.SOCK_DGRAM, 0, "udp"),
        (socket.AF_INET6, socket.SOCK_DGRAM, 0, "udp"),
        (socket.AF_INET, socket.SOCK_STREAM, 0, "tcp"),
        (socket.AF_INET6, socket.SOCK_STREAM, 0, "tcp"),
        (socket.AF_UNIX, socket.SOCK_DGRAM, 0, "unix"),
        (socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, "unix"),
        (socket.AF_NETLINK, socket.SOCK_RAW, 0, "netlink"),
        pytest.param(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP, "raw4", marks=needs_root),
        pytest.param(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6, "raw6", marks=needs_root),
        pytest.param(socket.AF_PACKET, socket.SOCK_DGRAM, 0, "packet_dgram", marks=needs_root),
        pytest.param(socket.AF_PACKET, socket.SOCK_RAW, 0, "packet", marks=needs_root),
    ],
)
def test_the_layout_follows_family_type_and_protocol(
    kernel: KernelBackend, family: int, type: int, protocol: int, name: str
) -> None:
    with socket.socket(family, type, protocol) as made:
        assert kernel.socket_layout(made) is SOCKET_LAYOUTS[name]


@needs_root
def test_a_raw_packet_socket_has_its_devices_layout(kernel: KernelBackend) -> None:
    with kernel.packet_socket("lo") as made:
        assert kernel.socket_layout(made) is SOCKET_LAYOUTS["packet_ethernet"]
    with kernel.packet_socket(None) as made:
        assert kernel.socket_layout(made) is SOCKET_LAYOUTS["packet"]


@pytest.mark.requires("netns")
def test_a_device_without_link_header_starts_at_the_network_header(
    network_namespace: Callable[[str], subprocess.CompletedProcess[str]],
) -> None:
    if not Path("/dev/net/tun").exists():
        pytest.skip("this machine has no tun devices")
    script = (
        "from kbpf.kernel.backend import KernelBackend as K; k = K(); s = k.packet_socket('bare'); "
        "print(k.socket_layout(s).name, s.getsockname()[3])"
    )
    done = network_namespace(f'ip tuntap add dev bare mode tun; $PYTHON -c "{script}"')
    assert done.stdout.split() == ["packet_ip", str(ARPHRD_NONE)], done.stderr


def test_a_unix_stream_is_refused_because_its_filter_never_runs(kernel: KernelBackend) -> None:
    first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with first, second, pytest.raises(OSError, match="never runs a filter on a UNIX stream") as raised:
        kernel.socket_layout(first)
    assert raised.value.errno == errno.EOPNOTSUPP


def test_mptcp_and_unknown_families_are_not_supported(kernel: KernelBackend) -> None:
    for family, type, protocol in (
        (socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP),
        (socket.AF_VSOCK, socket.SOCK_STREAM, 0),
    ):
        try:
            made = socket.socket(family, type, protocol)
        except OSError:
            continue  # This kernel has no such sockets.
        with made:
            assert failing(kernel.socket_layout, made) == errno.EOPNOTSUPP


def test_a_filter_is_read_back_as_it_was_attached(kernel: KernelBackend, udp: socket.socket) -> None:
    assert kernel.socket_get_filter(udp) == b""
    for count in (1, 2, cbpf.MAXINSNS // 2):
        program = cbpf.encode([cbpf.stmt(cbpf.LD | cbpf.IMM, n) for n in range(count - 1)]) + KEEP_ALL
        kernel.socket_attach_filter(udp, program)
        assert kernel.socket_get_filter(udp) == program
    kernel.socket_detach(udp)
    assert kernel.socket_get_filter(udp) == b""
    assert failing(kernel.socket_detach, udp) == errno.ENOENT


def test_a_filter_filters(kernel: KernelBackend, udp: socket.socket) -> None:
    udp.settimeout(1)
    kernel.socket_attach_filter(udp, DROP_ALL)
    udp.send(b"dropped")
    kernel.socket_attach_filter(udp, KEEP_ALL)
    udp.send(b"kept")
    assert udp.recv(100) == b"kept"


@pytest.mark.parametrize("count", [0, 4097, 65535, 65536, 65537, 131073])
def test_lengths_that_linux_refuses_stay_refused(kernel: KernelBackend, udp: socket.socket, count: int) -> None:
    kernel.socket_attach_filter(udp, DROP_ALL)
    assert failing(kernel.socket_attach_filter, udp, KEEP_ALL * count) == errno.EINVAL
    assert kernel.socket_get_filter(udp) == DROP_ALL


def test_half_an_instruction_is_einval(kernel: KernelBackend, udp: socket.socket) -> None:
    assert failing(kernel.socket_attach_filter, udp, KEEP_ALL + b"1234") == errno.EINVAL


def test_what_is_no_socket_or_closed(kernel: KernelBackend) -> None:
    with Path("/dev/null").open() as file:
        for use in (kernel.socket_layout, kernel.socket_detach, kernel.socket_lock, kernel.socket_drain):
            assert failing(use, file) == errno.ENOTSOCK
        assert failing(kernel.socket_attach_filter, file, KEEP_ALL) == errno.ENOTSOCK
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as closed:
        pass
    for use in (kernel.socket_layout, kernel.socket_get_filter, kernel.socket_drain, kernel.socket_drainable):
        assert failing(use, closed) == errno.EBADF


def test_a_locked_filter_stays(kernel: KernelBackend, udp: socket.socket) -> None:
    kernel.socket_attach_filter(udp, DROP_ALL)
    kernel.socket_lock(udp)
    kernel.socket_lock(udp)
    assert failing(kernel.socket_attach_filter, udp, KEEP_ALL) == errno.EPERM
    assert failing(kernel.socket_attach_filter, udp, KEEP_ALL * 65536) == errno.EPERM
    assert failing(kernel.socket_detach, udp) == errno.EPERM
    assert kernel.socket_get_filter(udp) == DROP_ALL
    assert kernel.explain_denied("SO_DETACH_FILTER", errno.EPERM)[0].startswith("the socket's filter is locked")


@needs_root
def test_a_program_takes_the_slot_and_cannot_be_read_back(
    kernel: KernelBackend, udp: socket.socket, program: int
) -> None:
    kernel.socket_attach_filter(udp, KEEP_ALL)
    kernel.socket_attach_bpf(udp, program)
    assert failing(kernel.socket_get_filter, udp) == errno.EACCES
    assert "eBPF program" in kernel.explain_denied("SO_GET_FILTER", errno.EACCES)[0]
    kernel.socket_attach_filter(udp, KEEP_ALL)
    assert kernel.socket_get_filter(udp) == KEEP_ALL


@needs_root
def test_descriptors_that_are_no_socket_filters_are_refused(
    kernel: KernelBackend, udp: socket.socket, keep: Callable[[int], int]
) -> None:
    assert failing(kernel.socket_attach_bpf, udp, -1) == errno.EBADF
    with Path("/dev/null").open() as file:
        assert failing(kernel.socket_attach_bpf, udp, file.fileno()) == errno.EINVAL
    xdp = keep(kernel.program_load(ProgramSpec(type="xdp", instructions=PROGRAM.instructions), ()))
    assert failing(kernel.socket_attach_bpf, udp, xdp) == errno.EINVAL


@needs_root
def test_a_program_goes_onto_a_vsock_socket(kernel: KernelBackend, program: int) -> None:
    try:
        made = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    except OSError:
        pytest.skip("this kernel has no vsock")
    with made:
        kernel.socket_attach_bpf(made, program)


def test_asyncios_sockets_are_sockets(kernel: KernelBackend) -> None:
    async def check() -> None:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(asyncio.DatagramProtocol, ("127.0.0.1", 0))
        try:
            made = transport.get_extra_info("socket")
            assert kernel.socket_layout(made).name == "udp"
            kernel.socket_attach_filter(made, KEEP_ALL)
            assert kernel.socket_get_filter(made) == KEEP_ALL
        finally:
            transport.close()
            await asyncio.sleep(0)

    asyncio.run(check())


@pytest.mark.parametrize("timeout", [None, 0.0, 5.0])
def test_draining_empties_the_queue_and_leaves_the_blocking_mode(
    kernel: KernelBackend, udp: socket.socket, timeout: float | None
) -> None:
    udp.settimeout(timeout)
    blocking = os.get_blocking(udp.fileno())
    for payload in (b"", b"one", bytes(9000)):
        udp.send(payload)
    assert kernel.socket_drain(udp) == 3
    assert kernel.socket_drain(udp) == 0
    assert (udp.gettimeout(), os.get_blocking(udp.fileno())) == (timeout, blocking)


def test_draining_goes_past_the_error_of_an_earlier_send(kernel: KernelBackend) -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer,
    ):
        made.bind(("127.0.0.1", 0))
        peer.bind(("127.0.0.1", 0))
        made.connect(peer.getsockname())
        peer.sendto(b"queued", made.getsockname())
        peer.close()
        made.send(b"to nobody")
        deadline = time.monotonic() + 2
        while kernel.socket_drain(made) != 1:
            assert time.monotonic() < deadline


def test_only_what_loses_nothing_is_drainable(kernel: KernelBackend) -> None:
    drainable = {
        (socket.AF_INET, socket.SOCK_DGRAM): True,
        (socket.AF_INET6, socket.SOCK_DGRAM): True,
        (socket.AF_INET, socket.SOCK_STREAM): False,
        (socket.AF_UNIX, socket.SOCK_DGRAM): False,
        (socket.AF_UNIX, socket.SOCK_SEQPACKET): False,
        (socket.AF_NETLINK, socket.SOCK_RAW): False,
    }
    for (family, type), expected in drainable.items():
        with socket.socket(family, type) as made:
            assert kernel.socket_drainable(made) is expected


@needs_root
class TestPacketSocket:
    def test_sees_its_interface_both_ways_and_is_close_on_exec(self, kernel: KernelBackend, udp: socket.socket) -> None:
        with kernel.packet_socket("lo") as made:
            assert not os.get_inheritable(made.fileno())
            assert made.getsockname()[:2] == ("lo", 3)
            assert kernel.socket_drainable(made)
            made.settimeout(2)
            udp.send(b"look at this")
            kinds = []
            while len(kinds) < 2:
                frame, (_, _, kind, *_) = made.recvfrom(2048)
                if frame.endswith(b"look at this"):
                    kinds.append(kind)
            assert kinds == [socket.PACKET_OUTGOING, socket.PACKET_HOST]

    def test_a_dgram_one_starts_at_the_network_header(self, kernel: KernelBackend, udp: socket.socket) -> None:
        with kernel.packet_socket("lo", type="dgram", protocol=ETH_P_IP) as made:
            made.settimeout(2)
            udp.send(b"payload")
            frame = made.recv(2048)
            while not frame.endswith(b"payload"):
                frame = made.recv(2048)
            assert frame[0] == 0x45

    def test_without_an_interface_it_sees_all(self, kernel: KernelBackend, udp: socket.socket) -> None:
        with kernel.packet_socket(None) as made:
            made.settimeout(2)
            udp.send(b"anywhere")
            while not made.recv(2048).endswith(b"anywhere"):
                pass

    @pytest.mark.parametrize("name", ["", "nosuch0", "lo" + "x" * 20, "lo\x00x"])
    def test_an_interface_that_is_not_there_is_an_error(self, kernel: KernelBackend, name: str) -> None:
        with pytest.raises((OSError, ValueError)) as raised:
            kernel.packet_socket(name)
        assert isinstance(raised.value, ValueError) or raised.value.errno == errno.ENODEV
