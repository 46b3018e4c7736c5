"""Raw IP sockets and netlink sockets of the emulated network: the same scenarios on the kernel's."""

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

RAW, USERSOCK, TEST = socket.SOCK_RAW, 2, 253
ADDRESSES = ["127.0.0.1", "::1"]


def family(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def settled(data: bytes) -> bytes:
    """Without what Linux leaves open: an IPv4 header's identification and checksum."""
    return data[:4] + data[6:10] + data[12:] if data[:1] == b"E" else data


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("kept", [0, 1, 20, 24, KEEP])
def test_a_filter_on_a_raw_socket(netns: NetworkNamespace, address: str, kept: int) -> None:
    def scenario(host: Host) -> Any:
        reader, sender = (host.open(family(address), RAW, TEST) for _ in range(2))
        host.attach(reader, returns(kept))
        sent = [sender.sendto(data, (address, 0)) for data in (b"0123456789", b"", b"x")]
        return sent, [settled(data) for data in received(reader)], drops(reader), host.backend.socket_layout(reader)

    same_on_both(netns, scenario)


LOADS = {
    **{f"byte {k}": (cbpf.B, k) for k in (0, 1, 8, 9, 12, 19, 20, 22)},
    **{f"network {k}": (cbpf.B, NET + k) for k in (0, 6, 9, 20, 40)},
    **{f"link {k}": (cbpf.B, LL + k) for k in (0, 12, 13)},
    **{f"ancillary {k}": (cbpf.W, AD + k) for k in (0, 4, 8, 20, 28, 52)},
}


@pytest.mark.parametrize("address", ADDRESSES)
def test_what_a_filter_on_a_raw_socket_sees(netns: NetworkNamespace, address: str) -> None:
    def scenario(host: Host) -> Any:
        reader, sender = (host.open(family(address), RAW, TEST) for _ in range(2))
        seen = {}
        for name, (size, at) in LOADS.items():
            load = [cbpf.stmt(cbpf.LD | size | cbpf.ABS, at), cbpf.stmt(cbpf.ALU | cbpf.AND | cbpf.K, 63)]
            host.attach(reader, [*load, cbpf.stmt(cbpf.ALU | cbpf.ADD | cbpf.K, 1), cbpf.stmt(cbpf.RET | cbpf.A)])
            sender.sendto(bytes(range(50)), (address, 0))
            seen[name] = [len(data) for data in received(reader)]
        return seen

    same_on_both(netns, scenario)


@pytest.mark.parametrize("address", ADDRESSES)
def test_raw_sockets_hear_what_they_are_bound_to(netns: NetworkNamespace, address: str) -> None:
    other = "127.0.0.2" if address == "127.0.0.1" else "2001:db8::1"

    def scenario(host: Host) -> Any:
        one, two, sender = (host.open(family(address), RAW, TEST) for _ in range(3))
        found: list[Any] = [one.getsockname(), outcome(one.getpeername), outcome(sender.send, b"x")]
        one.bind((address, 77))
        found.append(one.getsockname())
        found.append(outcome(two.bind, (other, 0)))
        sender.connect((address, 77))
        found += [sender.getpeername(), sender.getsockname(), sender.send(b"heard")]
        found += [[settled(data) for data in received(end)] for end in (one, two, sender)]
        found += [outcome(sender.sendto, b"x", (address, 5)), outcome(sender.sendto, bytes(70000), (address, 0))]
        udp = host.open(family(address), RAW, socket.IPPROTO_UDP)
        icmp = host.open(family(address), RAW, 1 if address == "127.0.0.1" else 58)
        host.open(family(address)).sendto(b"nobody", (address, 9))
        for end, at in (udp, 22), (icmp, 20):
            data, where = end.recvfrom(200)
            found.append((len(data), data[at : at + 2], where[0]))
        return found

    same_on_both(netns, scenario)


def test_pings(netns: NetworkNamespace) -> None:
    def scenario(host: Host) -> Any:
        end = host.open(socket.AF_INET6, RAW, 58)
        end.sendto(b"\x80\0\0\0\0\1\0\2ping", ("::1", 0))
        return sorted(end.recv(100) for _ in range(2))

    found = same_on_both(netns, scenario)
    assert [data[0] for data in found] == [128, 129]


@pytest.mark.parametrize("size", [1, 300, 2000, 30000])
def test_what_fits_into_the_buffer_of_a_raw_socket(netns: NetworkNamespace, size: int) -> None:
    def scenario(host: Host) -> Any:
        reader, sender = (host.open(socket.AF_INET, RAW, TEST) for _ in range(2))
        reader.setsockopt(socket.SOL_SOCKET, SO_RCVBUF, 5000)
        for _ in range(30):
            sender.sendto(bytes(size), ("127.0.0.1", 0))
        memory = struct.unpack("=9I", reader.getsockopt(socket.SOL_SOCKET, 55, 36))
        return memory[0], memory[8], len(received(reader))

    same_on_both(netns, scenario)


@pytest.mark.parametrize("kept", [0, 7, 16, KEEP])
def test_a_filter_on_a_netlink_socket(netns: NetworkNamespace, kept: int) -> None:
    def scenario(host: Host) -> Any:
        reader, sender = (host.open(socket.AF_NETLINK, RAW, USERSOCK) for _ in range(2))
        reader.bind((4711, 1))
        sender.bind((4712, 0))
        host.attach(reader, returns(kept))
        sent = [sender.sendto(bytes(range(24)), (4711, 0)), outcome(sender.sendto, bytes(range(24)), (0, 1))]
        reader.setblocking(False)
        read = [outcome(reader.recvfrom, 100) for _ in range(3)]
        return sent, read, host.backend.socket_layout(reader), drops(reader)

    same_on_both(netns, scenario)


def test_netlink_addresses(netns: NetworkNamespace) -> None:
    def scenario(host: Host) -> Any:
        one, two = (host.open(socket.AF_NETLINK, RAW, USERSOCK) for _ in range(2))
        found: list[Any] = [one.getsockname(), one.getpeername(), outcome(one.sendto, b"x", (4799, 0))]
        three = host.open(socket.AF_NETLINK, RAW, USERSOCK)
        three.bind((4711, 2))
        found += [three.getsockname(), outcome(two.bind, (4711, 0)), outcome(three.bind, (4712, 0))]
        two.bind((4712, 0))
        two.connect((4711, 0))
        found += [two.getpeername(), two.send(b"12"), three.recvfrom(10), outcome(two.send, bytes(300000))]
        three.close()
        return [*found, outcome(two.send, b"12")]

    same_on_both(netns, scenario)


@pytest.mark.parametrize(
    "at", [(cbpf.B, 3), (cbpf.B, NET + 3), (cbpf.B, LL), (cbpf.W, AD), (cbpf.W, AD + 8), (cbpf.B, 24)]
)
def test_what_a_filter_on_a_netlink_socket_sees(netns: NetworkNamespace, at: tuple[int, int]) -> None:
    def scenario(host: Host) -> Any:
        reader, sender = (host.open(socket.AF_NETLINK, RAW, USERSOCK) for _ in range(2))
        reader.bind((4711, 0))
        load = cbpf.stmt(cbpf.LD | at[0] | cbpf.ABS, at[1])
        host.attach(reader, [load, cbpf.stmt(cbpf.ALU | cbpf.ADD | cbpf.K, 1), cbpf.stmt(cbpf.RET | cbpf.A)])
        sender.sendto(bytes(range(24)), (4711, 0))
        return [len(data) for data in received(reader)]

    same_on_both(netns, scenario)
