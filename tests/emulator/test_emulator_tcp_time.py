"""TCP's timers under a clock that the test moves, segments that somebody injects, and a cable between two networks."""

from __future__ import annotations

import errno
import itertools
import random
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import kbpf
from kbpf import emulator
from kbpf.emulator import headers
from kbpf.emulator.clock import timeline
from kbpf.emulator.connection import Connection
from kbpf.emulator.headers import ACK, FIN, RST, SYN, TcpOptions

SECOND = 10**9
HOST, PEER = socket.inet_aton("192.0.2.1"), socket.inet_aton("192.0.2.9")
NO_OPTIONS = TcpOptions()


@pytest.fixture(autouse=True)
def clock() -> Iterator[emulator.ManualClock]:
    emulator.reset()
    timeline.clear()
    before, emulator.environment.clock = emulator.environment.clock, emulator.ManualClock()
    yield emulator.environment.clock  # type: ignore[misc]
    emulator.environment.clock = before
    timeline.clear()
    emulator.reset()


@pytest.fixture
def pair() -> Iterator[tuple[Any, Any]]:
    with emulator.socket() as server, emulator.socket() as client:
        server.bind(("127.0.0.1", 7000))
        server.listen()
        client.connect(("127.0.0.1", 7000))
        accepted, _ = server.accept()
        with accepted:
            accepted.setblocking(False)
            client.setblocking(False)
            yield client, accepted


def filtered(target: Any, expression: str) -> kbpf.Link:
    return kbpf.attach(target, expression, backend="emulator")


def test_a_syn_is_sent_again_for_131_seconds(clock: emulator.ManualClock) -> None:
    with emulator.socket() as server, emulator.socket() as client, kbpf.packet_socket("lo", backend="emulator") as wire:
        server.bind(("127.0.0.1", 7000))
        server.listen()
        filtered(server, "less 0")
        client.setblocking(False)
        assert client.connect_ex(("127.0.0.1", 7000)) == errno.EINPROGRESS
        times = []
        for second in range(132):
            clock.advance(SECOND if second else 0)
            for frame, address in iter(lambda: _next(wire), None):
                if address[2] == 4:
                    assert frame[47] == SYN
                    times.append(second)
        # net.ipv4.tcp_syn_retries and tcp_syn_linear_timeouts in ip-sysctl.rst.
        assert times == [0, 1, 2, 3, 4, 5, 7, 11, 19, 35, 67]
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ETIMEDOUT


def _next(wire: Any) -> Any:
    wire.setblocking(False)
    try:
        return wire.recvfrom(2000)
    except BlockingIOError:
        return None


def test_lost_data_comes_again_ever_later(clock: emulator.ManualClock, pair: tuple[Any, Any]) -> None:
    client, accepted = pair
    with kbpf.packet_socket("lo", backend="emulator") as wire:
        link = filtered(accepted, "less 0")
        client.send(b"HELLO")
        times = []
        for tenth in range(64):
            clock.advance(SECOND // 10 if tenth else 0)
            times += [tenth for _, address in iter(lambda: _next(wire), None) if address[2] == 4]
        gaps = [two - one for one, two in itertools.pairwise(times)]
        # The first time only probes for a loss, as Linux does.
        assert gaps[0] == gaps[1] >= 2 and all(two >= 2 * one for one, two in itertools.pairwise(gaps[1:]))
        link.detach()
        clock.advance(100 * SECOND)
        assert accepted.recv(10) == b"HELLO"


def test_who_never_answers_is_given_up(clock: emulator.ManualClock, pair: tuple[Any, Any]) -> None:
    client, accepted = pair
    filtered(accepted, "less 0")
    client.send(b"HELLO")
    clock.advance(2000 * SECOND)
    with pytest.raises(OSError) as raised:
        client.recv(1)
    assert raised.value.errno == errno.ETIMEDOUT
    assert client.recv(1) == b""


def test_time_wait_ends(clock: emulator.ManualClock, pair: tuple[Any, Any]) -> None:
    client, accepted = pair
    network = emulator.current()
    client.close()
    accepted.close()
    (left,) = [one for one in network.tcp.holders.values() if isinstance(one, Connection)]
    with emulator.socket() as again:
        with pytest.raises(OSError) as raised:
            again.bind(("127.0.0.1", left.sock.local_port))
        assert raised.value.errno == errno.EADDRINUSE
        clock.advance(61 * SECOND)
        assert not any(isinstance(one, Connection) for one in network.tcp.holders.values())
        again.bind(("127.0.0.1", left.sock.local_port))


def test_a_full_window_opens_though_the_news_is_lost(clock: emulator.ManualClock, pair: tuple[Any, Any]) -> None:
    client, accepted = pair
    client.send(bytes(100000))
    link = filtered(client, "less 0")
    got = len(accepted.recv(1 << 20))
    with pytest.raises(BlockingIOError):
        accepted.recv(1)
    link.detach()
    for _ in range(5):
        clock.advance(10 * SECOND)
        try:
            got += len(accepted.recv(1 << 20))
        except BlockingIOError:
            break
    assert got == 100000


def segment(seq: int, ack: int, flags: int, data: bytes = b"", port: int = 4000, window: int = 8000) -> bytes:
    """A frame with a segment from the peer to port 80 of the host."""
    made = headers.tcp(port, 80, seq, ack, flags, window, NO_OPTIONS) + data
    total = headers.ones_sum(made, headers.pseudo_sum(PEER, HOST, 6, len(made))) ^ 0xFFFF
    made = headers.with_checksum(made, 6, total)
    return bytes(5) + b"\1" + b"\2" * 6 + b"\x08\0" + headers.ipv4(PEER, HOST, 6, len(made)) + made


@pytest.fixture
def server() -> Iterator[Any]:
    emulator.add_interface("eth0", address=bytes(5) + b"\1")
    emulator.add_address("eth0", "192.0.2.1/24")
    with emulator.socket() as made:
        made.bind(("192.0.2.1", 80))
        made.listen()
        made.setblocking(False)
        yield made


def answers(wire: Any) -> list[headers.TcpHeader]:
    found = []
    for frame, address in iter(lambda: _next(wire), None):
        if address[2] == 4:
            read = headers.read_tcp(frame[34:])
            assert read is not None
            assert headers.read_ipv4(frame[14:]) is not None
            found.append(read)
    return found


def test_a_connection_with_somebody_who_injects(server: Any) -> None:
    with kbpf.packet_socket("eth0", backend="emulator") as wire:
        emulator.inject("eth0", segment(100, 0, SYN))
        (answer,) = answers(wire)
        assert (answer.flags, answer.ack, answer.options.timestamps) == (SYN | ACK, 101, None)
        emulator.inject("eth0", segment(101, answer.seq + 1, ACK))
        accepted, address = server.accept()
        with accepted:
            assert address == ("192.0.2.9", 4000)
            emulator.inject("eth0", segment(104, answer.seq + 1, ACK, b"later"))
            emulator.inject("eth0", segment(101, answer.seq + 1, ACK, b"now"))
            assert accepted.recv(100) == b"nowlater"
            assert [one.ack for one in answers(wire)] == [101, 109]
            # Not quite the right place: Linux asks back (RFC 5961).
            emulator.inject("eth0", segment(110, 0, RST))
            assert [(one.flags, one.ack) for one in answers(wire)] == [(ACK, 109)]
            emulator.inject("eth0", segment(109, answer.seq + 1, ACK | FIN))
            assert accepted.recv(100) == b""
            emulator.inject("eth0", segment(110, 0, RST))
            accepted.setblocking(False)
            with pytest.raises(BrokenPipeError):
                accepted.send(b"x")
        answers(wire)
        # An acknowledgement of nothing, and a connection that is not there.
        emulator.inject("eth0", segment(110, 5, ACK))
        assert [(one.flags, one.seq) for one in answers(wire)] == [(RST, 5)]


@pytest.mark.parametrize("seed", range(20))
def test_no_segment_is_too_strange(clock: emulator.ManualClock, server: Any, seed: int) -> None:
    chance = random.Random(seed)
    with kbpf.packet_socket("eth0", backend="emulator") as wire:
        emulator.inject("eth0", segment(100, 0, SYN))
        (answer,) = answers(wire)
        emulator.inject("eth0", segment(101, answer.seq + 1, ACK))
        accepted, _ = server.accept()
        with accepted:
            accepted.setblocking(False)
            for _ in range(150):
                seq = chance.choice([101, 100, 102, 101 + chance.randrange(70000), chance.getrandbits(32)])
                ack = chance.choice([answer.seq + 1, answer.seq, answer.seq + 3, chance.getrandbits(32)]) & 0xFFFFFFFF
                flags = chance.choice([ACK, ACK, ACK, SYN, SYN | ACK, FIN | ACK, RST, 0, chance.randrange(64)])
                frame = segment(seq, ack, flags, chance.randbytes(chance.randrange(5)), chance.choice([4000, 4001]))
                emulator.inject("eth0", frame)
                if chance.random() < 0.2:
                    clock.advance(SECOND)
                for action in (lambda: accepted.send(b"data"), lambda: accepted.recv(100), server.accept):
                    if chance.random() < 0.2:
                        try:
                            made = action()
                        except OSError:
                            continue
                        if isinstance(made, tuple):
                            made[0].close()
    clock.advance(5000 * SECOND)
    assert not any(isinstance(one, Connection) for one in emulator.current().tcp.holders.values())


def test_two_networks_talk_over_a_cable() -> None:
    here, there = emulator.current(), emulator.Network()
    here.add_pair("left", "right", there)
    here.add_address("left", "10.0.0.1/24")
    there.add_address("right", "10.0.0.2/24")
    with emulator.socket(network=there) as server, emulator.socket() as client:
        server.bind(("10.0.0.2", 80))
        server.listen()
        client.connect(("10.0.0.2", 80))
        accepted, address = server.accept()
        with accepted:
            assert address[0] == "10.0.0.1"
            data = bytes(range(256)) * 500
            sender = threading.Thread(target=lambda: (client.sendall(data), client.shutdown(socket.SHUT_WR)))
            sender.start()
            received = bytearray()
            while part := accepted.recv(1 << 16):
                received += part
            sender.join()
            assert received == data
