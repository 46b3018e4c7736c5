"""IP on the emulated network: addresses, frames that somebody injects, and what is sent out of an interface."""

from __future__ import annotations

import errno
import random
import socket
from collections.abc import Iterator
from typing import Any

import pytest

import kbpf
from kbpf import emulator
from kbpf.emulator import headers
from kbpf.emulator.routes import Route

LOOPBACK, HOST, PEER = [socket.inet_aton(text) for text in ("127.0.0.9", "192.0.2.1", "192.0.2.9")]


@pytest.fixture(autouse=True)
def network() -> Iterator[emulator.Network]:
    emulator.reset()
    emulator.add_interface("eth0", address=bytes(5) + b"\1")
    emulator.add_address("eth0", "192.0.2.1/24")
    emulator.add_address("eth0", "2001:db8::1/64")
    yield emulator.current()
    emulator.reset()


@pytest.fixture
def reader() -> Iterator[Any]:
    with emulator.socket(socket.AF_INET6, socket.SOCK_DGRAM) as made:
        made.bind(("::", 53))
        made.setblocking(False)
        yield made


def frame(source: bytes, target: bytes, payload: bytes, checksum: int | None = None, link: bytes = b"") -> bytes:
    """A UDP datagram from port 9 to port 53, its checksum right if none is given."""
    segment = headers.udp(9, 53, len(payload)) + payload
    if checksum is None:
        checksum = headers.ones_sum(segment, headers.pseudo_sum(source, target, 17, len(segment))) ^ 0xFFFF
    segment = headers.with_checksum(segment, 17, checksum)
    make = headers.ipv4 if len(source) == 4 else headers.ipv6
    kind = b"\x08\x00" if len(source) == 4 else b"\x86\xdd"
    return (link or bytes(5) + b"\1") + b"\2" * 6 + kind + make(source, target, 17, len(segment)) + segment


def test_injected_frames_reach_sockets(reader: Any) -> None:
    emulator.inject("eth0", frame(PEER, HOST, b"four") + b"padding")
    six = [socket.inet_pton(socket.AF_INET6, text) for text in ("2001:db8::9", "2001:db8::1")]
    emulator.inject("eth0", frame(*six, b"six"))
    assert reader.recvfrom(100) == (b"four", ("::ffff:192.0.2.9", 9, 0, 0))
    assert reader.recvfrom(100) == (b"six", ("2001:db8::9", 9, 0, 0))


def test_what_is_wrong_or_for_others_does_not(reader: Any, network: emulator.Network) -> None:
    good = frame(PEER, HOST, b"data")
    for bad in (
        frame(PEER, HOST, b"data", link=b"\4" * 6),
        frame(PEER, socket.inet_aton("192.0.2.2"), b"data"),
        frame(LOOPBACK, HOST, b"data"),
        frame(HOST, HOST, b"data"),
        good[:24] + b"\xff" + good[25:],
        good[:-1],
    ):
        emulator.inject("eth0", bad)
        with pytest.raises(BlockingIOError):
            reader.recv(100)
    assert not network.inet.counters["UdpInErrors"]
    emulator.inject("eth0", frame(PEER, HOST, b"data", checksum=1))
    assert network.inet.counters["UdpInCsumErrors"] == network.inet.counters["UdpInErrors"] == 1
    emulator.inject("eth0", frame(PEER, HOST, b"data", checksum=0))
    assert reader.recv(100) == b"data"


def test_what_is_sent_leaves_by_the_interface_of_its_route(network: emulator.Network) -> None:
    emulator.add_pair("a", "b")
    emulator.add_address("a", "198.51.100.1/24")
    emulator.environment.routes.append(
        Route(to="203.0.113.0/24", device=network.interface("a").index, via="198.51.100.2")
    )
    try:
        with (
            emulator.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
            kbpf.packet_socket("b", backend="emulator") as cable,
        ):
            for target in ("198.51.100.7", "203.0.113.7"):
                sender.sendto(b"out", (target, 9))
                data = cable.recv(100)
                assert data[:6] == network.interface("b").address
                assert data[26:34] == socket.inet_aton("198.51.100.1") + socket.inet_aton(target)
            with pytest.raises(OSError) as raised:
                sender.sendto(b"out", ("8.8.8.8", 9))
            assert raised.value.errno == errno.ENETUNREACH
            with pytest.raises(OSError) as raised:
                sender.sendto(bytes(1500), ("198.51.100.7", 9))
            assert raised.value.errno == errno.EMSGSIZE
    finally:
        emulator.environment.routes.clear()


def test_addresses_are_given_once() -> None:
    with pytest.raises(OSError) as raised:
        emulator.add_address("eth0", "192.0.2.1/24")
    assert raised.value.errno == errno.EEXIST


def test_pings_are_answered(network: emulator.Network) -> None:
    request = b"\x08\0\0\0\1\2\3\4data"
    request = request[:2] + (headers.ones_sum(request) ^ 0xFFFF).to_bytes(2, "big") + request[4:]
    with kbpf.packet_socket("eth0", backend="emulator") as wire:
        emulator.inject(
            "eth0", bytes(5) + b"\1" + b"\2" * 6 + b"\x08\0" + headers.ipv4(PEER, HOST, 1, len(request)) + request
        )
        wire.recv(100)
        answer = wire.recv(100)
        assert answer[26:34] == HOST + PEER and answer[34:36] == b"\0\0" and answer[38:] == request[4:]
        assert headers.ones_sum(answer[34:]) == 0xFFFF


@pytest.mark.parametrize("seed", range(20))
def test_no_frame_is_too_broken(reader: Any, seed: int) -> None:
    chance = random.Random(seed)
    six = [socket.inet_pton(socket.AF_INET6, text) for text in ("2001:db8::9", "2001:db8::1")]
    for _ in range(100):
        data = bytearray(frame(*(six if chance.random() < 0.5 else [PEER, HOST]), chance.randbytes(20)))
        for _ in range(chance.randrange(4)):
            data[chance.randrange(12, len(data))] = chance.randrange(256)
        if chance.random() < 0.8 and data[12:14] == b"\x08\0" and len(data) >= 34:
            data[24:26] = bytes(2)
            data[24:26] = (headers.ones_sum(bytes(data[14:34])) ^ 0xFFFF).to_bytes(2, "big")
        emulator.inject("eth0", bytes(data[: max(14, chance.randrange(2 * len(data)))]))
