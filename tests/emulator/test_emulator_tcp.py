"""TCP sockets of the emulated network: the same scenarios on the kernel's."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from typing import Any

import pytest
from hosts import KEEP, LL, NET, Host, outcome, passes_if, returns, same_on_both

from kbpf.isa import cbpf, ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.specs import MapSpec
from kbpf.testing.network import NetworkNamespace
from kbpf.uapi.constants import SO_LOCK_FILTER, SO_MARK, SO_REUSEPORT

pytestmark = pytest.mark.requires("kernel", "netns")

STREAM = socket.SOCK_STREAM
FIN, SYN, RST, PSH, ACK = 0x01, 0x02, 0x04, 0x08, 0x10
#: Where the flags and the data are for a filter on a connection: a header with timestamps has 32 bytes.
FLAGS, DATA = 13, 32
SHORT = 0.4
ADDRESSES = [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("::", "127.0.0.1")]


def drops_flag(flag: int) -> list[cbpf.Instruction]:
    """Drop segments that have a flag."""
    return [
        cbpf.stmt(cbpf.LD | cbpf.B | cbpf.ABS, FLAGS),
        cbpf.jump(cbpf.JMP | cbpf.JSET | cbpf.K, flag, 0, 1),
        *returns(0),
        *returns(KEEP),
    ]


def drops_data() -> list[cbpf.Instruction]:
    """Drop segments that are longer than a header with timestamps."""
    return [
        cbpf.stmt(cbpf.LD | cbpf.W | cbpf.LEN),
        cbpf.jump(cbpf.JMP | cbpf.JGT | cbpf.K, DATA, 0, 1),
        *returns(0),
        *returns(KEEP),
    ]


def family(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def listener(host: Host, address: str = "127.0.0.1", port: int = 7000, backlog: int = 5) -> Any:
    made = host.open(family(address), STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind((address, port))
    made.listen(backlog)
    return made


def connected(host: Host, bound: str = "127.0.0.1", target: str = "127.0.0.1") -> tuple[Any, Any, Any]:
    """A client, its accepted connection, and the listener."""
    server = listener(host, bound)
    client = host.open(family(target), STREAM)
    client.connect((target, 7000))
    accepted, _ = server.accept()
    return client, host.keep(accepted), server


@pytest.mark.parametrize(("bound", "target"), ADDRESSES)
def test_a_connection_carries_data_both_ways(netns: NetworkNamespace, bound: str, target: str) -> None:
    def scenario(host: Host) -> Any:
        server = listener(host, bound)
        client = host.open(family(target), STREAM)
        client.bind((target, 7001))
        client.connect((target, 7000))
        accepted, address = server.accept()
        host.keep(accepted)
        found: list[Any] = [address, accepted.getsockname(), accepted.getpeername(), client.getpeername()]
        client.sendall(b"question")
        found.append(accepted.recv(100))
        accepted.sendall(b"answer")
        found.append(client.recvfrom(3))
        found.append(client.recv(100))
        client.shutdown(socket.SHUT_WR)
        found += [accepted.recv(10), accepted.recv(10), accepted.send(b"still"), client.recv(10)]
        accepted.close()
        found += [client.recv(10), outcome(client.send, b"x")]
        return found

    same_on_both(netns, scenario)


def test_much_data_arrives_whole(netns: NetworkNamespace) -> None:
    def scenario(host: Host) -> Any:
        client, accepted, _ = connected(host)
        data = bytes(range(256)) * 8000
        sender = threading.Thread(target=lambda: (client.sendall(data), client.shutdown(socket.SHUT_WR)))
        sender.start()
        parts = bytearray()
        while part := accepted.recv(1 << 20):
            parts += part
        sender.join()
        return parts == data

    assert same_on_both(netns, scenario)


def test_what_is_on_the_wire(netns: NetworkNamespace) -> None:
    def scenario(host: Host) -> Any:
        packets = host.packets()
        client, accepted, _ = connected(host)
        client.sendall(b"question")
        accepted.recv(100)
        client.close()
        accepted.recv(100)
        accepted.close()
        refused = host.open(socket.AF_INET, STREAM)
        outcome(refused.connect, ("127.0.0.1", 9))
        packets.settimeout(0.2)
        seen = []
        with contextlib.suppress(TimeoutError):
            while True:
                frame, (_, _, kind, *_) = packets.recvfrom(2000)
                tcp = frame[34:]
                if kind != 4:
                    continue
                size = tcp[12] >> 4 << 2
                ports = [port if port in (7000, 9) else 0 for port in struct.unpack_from("!HH", tcp)]
                options = tcp[20:size]
                kinds = (
                    bytes(b for at, b in enumerate(options) if at in (0, 1, 2, 3)) if tcp[FLAGS] & SYN else options[:4]
                )
                seen.append((ports, tcp[FLAGS], size, kinds, frame[14:16], frame[20:24], tcp[size:], tcp[18:20]))
        # When an ACK goes alone is left to Linux's timers, but for that of the handshake.
        return [one for at, one in enumerate(seen) if at < 3 or one[1] != ACK]

    found = same_on_both(netns, scenario)
    assert [flags for _, flags, *_ in found][:3] == [SYN, SYN | ACK, ACK]


def test_who_is_not_there_refuses(netns: NetworkNamespace) -> None:
    def scenario(host: Host) -> Any:
        found = []
        for address in ("127.0.0.1", "::1"):
            client = host.open(family(address), STREAM)
            found.append([outcome(client.connect, (address, 9)), outcome(client.getpeername)])
            found.append([outcome(client.send, b"x"), outcome(client.recv, 1)])
            client = host.open(family(address), STREAM)
            client.setblocking(False)
            found.append([outcome(client.connect, (address, 9)), client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)])
        return found

    same_on_both(netns, scenario)


def test_not_blocking(netns: NetworkNamespace) -> None:
    def scenario(host: Host) -> Any:
        server = listener(host)
        server.setblocking(False)
        client = host.open(socket.AF_INET, STREAM)
        client.setblocking(False)
        found = [outcome(server.accept), outcome(client.recv, 1), outcome(client.send, b"x")]
        found.append(outcome(client.connect, ("127.0.0.1", 7000)))
        found += [outcome(client.connect, ("127.0.0.1", 7000)) for _ in range(2)]
        accepted, _ = server.accept()
        host.keep(accepted).setblocking(False)
        found += [outcome(accepted.recv, 1), client.send(b"x"), accepted.recv(1), outcome(accepted.recv, 1)]
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                sent += client.send(bytes(100000))
        received = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                received += len(accepted.recv(1 << 20))
        return found, sent > 100000, received > 0

    same_on_both(netns, scenario)


def test_who_reads_no_more_gets_what_comes_until_the_connection_ends(netns: NetworkNamespace) -> None:
    def something(target: Any) -> Any:
        # It does not wait for data, and a busy kernel brings them later.
        for _ in range(200):
            got = outcome(target.recv, 10)
            if got != b"":
                return got
            time.sleep(0.01)
        return b""

    def scenario(host: Host) -> Any:
        client, accepted, _ = connected(host)
        accepted.shutdown(socket.SHUT_RD)
        found: list[Any] = [accepted.recv(10)]
        for data in (b"abc", b"def"):
            client.send(data)
            found += [something(accepted), accepted.recv(10)]
        found += [accepted.send(b"still"), client.recv(10)]
        accepted.shutdown(socket.SHUT_WR)
        # On its way out it is reset.
        found += [client.recv(10), client.send(b"zz"), something(accepted)]
        return [*found, outcome(client.send, b"zz"), outcome(client.recv, 10)]

    same_on_both(netns, scenario)


def test_what_cannot_be_done(netns: NetworkNamespace) -> None:
    def scenario(host: Host) -> Any:
        fresh = host.open(socket.AF_INET, STREAM)
        found = [outcome(action, *given) for action, *given in (
            (fresh.recv, 1), (fresh.send, b"x"), (fresh.accept,), (fresh.getpeername,), (fresh.shutdown, 1),
        )]  # fmt: skip
        client, accepted, server = connected(host)
        for one in (client, accepted, server):
            # Python would wait before it asks.
            one.settimeout(None)
        found += [outcome(action, *given) for action, *given in (
            (server.recv, 1), (server.send, b"x"), (server.getpeername,), (server.connect, ("127.0.0.1", 9)),
            (client.listen,), (client.accept,), (client.connect, ("127.0.0.1", 9)), (client.bind, ("127.0.0.1", 7009)),
            (accepted.shutdown, 7), (client.sendto, b"x", ("127.0.0.1", 9)), (server.listen, 3),
        )]  # fmt: skip
        again = host.open(socket.AF_INET, STREAM)
        found.append(outcome(again.bind, ("127.0.0.1", 7000)))
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.append(outcome(again.bind, ("127.0.0.1", 7000)))
        server.close()
        found.append(outcome(again.bind, ("127.0.0.1", 7000)))
        found.append(outcome(again.listen))
        return found

    same_on_both(netns, scenario)


@pytest.mark.parametrize("unread", [False, True])
@pytest.mark.parametrize("sent", [False, True])
@pytest.mark.parametrize("linger", [False, True])
def test_the_other_end_closes(netns: NetworkNamespace, unread: bool, sent: bool, linger: bool) -> None:
    def scenario(host: Host) -> Any:
        client, accepted, _ = connected(host)
        if linger:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if sent:
            client.send(b"last words")
        if unread:
            accepted.send(b"unread")
        client.close()
        found = [outcome(accepted.recv, 20) for _ in range(3)]
        found += [outcome(accepted.send, b"x"), outcome(accepted.send, b"x"), outcome(accepted.recv, 1)]
        return found, outcome(accepted.getpeername), outcome(client.recv, 1)

    same_on_both(netns, scenario)


# Filters.


def test_a_filter_that_drops_data_has_it_sent_again(netns: NetworkNamespace) -> None:
    def scenario(host: Host) -> Any:
        client, accepted, _ = connected(host)
        host.attach(accepted, drops_data())
        client.send(b"HELLO")
        accepted.settimeout(SHORT)
        found = [outcome(accepted.recv, 10)]
        host.backend.socket_detach(accepted)
        accepted.settimeout(5)
        return [*found, accepted.recv(10), host.backend.socket_layout(accepted)]

    assert same_on_both(netns, scenario)[:2] == ["TimeoutError", b"HELLO"]


@pytest.mark.parametrize("kept", [1, DATA, DATA + 1, DATA + 4, DATA + 5, KEEP])
def test_what_a_filter_cuts_off_comes_again(netns: NetworkNamespace, kept: int) -> None:
    def scenario(host: Host) -> Any:
        client, accepted, _ = connected(host)
        host.attach(accepted, returns(kept))
        client.send(b"HELLO")
        accepted.settimeout(SHORT)
        found = [outcome(accepted.recv, 10)]
        if DATA < kept < KEEP:
            accepted.settimeout(5)
            while sum(len(part) for part in found) < 5:
                found.append(accepted.recv(10))
        return found

    same_on_both(netns, scenario)


def test_a_listener_that_drops_everything_is_silent(netns: NetworkNamespace) -> None:
    def scenario(host: Host) -> Any:
        server = listener(host)
        host.attach(server, returns(0))
        client = host.open(socket.AF_INET, STREAM)
        client.settimeout(SHORT)
        return outcome(client.connect, ("127.0.0.1", 7000)), outcome(client.getpeername)

    same_on_both(netns, scenario)


@pytest.mark.parametrize("flag", [SYN, ACK, RST, FIN])
def test_a_listener_sees_the_handshake(netns: NetworkNamespace, flag: int) -> None:
    def scenario(host: Host) -> Any:
        server = listener(host)
        host.attach(server, drops_flag(flag))
        client = host.open(socket.AF_INET, STREAM)
        client.settimeout(SHORT)
        server.settimeout(SHORT)
        found = [outcome(client.connect, ("127.0.0.1", 7000))]
        accepted = outcome(server.accept)
        if isinstance(accepted, tuple):
            made = host.keep(accepted[0])
            client.send(b"data")
            found += [outcome(made.recv, 10), len(host.backend.socket_get_filter(made))]
        else:
            found.append(accepted)
        return found

    same_on_both(netns, scenario)


@pytest.mark.parametrize("program", [returns(0), drops_flag(SYN), drops_flag(RST)])
def test_the_first_that_a_client_sees_is_the_answer(netns: NetworkNamespace, program: list[cbpf.Instruction]) -> None:
    def scenario(host: Host) -> Any:
        listener(host)
        client = host.open(socket.AF_INET, STREAM)
        host.attach(client, program)
        client.settimeout(SHORT)
        refused = host.open(socket.AF_INET, STREAM)
        host.attach(refused, program)
        refused.settimeout(SHORT)
        return outcome(client.connect, ("127.0.0.1", 7000)), outcome(refused.connect, ("127.0.0.1", 9))

    same_on_both(netns, scenario)


def test_an_accepted_connection_has_the_filter_and_the_lock(netns: NetworkNamespace) -> None:
    def scenario(host: Host) -> Any:
        server = listener(host)
        host.attach(server, returns(KEEP))
        host.backend.socket_lock(server)
        client = host.open(socket.AF_INET, STREAM)
        client.connect(("127.0.0.1", 7000))
        accepted, _ = server.accept()
        host.keep(accepted)
        return [
            host.backend.socket_get_filter(accepted),
            accepted.getsockopt(socket.SOL_SOCKET, SO_LOCK_FILTER),
            outcome(host.backend.socket_detach, accepted),
            outcome(host.attach, accepted, returns(0)),
            host.backend.socket_get_filter(client),
            host.backend.socket_drainable(accepted),
            host.backend.socket_drainable(server),
        ]

    same_on_both(netns, scenario)


def test_a_filter_sees_acknowledgements(netns: NetworkNamespace) -> None:
    """A sender that never sees one sends again, and the other end has the data once."""

    def scenario(host: Host) -> Any:
        client, accepted, _ = connected(host)
        host.attach(client, returns(0))
        client.send(b"once")
        found = [accepted.recv(10)]
        accepted.settimeout(SHORT)
        found.append(outcome(accepted.recv, 10))
        host.backend.socket_detach(client)
        client.send(b"more")
        accepted.settimeout(5)
        return [*found, accepted.recv(10)]

    same_on_both(netns, scenario)


@pytest.mark.parametrize("flag", [RST, FIN])
def test_who_drops_the_end_never_learns_of_it(netns: NetworkNamespace, flag: int) -> None:
    def scenario(host: Host) -> Any:
        client, accepted, _ = connected(host)
        host.attach(accepted, drops_flag(flag))
        if flag == RST:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        accepted.settimeout(SHORT)
        found = [outcome(accepted.recv, 10)]
        host.backend.socket_detach(accepted)
        if flag == FIN:
            accepted.settimeout(5)
            found.append(outcome(accepted.recv, 10))
        return found

    same_on_both(netns, scenario)


def test_what_was_read_out_of_order_is_put_in_order(netns: NetworkNamespace) -> None:
    def scenario(host: Host) -> Any:
        client, accepted, _ = connected(host)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        first = cbpf.jump(cbpf.JMP | cbpf.JEQ | cbpf.K, DATA + 2, 0, 1)
        host.attach(accepted, [cbpf.stmt(cbpf.LD | cbpf.W | cbpf.LEN), first, *returns(0), *returns(KEEP)])
        client.send(b"AA")
        client.send(b"B")
        client.send(b"CCC")
        accepted.settimeout(0.1)
        found = [outcome(accepted.recv, 10)]
        host.backend.socket_detach(accepted)
        accepted.settimeout(5)
        data = b""
        while len(data) < 6:
            data += accepted.recv(10)
        return [*found, data]

    assert same_on_both(netns, scenario) == ["TimeoutError", b"AABCCC"]


def test_what_a_filter_passes_by_its_data(netns: NetworkNamespace) -> None:
    def scenario(host: Host) -> Any:
        client, accepted, _ = connected(host)
        host.attach(accepted, passes_if(cbpf.B, DATA, ord("y")))
        client.send(b"yes")
        found = [accepted.recv(10)]
        client.send(b"no")
        accepted.settimeout(SHORT)
        return [*found, outcome(accepted.recv, 10)]

    same_on_both(netns, scenario)


def watching(fd: int, load: list[Instruction]) -> list[Instruction]:
    """Put what `load` leaves in R7, and one, into the map's only value, and keep the segment."""
    return [
        Instruction(ebpf.ALU64 | ebpf.MOV | ebpf.X, 6, 1),
        *load,
        Instruction(ebpf.ALU64 | ebpf.ADD | ebpf.K, 7, 0, 0, 1),
        Instruction(ebpf.LD_IMM64, 1, ebpf.PSEUDO_MAP_VALUE, 0, fd),
        Instruction(0),
        Instruction(ebpf.STX | ebpf.MEM | ebpf.DW, 1, 7),
        Instruction(ebpf.ALU64 | ebpf.MOV | ebpf.K, 0, 0, 0, -1),
        Instruction(ebpf.JMP | ebpf.EXIT),
    ]


def field(offset: int) -> list[Instruction]:
    return [Instruction(ebpf.LDX | ebpf.MEM | ebpf.W, 7, 6, offset)]


def byte(offset: int) -> list[Instruction]:
    load = Instruction(ebpf.LD | ebpf.ABS | ebpf.B, 0, 0, 0, offset - (1 << 32) if offset >= 1 << 31 else offset)
    return [load, Instruction(ebpf.ALU64 | ebpf.MOV | ebpf.X, 7, 0)]


#: `__sk_buff` but for the hash, and bytes that Linux does not leave open.
SEEN = {
    **{f"field {offset}": field(offset) for offset in (*range(0, 44, 4), *range(48, 68, 4), 164, 176)},
    **{f"byte {at}": byte(at) for at in (0, 1, 12, 13, 18, 19, 20, 21, 22, 23, 32, 39)},
    **{f"network byte {at}": byte(NET + at) for at in (0, 6, 7, 8, 9, 12, 15, 19, 21)},
    **{f"link byte {at}": byte(LL + at) for at in (0, 11, 12, 13)},
}


@pytest.mark.parametrize(("bound", "target"), ADDRESSES)
@pytest.mark.parametrize("data", [b"", b"DATADATA"])
def test_what_a_program_sees(netns: NetworkNamespace, bound: str, target: str, data: bytes) -> None:
    """Of a segment with data, and of the acknowledgement of one."""

    def scenario(host: Host) -> Any:
        client, accepted, _ = connected(host, bound, target)
        accepted.setsockopt(socket.SOL_SOCKET, SO_MARK, 0x1234)
        fd = host.backend.map_create(MapSpec(type="array", key_size=4, value_size=8, max_entries=1))
        seen = {}
        for name, load in SEEN.items():
            host.backend.map_update(fd, bytes(4), bytes(8))
            host.backend.socket_attach_bpf(client, host.load(watching(fd, load)))
            if data:
                accepted.send(data)
                client.recv(100)
            else:
                client.send(b"x")
                accepted.recv(100)
            seen[name] = int.from_bytes(host.backend.map_lookup(fd, bytes(4), 8), "little")
            host.backend.socket_detach(client)
        host.backend.close(fd)
        return seen

    found = same_on_both(netns, scenario)
    assert found["field 8"] == 0x1235 and found["field 0"] == DATA + len(data) + 1


@pytest.mark.parametrize("attached", ["before", "after"])
def test_a_reuseport_program_chooses_the_listener(netns: NetworkNamespace, attached: str) -> None:
    def scenario(host: Host) -> Any:
        group = [host.open(socket.AF_INET, STREAM) for _ in range(3)]
        place = [
            cbpf.stmt(cbpf.LD | cbpf.W | cbpf.LEN),
            cbpf.stmt(cbpf.ALU | cbpf.ADD | cbpf.K, 2),
            cbpf.stmt(cbpf.RET | cbpf.A),
        ]
        for one in group:
            one.setsockopt(socket.SOL_SOCKET, SO_REUSEPORT, 1)
            one.bind(("127.0.0.1", 7000))
        if attached == "before":
            host.backend.socket_attach_reuseport_filter(group[0], cbpf.encode(place))
        listening = [outcome(one.listen) for one in reversed(group)]
        if attached == "after":
            host.backend.socket_attach_reuseport_filter(group[0], cbpf.encode(place))
        for _ in range(3):
            host.open(socket.AF_INET, STREAM).connect(("127.0.0.1", 7000))
        found = []
        for one in group:
            one.setblocking(False)
            count = 0
            while isinstance(accepted := outcome(one.accept), tuple):
                host.keep(accepted[0])
                count += 1
            found.append(count)
        # The program's socket cannot listen if it has it too early, and the hash chooses among the others.
        return listening, found if attached == "after" else sum(found)

    same_on_both(netns, scenario)


def test_how_many_connections_wait(netns: NetworkNamespace) -> None:
    def scenario(host: Host) -> Any:
        server = listener(host, backlog=1)
        found = []
        for _ in range(3):
            client = host.open(socket.AF_INET, STREAM)
            client.settimeout(0.2)
            found.append(outcome(client.connect, ("127.0.0.1", 7000)))
        server.setblocking(False)
        accepted = [host.keep(server.accept()[0]) for _ in range(2)]
        return found, len(accepted), outcome(server.accept)

    same_on_both(netns, scenario)


def test_closing_a_listener_resets_who_waits(netns: NetworkNamespace) -> None:
    def scenario(host: Host) -> Any:
        server = listener(host)
        client = host.open(socket.AF_INET, STREAM)
        client.connect(("127.0.0.1", 7000))
        server.close()
        return outcome(client.recv, 1), outcome(client.recv, 1), outcome(client.send, b"x")

    same_on_both(netns, scenario)
