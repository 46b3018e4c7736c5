"""What sockex1 and sockex2 count: the same on every socket, of IPv4 and IPv6, once each, and nothing is lost."""

from __future__ import annotations

import socket
import struct
import time
from pathlib import Path

import pytest

import kbpf

OBJECTS = Path(kbpf.__file__).parent / "objects"
ICMP, TCP, UDP, ICMP6 = 1, 6, 17, 58
PORTS = struct.pack("!HH", 1000, 53)
SOURCE4, TARGET4 = bytes([192, 0, 2, 1]), bytes([192, 0, 2, 2])
SOURCE6, TARGET6 = bytes(range(16)), bytes(range(16, 32))


def frame(ethertype: int, packet: bytes) -> bytes:
    return bytes(12) + struct.pack("!H", ethertype) + packet


def ipv4(protocol: int, payload: bytes, fragment: int = 0, options: bytes = b"") -> bytes:
    words, length = 5 + len(options) // 4, 20 + len(options) + len(payload)
    head = struct.pack("!BBHHHBBH4s4s", 0x40 | words, 0, length, 1, fragment, 64, protocol, 0, SOURCE4, TARGET4)
    return head + options + payload


def ipv6(protocol: int, payload: bytes, length: int | None = None) -> bytes:
    size = len(payload) if length is None else length
    return struct.pack("!IHBB16s16s", 6 << 28, size, protocol, 64, SOURCE6, TARGET6) + payload


def extension(following: int, kind: str, fragment: int = 0) -> bytes:
    if kind == "fragment":
        return struct.pack("!BBHI", following, 0, fragment, 7)
    if kind == "authentication":
        return struct.pack("!BB", following, 4) + bytes(22)
    return struct.pack("!BB", following, 1) + bytes(14)


UDP_PACKET = PORTS + bytes(20)

#: name, frame, protocol, bytes of the IP packet, (family, source port, destination port)
PACKETS = [
    ("udp4", frame(0x800, ipv4(UDP, UDP_PACKET)), UDP, 44, (socket.AF_INET, 1000, 53)),
    ("udp4_padded", frame(0x800, ipv4(UDP, PORTS)) + bytes(18), UDP, 24, (socket.AF_INET, 1000, 53)),
    ("tcp4_options", frame(0x800, ipv4(TCP, UDP_PACKET, options=bytes(8))), TCP, 52, (socket.AF_INET, 1000, 53)),
    ("first_fragment4", frame(0x800, ipv4(UDP, UDP_PACKET, 0x2000)), UDP, 44, (socket.AF_INET, 1000, 53)),
    ("later_fragment4", frame(0x800, ipv4(UDP, UDP_PACKET, 0x2001)), UDP, 44, (socket.AF_INET, 0, 0)),
    ("icmp4", frame(0x800, ipv4(ICMP, UDP_PACKET)), ICMP, 44, (socket.AF_INET, 0, 0)),
    ("udp6", frame(0x86DD, ipv6(UDP, UDP_PACKET)), UDP, 64, (socket.AF_INET6, 1000, 53)),
    ("icmp6", frame(0x86DD, ipv6(ICMP6, UDP_PACKET)), ICMP6, 64, (socket.AF_INET6, 0, 0)),
    (
        "hop_by_hop6",
        frame(0x86DD, ipv6(0, extension(60, "options") + extension(TCP, "options") + UDP_PACKET)),
        TCP,
        96,
        (socket.AF_INET6, 1000, 53),
    ),
    (
        "authentication6",
        frame(0x86DD, ipv6(51, extension(UDP, "authentication") + UDP_PACKET)),
        UDP,
        88,
        (socket.AF_INET6, 1000, 53),
    ),
    (
        "first_fragment6",
        frame(0x86DD, ipv6(44, extension(UDP, "fragment", 1) + UDP_PACKET)),
        UDP,
        72,
        (socket.AF_INET6, 1000, 53),
    ),
    (
        "later_fragment6",
        frame(0x86DD, ipv6(44, extension(UDP, "fragment", 8) + UDP_PACKET)),
        UDP,
        72,
        (socket.AF_INET6, 0, 0),
    ),
    # The frame's second tag; the first would be in the metadata.
    ("vlan", frame(0x8100, b"\0\1\x08\0" + ipv4(UDP, UDP_PACKET)), UDP, 44, (socket.AF_INET, 1000, 53)),
    ("big_tcp6", frame(0x86DD, ipv6(TCP, UDP_PACKET, length=0)), TCP, 64, (socket.AF_INET6, 1000, 53)),
]

NOT_COUNTED = {
    "arp": frame(0x806, bytes(28)),
    "wrong version": frame(0x800, ipv6(UDP, UDP_PACKET)),
    "header too short": frame(0x800, b"\x44" + ipv4(UDP, UDP_PACKET)[1:]),
    "cut short": frame(0x8100, b"\0\1\x86\xdd" + ipv6(UDP, b"")[:6]),
}


@pytest.fixture
def sockex1(backend):
    with kbpf.load(OBJECTS / "sockex1.bpf.o", backend=backend) as loaded:
        yield loaded


@pytest.fixture
def sockex2(backend):
    with kbpf.load(OBJECTS / "sockex2.bpf.o", backend=backend) as loaded:
        yield loaded


def counted(map) -> dict[int, int]:
    return {protocol: count for protocol, count in map.items() if count}


def settled(map, protocol: int, wanted: int) -> int:
    """The count, once it is no less than `wanted`: a busy machine delivers a little later."""
    deadline = time.monotonic() + 5
    while map[protocol] < wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    return map[protocol]


def addresses(family: int) -> tuple[bytes, bytes]:
    return (SOURCE6, TARGET6) if family == socket.AF_INET6 else (SOURCE4.ljust(16, b"\0"), TARGET4.ljust(16, b"\0"))


@pytest.mark.parametrize(("data", "protocol", "size", "flow"), [p[1:] for p in PACKETS], ids=[p[0] for p in PACKETS])
class TestOnePacket:
    def test_bytes_are_the_ip_packets_under_its_transport_protocol(self, sockex1, data, protocol, size, flow):
        assert sockex1.programs["count"].run(data).value == 0xFFFFFFFF
        assert counted(sockex1.maps["bytes"]) == {protocol: size}

    def test_its_flow(self, sockex2, data, protocol, size, flow):
        for _ in range(2):
            assert sockex2.programs["count"].run(data).value == 0xFFFFFFFF
        ((key, value),) = sockex2.maps["flows"].items()
        assert (key.family, key.source_port, key.destination_port) == flow
        assert (key.protocol, bytes(key.source), bytes(key.destination)) == (protocol, *addresses(flow[0]))
        assert (value.packets, value.bytes) == (2, 2 * size)


@pytest.mark.parametrize("data", NOT_COUNTED.values(), ids=NOT_COUNTED)
def test_what_is_no_ip_packet_is_kept_and_not_counted(sockex1, data):
    assert sockex1.programs["count"].run(data).value == 0xFFFFFFFF
    assert counted(sockex1.maps["bytes"]) == {}


@pytest.mark.requires("kernel")
class TestLiveSockets:
    """On the running kernel's own sockets."""

    @pytest.fixture
    def program(self):
        with kbpf.load(OBJECTS / "sockex1.bpf.o", backend="kernel") as loaded:
            yield loaded

    @pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
    def test_udp_loses_nothing_and_counts_the_ip_packet(self, program, family):
        with socket.socket(family, socket.SOCK_DGRAM) as receiver, socket.socket(family, socket.SOCK_DGRAM) as sender:
            receiver.bind(("127.0.0.1" if family == socket.AF_INET else "::1", 0))
            receiver.settimeout(5)
            with program.programs["count"].attach(receiver):
                sender.sendto(b"x" * 1000, receiver.getsockname())
                assert receiver.recv(2000) == b"x" * 1000
                header = 20 if family == socket.AF_INET else 40
                assert counted(program.maps["bytes"]) == {UDP: header + 8 + 1000}

    def test_a_tcp_connection_goes_on(self, program):
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname()) as client,
            server.accept()[0] as accepted,
        ):
            accepted.settimeout(5)
            with program.programs["count"].attach(accepted):
                client.sendall(b"x" * 100_000)
                got = 0
                while got < 100_000:
                    got += len(accepted.recv(65536))
                assert program.maps["bytes"][TCP] > 100_000

    def test_unix_payload_that_looks_like_ip_is_no_ip(self, program):
        one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        with one, two, program.programs["count"].attach(two):
            one.send(ipv4(UDP, UDP_PACKET))
            assert two.recv(100) == ipv4(UDP, UDP_PACKET)
            assert counted(program.maps["bytes"]) == {}

    @pytest.mark.parametrize("kind", [socket.SOCK_RAW, socket.SOCK_DGRAM])
    def test_veth_counts_equal_what_the_sender_sent(self, program, veth, kind):
        sender, receiver = veth
        sizes = [(family, length) for family in (socket.AF_INET, socket.AF_INET6) for length in (0, 1, 18, 1000)]
        with receiver.namespace.socket(socket.AF_PACKET, kind, socket.htons(3)) as tap:
            tap.bind((receiver.interface, 3))
            with program.programs["count"].attach(tap):
                for family, length in sizes:
                    with sender.namespace.socket(family, socket.SOCK_DGRAM) as out:
                        target = receiver.ipv4 if family == socket.AF_INET else receiver.ipv6
                        out.sendto(bytes(length), (target, 9))
                sent = sum((20 if family == socket.AF_INET else 40) + 8 + length for family, length in sizes)
                assert settled(program.maps["bytes"], UDP, sent) == sent

    def test_loopback_counts_each_packet_once(self, program, netns):
        netns.run("ip", "link", "set", "lo", "up")
        with netns.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as tap:
            tap.bind(("lo", 3))
            with program.programs["count"].attach(tap), netns.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
                out.sendto(bytes(100), ("127.0.0.1", 9))
                assert settled(program.maps["bytes"], UDP, 128) == 128
