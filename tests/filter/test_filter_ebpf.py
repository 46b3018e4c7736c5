"""Expressions as eBPF: the classic filter's verdicts, from all three kinds of program, whatever the packet's length."""

from __future__ import annotations

import functools
import ipaddress
import json
import random
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import kbpf
from kbpf.filter import compile_filter
from kbpf.filter.ebpf import TARGETS, compile_ebpf, target_layout
from kbpf.isa import ebpf
from kbpf.pcapfile import open_capture
from kbpf.specs import SOCKET_LAYOUTS
from kbpf.testing.generate_packets import frame

EVERY = ("socket_filter", "sched_cls", "xdp")

EXPRESSIONS = (
    "",
    "ip",
    "arp or ip6",
    "not ip",
    "tcp port 80",
    "udp src port 53 or tcp dst portrange 22-80",
    "host 10.0.0.1 and not port 7070",
    "src net 192.0.2.0/24 or ip6 host ::1",
    "tcp[tcpflags] & tcp-syn != 0",
    "ip[0] & 0xf > 5",
    "vlan",
    "vlan and ip",
    "vlan 100 or (vlan and vlan and udp)",
    "ether host 00:00:00:00:00:00",
    "ether broadcast or ether multicast",
    "len > 70 and len <= 90",
    "less 60",
    "ether[13] = 0 and ether[100] > 3",
    "ether[2000:4] > 0 or len < 2000",
    "ether[3708:4] = 0 or ether[3709:4] > 0",
    "not ether[54:2] > 0x7fff",
    "ip[ip[3] & 0x1f] > 100",
    "ip[ip[2:2]:4] > 100 or ip6",
    "ether[len - 1] > 10",
    "ether[len - 4:4] < 0x7fffffff",
    "ip[8] / ip[9] = 2 or ip[9] % ip[8] = 1",
    "not (ip[8] / (ip[9] - 17) = 2)",
    "ip[2:2] << (ip[8] & 31) > 1000 and -ip[9] < 0xffffffff",
    "ip[2:2] * ip[4:2] - ip[6:2] > ip[10:2] ^ 0x1234",
    "(ether[0] + (ether[1] * (ether[2] | (ether[3] - (ether[4] + 1))))) & 1 = 1",
    "protochain 6",
    "mpls",
    "pppoes or geneve",
    "geneve and tcp",
    "vxlan and udp port 53",
    "udp and udp[8:2] = udp[10:2]",
    "icmp or icmp6 or sctp",
    "llc or iso",
    "ip multicast or ip6 multicast",
)


def frames(seed: int, count: int) -> Iterator[bytes]:
    """Frames that all program types take, many of them cut, a few as long as may be."""
    rng = random.Random(seed)
    while count:
        packet = frame(rng, vlan=True)
        dice = rng.random()
        if dice < 0.4:
            packet = packet[: rng.randrange(14, len(packet) + 1)]
        elif dice < 0.5:
            packet = (packet + rng.randbytes(3712))[: rng.choice((3712, 3711, rng.randrange(1000, 3712)))]
        if len(packet) >= {0x0800: 34, 0x86DD: 54}.get(int.from_bytes(packet[12:14], "big"), 14):
            count -= 1
            yield packet


def verdict(target: str, match: bool) -> int:
    match_value, other = next(iter(TARGETS[target].values()))
    return match_value if match else other


def compare(expression: str, target: str, packets: list[bytes], backend: str) -> int:
    """Assert that program and classic filter agree; gives how many packets matched."""
    classic = kbpf.Filter.from_spec(compile_filter(expression, target_layout(target)))
    matches = 0
    with kbpf.load(kbpf.compile_ebpf(expression, target), backend=backend) as collection:
        program = collection.programs["filter"]
        for packet in packets:
            match = bool(classic.run(packet))
            matches += match
            got = program.run(packet).value
            assert got == verdict(target, match), f"{expression!r} as {target}: {got} for {packet.hex()}"
    return matches


@pytest.mark.requires("kernel")
@pytest.mark.parametrize("target", EVERY)
def test_verdicts_are_those_of_the_classic_filter(target: str) -> None:
    packets = list(frames(1, 200))
    matches = {expression: compare(expression, target, packets, "kernel") for expression in EXPRESSIONS}
    assert sum(0 < count < len(packets) for count in matches.values()) > len(EXPRESSIONS) * 2 // 3


def test_the_emulator_runs_socket_filters_with_the_same_verdicts() -> None:
    packets = list(frames(2, 25))
    for expression in EXPRESSIONS:
        compare(expression, "socket_filter", packets, "emulator")


@pytest.mark.requires("kernel")
@pytest.mark.parametrize("target", EVERY)
def test_without_the_optimiser_the_verdicts_are_the_same(target: str) -> None:
    packets = list(frames(3, 60))
    for expression in EXPRESSIONS[::3]:
        optimised, plain = (kbpf.compile_ebpf(expression, target, optimize=optimize) for optimize in (True, False))
        with kbpf.load(optimised, backend="kernel") as one, kbpf.load(plain, backend="kernel") as other:
            for packet in packets:
                assert one.programs["filter"].run(packet).value == other.programs["filter"].run(packet).value


@pytest.mark.requires("kernel")
@pytest.mark.parametrize("target", EVERY)
def test_a_load_is_refused_where_the_packet_ends_and_not_before(target: str) -> None:
    for offset, size in ((13, 1), (14, 1), (22, 4), (50, 2), (61, 4), (62, 4), (300, 2)):
        for text in (f"ether[{offset}:{size}] >= 0", f"ether[{offset} - ether[14]:{size}] >= 0"):
            for length in range(max(offset + size - 2, 15), offset + size + 2):
                packet = bytes(12) + b"\x88\xb5" + bytes(length - 14)
                classic = kbpf.Filter.from_spec(compile_filter(text, target_layout(target)))
                with kbpf.load(kbpf.compile_ebpf(text, target), backend="kernel") as collection:
                    got = collection.programs["filter"].run(packet).value
                assert bool(classic.run(packet)) == (length >= offset + size)
                assert got == verdict(target, length >= offset + size), (text, length)


def random_arithmetic(rng: random.Random, depth: int) -> str:
    if depth == 0 or rng.random() < 0.2:
        return rng.choice(
            (
                str(rng.choice((0, 1, 3, 7, 20, 255, 0xFFFF, 0x80000000, 0xFFFFFFFF))),
                "len",
                f"ether[{rng.randrange(70)}]",
            )
        )
    if rng.random() < 0.25:
        return f"ether[({random_arithmetic(rng, depth - 1)}) & {rng.choice((15, 63, 0xFFFF))}:{rng.choice((1, 2, 4))}]"
    left, right = (random_arithmetic(rng, depth - 1) for _ in range(2))
    return f"({left} {rng.choice(('+', '-', '*', '/', '%', '&', '|', '^'))} {right})"


@pytest.mark.requires("kernel")
@pytest.mark.parametrize("target", EVERY)
def test_random_arithmetic_gives_the_classic_results(target: str) -> None:
    rng = random.Random(4)
    packets = list(frames(5, 25))
    compared = 0
    while compared < 60:
        left, right = (random_arithmetic(rng, rng.choice((1, 2, 4))) for _ in range(2))
        expression = f"{left} {rng.choice(('=', '!=', '>', '<=', '<', '>='))} {right}"
        if rng.random() < 0.5:
            expression = f"not ({expression} and {rng.choice(EXPRESSIONS[1:])})"
        try:
            compile_filter(expression, target_layout(target))
        except kbpf.FilterError:
            continue
        compare(expression, target, packets, "kernel")
        compared += 1


@pytest.mark.requires("kernel", "corpus")
@pytest.mark.parametrize("target", EVERY)
def test_the_corpus_gets_the_classic_verdicts(target: str, corpus: Path) -> None:
    rng = random.Random(6)
    with open_capture(str(corpus / "filters" / "packets_1.pcap")) as capture:
        packets = [record.data for record in capture if 14 <= len(record.data) <= 3712]
    lines = (corpus / "filters" / "expressions.jsonl").read_text().splitlines()
    expressions = [json.loads(line)["expr"] for line in lines]
    compared = 0
    for expression in rng.sample(expressions, 400):
        # What classic filters are run on here has no device.
        if "ifindex" in expression or "bound" in expression:
            continue
        try:
            compile_filter(expression, target_layout(target))
        except kbpf.FilterError:
            with pytest.raises(kbpf.FilterError):
                kbpf.compile_ebpf(expression, target)
            continue
        chosen = [
            packet
            for packet in rng.sample(packets, 25)
            if target == "xdp" or len(packet) >= {0x0800: 34, 0x86DD: 54}.get(int.from_bytes(packet[12:14], "big"), 14)
        ]
        compare(expression, target, chosen, "kernel")
        compared += 1
    assert compared > 150


# Sets


@functools.cache
def networks(count: int, version: int) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    rng = random.Random(count)
    chosen: set[ipaddress.IPv4Network | ipaddress.IPv6Network] = set()
    bits, kind = (32, ipaddress.IPv4Network) if version == 4 else (128, ipaddress.IPv6Network)
    while len(chosen) < count:
        chosen.add(kind((rng.getrandbits(bits), rng.randrange(bits // 4, bits + 1)), strict=False))
    return tuple(sorted(chosen))


def addressed(rng: random.Random, address: ipaddress.IPv4Address | ipaddress.IPv6Address, source: bool) -> bytes:
    """A UDP packet with the address in one place and any in the other."""
    size = len(address.packed)
    pair = (address.packed, rng.randbytes(size)) if source else (rng.randbytes(size), address.packed)
    if size == 4:
        return bytes(12) + b"\x08\x00\x45" + bytes(8) + b"\x11" + bytes(2) + b"".join(pair) + bytes(8)
    return bytes(12) + b"\x86\xdd\x60" + bytes(5) + b"\x11\x40" + b"".join(pair) + bytes(8)


@pytest.mark.requires("kernel")
@pytest.mark.parametrize("target", EVERY)
@pytest.mark.parametrize("version", (4, 6))
@pytest.mark.parametrize("kind", ("host", "net"))
@pytest.mark.parametrize("form", ("{}", "src {}", "dst {}", "not {}"))
def test_more_than_64_addresses_are_looked_up_in_a_map(target: str, version: int, kind: str, form: str) -> None:
    rng = random.Random(7)
    members = networks(100, version)
    texts = [str(net if kind == "net" else net.network_address) for net in members]
    word = {"{}": kind, "not {}": f"not {kind}"}.get(form, form.format(kind))
    expression = (" and " if "not" in form else " or ").join(f"{word} {text}" for text in texts)
    spec = kbpf.compile_ebpf(expression, target)
    assert {map.type for map in spec.maps.values()} == {"hash" if kind == "host" else "lpm_trie"}
    packets = list(frames(8, 30))
    for net in rng.sample(members, 25):
        inside = net[rng.randrange(net.num_addresses)] if kind == "net" else net.network_address
        packets += [addressed(rng, inside, source) for source in (True, False)]
        packets.append(addressed(rng, net.network_address - 1 if int(net.network_address) else inside, True))
    assert 20 < compare(expression, target, packets, "kernel") < len(packets) - 20


def test_up_to_64_addresses_stay_code() -> None:
    expression = " or ".join(f"src host 192.0.2.{last}" for last in range(64))
    assert not kbpf.compile_ebpf(expression, "xdp").maps
    assert kbpf.compile_ebpf(expression + " or src host 192.0.2.64", "xdp").maps


@pytest.mark.requires("kernel")
def test_ten_thousand_networks_go_into_one_map() -> None:
    expression = " or ".join(f"net {network}" for network in networks(10_000, 4))
    with kbpf.load(kbpf.compile_ebpf(expression, "xdp"), backend="kernel") as collection:
        assert len(collection.maps["set0"]) == 10_000


# What is returned, and what is refused


@pytest.mark.requires("kernel")
@pytest.mark.parametrize(
    ("target", "action", "match", "other"),
    (
        ("socket_filter", None, 262144, 0),
        ("socket_filter", (96, 0), 96, 0),
        ("socket_filter", (0, 0xFFFFFFFF), 0, 0xFFFFFFFF),
        ("sched_cls", None, 2, 0xFFFFFFFF),
        ("sched_cls", "drop", 2, 0xFFFFFFFF),
        ("sched_cls", "pass", 0, 2),
        ("xdp", None, 1, 2),
        ("xdp", "drop", 1, 2),
        ("xdp", "pass", 2, 1),
        ("xdp", "tx", 3, 2),
        ("xdp", (4, 0), 4, 0),
    ),
)
def test_the_action_says_what_is_returned(target: str, action: str | None, match: int, other: int) -> None:
    ip, arp = bytes(12) + b"\x08\x00" + bytes(40), bytes(12) + b"\x08\x06" + bytes(40)
    with kbpf.load(kbpf.compile_ebpf("ip", target, action), backend="kernel") as collection:
        assert collection.programs["filter"].run(ip).value == match
        assert collection.programs["filter"].run(arp).value == other
    # A packet that is too short does not match.
    with kbpf.load(kbpf.compile_ebpf("ether[60] = 0", target, action), backend="kernel") as collection:
        assert collection.programs["filter"].run(arp + bytes(20)).value == match
        assert collection.programs["filter"].run(arp).value == other


@pytest.mark.requires("kernel")
@pytest.mark.parametrize("target", EVERY)
def test_what_is_always_or_never_true_loads(target: str) -> None:
    for text, match in (("", True), ("ip and arp", False), ("ether[0] >= 0", True)):
        with kbpf.load(kbpf.compile_ebpf(text, target), backend="kernel") as collection:
            assert collection.programs["filter"].run(bytes(60)).value == verdict(target, match)


def test_wrong_targets_actions_and_link_types_are_refused() -> None:
    with pytest.raises(kbpf.FilterError, match="socket_filter, sched_cls, xdp"):
        kbpf.compile_ebpf("ip", "kprobe")  # type: ignore[arg-type]
    with pytest.raises(kbpf.FilterError, match="drop, pass, tx"):
        kbpf.compile_ebpf("ip", "xdp", "keep")
    with pytest.raises(kbpf.FilterError, match="EN10MB, RAW"):
        kbpf.compile_ebpf("ip", "xdp", link="LINUX_SLL")
    with pytest.raises(kbpf.FilterSyntaxError):
        kbpf.compile_ebpf("ip and", "xdp")


def test_what_a_program_cannot_know_is_refused() -> None:
    with pytest.raises(kbpf.FilterError, match="live sockets only"):
        kbpf.compile_ebpf("inbound", "xdp")
    # Whether a device has Ethernet headers.
    with pytest.raises(kbpf.FilterError, match="hatype"):
        compile_ebpf("ether src 02:00:00:00:00:01", "socket_filter", SOCKET_LAYOUTS["udp"])


@pytest.mark.requires("kernel")
@pytest.mark.parametrize("target", EVERY)
def test_an_expression_is_loaded_or_refused_as_too_large(target: str) -> None:
    refused = 0
    for count in (100, 1000, 3000):
        expression = " or ".join(f"ether[{index % 1400}] = {index % 250}" for index in range(count))
        try:
            spec = kbpf.compile_ebpf(expression, target)
        except kbpf.FilterError as error:
            assert "too large" in str(error)
            refused += 1
            continue
        with kbpf.load(spec, backend="kernel"):
            pass
    assert refused < 3


@pytest.mark.requires("kernel")
@pytest.mark.parametrize("target", EVERY)
def test_deep_arithmetic_loads(target: str) -> None:
    for expression in (
        "ip[" * 60 + "0" + "]" * 60 + " = 3",
        "".join(f"ip[{index}] + (" for index in range(60)) + "1" + ")" * 60 + " = 3",
        " + ".join(f"ip[ip[{index % 60}]]" for index in range(200)) + " > 5",
    ):
        compare(expression, target, list(frames(9, 20)), "kernel")


# On sockets


@pytest.mark.requires("kernel")
def test_metadata_comes_from_the_context() -> None:
    packet = bytes(12) + b"\x08\x00" + bytes(40)
    for target in ("socket_filter", "sched_cls"):
        for text, match in (("inbound", True), ("outbound", False), ("ifindex 1", True), ("ifindex 2", False)):
            with kbpf.load(kbpf.compile_ebpf(text, target), backend="kernel") as collection:
                assert collection.programs["filter"].run(packet).value == verdict(target, match), (target, text)


def received(sock: socket.socket) -> list[bytes]:
    sock.setblocking(False)
    packets = []
    while True:
        try:
            packets.append(sock.recv(1 << 17))
        except BlockingIOError:
            return packets


@pytest.mark.requires("kernel", "netns")
@pytest.mark.parametrize("kind", ("raw", "dgram"))
def test_packet_sockets_get_what_the_classic_filter_keeps(netns, kind: str) -> None:
    netns.run("ip", "link", "set", "lo", "up")
    expressions = ["tcp", "udp and len > 4000", "tcp[1000:4] = 0x41414141", "udp[9000:4] = 0x41414141 or less 60"]
    expressions += ["tcp[32:4] = 0x41414141", "outbound and tcp", "host 127.0.0.1 and ip[ip[0] & 0xf] > 0"]
    pairs = []
    for expression in expressions:
        socks = [netns.call(kbpf.packet_socket, "lo", type=kind, backend="kernel") for _ in range(2)]
        classic = kbpf.compile(expression, socket=socks[0])
        collection = kbpf.load(kbpf.compile_ebpf(expression, socket=socks[1]), backend="kernel")
        pairs.append((expression, socks, collection, classic))
        kbpf.attach(socks[0], classic)
        kbpf.attach(socks[1], collection.programs["filter"])
    # Large enough for their data to lie outside the linear part.
    with netns.socket(socket.AF_INET, socket.SOCK_DGRAM) as there, netns.socket(socket.AF_INET) as listener:
        there.bind(("127.0.0.1", 0))
        there.sendto(b"A" * 20000, there.getsockname())
        there.sendto(b"A", there.getsockname())
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with netns.socket(socket.AF_INET) as client:
            client.connect(listener.getsockname())
            client.sendall(b"A" * 30000)
            time.sleep(0.05)
    matched = {}
    for expression, socks, collection, _ in pairs:
        classic_got, ebpf_got = (received(sock) for sock in socks)
        assert classic_got == ebpf_got, expression
        matched[expression] = len(ebpf_got)
        for resource in (collection, *socks):
            resource.close()
    assert all(matched.values()), matched


@pytest.mark.requires("kernel")
def test_a_udp_socket_gets_what_it_asks_for() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.bind(("127.0.0.1", 0))
            text = f"udp src port {sender.getsockname()[1]} and src net 127.0.0.0/8 and udp[8] = 0x61"
            with (
                kbpf.load(kbpf.compile_ebpf(text, socket=sock), backend="kernel") as collection,
                collection.programs["filter"].attach(sock),
            ):
                for data in (b"b", b"a", b"", b"abc"):
                    sender.sendto(data, sock.getsockname())
                assert received(sock) == [b"a", b"abc"]


@pytest.mark.requires("kernel", "netns")
def test_tc_sees_bytes_outside_the_linear_part(netns) -> None:
    pin = f"/sys/fs/bpf/kbpf-test-{time.monotonic_ns()}"
    netns.run("ip", "link", "set", "lo", "up")
    # Unlike `ip netns exec`, this keeps the mounted file systems, and so the pin.
    tc = ["nsenter", f"--net=/run/netns/{netns.name}", "tc"]
    subprocess.run([*tc, "qdisc", "add", "dev", "lo", "clsact"], check=True)
    with kbpf.load(kbpf.compile_ebpf("udp[9000:4] = 0x41414141", "sched_cls"), backend="kernel") as collection:
        collection.programs["filter"].pin(pin)
        try:
            subprocess.run([*tc, "filter", "add", "dev", "lo", "ingress", "bpf", "da", "pinned", pin], check=True)
        finally:
            Path(pin).unlink()
    with netns.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        for data in (b"A" * 20000, b"B" * 20000, b"A"):
            sock.sendto(data, sock.getsockname())
        assert [data[:1] + str(len(data)).encode() for data in received(sock)] == [b"B20000", b"A1"]


def test_a_program_is_named_filter_and_holds_no_code_that_nothing_reaches() -> None:
    spec = kbpf.compile_ebpf("tcp port 80")
    assert list(spec.programs) == ["filter"]
    assert spec.programs["filter"].instructions[-1] == ebpf.Instruction(ebpf.JMP | ebpf.EXIT)


@pytest.mark.requires("kernel")
def test_devices_without_link_header_start_with_the_ip_header() -> None:
    # Under BPF_PROG_TEST_RUN a socket filter starts behind the Ethernet header, as on such a device.
    packets = [packet for packet in frames(13, 80) if packet[12:14] in (b"\x08\x00", b"\x86\xdd")]
    for expression in ("udp", "tcp port 80", "ip6", "host 10.0.0.1", "ip[ip[0] & 15] > 9", "len > 60", "not ip6"):
        classic = kbpf.compile(expression, link="RAW")
        for action in (None, (1, 2)):
            spec = kbpf.compile_ebpf(expression, "socket_filter", action, link="RAW")
            yes, no = action or (262144, 0)
            with kbpf.load(spec, backend="kernel") as collection:
                for packet in packets:
                    match = classic.run(packet[14:]) > 0
                    assert collection.programs["filter"].run(packet).value == (yes if match else no), expression
