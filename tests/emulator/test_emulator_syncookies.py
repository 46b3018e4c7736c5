"""SYN cookies. Each machine has a secret of its own: what is compared is what a cookie says, and what is refused."""

from __future__ import annotations

import itertools
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from mapcode import EXIT, call, copy, mov
from sides import Side
from socks import Scene, element, here, keep_result, tuple_of

from kbpf.emulator.clock import ManualClock
from kbpf.emulator.environment import environment
from kbpf.emulator.socket_table import ReuseportGroup
from kbpf.emulator.syncookies import SynCookies
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.specs import MapSpec, ProgramSpec
from kbpf.testing.network import NetworkNamespace

#: Where the TCP header lies in a map's value, behind the IP header.
TCP = 40
FIN, SYN, RST, ACK = 1, 2, 4, 16
MINUTE = 60 * 10**9
M32 = 0xFFFFFFFF


@pytest.fixture(autouse=True)
def machine() -> Iterator[None]:
    before = environment.clock, environment.syncookies, environment.tcp_syncookies, environment.sockets
    yield
    environment.clock, environment.syncookies, environment.tcp_syncookies, environment.sockets = before


def ip_header(version: int) -> bytes:
    if version == 4:
        return bytes.fromhex("4500002c0000400040060000c0000201c0000202")
    source, destination = (socket.inet_pton(socket.AF_INET6, f"2001:db8::{n}") for n in (1, 2))
    return bytes.fromhex("6000000000180640") + source + destination


def tcp_header(
    sequence: int = 0x11223344, acknowledged: int = 0, flags: int = SYN, options: bytes = b"", words: int | None = None
) -> bytes:
    words = 5 + len(options) // 4 if words is None else words
    return struct.pack(">HHIIBBHHH", 4711, 80, sequence, acknowledged, words << 4, flags, 1000, 0, 0) + options


def mss(size: int) -> bytes:
    return struct.pack(">BBH", 2, 4, size)


Asked = Callable[..., int]


def raw(side: Side, helper: str, size: int) -> tuple[Asked, Callable[[], None]]:
    """A program that calls the helper over what is in its map, and how to close it."""
    fd = side.backend.map_create(MapSpec(type="array", key_size=4, value_size=128, max_entries=1))
    program = [
        *element(0), *copy(6, 0),
        *copy(1, 6), *copy(2, 6), Instruction(ebpf.ALU64 | ebpf.ADD, 2, 0, 0, TCP), *mov(3, size), *call(helper),
        Instruction(ebpf.STX | ebpf.MEM | ebpf.DW, 6, 0, 120), *mov(0, 1), EXIT,
    ]  # fmt: skip
    loaded = side.backend.program_load(ProgramSpec(type="xdp", instructions=tuple(program)), [fd])

    def ask(ip: bytes, tcp: bytes) -> int:
        side.backend.map_update(fd, bytes(4), (ip.ljust(TCP, b"\0") + tcp).ljust(128, b"\0"))
        side.backend.program_run(loaded, bytes(64), b"")
        return int(struct.unpack("=q", side.backend.map_lookup(fd, bytes(4), 128)[120:])[0])

    def close() -> None:
        side.backend.close(loaded)
        side.backend.close(fd)

    return ask, close


@pytest.fixture
def asks() -> Iterator[Callable[..., Asked]]:
    closers: list[Callable[[], None]] = []

    def make(side: Side, helper: str, size: int = 20) -> Asked:
        ask, close = raw(side, helper, size)
        closers.append(close)
        return ask

    yield make
    for close in closers:
        close()


def answers(gen: Asked, check: Asked, version: int, options: bytes, words: int | None = None) -> list[int]:
    """What is said of a SYN, and of ACKs whose numbers are next to the right one."""
    ip = ip_header(version)
    made = gen(ip, tcp_header(options=options, words=words))
    said = [made if made < 0 else made >> 32]
    for distance in range(-5, 6) if made >= 0 else ():
        said.append(check(ip, tcp_header(0x11223345, made + 1 + distance & M32, ACK)))
    if made >= 0:
        good = tcp_header(0x11223345, made + 1 & M32, ACK)
        wrong = [bytes([*good[:at], good[at] ^ 1, *good[at + 1 :]]) for at in (0, 1, 2, 3, 4, 7, 12, 13, 16)]
        said += [check(ip, header) for header in wrong]
        addresses = range(12, 20) if version == 4 else range(8, 40)
        said += [check(bytes([*ip[:at], ip[at] ^ 1, *ip[at + 1 :]]), good) for at in range(len(ip))]
        assert [at for at in range(len(ip)) if said[at - len(ip)]] == list(addresses)
    return said


OPTIONS = [
    b"", *map(mss, (0, 1, 535, 536, 1219, 1220, 1299, 1300, 1419, 1420, 1439, 1440, 1459, 1460, 8939, 8940, 65535)),
    b"\1\1\1\1" + mss(1460), mss(1460) + mss(1300), mss(1460) + mss(0), b"\0\0\0\0" + mss(1460),
    b"\3\0\0\0" + mss(1460),
    b"\3\1\0\0" + mss(1460), b"\3\4\0\0" + mss(1460), b"\3\40\0\0" + mss(1460), b"\2\3\5\0", b"\2\5\5\264\0\0\0\0",
    b"\1\1\1\2", b"\1\1\2\4",
]  # fmt: skip


@pytest.mark.requires("kernel")
@pytest.mark.parametrize("version", (4, 6))
@pytest.mark.parametrize("options", OPTIONS, ids=bytes.hex)
def test_a_cookie_says_the_segment_size(
    kernel: Side, emulator: Side, asks: Callable[..., Asked], version: int, options: bytes
) -> None:
    said = []
    for side in (kernel, emulator):
        gen = asks(side, f"tcp_raw_gen_syncookie_ipv{version}", 20 + len(options))
        said.append(answers(gen, asks(side, f"tcp_raw_check_syncookie_ipv{version}"), version, options))
    assert said[1] == said[0]


@pytest.mark.requires("kernel")
@pytest.mark.parametrize("version", (4, 6))
@pytest.mark.parametrize("size", (1, 19, 20, 24, 60))
def test_the_header_must_be_as_long_as_it_says(
    kernel: Side, emulator: Side, asks: Callable[..., Asked], version: int, size: int
) -> None:
    gens = [asks(side, f"tcp_raw_gen_syncookie_ipv{version}", size) for side in (kernel, emulator)]
    for words in (0, 4, 5, 6, 15):
        header = tcp_header(words=words).ljust(60, b"\0")
        ours, theirs = (min(gen(ip_header(version), header), 0) for gen in gens)
        assert ours == theirs, words


def test_a_cookie_is_good_for_two_minutes(emulator: Side, asks: Callable[..., Asked]) -> None:
    environment.clock = clock = ManualClock(10 * MINUTE)
    gen, check = asks(emulator, "tcp_raw_gen_syncookie_ipv4"), asks(emulator, "tcp_raw_check_syncookie_ipv4")
    made = gen(ip_header(4), tcp_header())
    good = []
    for _ in range(4):
        good.append(check(ip_header(4), tcp_header(0x11223345, made + 1 & M32, ACK)))
        clock.advance(MINUTE)
    assert good == [0, 0, -13, -13]


def test_another_secret_makes_other_cookies() -> None:
    made = {SynCookies(bytes([n])).make(bytes(12), 5, 0, 7) for n in range(3)} | {SynCookies().make(bytes(12), 5, 0, 7)}
    assert len(made) == 4


# With a listener, whose address is before the headers.

IP_AT, TCP_AT, RESULT_AT, SIZE = 40, 80, 152, 160


def of_listener(side: Side, helper: str, ip_size: int, tcp_size: int, call_in: Callable[..., Any]) -> tuple[Asked, ...]:
    """A program that looks a socket up and calls the helper over the headers, and how to close it."""
    fd = side.backend.map_create(MapSpec(type="array", key_size=4, value_size=SIZE, max_entries=1))
    program = [
        *copy(9, 1), *element(0), *copy(7, 0),
        *copy(1, 9), *copy(2, 7), *mov(3, 12), *mov(4, -1), *mov(5, 0), *call("skc_lookup_tcp"),
        Instruction(ebpf.JMP | ebpf.JNE, 0, 0, 2), *mov(0, 0), EXIT,
        *copy(8, 0), *copy(1, 8),
        *copy(2, 7), Instruction(ebpf.ALU64 | ebpf.ADD, 2, 0, 0, IP_AT), *mov(3, ip_size),
        *copy(4, 7), Instruction(ebpf.ALU64 | ebpf.ADD, 4, 0, 0, TCP_AT), *mov(5, tcp_size), *call(helper),
        *keep_result(RESULT_AT), *copy(1, 8), *call("sk_release"), *mov(0, 1), EXIT,
    ]  # fmt: skip
    loaded = side.backend.program_load(ProgramSpec(type="xdp", instructions=tuple(program)), [fd])

    def ask(port: int, ip: bytes, tcp: bytes) -> int:
        given = tuple_of("127.0.0.1", 5, "127.0.0.1", port).ljust(IP_AT, b"\0") + ip.ljust(TCP_AT - IP_AT, b"\0") + tcp
        side.backend.map_update(fd, bytes(4), given.ljust(SIZE, b"\0"))
        assert call_in(side.backend.program_run, loaded, bytes(64), b"").value == 1
        return int(struct.unpack_from("=q", side.backend.map_lookup(fd, bytes(4), SIZE), RESULT_AT)[0])

    def close() -> int:
        side.backend.close(loaded)
        side.backend.close(fd)
        return 0

    return ask, close


@pytest.fixture(scope="module")
def namespace() -> Iterator[NetworkNamespace]:
    with NetworkNamespace() as made:
        yield made


PORTS = {"IPv4": 7001, "both": 7002, "shared": 7003, "connected": 7004}


@pytest.fixture
def scene(namespace: NetworkNamespace) -> Iterator[Scene]:
    """A listener of IPv4, one of both versions, one that shares its port, and a socket that does not listen."""
    with Scene(namespace, environment) as scene:
        for name, port in PORTS.items():
            family = socket.AF_INET6 if name == "both" else socket.AF_INET
            opened = scene.socket(family, socket.SOCK_STREAM)
            if name == "shared":
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            opened.bind(("::" if name == "both" else "127.0.0.1", port))
            if name == "connected":
                peer = scene.socket(socket.AF_INET, socket.SOCK_STREAM)
                peer.bind(("127.0.0.1", 5))
                peer.listen()
                opened.connect(("127.0.0.1", 5))
            else:
                opened.listen()
            sock = scene.listed(opened)
            if name == "shared":
                ReuseportGroup().add(sock)
        yield scene


def exchange(side: Side, call_in: Callable[..., Any], sizes: tuple[int, int]) -> list[tuple[Any, ...]]:
    """What is said of segments of many kinds: errors as they are, cookies as their segment size."""
    gen, close_gen = of_listener(side, "tcp_gen_syncookie", *sizes, call_in)
    check, close_check = of_listener(side, "tcp_check_syncookie", *sizes, call_in)
    said: list[tuple[Any, ...]] = []
    for (name, port), version in itertools.product(PORTS.items(), (4, 6, 5)):
        ip = ip_header(version) if version != 5 else b"\x55" + ip_header(4)[1:]
        for flags in (SYN, SYN | ACK, SYN | FIN, SYN | RST, ACK, 0):
            before = check(port, ip, tcp_header(flags=flags))
            said.append((name, version, flags, "before", before))
            for words in (sizes[1] // 4, 4):
                made = gen(port, ip, tcp_header(flags=flags, options=mss(1400), words=words))
                said.append((name, version, flags, words, made if made < 0 else made >> 32))
                if made >= 0:
                    acknowledged = [tcp_header(0x11223345, made + 1 + way & M32, ACK) for way in range(-4, 5)]
                    said.append(tuple(check(port, ip, tcp) for tcp in acknowledged))
    close_gen()
    close_check()
    return said


@pytest.mark.requires("kernel")
@pytest.mark.parametrize("sizes", ((20, 20), (20, 24), (40, 20), (40, 24), (19, 24), (39, 24), (40, 19)))
@pytest.mark.parametrize("sysctl", (0, 1, 2))
def test_listeners_make_and_check_cookies(
    kernel: Side, emulator: Side, namespace: NetworkNamespace, scene: Scene, sysctl: int, sizes: tuple[int, int]
) -> None:
    namespace.run("sysctl", "-q", f"net.ipv4.tcp_syncookies={sysctl}")
    environment.tcp_syncookies = sysctl
    truth = exchange(kernel, namespace.call, sizes)
    assert exchange(emulator, here, sizes) == truth
    made = [said for said in truth if len(said) == 5 and said[3] != "before" and said[4] > 0]
    assert bool(made) == (sysctl == 2 and sizes[0] >= 20 and sizes[1] >= 20)


def test_a_listener_forgets_its_cookies(emulator: Side, scene: Scene) -> None:
    environment.clock, environment.tcp_syncookies = (clock := ManualClock(10 * MINUTE)), 2
    gen, close_gen = of_listener(emulator, "tcp_gen_syncookie", 20, 20, here)
    check, close_check = of_listener(emulator, "tcp_check_syncookie", 20, 20, here)
    answers = []
    for port in (PORTS["IPv4"], PORTS["shared"]):
        made = gen(port, ip_header(4), tcp_header())
        answer = tcp_header(0x11223345, made + 1 & M32, ACK)
        answers.append(check(port, ip_header(4), answer))
        clock.advance(3 * MINUTE)
        answers.append(check(port, ip_header(4), answer))
    assert answers == [0, -2, 0, -2]
    close_gen()
    close_check()
