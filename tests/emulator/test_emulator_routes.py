"""Where packets go: bpf_fib_lookup and bpf_check_mtu over devices, routes and neighbours, against the kernel's."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from sides import FRAME, Side

from kbpf.emulator import network
from kbpf.emulator.environment import environment
from kbpf.emulator.routes import Route
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction, ld_imm64
from kbpf.specs import MapSpec, ProgramSpec
from kbpf.testing.network import NetworkNamespace
from kbpf.uapi.enums import HELPERS

pytestmark = [pytest.mark.requires("kernel"), pytest.mark.requires("netns")]

I = Instruction  # noqa: E741
MAC, NEIGHBOUR = bytes.fromhex("020000000002"), bytes.fromhex("020000000009")
INDEX = 7


@pytest.fixture(scope="module")
def namespace() -> Iterator[NetworkNamespace]:
    """One device that forwards, with routes, and a neighbour behind it."""
    with NetworkNamespace() as made:
        for command in (
            "ip link add dev fib0 index 7 address 02:00:00:00:00:02 mtu 1400 type veth peer name fib1",
            "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv6.conf.fib0.accept_dad=0",
            "sysctl -qw net.ipv4.conf.lo.forwarding=0 net.ipv6.conf.lo.forwarding=0",
            "ip link set lo up",
            "ip link set fib1 up",
            "ip link set fib0 up",
            "ip address add 192.0.2.1/24 dev fib0",
            "ip -6 address add 2001:db8::1/64 dev fib0 nodad",
            "ip route add 198.51.100.0/24 via 192.0.2.9 metric 5",
            "ip route add 198.51.100.128/25 via 192.0.2.10",
            "ip route add blackhole 203.0.113.0/26",
            "ip route add unreachable 203.0.113.64/26",
            "ip route add prohibit 203.0.113.128/26",
            "ip -6 route add 2001:db8:1::/48 via 2001:db8::9 metric 5",
            "ip neighbour add 192.0.2.9 lladdr 02:00:00:00:00:09 dev fib0 nud permanent",
            "ip -6 neighbour add 2001:db8::9 lladdr 02:00:00:00:00:09 dev fib0 nud permanent",
        ):
            made.run(*command.split())
        yield made


@pytest.fixture(autouse=True)
def emulated_network() -> Iterator[None]:
    before = environment.routes, environment.neighbours
    network.reset()
    device = network.add_interface("fib0", index=INDEX, mtu=1400, address=MAC)
    device.forwards = device.forwards6 = True
    for address in ("192.0.2.1/24", "2001:db8::1/64"):
        network.add_address("fib0", address)
    environment.routes = [
        Route(to="198.51.100.0/24", device=INDEX, via="192.0.2.9", metric=5, source="192.0.2.1"),
        Route(to="198.51.100.128/25", device=INDEX, via="192.0.2.10", source="192.0.2.1"),
        Route(to="203.0.113.0/26", kind="blackhole"),
        Route(to="203.0.113.64/26", kind="unreachable"),
        Route(to="203.0.113.128/26", kind="prohibit"),
        Route(to="2001:db8:1::/48", device=INDEX, via="2001:db8::9", metric=5, source="2001:db8::1"),
    ]
    environment.neighbours = {"192.0.2.9": NEIGHBOUR, "2001:db8::9": NEIGHBOUR}
    yield
    environment.routes, environment.neighbours = before
    network.reset()


def ask(side: Side, type: str, name: str, question: bytes, *numbers: tuple[int, int]) -> Any:
    """Call a helper with the context, the question in a map's value and numbers in registers; its result and answer."""
    fd = side.backend.map_create(MapSpec(type="array", key_size=4, value_size=64, max_entries=1))
    try:
        side.backend.map_update(fd, bytes(4), question.ljust(64, b"\0"))
        pointer = 2 if name == "fib_lookup" else 3
        program = (
            *ld_imm64(pointer, fd, ebpf.PSEUDO_MAP_VALUE),
            *(I(ebpf.ALU64 | ebpf.MOV, register, 0, 0, value) for register, value in numbers),
            I(ebpf.JMP | ebpf.CALL, 0, 0, 0, HELPERS[name]),
            I(ebpf.JMP | ebpf.EXIT),
        )
        loaded = side.backend.program_load(ProgramSpec(type=type, instructions=program), [fd])
        value = side.backend.program_run(loaded, FRAME, b"").value
        side.backend.close(loaded)
        return value, side.backend.map_lookup(fd, bytes(4), 64)
    finally:
        side.backend.close(fd)


def question(to: str, index: int = INDEX, length: int = 0, family: int = 0) -> bytes:
    address = ipaddress.ip_address(to)
    family = family or (2 if address.version == 4 else 10)
    source = ipaddress.ip_address("192.0.2.77" if address.version == 4 else "2001:db8::77")
    return (
        struct.pack("=BBHHHII", family, 6, 0, 0, length, index, 0)[:16]
        + source.packed.ljust(16, b"\0")
        + address.packed.ljust(16, b"\0")
        + bytes(16)
    )


@pytest.mark.parametrize("type", ("xdp", "sched_cls"))
@pytest.mark.parametrize(
    "to",
    [
        "192.0.2.9", "192.0.2.55", "192.0.2.1", "192.0.2.255", "127.0.0.1", "127.9.9.9", "255.255.255.255",
        "198.51.100.3", "198.51.100.200", "203.0.113.1", "203.0.113.65", "203.0.113.129", "8.8.8.8",
        "2001:db8::9", "2001:db8::55", "2001:db8::1", "::1", "2001:db8:1::5", "2001:db8:ffff::1", "fe80::1",
    ],
)  # fmt: skip
def test_routes(kernel: Side, emulator: Side, namespace: NetworkNamespace, type: str, to: str) -> None:
    for flags in (0, 1, 2, 4, 5, 16, 20, 64):
        for length in (0, 1400, 1401):
            given = type, "fib_lookup", question(to, length=length), (3, 64), (4, flags)
            assert ask(emulator, *given) == namespace.call(ask, kernel, *given), (flags, length)


@pytest.mark.parametrize("type", ("xdp", "sched_cls"))
def test_questions_that_are_refused(kernel: Side, emulator: Side, namespace: NetworkNamespace, type: str) -> None:
    for to, index, family, size in (
        ("192.0.2.9", 99, 0, 64), ("192.0.2.9", 1, 0, 64), ("192.0.2.9", INDEX, 3, 64), ("192.0.2.9", INDEX, 0, 60),
        ("2001:db8::9", 99, 0, 64), ("2001:db8::9", 1, 0, 64),
    ):  # fmt: skip
        given = type, "fib_lookup", question(to, index, family=family), (3, size), (4, 0)
        assert ask(emulator, *given) == namespace.call(ask, kernel, *given), (to, index, family, size)


@pytest.mark.parametrize("type", ("xdp", "sched_cls"))
@pytest.mark.parametrize("index", (0, 1, INDEX, 99))
def test_mtus(kernel: Side, emulator: Side, namespace: NetworkNamespace, type: str, index: int) -> None:
    for length in (0, 1400, 1401):
        for difference in (0, 1, -1, 1400, 70000):
            for flags in (0, 1, 2):
                given = type, "check_mtu", struct.pack("=I", length), (2, index), (4, difference), (5, flags)
                assert ask(emulator, *given) == namespace.call(ask, kernel, *given), (length, difference, flags)
