"""UDP sockets of the emulated network: the same scenarios on the kernel's."""

from __future__ import annotations

import socket
import struct
from typing import Any

import pytest
from hosts import AD, KEEP, LL, NET, Host, drops, outcome, received, returns, same_on_both

from kbpf.isa import cbpf, ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.testing.network import NetworkNamespace
from kbpf.uapi.constants import SO_LOCK_FILTER, SO_MARK, SO_PRIORITY, SO_RCVBUF, SO_REUSEPORT

pytestmark = pytest.mark.requires("kernel", "netns")

SO_REUSEADDR, SO_BROADCAST = 2, 6
GOOD = returns(1)
ADDRESSES = [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("::", "127.0.0.1")]


@pytest.mark.parametrize(("bound", "target"), ADDRESSES)
@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 12, 20, 0x80000000, KEEP])
def test_a_filter_cuts_and_drops(netns: NetworkNamespace, bound: str, target: str, kept: int) -> None:
    def scenario(host: Host) -> Any:
        reader, sender = host.udp(bound, 7000), host.udp(target, 7001)
        host.attach(reader, returns(kept))
        sent = [sender.sendto(data, (target, 7000)) for data in (b"abcdefgh", b"", b"x")]
        return sent, received(reader), drops(reader), reader.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)

    same_on_both(netns, scenario)


def test_what_a_reader_is_told_is_what_was_left(netns: NetworkNamespace) -> None:
    def scenario(host: Host) -> Any:
        reader, sender = host.udp(port=7000), host.udp(port=7001)
        host.attach(reader, returns(8 + 6))
        for _ in range(7):
            sender.sendto(b"0123456789", ("127.0.0.1", 7000))
        buffer, parts = bytearray(10), [bytearray(4), bytearray(4)]
        return [
            reader.recv(100, socket.MSG_PEEK),
            reader.recv(4),
            reader.recvfrom(100),
            len(reader.recv(2, socket.MSG_TRUNC)),
            reader.recvmsg(3, 256),
            reader.recv_into(buffer),
            buffer,
            reader.recvmsg_into(parts)[:3],
            parts,
            reader.recvfrom_into(buffer, 3, socket.MSG_TRUNC),
            outcome(reader.recv, 10, socket.MSG_DONTWAIT) if reader.settimeout(None) else None,
        ]

    same_on_both(netns, scenario)


#: Loads that do not depend on what Linux leaves open (the packet's identification, hashes, random numbers).
LOADS = {
    **{f"byte {k}": (cbpf.B, k) for k in range(12)},
    **{f"network byte {k}": (cbpf.B, NET + k) for k in (0, 6, 7, 8, 9, 12, 15, 16, 19, 20, 23, 28, 35, 47, 48)},
    **{f"link byte {k}": (cbpf.B, LL + k) for k in (0, 5, 6, 11, 12, 13, 14)},
    **{f"ancillary {k}": (cbpf.W, AD + k) for k in (0, 4, 8, 20, 24, 28, 44, 48, 52, 60)},
    "out of bounds": (cbpf.W, 16),
}


@pytest.mark.parametrize(("bound", "target"), ADDRESSES)
def test_what_a_filter_sees(netns: NetworkNamespace, bound: str, target: str) -> None:
    def scenario(host: Host) -> Any:
        reader, sender = host.udp(bound, 7000), host.udp(target, 7001)
        sender.setsockopt(socket.SOL_SOCKET, SO_MARK, 0x1234)
        sender.setsockopt(socket.SOL_SOCKET, SO_PRIORITY, 5)
        seen = {}
        for name, (size, at) in LOADS.items():
            program = [cbpf.stmt(cbpf.LD | size | cbpf.ABS, at)]
            # Four bits at a time, as the length that is kept, over two datagrams' worth of digits.
            digits = []
            for shift in range(0, 32, 4):
                digit = [
                    cbpf.stmt(cbpf.ALU | cbpf.RSH | cbpf.K, shift),
                    cbpf.stmt(cbpf.ALU | cbpf.AND | cbpf.K, 15),
                    cbpf.stmt(cbpf.ALU | cbpf.ADD | cbpf.K, 9),
                    cbpf.stmt(cbpf.RET | cbpf.A),
                ]
                host.attach(reader, program + digit)
                sender.sendto(bytes(40), (target, 7000))
                digits.append([len(data) for data in received(reader)])
            seen[name] = digits
        return seen

    found = same_on_both(netns, scenario)
    assert found["byte 5"][0] == [1] and found["out of bounds"][0] == [1]


@pytest.mark.parametrize("field", [0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48])
def test_what_a_program_sees(netns: NetworkNamespace, field: int) -> None:
    """The whole word, a nibble a datagram; 20 and up include what is not set."""

    def scenario(host: Host) -> Any:
        reader, sender = host.udp(port=7000), host.udp(port=7001)
        sender.setsockopt(socket.SOL_SOCKET, SO_PRIORITY, 5)
        digits = []
        for shift in range(0, 32, 4):
            code = [
                Instruction(ebpf.LDX | ebpf.MEM | ebpf.W, 0, 1, field),
                Instruction(ebpf.ALU64 | ebpf.RSH | ebpf.K, 0, 0, 0, shift),
                Instruction(ebpf.ALU64 | ebpf.AND | ebpf.K, 0, 0, 0, 15),
                Instruction(ebpf.ALU64 | ebpf.ADD | ebpf.K, 0, 0, 0, 9),
                Instruction(ebpf.JMP | ebpf.EXIT),
            ]
            try:
                program = host.load(code)
            except OSError as failure:
                return failure.errno
            host.backend.socket_attach_bpf(reader, program)
            sender.sendto(bytes(40), ("127.0.0.1", 7000))
            digits.append([len(data) for data in received(reader)])
        return digits

    same_on_both(netns, scenario)


def test_the_slot(netns: NetworkNamespace) -> None:
    def scenario(host: Host) -> Any:
        reader, sender = host.udp(port=7000), host.udp(port=7001)
        sender.sendto(b"before", ("127.0.0.1", 7000))
        backend, found = host.backend, []
        found.append(outcome(backend.socket_detach, reader))
        host.attach(reader, returns(0))
        found.append(backend.socket_get_filter(reader))
        sender.sendto(b"dropped", ("127.0.0.1", 7000))
        found.append(received(reader))
        backend.socket_detach(reader)
        sender.sendto(b"after", ("127.0.0.1", 7000))
        found.append(received(reader))
        backend.socket_lock(reader)
        found.append(reader.getsockopt(socket.SOL_SOCKET, SO_LOCK_FILTER))
        found.append(outcome(host.attach, reader, returns(1)))
        found.append(outcome(host.attach, reader, []))
        found.append(outcome(reader.setsockopt, socket.SOL_SOCKET, SO_LOCK_FILTER, 0))
        return found, backend.socket_layout(reader), backend.socket_drainable(reader)

    same_on_both(netns, scenario)


@pytest.mark.parametrize("size", [0, 1, 100, 200, 400, 900, 2000, 4000, 8000, 17000, 40000, 65507])
@pytest.mark.parametrize("rcvbuf", [0, 9000, None])
def test_what_fits_into_the_buffer(netns: NetworkNamespace, size: int, rcvbuf: int | None) -> None:
    def scenario(host: Host) -> Any:
        reader, sender = host.udp(port=7000), host.udp(port=7001)
        if rcvbuf is not None:
            reader.setsockopt(socket.SOL_SOCKET, SO_RCVBUF, rcvbuf)
        for _ in range(300 if size < 300 else 130):
            sender.sendto(bytes(size), ("127.0.0.1", 7000))
        memory = struct.unpack("=9I", reader.getsockopt(socket.SOL_SOCKET, 55, 36))
        return memory[0], memory[1], memory[8], len(received(reader))

    same_on_both(netns, scenario)


def test_who_is_not_there_refuses(netns: NetworkNamespace) -> None:
    def scenario(host: Host) -> Any:
        found = []
        for address in ("127.0.0.1", "::1"):
            sender = host.open(socket.AF_INET6 if ":" in address else socket.AF_INET)
            found.append([sender.sendto(b"x", (address, 9)), outcome(sender.sendto, b"x", (address, 9))])
            sender.connect((address, 9))
            found.append([outcome(sender.send, b"x"), outcome(sender.send, b"x"), outcome(sender.send, b"x")])
            found.append([outcome(sender.recv, 10), sender.send(b"x")])
            found.append([sender.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) for _ in range(2)])
        return found

    same_on_both(netns, scenario)


def test_connected_sockets_hear_one_only(netns: NetworkNamespace) -> None:
    def scenario(host: Host) -> Any:
        one, other, third = host.udp(port=7000), host.udp(port=7001), host.udp(port=7002)
        one.connect(("127.0.0.1", 7001))
        found = [outcome(other.getpeername), one.getpeername(), one.getsockname()]
        other.sendto(b"heard", ("127.0.0.1", 7000))
        third.connect(("127.0.0.1", 7000))
        third.send(b"not heard")
        found.append([received(one), outcome(third.send, b"again")])
        return found, outcome(other.send, b"x"), one.sendto(b"x", ("127.0.0.1", 7002)), received(third)

    same_on_both(netns, scenario)


def test_binding(netns: NetworkNamespace) -> None:
    def scenario(host: Host) -> Any:
        found: list[Any] = []

        def bind(address: tuple[Any, ...], *options: int, v6only: bool = False) -> None:
            made = host.open(socket.AF_INET6 if ":" in str(address[0]) else socket.AF_INET)
            for option in options:
                made.setsockopt(socket.SOL_SOCKET, option, 1)
            if v6only:
                made.setsockopt(41, 26, 1)
            found.append(outcome(made.bind, address) or made.getsockname())

        bind(("127.0.0.1", 7000))
        bind(("127.0.0.1", 7000))
        bind(("127.0.0.1", 7000), SO_REUSEADDR)
        bind(("0.0.0.0", 7000))
        bind(("127.0.0.2", 7000))
        bind(("::1", 7000))
        bind(("::", 7000))
        bind(("::", 7000), v6only=True)
        bind(("::", 7001))
        bind(("127.0.0.1", 7001))
        bind(("127.0.0.1", 7002), SO_REUSEADDR)
        bind(("127.0.0.1", 7002), SO_REUSEADDR)
        bind(("127.0.0.1", 7002), SO_REUSEPORT)
        bind(("127.0.0.1", 7003), SO_REUSEPORT)
        bind(("127.0.0.1", 7003), SO_REUSEPORT)
        bind(("::ffff:127.0.0.1", 7003))
        bind(("10.9.8.7", 7004))
        bind(("fd00::1", 7004))
        bind(("127.0.0.1", 70000))
        bind(("::ffff:127.0.0.1", 7005))
        bound = host.udp(port=7006)
        found.append(outcome(bound.bind, ("127.0.0.1", 7007)))
        free = host.open()
        found.append(free.getsockname())
        found.append(outcome(free.bind, "127.0.0.1"))
        found.append(outcome(free.sendto, b"x", ("127.0.0.1", 0)))
        found.append(outcome(free.sendto, b"x", ("10.9.8.7", 9)))
        found.append(outcome(free.sendto, bytes(65508), ("127.0.0.1", 9)))
        free.sendto(b"x", ("127.0.0.1", 9))
        found.append(free.getsockname()[0])
        free.close()
        found.append([outcome(free.getsockname), outcome(free.recv, 1), free.fileno()])
        return found

    same_on_both(netns, scenario)


def test_broadcasts(netns: NetworkNamespace) -> None:
    def scenario(host: Host) -> Any:
        readers = [host.open() for _ in range(2)]
        for reader in readers:
            reader.setsockopt(socket.SOL_SOCKET, SO_REUSEADDR, 1)
            reader.bind(("0.0.0.0", 7000))
        host.attach(readers[1], returns(10))
        sender = host.udp(port=7001)
        found = [outcome(sender.sendto, b"all", ("127.255.255.255", 7000))]
        sender.setsockopt(socket.SOL_SOCKET, SO_BROADCAST, 1)
        found.append(outcome(sender.sendto, b"all", ("127.255.255.255", 7000)))
        return found, [received(reader) for reader in readers]

    same_on_both(netns, scenario)


def test_packet_sockets_see_what_is_sent(netns: NetworkNamespace) -> None:
    def scenario(host: Host) -> Any:
        packets = host.packets()
        reader, sender = host.udp(port=7000), host.udp(port=7001)
        sender.sendto(b"payload", ("127.0.0.1", 7000))
        six = host.udp("::1", 7002)
        six.sendto(b"payload", ("::1", 7002))
        sender.sendto(b"nobody", ("127.0.0.1", 7009))
        frames = [packets.recvfrom(200) for _ in range(8)]
        assert received(reader) == [b"payload"]

        # Without what Linux leaves open: the identification and so the checksum of IPv4, the flow label of IPv6.
        def settled(data: bytes) -> bytes:
            if data[12:14] == b"\x08\x00":
                inner = data[14:18] + data[20:24] + data[26:]
                # An ICMP error quotes the packet, with its identification, and has a checksum over it.
                return inner[:18] + inner[20:28] + inner[30:34] + inner[36:] if data[23] == 1 else inner
            return data[14:15] + data[18:]

        return [(settled(data), address) for data, address in frames]

    same_on_both(netns, scenario)


def test_the_errors_of_reuseport_programs(netns: NetworkNamespace) -> None:
    def scenario(host: Host) -> Any:
        backend = host.backend

        def attach(target: Any, code: list[cbpf.Instruction] = GOOD) -> Any:
            return outcome(backend.socket_attach_reuseport_filter, target, cbpf.encode(code))

        bad = [cbpf.Instruction(0xFF, 0, 0, 0)]
        found: list[Any] = []
        for options in ((), (SO_REUSEPORT,)):
            one = host.open()
            for option in options:
                one.setsockopt(socket.SOL_SOCKET, option, 1)
            found.append([outcome(backend.socket_detach_reuseport, one), attach(one), attach(one, bad)])
            found.append([outcome(backend.socket_detach_reuseport, one) for _ in range(2)])
            found.append(outcome(backend.socket_attach_reuseport_bpf, one, 9999))
            attach(one)
            backend.socket_lock(one)
            found.append([attach(one), attach(one, []), outcome(backend.socket_detach_reuseport, one)])
        late = host.udp(port=7000)
        late.setsockopt(socket.SOL_SOCKET, SO_REUSEPORT, 1)
        found.append(attach(late))
        early = host.open()
        early.setsockopt(socket.SOL_SOCKET, SO_REUSEPORT, 1)
        early.bind(("127.0.0.1", 7001))
        early.setsockopt(socket.SOL_SOCKET, SO_REUSEPORT, 0)
        return found, attach(early), host.backend.socket_get_filter(early)

    same_on_both(netns, scenario)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_reuseport_program_chooses(netns: NetworkNamespace, address: str) -> None:
    def scenario(host: Host) -> Any:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        group = [host.open(family) for _ in range(3)]
        for one in group:
            one.setsockopt(socket.SOL_SOCKET, SO_REUSEPORT, 1)
            one.bind((address, 7000))
        sender = host.udp(address, 7001)
        # The first byte of the data is the place; the length is that of the data.
        place = [cbpf.stmt(cbpf.LD | cbpf.B | cbpf.ABS, 0), cbpf.stmt(cbpf.RET | cbpf.A)]
        length = [cbpf.stmt(cbpf.LD | cbpf.W | cbpf.LEN), cbpf.stmt(cbpf.RET | cbpf.A)]
        host.backend.socket_attach_reuseport_filter(group[2], cbpf.encode(place))

        def heard() -> list[list[bytes]]:
            return [received(one) if one.fileno() >= 0 else [] for one in group]

        for data in (b"\0", b"\1", b"\2", b""):
            sender.sendto(data, (address, 7000))
        found = [heard()]
        sender.sendto(b"\7", (address, 7000))
        found.append([sum(map(len, heard()))])
        host.backend.socket_attach_reuseport_filter(group[0], cbpf.encode(length))
        for data in (b"", b"x", b"xx"):
            sender.sendto(data, (address, 7000))
        found.append(heard())
        group[1].close()
        for data in (b"", b"x"):
            sender.sendto(data, (address, 7000))
        return [*found, heard()]

    same_on_both(netns, scenario)


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::1", "::"])
def test_a_socket_that_is_connected_leaves_its_group(netns: NetworkNamespace, address: str) -> None:
    def scenario(host: Host) -> Any:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        target = "::1" if ":" in address else "127.0.0.1"
        group = [host.open(family) for _ in range(3)]
        for one in group:
            one.setsockopt(socket.SOL_SOCKET, SO_REUSEPORT, 1)
            one.bind((address, 7000))
        sender, peer = host.udp(target, 7001), host.udp(target, 7002)
        place = [cbpf.stmt(cbpf.LD | cbpf.B | cbpf.ABS, 0), cbpf.stmt(cbpf.RET | cbpf.A)]
        host.backend.socket_attach_reuseport_filter(group[2], cbpf.encode(place))
        found: list[Any] = []
        for connected in (0, 1):
            group[connected].connect((target, 7002))
            for data in (b"\0", b"\1")[: 2 - connected]:
                sender.sendto(data, (target, 7000))
                peer.sendto(data, (target, 7000))
            found.append([sorted(received(one)) for one in group])
        # One that has left has no group to take the program from.
        found.append([outcome(host.backend.socket_detach_reuseport, one) for one in (group[0], group[2])])
        return found

    same_on_both(netns, scenario)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_of_sockets_that_are_connected_to_the_same_the_last_is_found(netns: NetworkNamespace, address: str) -> None:
    def scenario(host: Host) -> Any:
        found = []
        for order in ((0, 1), (1, 0)):
            ends = [host.open(socket.AF_INET6 if ":" in address else socket.AF_INET) for _ in range(2)]
            for one in ends:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                one.bind((address, 7000))
            peer = host.udp(address, 7002)
            for place in order:
                ends[place].connect((address, 7002))
            peer.sendto(b"data", (address, 7000))
            found.append([received(one) for one in ends])
            for one in (*ends, peer):
                one.close()
        return found

    same_on_both(netns, scenario)
