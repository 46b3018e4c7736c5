"""bpf_redirect_neigh on the emulated network and on Linux: the link header of the next hop."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from mapcode import EXIT, Code, call, copy, mov
from networld import FRAME, INDEX, METADATA, I, Machine, compare, machines, watch

from kbpf.emulator.environment import environment
from kbpf.emulator.routes import Route
from kbpf.isa import ebpf

pytestmark = [pytest.mark.requires("kernel"), pytest.mark.requires("netns")]


@pytest.fixture(scope="module")
def both() -> Iterator[tuple[Machine, Machine]]:
    with machines() as made:
        yield made


def _neighbour(address: str | None) -> Code:
    """bpf_redirect_neigh to w0; `address` is the next hop, if it is not to be the route's."""
    if address is None:
        return [*mov(1, INDEX["w0"]), *mov(2, 0), *mov(3, 0), *mov(4, 0), *call("redirect_neigh"), EXIT]
    hop = ipaddress.ip_address(address)
    words = struct.unpack("=5i", struct.pack("=I", 2 if hop.version == 4 else 10) + hop.packed.ljust(16, b"\0"))
    code = [I(ebpf.ST | ebpf.MEM | ebpf.W, ebpf.FP, 0, -20 + 4 * at, word) for at, word in enumerate(words)]
    code += [*mov(1, INDEX["w0"]), *copy(2, ebpf.FP), I(ebpf.ALU64 | ebpf.ADD, 2, 0, 0, -20)]
    return [*code, *mov(3, 20), *mov(4, 0), *call("redirect_neigh"), EXIT]


NOWHERE = ("2001:db8:3::1", "2001:db8:4::1")
LINKS = {
    "198.51.100.8": "02:00:00:00:00:08",
    "198.51.100.9": "02:00:00:00:00:09",
    # Behind a blackhole.
    "203.0.114.1": "02:00:00:00:00:0a",
    "2001:db8::8": "02:00:00:00:06:08",
    "2001:db8::9": "02:00:00:00:06:09",
}


@pytest.fixture
def neighbourhood(both: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Next hops behind w0, and a network behind one of them, of either version."""
    hops = {ip: bytes.fromhex(mac.replace(":", "")) for ip, mac in LINKS.items()}
    behind = {"203.0.113.0/24": "198.51.100.9", "2001:db8:1::/64": "2001:db8::9"}
    on_link = ("198.51.100.0/24", "2001:db8::/64")
    routes = [Route(to=to, device=INDEX["w0"]) for to in on_link]
    routes += [Route(to=to, device=INDEX["w0"], via=via) for to, via in behind.items()]
    nowhere = ("203.0.114.0/24", "2001:db8:3::/64")
    routes += [Route(to=to, kind="blackhole") for to in nowhere]
    monkeypatch.setattr(environment, "routes", routes)
    monkeypatch.setattr(environment, "neighbours", hops)
    run = both[0].namespace.run
    run("sysctl", "-qw", "net.ipv6.conf.w0.addr_gen_mode=1", "net.ipv6.conf.w0.disable_ipv6=0")
    # An IPv6 address of its own would have w0 send reports of its groups.
    commands = ["ip address replace 198.51.100.1/24 dev w0", "ip route replace 2001:db8::/64 dev w0"]
    commands += [f"ip route replace {to} via {via} dev w0" for to, via in behind.items()]
    commands += [f"ip route replace blackhole {to}" for to in nowhere]
    commands += [f"ip neighbour replace {ip} lladdr {mac} dev w0 nud permanent" for ip, mac in LINKS.items()]
    try:
        for command in commands:
            run(*command.split())
        yield
    finally:
        run("sysctl", "-qw", "net.ipv6.conf.w0.disable_ipv6=1")
        run("ip", "address", "flush", "dev", "w0")


@pytest.mark.parametrize(
    ("destination", "hop"),
    [
        (destination, hop)
        for destinations, hops in (
            (("198.51.100.8", "198.51.100.9", "203.0.113.1", "203.0.114.1"), (None, "198.51.100.9", "2001:db8::9")),
            (
                ("2001:db8::8", "2001:db8::9", "2001:db8:1::1", "2001:db8:3::1", "2001:db8:4::1"),
                (None, "2001:db8::9", "198.51.100.9"),
            ),
        )
        for destination in destinations
        for hop in hops
    ],
)
@pytest.mark.parametrize(("device", "place"), [("v0", "tcx_egress"), ("v1", "tcx_ingress")])
@pytest.mark.usefixtures("neighbourhood")
def test_packets_that_get_the_link_header_of_the_next_hop(
    both: Any, device: str, place: str, destination: str, hop: str | None
) -> None:
    to = ipaddress.ip_address(destination)
    if to.version == 4:
        frame = FRAME[:30] + to.packed + FRAME[34:]
    else:
        source = ipaddress.ip_address("2001:db8:2::1").packed
        frame = FRAME[:12] + b"\x86\xdd" + bytes.fromhex("6000000000081140") + source + to.packed + bytes(8)

    def setup(machine: Machine) -> None:
        machine.hook(device, place, [*METADATA, *_neighbour(hop)], 1)
        watch(machine)

    # What packet sockets have queued at ingress, Linux overwrites: the bytes are the same memory.
    found = compare(both, setup, frame=frame, mark=3, listen=("w0", "w1"))
    assert found.received["w1"] or hop == "198.51.100.9" or (hop is None and destination in NOWHERE)
