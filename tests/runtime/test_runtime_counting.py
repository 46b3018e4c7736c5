"""One program that counts for many expressions: each is answered as if it were alone."""

from __future__ import annotations

import random
import socket
import struct
import time

import pytest

import kbpf
from kbpf.isa import cbpf
from kbpf.pcapfile import Record
from kbpf.runtime.counting import CaptureCounter, Count, Counter, counting_program
from kbpf.specs import SOCKET_LAYOUTS

LD, LDX, JMP, RET, IND, ABS = cbpf.LD, cbpf.LDX, cbpf.JMP, cbpf.RET, cbpf.IND, cbpf.ABS
HALVES = LD | cbpf.H

ETHERNET = bytes(12) + b"\x08\x00"


def ipv4_udp(payload: bytes, port: int = 53) -> bytes:
    udp = struct.pack("!HHHH", 4000, port, 8 + len(payload), 0) + payload
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0, b"\x7f\0\0\1", b"\x7f\0\0\1")
    return head + udp


def matching(*load: tuple[int, int], value: int | None = None) -> kbpf.Filter:
    """Keeps a packet if the loads succeed, and give `value` where one is asked for."""
    end = [cbpf.stmt(RET, 1)]
    if value is not None:
        end = [cbpf.jump(JMP | cbpf.JEQ, value, 0, 1), *end, cbpf.stmt(RET, 0)]
    return kbpf.Filter([*(cbpf.stmt(code, k) for code, k in load), *end], layout=SOCKET_LAYOUTS["packet_dgram"])


# Loads of every kind, inside, at the edge of and outside a packet of 60 bytes that starts with its IP header.
FILTERS = {
    "in": matching((HALVES | ABS, 22), value=53),
    "edge": matching((LD | cbpf.W | ABS, 56)),
    "out": matching((LD | cbpf.W | ABS, 57)),
    "far out": matching((LD | cbpf.B | ABS, 0x7FFFFFFF)),
    "msh": matching((LDX | cbpf.B | cbpf.MSH, 0), (HALVES | IND, 2), value=53),
    "indirect out": matching((LDX | cbpf.B | cbpf.MSH, 0), (HALVES | IND, 39)),
    "indirect edge": matching((LDX | cbpf.B | cbpf.MSH, 0), (HALVES | IND, 38)),
    "indirect wraps": matching((LDX | cbpf.IMM, 0xFFFFFFFC), (HALVES | IND, 26), value=53),
    "network": matching((HALVES | ABS, cbpf.NET_OFF + 22), value=53),
    "network msh": matching((LDX | cbpf.B | cbpf.MSH, cbpf.NET_OFF), (HALVES | IND, cbpf.NET_OFF + 2), value=53),
    "network out": matching((LD | cbpf.W | ABS, cbpf.NET_OFF + 5000)),
    "after out": matching((LD | cbpf.B | ABS, 0), value=0x45),
    "protocol": matching((LD | cbpf.W | ABS, cbpf.AD_OFF), value=0x800),
    "msh keeps A": matching(
        (LD | cbpf.IMM, 7), (LDX | cbpf.B | cbpf.MSH, 0), (cbpf.ALU | cbpf.ADD | cbpf.X, 0), value=27
    ),
    "starts at 0": matching((cbpf.ALU | cbpf.ADD | cbpf.X, 0), value=0),
    "divided by 0": matching((cbpf.ALU | cbpf.DIV | cbpf.X, 0)),
    "length": matching((LD | cbpf.LEN, 0), value=60),
    "nothing": kbpf.Filter([cbpf.stmt(RET, 0)]),
    "all": kbpf.Filter([cbpf.stmt(RET, 0xFFFFFFFF)]),
}
MATCHED = {
    *("in", "edge", "msh", "indirect edge", "indirect wraps", "network", "network msh", "after out", "protocol"),
    *("msh keeps A", "starts at 0", "length", "all"),
}


def test_a_failing_load_ends_only_its_own_expression(backend: str) -> None:
    packet = ipv4_udp(bytes(32))
    assert len(packet) == 60
    with kbpf.load_program(counting_program(list(FILTERS.values())), backend=backend) as program:
        for _ in range(3):
            assert program.run(ETHERNET + packet).value == 0
        counts = dict(zip(FILTERS, program.maps[0][0].sum(), strict=True))
    assert {name for name, count in counts.items() if count.packets} == MATCHED
    assert all(count == (3, 180) for name, count in counts.items() if name in MATCHED)


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
    with kbpf.load_program(counting_program(list(filters.values())), backend=backend) as program:
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
    hatype = matching((LD | cbpf.W | ABS, cbpf.AD_OFF + 28))
    with pytest.raises(kbpf.FilterError, match="hatype"):
        counting_program([hatype])


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
    filters = [kbpf.compile(f"tcp and dst port {number} and host 10.0.0.{number % 256}") for number in range(1, 401)]
    with kbpf.load_program(counting_program(filters), backend="kernel") as program:
        assert program.verified
