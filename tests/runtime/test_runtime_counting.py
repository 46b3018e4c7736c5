"""One program that counts for many expressions: each is answered as if it were alone."""

from __future__ import annotations

import random
import socket
import struct
import time

import pytest

import kbpf
from kbpf.pcapfile import Record
from kbpf.runtime.counting import CaptureCounter, Count, Counter, counting_program
from kbpf.specs import FILE_LAYOUTS, SOCKET_LAYOUTS

ETHERNET = bytes(12) + b"\x08\x00"


def ipv4_udp(payload: bytes, port: int = 53) -> bytes:
    udp = struct.pack("!HHHH", 4000, port, 8 + len(payload), 0) + payload
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0, b"\x7f\0\0\1", b"\x7f\0\0\1")
    return head + udp


# Loads of every kind, inside, at the edge of and outside an IPv4 packet of 60 bytes; and whether they match.
LOADS = {
    "ip[22:2] = 53": True,
    "ip[56:4] >= 0": True,
    "ip[57:4] >= 0": False,
    "not ip[57:4] >= 0": False,
    "ip[5000:4] >= 0": False,
    "ip[0x7fffff:1] >= 0": False,
    "udp[2:2] = 53": True,
    "udp[38:2] >= 0": True,
    "udp[39:2] >= 0": False,
    "ip[ip[9] - 21 + 26:2] = 53": True,
    "ip[ip[9] - 21:2] >= 0": False,
    "ip[0] = 0x45": True,
    "ip": True,
    "1 / ip[1] = 1": False,
    "not 1 / ip[1] = 1": False,
    "len = 60": True,
    "len > 60": False,
    "ip and arp": False,
    "": True,
}


@pytest.mark.parametrize("layout", ("packet", "packet_dgram", "packet_ip"))
def test_a_failing_load_ends_only_its_own_expression(layout: str, backend: str) -> None:
    packet = ipv4_udp(bytes(32))
    assert len(packet) == 60
    with kbpf.load_program(counting_program(list(LOADS), SOCKET_LAYOUTS[layout]), backend=backend) as program:
        for _ in range(3):
            assert program.run(ETHERNET + packet).value == 0
        counts = dict(zip(LOADS, program.maps[0][0].sum(), strict=True))
    assert {text: count.packets > 0 for text, count in counts.items()} == LOADS
    assert all(count == (3, 180) for text, count in counts.items() if LOADS[text])


def test_frames_are_counted_with_their_link_header(backend: str) -> None:
    frame = ETHERNET + ipv4_udp(bytes(32))
    expressions = ["ether[12:2] = 0x800", "udp port 53", "len = 74", "ether[74] >= 0", "ether[73] = 0"]
    spec = counting_program(expressions, SOCKET_LAYOUTS["packet_ethernet"])
    with kbpf.load_program(spec, backend=backend) as program:
        program.run(frame)
        assert [tuple(count) for count in program.maps[0][0].sum()] == [(1, 74)] * 3 + [(0, 0), (1, 74)]


EXPRESSIONS = {
    "dns": "udp port 53",
    "web": "tcp port 443 or tcp port 80",
    "local": "net 127.0.0.0/8",
    "not local": "not net 127.0.0.0/8",
    "v6": "ip6",
    "ping": "icmp",
    "range": "udp portrange 50-60 and not src host 10.0.0.1",
}


def random_packet(generator: random.Random) -> bytes:
    """Something like IP, often cut short, with values that the expressions above ask for."""
    version = generator.choice([4, 4, 6])
    protocol = generator.choice([1, 6, 17, generator.randrange(256)])
    ports = struct.pack("!HH", *(generator.choice([53, 80, 443, 55, generator.randrange(65536)]) for _ in range(2)))
    hosts = [generator.choice([b"\x7f\0\0\1", b"\x0a\0\0\1", generator.randbytes(4)]) for _ in range(2)]
    if version == 4:
        words = generator.choice([5, 5, 5, 6, 15])
        fragment = generator.choice([0, 0, 0, 0x2000, 0x1FFF])
        head = struct.pack("!BBHHHBBH", 0x40 | words, 0, 0, 0, fragment, 64, protocol, 0) + b"".join(hosts)
        head += bytes(4 * words - 20)
    else:
        head = struct.pack("!IHBB", 0x60000000, 0, protocol, 64) + hosts[0] * 4 + hosts[1] * 4
    # BPF_PROG_TEST_RUN wants a whole fixed header.
    least = 20 if version == 4 else 40
    whole = head + ports + generator.randbytes(generator.randrange(40))
    return whole[: generator.choice([len(whole), least, generator.randrange(least, len(whole) + 1)])]


def test_random_packets_are_counted_as_each_filter_alone_would(backend: str) -> None:
    generator = random.Random(20)
    filters = {name: kbpf.compile(expression, link="RAW") for name, expression in EXPRESSIONS.items()}
    expected = dict.fromkeys(filters, (0, 0))
    spec = counting_program(list(EXPRESSIONS.values()), FILE_LAYOUTS["RAW"])
    with kbpf.load_program(spec, backend=backend) as program:
        for _ in range(400):
            packet = random_packet(generator)
            ether_type = b"\x08\x00" if packet[0] >> 4 == 4 else b"\x86\xdd"
            program.run(bytes(12) + ether_type + packet)
            for name, filter in filters.items():
                if filter.run(packet):
                    packets, octets = expected[name]
                    expected[name] = packets + 1, octets + len(packet)
        assert dict(zip(filters, map(tuple, program.maps[0][0].sum()), strict=True)) == expected
    assert all(packets for packets, _ in expected.values())


@pytest.mark.requires("kernel")
def test_loopback_packets_are_counted_once(loopback_traffic) -> None:
    with kbpf.packet_socket("lo", backend="kernel") as sock:
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
        ):
            receiver.bind(("127.0.0.1", 0))
            port = receiver.getsockname()[1]
            with Counter(sock, {"mine": f"udp dst port {port}", "reverse": f"udp src port {port}"}) as counter:
                for _ in range(7):
                    sender.sendto(b"x" * 100, ("127.0.0.1", port))
                time.sleep(0.05)
                counts = counter.counts()
        assert counts == {"mine": Count(7, 7 * (14 + 20 + 8 + 100)), "reverse": Count(0, 0)}


@pytest.mark.requires("kernel")
def test_both_directions_are_counted_on_other_interfaces(veth) -> None:
    left, right = veth
    with (
        left.namespace.call(kbpf.packet_socket, left.interface, backend="kernel") as sock,
        Counter(sock, {"udp": "udp", "to": f"dst host {right.ipv4}", "to6": f"dst host {right.ipv6}"}) as counter,
        right.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as there,
        left.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as here,
    ):
        there.bind((right.ipv4, 0))
        there.settimeout(5)
        here.settimeout(5)
        for _ in range(3):
            here.sendto(b"ping", there.getsockname())
            there.sendto(b"pong", there.recvfrom(100)[1])
            here.recv(100)
        counts = counter.counts()
    assert counts["udp"].packets == 6
    assert counts["to"] == Count(3, 3 * (14 + 20 + 8 + 4))
    assert counts["to6"] == Count(0, 0)


def test_a_wrong_expression_leaves_the_socket_as_it_was(backend: str) -> None:
    with kbpf.packet_socket("lo", backend=backend) as sock:
        with pytest.raises(kbpf.FilterSyntaxError):
            Counter(sock, {"good": "udp", "bad": "udp port"}, backend=backend)
        with kbpf.attach(sock, "udp", backend=backend) as link:
            assert link.read_back() is not None


def test_what_an_ebpf_program_cannot_know_is_refused() -> None:
    # Whether a device has Ethernet headers.
    with pytest.raises(kbpf.FilterError, match="hatype"):
        counting_program(["ether src 02:00:00:00:00:01"], SOCKET_LAYOUTS["packet_dgram"])


def test_a_capture_is_counted_by_wire_length_and_link_type() -> None:
    counter = CaptureCounter({"dns": "udp port 53", "any": ""})
    packet = ipv4_udp(b"query")
    counter.add(Record(0, (ETHERNET + packet)[:42], 1000, dlt=1))
    counter.add(Record(0, packet, len(packet), dlt=12))
    counter.add(Record(0, ETHERNET + packet[:15], 500, dlt=1))
    assert counter.counts() == {
        "dns": Count(2, 1000 + len(packet)),
        "any": Count(3, 1000 + len(packet) + 500),
    }


@pytest.mark.requires("kernel")
def test_the_verifier_takes_hundreds_of_expressions() -> None:
    expressions = [f"tcp and dst port {number} and host 10.0.0.{number % 256}" for number in range(1, 401)]
    for layout in ("packet_ethernet", "packet_dgram"):
        spec = counting_program(expressions, SOCKET_LAYOUTS[layout])
        with kbpf.load_program(spec, backend="kernel") as program:
            assert program.verified
