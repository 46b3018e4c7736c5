"""UNIX sockets of the emulated network: the same scenarios on the kernel's."""

from __future__ import annotations

import socket
import struct
from typing import Any

import pytest
from hosts import AD, KEEP, LL, NET, Host, drops, outcome, received, returns, same_on_both

from kbpf.isa import cbpf
from kbpf.testing.network import NetworkNamespace

pytestmark = pytest.mark.requires("kernel", "netns")

DGRAM, SEQPACKET, STREAM = socket.SOCK_DGRAM, socket.SOCK_SEQPACKET, socket.SOCK_STREAM
MESSAGES = [DGRAM, SEQPACKET]
ALL = [*MESSAGES, STREAM]


def under_way(target: Any) -> int:
    return int(struct.unpack("=9I", target.getsockopt(socket.SOL_SOCKET, 55, 36))[2])


@pytest.mark.parametrize("type", MESSAGES)
@pytest.mark.parametrize("kept", [0, 1, 4, 8, 0x80000000, KEEP])
def test_a_filter_cuts_and_drops(netns: NetworkNamespace, type: int, kept: int) -> None:
    def scenario(host: Host) -> Any:
        one, other = host.pair(type)
        host.attach(one, returns(kept))
        sent = [other.send(data) for data in (b"abcdefgh", b"", b"x")]
        return sent, under_way(other), received(one), under_way(other), drops(one)

    same_on_both(netns, scenario)


LOADS = {
    "first": (cbpf.B, 0),
    "last": (cbpf.B, 7),
    "past the end": (cbpf.B, 8),
    "network": (cbpf.B, NET + 1),
    "before the network": (cbpf.B, NET - 1),
    "link": (cbpf.B, LL),
    **{f"ancillary {k}": (cbpf.W, AD + k) for k in (0, 4, 8, 20, 24, 28, 32, 44, 48, 52, 60)},
}


@pytest.mark.parametrize("type", MESSAGES)
def test_what_a_filter_sees(netns: NetworkNamespace, type: int) -> None:
    def scenario(host: Host) -> Any:
        one, other = host.pair(type)
        seen = {}
        for name, (size, at) in LOADS.items():
            host.attach(
                one,
                [
                    cbpf.stmt(cbpf.LD | size | cbpf.ABS, at),
                    cbpf.stmt(cbpf.ALU | cbpf.ADD | cbpf.K, 1),
                    cbpf.stmt(cbpf.RET | cbpf.A),
                ],
            )
            other.send(bytes(range(8)))
            seen[name] = received(one)
        return seen

    found = same_on_both(netns, scenario)
    assert found["last"] == [bytes(range(8))] and found["link"] == []


def test_a_stream_never_runs_its_filter(netns: NetworkNamespace) -> None:
    def scenario(host: Host) -> Any:
        one, other = host.pair(STREAM)
        host.attach(one, returns(0))
        other.send(b"data")
        read = one.recv(10)
        host.backend.socket_detach(one)
        return read, outcome(host.backend.socket_layout, one), host.backend.socket_drainable(one)

    same_on_both(netns, scenario)


@pytest.mark.parametrize("type", ALL)
@pytest.mark.parametrize("size", [1, 192, 193, 1000, 4000, 9000, 17000, 50000, 200000])
def test_what_is_under_way(netns: NetworkNamespace, type: int, size: int) -> None:
    def scenario(host: Host) -> Any:
        one, other = host.pair(type)
        other.setblocking(False)
        found = [other.send(bytes(size)), under_way(other)]
        sent = 0
        for _ in range(400):
            if outcome(other.send, bytes(size)) == "EAGAIN":
                break
            sent += 1
        found += [sent, under_way(other)]
        one.recv(min(size, 1000))
        return [*found, under_way(other), outcome(other.send, bytes(300000 if type != STREAM else 1))]

    same_on_both(netns, scenario)


@pytest.mark.parametrize("type", ALL)
@pytest.mark.parametrize("unread", [False, True])
@pytest.mark.parametrize("sent", [False, True])
def test_the_other_end_closes(netns: NetworkNamespace, type: int, unread: bool, sent: bool) -> None:
    def scenario(host: Host) -> Any:
        one, other = host.pair(type)
        if sent:
            other.send(b"last words")
        if unread:
            one.send(b"unread")
        other.close()
        one.setblocking(False)
        actions = [(one.recv, 20), (one.recv, 20), (one.recv, 20), (one.send, b"x"), (one.send, b"x")]
        return [outcome(*action) for action in actions], outcome(one.getpeername), outcome(other.recv, 1)

    same_on_both(netns, scenario)


@pytest.mark.parametrize("type", ALL)
@pytest.mark.parametrize("how", [socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR, 7])
def test_shutdown(netns: NetworkNamespace, type: int, how: int) -> None:
    def scenario(host: Host) -> Any:
        one, other = host.pair(type)
        one.setblocking(False)
        other.setblocking(False)
        other.bind(b"\0kbpf-other")
        other.send(b"before")
        found = [outcome(one.shutdown, how)]
        for end in (one, other):
            found += [outcome(end.send, b"after"), outcome(end.recvfrom, 10), outcome(end.recv, 10)]
        return found

    same_on_both(netns, scenario)


def test_datagrams_go_to_names(netns: NetworkNamespace) -> None:
    def scenario(host: Host) -> Any:
        server, client, third = (host.open(socket.AF_UNIX, DGRAM) for _ in range(3))
        found: list[Any] = [outcome(client.send, b"x"), outcome(client.sendto, b"x", b"\0kbpf-nobody")]
        found += [outcome(client.sendto, b"x", "/nonexistent/kbpf"), server.getsockname(), outcome(server.getpeername)]
        server.bind(b"\0kbpf-server")
        found += [server.getsockname(), outcome(third.bind, b"\0kbpf-server"), outcome(server.bind, b"\0kbpf-other")]
        client.sendto(b"anonymous", b"\0kbpf-server")
        client.bind(b"\0kbpf-client")
        client.sendto(b"named", b"\0kbpf-server")
        found += [server.recvfrom(20), server.recvfrom(20)]
        client.connect(b"\0kbpf-server")
        found += [client.send(b"connected"), client.getpeername(), server.recvfrom(20)]
        server.connect(b"\0kbpf-client")
        found += [outcome(third.sendto, b"x", b"\0kbpf-server"), outcome(third.connect, b"\0kbpf-server")]
        third.bind("")
        found.append(len(third.getsockname()))
        return found

    same_on_both(netns, scenario)


@pytest.mark.parametrize("wait", [False, True])
def test_how_many_datagrams_wait(netns: NetworkNamespace, wait: bool) -> None:
    def scenario(host: Host) -> Any:
        server, client = (host.open(socket.AF_UNIX, DGRAM) for _ in range(2))
        server.bind(b"\0kbpf-server")
        client.settimeout(0.05 if wait else 0)
        found = [outcome(client.sendto, b"x", b"\0kbpf-server") for _ in range(13)]
        return found, len(received(server))

    same_on_both(netns, scenario)


@pytest.mark.parametrize("type", [SEQPACKET, STREAM])
def test_connections(netns: NetworkNamespace, type: int) -> None:
    def scenario(host: Host) -> Any:
        listener = host.open(socket.AF_UNIX, type)
        fresh = host.open(socket.AF_UNIX, type)
        fresh.setblocking(False)
        found = [outcome(action, *given) for action, *given in (
            (fresh.recv, 1), (fresh.send, b"x"), (fresh.listen,), (fresh.accept,), (fresh.connect, b"\0kbpf-server"),
        )]  # fmt: skip
        listener.bind(b"\0kbpf-server")
        found.append(outcome(fresh.connect, b"\0kbpf-server"))
        listener.listen(1)
        listener.setblocking(False)
        found.append(outcome(listener.accept))
        clients = [host.open(socket.AF_UNIX, type) for _ in range(4)]
        for client in clients:
            client.setblocking(False)
            found.append(outcome(client.connect, b"\0kbpf-server"))
        clients[0].send(b"early")
        accepted, name = listener.accept()
        host.keep(accepted)
        found += [name, accepted.getsockname(), accepted.getpeername(), clients[0].getpeername(), accepted.recv(10)]
        accepted.send(b"answer")
        found += [
            clients[0].recv(10),
            outcome(clients[0].connect, b"\0kbpf-server"),
            outcome(clients[2].connect, b"\0kbpf-server"),
        ]
        found += [outcome(host.open(socket.AF_UNIX, other).connect, b"\0kbpf-server") for other in ALL if other != type]
        found += [outcome(clients[0].sendto, b"x", b"\0kbpf-server"), outcome(fresh.sendto, b"x", b"\0kbpf-server")]
        listener.close()
        found += [outcome(client.recv, 10) for client in clients] + [outcome(clients[1].send, b"x")]
        return found

    same_on_both(netns, scenario)


def test_streams_have_no_bounds(netns: NetworkNamespace) -> None:
    def scenario(host: Host) -> Any:
        one, other = host.pair(STREAM)
        other.sendall(b"0123")
        other.sendall(b"456789")
        buffer, parts = bytearray(4), [bytearray(1), bytearray(2)]
        found = [
            one.recv(3),
            one.recv(3, socket.MSG_PEEK),
            one.recv_into(buffer, 2),
            buffer,
            one.recvmsg_into(parts),
            parts,
        ]
        found += [one.recvfrom(1), one.recvmsg(1)]
        other.sendall(b"tail")
        other.close()
        return [*found, one.recv(100, socket.MSG_WAITALL), one.recv(1), one.recv(1)]

    same_on_both(netns, scenario)
