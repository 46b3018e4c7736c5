"""Filters for live sockets: by a model of what each socket's packets look like, and on real sockets."""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager

import filter_packets
import pytest
from filter_machine import Packet, run

from kbpf.errors import FilterError
from kbpf.filter import compile_filter
from kbpf.isa import cbpf
from kbpf.specs import SOCKET_LAYOUTS

MAC = b"\2\0\0\0\0\1\2\0\0\0\0\2"
FOUR = filter_packets.ipv4(filter_packets.udp(1024, 7070), 17)
OPTIONS = filter_packets.ipv4(filter_packets.udp(1024, 7070), 17, options=3)
SIX = filter_packets.ipv6(filter_packets.udp(1024, 7070), 17)
TCP_FOUR = filter_packets.ipv4(filter_packets.tcp(1024, 7070), 6)
TCP_SIX = filter_packets.ipv6(filter_packets.tcp(1024, 7070), 6)
PING = filter_packets.ipv4(b"\x08\0\0\0abcd", 1)


def packet(
    layout: str, kind: int, data: bytes, *, hardware: int = 1, tag: int | None = None, outgoing: bool = False
) -> Packet:
    """What the kernel shows a socket of this layout of a network packet."""
    header = b"" if layout == "packet_ip" else MAC + struct.pack("!H", kind)
    network = len(header)
    version = data[0] >> 4 if kind != 0x806 else 0
    length = 40 if version == 6 else 4 * (data[0] & 15)
    start = {
        "packet": 0,
        "packet_ethernet": 0,
        "packet_ip": 0,
        "packet_dgram": network,
        "raw4": network,
    }.get(layout, network + length)
    metadata = {0: kind, 4: 4 if outgoing else 0, 8: 3, 28: hardware, 44: tag or 0, 48: int(tag is not None)}
    return Packet(header + data, start, network, 0 if header else None, metadata)


def matches(expression: str, layout: str, kind: int, data: bytes, **options: object) -> bool:
    program = compile_filter(expression, SOCKET_LAYOUTS[layout], names="numeric").instructions
    cbpf.check(program)
    return bool(run(program, packet(layout, kind, data, **options)))  # type: ignore[arg-type]


PACKET_LAYOUTS = ("packet", "packet_ethernet", "packet_ip", "packet_dgram")


@pytest.mark.parametrize("layout", PACKET_LAYOUTS)
@pytest.mark.parametrize(("kind", "data"), [(0x800, TCP_FOUR), (0x86DD, TCP_SIX)])
def test_packet_sockets_find_ports_in_both_versions(layout: str, kind: int, data: bytes) -> None:
    assert matches("tcp and dst port 7070", layout, kind, data)
    assert matches("ip" if kind == 0x800 else "ip6", layout, kind, data)
    assert not matches("tcp and src port 7070", layout, kind, data)
    assert not matches("udp or arp or icmp", layout, kind, data)


@pytest.mark.parametrize(("kind", "data"), [(0x800, FOUR), (0x800, OPTIONS), (0x86DD, SIX)])
def test_udp_sockets_have_ports_at_offset_zero_and_addresses_before(kind: int, data: bytes) -> None:
    assert matches("dst port 7070", "udp", kind, data)
    assert matches("udp port 7070 and udp[0:2] = 1024", "udp", kind, data)
    assert matches("ip" if kind == 0x800 else "ip6", "udp", kind, data)
    assert matches("host 10.0.0.2 or ip6 host fe80::2", "udp", kind, data)
    assert not matches("host 10.0.0.3 or net 2000::/3", "udp", kind, data)


def test_what_the_socket_decides_is_folded() -> None:
    reject = (cbpf.stmt(cbpf.RET | cbpf.K, 0),)
    for expression, layout in (
        ("udp", "tcp"),
        ("tcp port 53", "udp"),
        ("arp", "udp"),
        ("ip6", "icmp"),
        ("ip", "icmp6"),
    ):
        assert compile_filter(expression, SOCKET_LAYOUTS[layout]).instructions == reject
    assert len(compile_filter("dst port 7070", SOCKET_LAYOUTS["tcp"]).instructions) <= 8
    assert compile_filter("icmp", SOCKET_LAYOUTS["icmp"]).instructions == (cbpf.stmt(cbpf.RET | cbpf.K, 262144),)


@pytest.mark.parametrize(("kind", "data"), [(0x800, TCP_FOUR), (0x86DD, TCP_SIX)])
def test_tcp_sockets_take_the_ports_of_either_version(kind: int, data: bytes) -> None:
    assert matches("tcp and dst port 7070", "tcp", kind, data)
    assert matches("tcp[tcpflags] & tcp-syn != 0", "tcp", kind, data)


def test_raw_sockets() -> None:
    assert matches("icmp and src 10.0.0.1 and icmp[icmptype] = icmp-echo", "raw4", 0x800, PING)
    assert not matches("udp", "raw4", 0x800, PING)
    echo = filter_packets.ipv6(b"\x80\0\0\0abcd", 58)
    assert matches("icmp6 and icmp6[icmp6type] = icmp6-echo and src host fe80::1", "raw6", 0x86DD, echo)
    assert matches("icmp[0] = 8", "icmp", 0x800, PING)


def test_ethernet_addresses_are_asked_where_the_device_has_them() -> None:
    for layout in ("packet", "packet_ethernet", "packet_dgram", "udp"):
        assert matches("ether src 2:0:0:0:0:2", layout, 0x800, FOUR)
        assert not matches("ether dst 2:0:0:0:0:2", layout, 0x800, FOUR)
    assert not matches("ether src 2:0:0:0:0:2", "packet", 0x800, FOUR, hardware=65534)
    with pytest.raises(FilterError):
        compile_filter("ether src 2:0:0:0:0:2", SOCKET_LAYOUTS["packet_ip"])


def test_a_vlan_tag_is_in_the_metadata_or_in_the_bytes() -> None:
    for layout in ("packet", "packet_ethernet", "packet_dgram"):
        assert matches("vlan 5 and udp", layout, 0x800, FOUR, tag=0x2005)
        assert matches("vlan and dst port 7070", layout, 0x800, FOUR, tag=0)
        assert not matches("vlan 6", layout, 0x800, FOUR, tag=0x2005)
        assert not matches("vlan", layout, 0x800, FOUR)
    tagged = struct.pack("!HH", 0x2005, 0x800) + FOUR
    program = compile_filter("vlan 5 and dst port 7070", SOCKET_LAYOUTS["packet_ethernet"]).instructions
    frame = Packet(MAC + b"\x81\0" + tagged, 0, 18, 0, {44: 0, 48: 0})
    assert run(program, frame)


def test_direction_and_interface_come_from_the_metadata() -> None:
    assert matches("outbound and ifindex 3", "packet", 0x800, FOUR, outgoing=True)
    assert matches("inbound", "udp", 0x800, FOUR)


@pytest.mark.parametrize("layout", ["unix", "netlink"])
def test_messages_without_headers_have_only_a_length(layout: str) -> None:
    for expression in ("udp port 53", "ether src 1:2:3:4:5:6", "ip", "tcp[0]=1", "vlan", "inbound", "host 1.2.3.4"):
        with pytest.raises(FilterError, match=layout):
            compile_filter(expression, SOCKET_LAYOUTS[layout])
    for expression in ("less 100", "len > 5 and greater 3", "1 = 1", ""):
        assert compile_filter(expression, SOCKET_LAYOUTS[layout]).instructions


# The kernel

SO_ATTACH_FILTER = 26


def attach(sock: socket.socket, expression: str, layout: str) -> None:
    program = compile_filter(expression, SOCKET_LAYOUTS[layout], names="numeric").instructions
    code = ctypes.create_string_buffer(cbpf.encode(program))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))


@contextmanager
def udp_pair(family: int, address: str) -> Iterator[tuple[socket.socket, socket.socket]]:
    with (
        closing(socket.socket(family, socket.SOCK_DGRAM)) as server,
        closing(socket.socket(family, socket.SOCK_DGRAM)) as client,
    ):
        server.bind((address, 0))
        client.bind((address, 0))
        client.connect(server.getsockname()[:2])
        server.setblocking(False)
        yield server, client


def received(server: socket.socket, client: socket.socket, data: bytes = b"hello") -> bool:
    client.send(data)
    try:
        return server.recv(100) == data
    except BlockingIOError:
        return False


@pytest.mark.requires("kernel")
@pytest.mark.parametrize(
    ("family", "address", "name"), [(socket.AF_INET, "127.0.0.1", "ip"), (socket.AF_INET6, "::1", "ip6")]
)
def test_a_real_udp_socket_filters(family: int, address: str, name: str) -> None:
    with udp_pair(family, address) as (server, client):
        port = client.getsockname()[1]
        for expression, expected in (
            (f"udp and src port {port}", True),
            (f"udp and src port {port ^ 1}", False),
            (f"{name} and host {address}", True),
            ("ip and ip6", False),
            ("udp[8] = 104", True),
            ("udp[8] = 105", False),
            ("inbound", True),
            ("ether dst 0:0:0:0:0:0", True),
        ):
            attach(server, expression, "udp")
            assert received(server, client) is expected, expression


@pytest.mark.requires("kernel")
def test_a_dual_stack_socket_gets_both_versions() -> None:
    with closing(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)) as server:
        server.bind(("::", 0))
        server.setblocking(False)
        with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as client:
            client.connect(("127.0.0.1", server.getsockname()[1]))
            for expression, expected in (("ip", True), ("ip6", False), (f"dst port {server.getsockname()[1]}", True)):
                attach(server, expression, "udp")
                assert received(server, client) is expected, expression


@pytest.mark.requires("kernel")
@pytest.mark.parametrize(
    ("kind", "layout"),
    [(socket.SOCK_RAW, "packet"), (socket.SOCK_RAW, "packet_ethernet"), (socket.SOCK_DGRAM, "packet_dgram")],
)
@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_a_real_packet_socket_filters(kind: int, layout: str, family: int, address: str) -> None:
    with udp_pair(family, address) as (server, client):
        port = server.getsockname()[1]
        for expression, expected in (
            (f"inbound and udp dst port {port}", 1),
            (f"outbound and udp dst port {port}", 1),
            (f"udp dst port {port} and host {address}", 2),
            (f"udp dst port {port} and not host {address}", 0),
            (f"udp dst port {port} and ether multicast", 0),
        ):
            with closing(socket.socket(socket.AF_PACKET, kind, socket.htons(3))) as sniffer:
                attach(sniffer, expression, layout)
                # What came before the filter was there is drained.
                sniffer.setblocking(False)
                while True:
                    try:
                        sniffer.recv(1)
                    except BlockingIOError:
                        break
                client.send(b"x" * 30)
                server.recv(100)
                count = 0
                while True:
                    try:
                        sniffer.recv(100)
                        count += 1
                    except BlockingIOError:
                        break
                assert count == expected, expression


@pytest.mark.requires("kernel")
def test_a_real_tcp_listener_filters_connections() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        attach(server, f"tcp and dst port {server.getsockname()[1]} and ip src 127.0.0.1", "tcp")
        with closing(socket.create_connection(server.getsockname(), timeout=2)) as client:
            peer, _ = server.accept()
            with closing(peer):
                client.send(b"hello")
                assert peer.recv(5) == b"hello"
