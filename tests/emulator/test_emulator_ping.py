"""Ping sockets of the emulated network: the same scenarios on the kernel's."""

from __future__ import annotations

import socket
import struct
from typing import Any

import pytest
from hosts import AD, KEEP, LL, NET, Host, drops, outcome, received, returns, same_on_both

from kbpf.isa import cbpf
from kbpf.testing.network import NetworkNamespace
from kbpf.uapi.constants import SO_RCVBUF

pytestmark = pytest.mark.requires("kernel", "netns")

ADDRESSES = ["127.0.0.1", "::1"]


@pytest.fixture(autouse=True)
def allowed(netns: NetworkNamespace) -> None:
    netns.run("sysctl", "-qw", "net.ipv4.ping_group_range=0 2147483647")


def ping(host: Host, address: str) -> Any:
    if ":" in address:
        return host.open(socket.AF_INET6, socket.SOCK_DGRAM, socket.IPPROTO_ICMPV6)
    return host.open(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)


def request(address: str, data: bytes = b"data", ident: int = 0x1234) -> bytes:
    return struct.pack("!BBHHH", 128 if ":" in address else 8, 0, 0, ident, 1) + data


@pytest.mark.parametrize("address", ADDRESSES)
def test_replies_come_to_who_asked(netns: NetworkNamespace, address: str) -> None:
    def scenario(host: Host) -> Any:
        one, other = ping(host, address), ping(host, address)
        found: list[Any] = [one.getsockname(), host.backend.socket_layout(one)]
        other.bind(("", 78))
        one.bind((address, 77))
        found += [
            one.getsockname(),
            outcome(one.bind, (address, 79)),
            one.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR),
        ]
        for end in (one, other):
            found.append(end.sendto(request(address), (address, 5)))
            found.append([received(one), received(other)])
        last = ping(host, address)
        last.bind((address, 77))
        one.sendto(request(address), (address, 0))
        found += [received(one), received(last)]
        other.connect((address, 9))
        found += [other.getpeername(), other.getsockname(), other.send(request(address, b"")), received(other)]
        return found

    same_on_both(netns, scenario)


@pytest.mark.parametrize("address", ADDRESSES)
def test_only_requests_are_sent(netns: NetworkNamespace, address: str) -> None:
    def scenario(host: Host) -> Any:
        end, good = ping(host, address), request(address)
        bad = [b"", good[:7], b"\0" + good[1:], b"\x03" + good[1:], good[:1] + b"\1" + good[2:], good + bytes(70000)]
        found = [outcome(end.sendto, data, (address, 0)) for data in bad]
        found += [outcome(end.send, good), outcome(end.getpeername)]
        free = end.sendto(good[:8], (address, 0)), end.getsockname()[1] > 0
        return found, free, received(end)[0][:2]

    same_on_both(netns, scenario)


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("kept", [0, 1, 8, 11, KEEP])
def test_a_filter_on_a_ping_socket(netns: NetworkNamespace, address: str, kept: int) -> None:
    def scenario(host: Host) -> Any:
        end = ping(host, address)
        end.bind((address, 77))
        host.attach(end, returns(kept))
        end.sendto(request(address), (address, 0))
        return received(end), drops(end)

    same_on_both(netns, scenario)


LOADS = {
    **{f"byte {k}": (cbpf.B, k) for k in (0, 1, 5, 8, 12)},
    **{f"network {k}": (cbpf.B, NET + k) for k in (0, 6, 9, 20, 40)},
    **{f"link {k}": (cbpf.B, LL + k) for k in (0, 12, 13)},
    **{f"ancillary {k}": (cbpf.W, AD + k) for k in (0, 4, 8, 20, 28, 52)},
}


@pytest.mark.parametrize("address", ADDRESSES)
def test_what_a_filter_on_a_ping_socket_sees(netns: NetworkNamespace, address: str) -> None:
    def scenario(host: Host) -> Any:
        end = ping(host, address)
        end.bind((address, 77))
        seen = {}
        for name, (size, at) in LOADS.items():
            load = [cbpf.stmt(cbpf.LD | size | cbpf.ABS, at), cbpf.stmt(cbpf.ALU | cbpf.AND | cbpf.K, 63)]
            host.attach(end, [*load, cbpf.stmt(cbpf.ALU | cbpf.ADD | cbpf.K, 1), cbpf.stmt(cbpf.RET | cbpf.A)])
            end.sendto(request(address, bytes(60)), (address, 0))
            seen[name] = [len(data) for data in received(end)]
        return seen

    same_on_both(netns, scenario)


@pytest.mark.parametrize("size", [0, 300, 2000])
def test_what_fits_into_the_buffer_of_a_ping_socket(netns: NetworkNamespace, size: int) -> None:
    def scenario(host: Host) -> Any:
        end = ping(host, "127.0.0.1")
        end.setsockopt(socket.SOL_SOCKET, SO_RCVBUF, 5000)
        for _ in range(30):
            end.sendto(request("127.0.0.1", bytes(size)), ("127.0.0.1", 0))
        memory = struct.unpack("=9I", end.getsockopt(socket.SOL_SOCKET, 55, 36))
        return memory[0], memory[8], len(received(end))

    same_on_both(netns, scenario)
