"""Filters for captures do what libpcap's unoptimised code does, on whole and on cut packets."""

from __future__ import annotations

import random

import filter_packets
import pytest
from filter_machine import Packet, libpcap, run

from kbpf.errors import FilterError
from kbpf.filter import compile_filter
from kbpf.isa import cbpf
from kbpf.specs import FILE_LAYOUTS

LAYOUTS = {layout.dlt: layout for layout in FILE_LAYOUTS.values() if layout.dlt in (0, 1, 12, 113, 276)}
FRAMES = {dlt: filter_packets.frames(dlt or 0) for dlt in LAYOUTS}

PRIMITIVES = [
    *["tcp", "udp", "ip", "ip6", "arp", "icmp", "rarp", "sctp", "icmp6", "iso", "stp", "ipx", "atalk", "decnet"],
    *("host 10.0.0.1", "src 10.0.0.2", "dst host 192.168.1.5", "net 10.0.0.0/8", "src net 192.168.1.0/24"),
    *("ip host 10.0.0.1", "arp src 10.0.0.1", "ip6 host fe80::1", "src or dst port 443", "src and dst port 53"),
    *("port 53", "tcp port 80", "dst port 7070", "udp src port 53", "portrange 50-90", "tcp dst portrange 70-8000"),
    *("ip proto 6", "ip6 proto 17", "proto 58", "less 60", "greater 70", "ip multicast", "ip6 multicast"),
    *("tcp[13]&2!=0", "ip[6:2]&0x1fff=0", "udp[0:2]=53", "ip[0]&0xf>5", "icmp[0]=8", "len>=60"),
    *("ip[2:2]-((ip[0]&0xf)<<2)>20", "link[0]&1=0", "link proto 0x806", "tcp[0:2]=tcp[2:2]", "ip[12:4]>ip[16:4]"),
    *("port 53 or 80 or 443", "host 10.0.0.1 or 10.0.0.2", "not port 53", "ip[9]/ip[8]=0", "ip[ip[0]&0xf*4]=0"),
    "port 1 or 2 or 3 or 4 or 5 or 53 or 80 or 81 or 443 or 7070",
    "tcp port 1 or host 10.0.0.9 or tcp port 443 or host 10.0.0.1 or tcp port 80 or host 10.0.0.2",
    "not port 1 and not host 10.0.0.9 and not port 443 and not host 10.0.0.2 and host 10.0.0.1 and not port 80",
    *("not (host 10.0.0.1 or 10.0.0.2)", "not host 10.0.0.2 and 10.0.0.1", "net 192.168.0.0/17"),
    *("dst net 128.0.0.0/1", "net 0.0.0.0/1", "decnet dst 10.1", "pppoes 1"),
    " or ".join(f"host fe80::{i % 3}:{i}" for i in range(0, 60, 5)) + " or host fe80::2 or net fe80:0:0:1::/64",
    "dst host " + " or ".join(f"fe8{i}::1" for i in range(10)) + " or fe80::1 or 1::2 or fe80::2",
    "src 1.1.1.1 or 2.2.2.2 or 10.0.0.1 or 10.0.0.2 or 5.5.5.5 or 6.6.6.6 or 7.7.7.7 or 8.8.8.8 or 9.9.9.9",
]


def expressions(count: int) -> list[str]:
    rng = random.Random(7)

    def combined(depth: int) -> str:
        kind = rng.random()
        if depth == 0 or kind < 0.25:
            return rng.choice(PRIMITIVES)
        if kind < 0.4:
            return f"not ({combined(depth - 1)})"
        return f"({combined(depth - 1)} {rng.choice(('and', 'or'))} {combined(depth - 1)})"

    return PRIMITIVES + [combined(rng.choice((1, 2, 3))) for _ in range(count)]


@pytest.mark.requires("libpcap")
@pytest.mark.parametrize("dlt", LAYOUTS)
def test_every_packet_gets_libpcaps_verdict(dlt: int) -> None:
    for expression in expressions(120):
        reference = libpcap(expression, dlt)
        try:
            program = compile_filter(expression, LAYOUTS[dlt], names="numeric").instructions
        except FilterError as error:
            assert reference is None, f"{expression}: {error}"
            continue
        assert reference is not None, expression
        cbpf.check(program)
        for frame in FRAMES[dlt]:
            assert run(program, frame) == run(reference, frame), (expression, frame.hex())


@pytest.mark.requires("libpcap")
def test_lists_of_ethernet_addresses_get_libpcaps_verdict() -> None:
    frames = FRAMES[1]
    listed = [":".join(f"{octet:x}" for octet in frame[at : at + 6]) for frame in frames[:60:5] for at in (0, 6)]
    for kind in ("ether host", "ether src", "ether dst", "not ether src"):
        for expression in (
            " or ".join(f"{kind} {each}" for each in listed),
            " or ".join(f"{kind} {each} or ip host 10.0.0.1" for each in listed[:4]),
            " and ".join(f"not {kind} {each}" for each in listed[2:9]),
        ):
            program, reference = compile_filter(expression).instructions, libpcap(expression, 1)
            assert reference is not None
            for frame in frames:
                assert run(program, frame) == run(reference, frame), (expression, frame.hex())


@pytest.mark.parametrize("order", ["traffic", "libpcap"])
@pytest.mark.parametrize("dlt", LAYOUTS)
def test_optimizing_changes_no_verdict(dlt: int, order: str) -> None:
    for expression in expressions(40):
        plain = compile_filter(expression, LAYOUTS[dlt], names="numeric", order=order, optimize=False).instructions
        better = compile_filter(expression, LAYOUTS[dlt], names="numeric", order=order).instructions
        assert len(better) <= len(plain)
        for frame in FRAMES[dlt]:
            assert run(better, frame) == run(plain, frame), (expression, frame.hex())


@pytest.mark.parametrize(
    "expression", ["ip and ip6", "tcp and udp and ip proto 6", "arp and tcp", "less 10 and greater 20"]
)
def test_what_can_never_match_is_one_instruction(expression: str) -> None:
    assert compile_filter(expression).instructions == (cbpf.stmt(cbpf.RET | cbpf.K, 0),)


def test_the_snapshot_length_is_what_is_returned() -> None:
    assert compile_filter("", snaplen=96).instructions == (cbpf.stmt(cbpf.RET | cbpf.K, 96),)


def test_ip_broadcast_needs_the_netmask() -> None:
    with pytest.raises(FilterError, match="network mask"):
        compile_filter("ip broadcast")
    program = compile_filter("ip broadcast", netmask=0xFFFFFF00).instructions
    frame = b"\2" * 12 + b"\x08\x00" + filter_packets.ipv4(b"", 17, destination="10.0.0.255")
    assert run(program, frame) and not run(program, frame[:-1] + b"\1")


@pytest.mark.parametrize("what", ["inbound", "outbound", "ifindex 1"])
def test_metadata_is_not_in_captures(what: str) -> None:
    with pytest.raises(FilterError, match="live"):
        compile_filter(what)
    assert compile_filter(what.replace("ifindex 1", "inbound"), FILE_LAYOUTS["LINUX_SLL"]).instructions


class TestLists:
    HOSTS = tuple(f"10.{i % 7}.{i * 37 % 256}.{i * 11 % 256}" for i in range(1000))

    def test_a_thousand_hosts_take_forty_instructions_a_packet(self) -> None:
        program = compile_filter(" or ".join(f"host {host}" for host in self.HOSTS)).instructions
        cbpf.check(program)
        for source, destination, matches in (
            (self.HOSTS[500], "9.9.9.9", True),
            ("9.9.9.9", self.HOSTS[999], True),
            ("10.3.1.1", "200.1.1.1", False),
        ):
            frame = b"\2" * 12 + b"\x08\x00" + filter_packets.ipv4(b"", 6, source, destination)
            packet = Packet(frame)
            assert bool(run(program, packet)) is matches
            assert packet.steps <= 40

    @pytest.mark.parametrize("kind", ["host", "ether host"])
    def test_lists_of_longer_addresses_are_trees_too(self, kind: str) -> None:
        rng = random.Random(3)
        if kind == "host":
            listed = [rng.getrandbits(128) for _ in range(500)]
            listed += [address ^ rng.getrandbits(40) for address in listed]
            texts = [":".join(f"{address >> shift & 0xFFFF:x}" for shift in range(112, -1, -16)) for address in listed]
        else:
            listed = [rng.getrandbits(48) for _ in range(1000)]
            texts = [":".join(f"{octet:x}" for octet in address.to_bytes(6, "big")) for address in listed]
        program = compile_filter(" or ".join(f"{kind} {text}" for text in texts)).instructions
        for address in (listed[0], listed[600], listed[999], 5):
            for source, destination in ((address, 9), (9, address)):
                if kind == "host":
                    frame = b"\2" * 12 + b"\x86\xdd" + filter_packets.ipv6(b"", 6, source, destination)
                    frame = frame[:22] + source.to_bytes(16, "big") + destination.to_bytes(16, "big")
                else:
                    frame = destination.to_bytes(6, "big") + source.to_bytes(6, "big") + b"\x08\0"
                packet = Packet(frame)
                assert bool(run(program, packet)) is (address != 5)
                assert packet.steps <= 50

    def test_far_jumps_go_through_hops(self) -> None:
        text = " or ".join(f"(tcp port {port} and ip[8]={port % 256})" for port in range(300))
        program = compile_filter(text).instructions
        assert len(program) > 600
        cbpf.check(program)
        frame = b"\2" * 12 + b"\x08\x00" + filter_packets.ipv4(filter_packets.tcp(1, 64), 6)
        assert run(program, frame)
        assert not run(program, frame.replace(b"\0\x40\0\0\0\1", b"\0\x41\0\0\0\1"))

    @pytest.mark.parametrize("negated", [False, True])
    def test_a_thousand_alternating_ports_and_hosts_fit_the_kernel(self, negated: bool) -> None:
        terms = [f"tcp port {i * 53 % 60000}" if i % 2 else f"host {host}" for i, host in enumerate(self.HOSTS)]
        text = " and ".join(f"not {term}" for term in terms) if negated else " or ".join(terms)
        program = compile_filter(text).instructions
        cbpf.check(program)
        for source, port, matches in ((self.HOSTS[500], 9, True), ("9.9.9.9", 999 * 53, True), ("200.1.1.1", 9, False)):
            frame = b"\2" * 12 + b"\x08\x00" + filter_packets.ipv4(filter_packets.tcp(port, 9), 6, source, "9.9.9.8")
            packet = Packet(frame)
            assert bool(run(program, packet)) is (matches is not negated)
            assert packet.steps <= 90
