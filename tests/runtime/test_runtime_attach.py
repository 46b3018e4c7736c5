"""Filters on live sockets of the operating system, through the kernel."""

import asyncio
import errno
import socket
from pathlib import Path

import pytest

import kbpf
from kbpf.isa import cbpf

KEEP = kbpf.Filter([(6, 0, 0, 0xFFFFFFFF)])
DROP = kbpf.Filter([(6, 0, 0, 0)])


@pytest.fixture
def udp():
    """A receiver on loopback and a function that sends to it."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(0.2)
        yield receiver, lambda data: sender.sendto(data, receiver.getsockname())


def received(sock):
    packets = []
    try:
        while True:
            packets.append(sock.recv(65536))
    except (TimeoutError, BlockingIOError):
        return packets


def test_an_expression_filters_a_udp_socket_until_it_is_detached(udp):
    receiver, send = udp
    port = receiver.getsockname()[1]
    with kbpf.attach(receiver, f"udp dst port {port} and less 12", backend="kernel") as link:
        assert link.backend == "kernel"
        assert link.socket is receiver
        send(b"1234")
        send(b"12345")
        assert received(receiver) == [b"1234"]
    send(b"12345")
    assert received(receiver) == [b"12345"]
    assert link.detach() is False


def test_what_was_queued_before_is_drained(udp):
    receiver, send = udp
    send(b"before")
    with kbpf.attach(receiver, KEEP, backend="kernel"):
        send(b"after")
        assert received(receiver) == [b"after"]


def test_draining_can_be_declined(udp):
    receiver, send = udp
    send(b"before")
    with kbpf.attach(receiver, KEEP, drain=False, backend="kernel"):
        assert received(receiver) == [b"before"]


def test_draining_leaves_the_blocking_mode_alone(udp):
    receiver, send = udp
    send(b"before")
    receiver.setblocking(True)
    with kbpf.attach(receiver, KEEP, backend="kernel"):
        assert receiver.getblocking()


def test_a_stream_is_never_drained():
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        left.send(b"precious")
        with kbpf.attach(right, KEEP, backend="kernel"):
            assert right.recv(100) == b"precious"
        with pytest.raises(ValueError, match="throw away data"):
            kbpf.attach(right, KEEP, drain=True, backend="kernel")


def test_a_tcp_listener_filters_its_connections():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with (
            kbpf.attach(server, f"tcp and dst port {port}", backend="kernel"),
            socket.create_connection(("127.0.0.1", port)) as client,
        ):
            accepted, _ = server.accept()
            with accepted:
                client.sendall(b"hello")
                assert accepted.recv(10) == b"hello"


def test_reading_back_gives_the_same_instructions(udp):
    receiver, _ = udp
    with kbpf.attach(receiver, "udp port 53 or 67", backend="kernel") as link:
        assert link.read_back() == link.attached
    assert link.read_back() is None


def test_replacing_keeps_the_old_filter_when_the_new_one_is_refused(udp):
    receiver, send = udp
    with kbpf.attach(receiver, DROP, backend="kernel") as link:
        with pytest.raises(kbpf.FilterError):
            link.replace(kbpf.Filter([(0xFF, 0, 0, 0)]))
        send(b"x")
        assert received(receiver) == []
        link.replace(KEEP)
        send(b"y")
        assert received(receiver) == [b"y"]


def test_somebody_elses_filter_is_left_alone(udp):
    receiver, _ = udp
    with kbpf.attach(receiver, KEEP, backend="kernel"):
        theirs = kbpf.attach(receiver, DROP, backend="kernel")
    assert theirs.read_back() is DROP
    assert theirs.detach() is True


def test_a_locked_filter_stays_and_leaving_does_not_raise(udp):
    receiver, send = udp
    with kbpf.attach(receiver, DROP, backend="kernel") as link:
        link.lock()
        with pytest.raises(kbpf.PermissionDeniedError, match="lock"):
            link.replace(KEEP)
        with pytest.raises(kbpf.PermissionDeniedError):
            link.detach()
    send(b"x")
    assert received(receiver) == []


def test_leaving_after_the_socket_was_closed_does_not_raise():
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with kbpf.attach(sock, KEEP, backend="kernel"):
        sock.close()


def test_a_closed_socket_is_refused():
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.close()
    with pytest.raises(kbpf.BpfError) as caught:
        kbpf.attach(sock, KEEP, backend="kernel")
    assert caught.value.errno == errno.EBADF


def test_what_is_no_socket_is_refused(tmp_path):
    with (tmp_path / "file").open("w") as file, pytest.raises(kbpf.BpfError) as caught:
        kbpf.attach(file, KEEP, backend="kernel")
    assert caught.value.errno == errno.ENOTSOCK


def test_what_is_no_filter_is_refused(udp):
    with pytest.raises(TypeError, match="not a NoneType"):
        kbpf.attach(udp[0], None)


def test_an_expression_that_a_unix_socket_cannot_answer_is_an_error():
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with left, right, pytest.raises(kbpf.FilterError):
        kbpf.attach(right, "udp port 53", backend="kernel")


def test_a_unix_stream_never_runs_a_filter_and_is_refused():
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with left, right, pytest.raises(kbpf.NotSupportedError):
        kbpf.attach(right, KEEP, backend="kernel")


def test_a_long_filter_takes_the_place_of_another(udp):
    receiver, _ = udp
    # Before Linux 6.8 sockets had less room for options.
    length = min(4096, int(Path("/proc/sys/net/core/optmem_max").read_text()) // 16)
    with kbpf.attach(receiver, DROP, backend="kernel") as link:
        long = kbpf.Filter([cbpf.stmt(cbpf.LD, 0)] * (length - 1) + [cbpf.stmt(cbpf.RET, 1)])
        attached = kbpf.attach(receiver, long, backend="kernel")
        assert len(attached.read_back()) == length
        assert link.detach() is False
        assert attached.detach() is True


def test_a_filter_larger_than_optmem_keeps_what_was_attached(udp):
    receiver, _ = udp
    # Each of these becomes several instructions of eBPF.
    larger = kbpf.Filter([cbpf.stmt(cbpf.LDX | cbpf.B | cbpf.MSH, 0)] * 4095 + [cbpf.stmt(cbpf.RET, 1)])
    with kbpf.attach(receiver, DROP, backend="kernel") as link:
        with pytest.raises(kbpf.BpfError) as refused:
            kbpf.attach(receiver, larger, backend="kernel")
        assert refused.value.errno == errno.ENOMEM
        assert link.detach() is True


def test_asyncio_sockets_take_filters():
    async def talk():
        loop = asyncio.get_running_loop()
        arrived = asyncio.Queue()

        class Protocol(asyncio.DatagramProtocol):
            def datagram_received(self, data, address):
                arrived.put_nowait(data)

        transport, _ = await loop.create_datagram_endpoint(Protocol, local_addr=("127.0.0.1", 0))
        try:
            with kbpf.attach(transport.get_extra_info("socket"), "less 10", backend="kernel"):
                address = transport.get_extra_info("sockname")
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                    sender.sendto(b"too long", address)
                    sender.sendto(b"ok", address)
                return await asyncio.wait_for(arrived.get(), 5)
        finally:
            transport.close()

    assert asyncio.run(talk()) == b"ok"


@pytest.mark.requires("kernel")
def test_a_program_on_a_socket_is_attached_and_detached(udp):
    receiver, send = udp
    # Return 9: eight bytes of UDP header and one of payload.
    spec = kbpf.ProgramSpec(instructions=[(0xB7, 0, 0, 0, 9), (0x95, 0, 0, 0, 0)], name="nine")
    with kbpf.load_program(spec, backend="kernel") as program:
        with program.attach(receiver) as link:
            send(b"abc")
            assert received(receiver) == [b"a"]
            with pytest.raises(kbpf.PermissionDeniedError) as caught:
                link.read_back()
            assert caught.value.errno == errno.EACCES
        send(b"abc")
        assert received(receiver) == [b"abc"]


def test_an_emulated_program_is_not_put_on_a_real_socket_unasked(udp):
    receiver, _ = udp
    spec = kbpf.ProgramSpec(instructions=[(0xB7, 0, 0, 0, 9), (0x95, 0, 0, 0, 0)])
    with (
        kbpf.load_program(spec, backend="emulator") as program,
        pytest.raises(ValueError, match="nothing would be filtered"),
    ):
        kbpf.attach(receiver, program)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_the_same_expression_works_on_sockets_of_both_families(family):
    host = "127.0.0.1" if family == socket.AF_INET else "::1"
    with socket.socket(family, socket.SOCK_DGRAM) as receiver, socket.socket(family, socket.SOCK_DGRAM) as sender:
        receiver.bind((host, 0))
        receiver.settimeout(0.2)
        port = receiver.getsockname()[1]
        for expression, passes in [
            (f"udp dst port {port}", True),
            (f"dst port {port + 1}", False),
            ("ip6", host == "::1"),
            ("tcp", False),
            (f"dst host {host}", True),
        ]:
            with kbpf.attach(receiver, expression, backend="kernel"):
                sender.sendto(b"x", (host, port))
                assert received(receiver) == ([b"x"] if passes else []), expression


def test_an_ipv6_socket_gets_ipv4_and_the_filter_knows():
    with (
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as receiver,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        receiver.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        receiver.bind(("::", 0))
        receiver.settimeout(0.2)
        port = receiver.getsockname()[1]
        for expression, passes in [
            ("ip", True),
            ("ip6", False),
            ("ip host 127.0.0.1", True),
            (f"dst port {port}", True),
        ]:
            with kbpf.attach(receiver, expression, backend="kernel"):
                sender.sendto(b"x", ("127.0.0.1", port))
                assert received(receiver) == ([b"x"] if passes else []), expression


@pytest.mark.parametrize("wrong", [{"type": "cooked"}, {"protocol": -1}, {"protocol": 0x10000}])
def test_a_packet_socket_of_no_kind_is_refused(wrong, backend):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        kbpf.packet_socket("lo", backend=backend, **wrong)


def test_a_locked_filter_says_so(backend):
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with one, other, kbpf.attach(one, "len > 3", backend=backend) as link:
        link.lock()
        for change in (lambda: link.replace("len > 4"), link.detach):
            with pytest.raises(kbpf.PermissionDeniedError, match="SO_LOCK_FILTER"):
                change()


@pytest.mark.requires("kernel")
def test_an_interrupted_replacement_puts_the_program_back(udp, monkeypatch):
    from kbpf.kernel.backend import KernelBackend

    def interrupted(self, socket):
        raise KeyboardInterrupt

    receiver, send = udp
    spec = kbpf.ProgramSpec(instructions=[(0xB7, 0, 0, 0, 9), (0x95, 0, 0, 0, 0)])
    with kbpf.load_program(spec, backend="kernel") as program, program.attach(receiver) as link:
        monkeypatch.setattr(KernelBackend, "socket_drain", interrupted)
        with pytest.raises(KeyboardInterrupt):
            link.replace(DROP)
        send(b"abc")
        assert received(receiver) == [b"a"]
        assert link.attached is program


@pytest.mark.parametrize(
    ("wrong", "message"), [((6, 0, 0, -1), "k -1 does not fit 32 bits"), ((6, 300, 0, 0), "jt 300 does not fit 8 bits")]
)
def test_a_field_that_does_not_fit_is_named(udp, wrong, message):
    with pytest.raises(kbpf.FilterError, match=message):
        kbpf.attach(udp[0], kbpf.Filter([wrong]), backend="kernel")
