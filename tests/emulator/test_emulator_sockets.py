"""Filters on sockets in the emulator: the slot's rules, and what reaches the reader, against the kernel's own."""

from __future__ import annotations

import array
import asyncio
import contextlib
import ctypes
import errno
import os
import random
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kbpf.emulator import reset, sockets
from kbpf.emulator.classic import ClassicProgram
from kbpf.emulator.filtered import FilteredSocket
from kbpf.emulator.packet import Packet
from kbpf.emulator.packetsocket import EmulatedPacketSocket
from kbpf.isa import cbpf
from kbpf.testing.network import NetworkNamespace

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="these are Linux's sockets")

Program = list[cbpf.Instruction]
Pair = tuple[Any, Callable[[bytes], object]]


def returns(value: int) -> Program:
    return [cbpf.stmt(cbpf.RET | cbpf.K, value)]


def returns_load(size: int, offset: int) -> Program:
    return [cbpf.stmt(cbpf.LD | size | cbpf.ABS, offset), cbpf.stmt(cbpf.RET | cbpf.A)]


def passes_if(size: int, offset: int, value: int) -> Program:
    load = cbpf.stmt(cbpf.LD | size | cbpf.ABS, offset)
    return [load, cbpf.jump(cbpf.JMP | cbpf.JEQ | cbpf.K, value, 0, 1), *returns(0xFFFFFFFF), *returns(0)]


class Kernel:
    """setsockopt on the socket itself."""

    def attach(self, target: Any, program: Program) -> Any:
        code = ctypes.create_string_buffer(cbpf.encode(program) or b"\0")
        target.setsockopt(1, 26, struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
        return target

    def detach(self, target: Any) -> None:
        target.setsockopt(1, 27, 0)

    def lock(self, target: Any) -> None:
        target.setsockopt(1, 44, 1)


class Emulator:
    """A program around the socket."""

    def attach(self, target: Any, program: Program) -> Any:
        wrapped = sockets.wrap(target)
        sockets.refuse_if_locked(wrapped)
        sockets.attach(wrapped, ClassicProgram(program), cbpf.encode(program))
        return wrapped

    def detach(self, target: Any) -> None:
        sockets.detach(sockets.wrap(target))

    def lock(self, target: Any) -> None:
        sockets.lock(sockets.wrap(target))


@pytest.fixture(params=[Kernel, Emulator], ids=["kernel", "emulator"])
def side(request: pytest.FixtureRequest) -> Any:
    return request.param()


@pytest.fixture(autouse=True)
def fresh_network() -> Iterator[None]:
    reset()
    yield
    reset()


@contextlib.contextmanager
def unix(kind: int = socket.SOCK_DGRAM) -> Iterator[Pair]:
    one, other = socket.socketpair(socket.AF_UNIX, kind)
    with one, other:
        yield one, other.send


@contextlib.contextmanager
def inet(family: int, host: str, target: str) -> Iterator[Pair]:
    with (
        socket.socket(family, socket.SOCK_DGRAM) as one,
        socket.socket(socket.AF_INET6 if ":" in target else socket.AF_INET, socket.SOCK_DGRAM) as other,
    ):
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        one.bind((host, 0))
        port = one.getsockname()[1]
        yield one, lambda data: other.sendto(data, (target, port))


@contextlib.contextmanager
def raw(family: int, protocol: int, host: str) -> Iterator[Pair]:
    with (
        socket.socket(family, socket.SOCK_RAW, protocol) as one,
        socket.socket(family, socket.SOCK_RAW, protocol) as other,
    ):
        one.bind((host, 0))
        yield one, lambda data: other.sendto(data, (host, 0))


@contextlib.contextmanager
def netlink() -> Iterator[Pair]:
    with (
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 2) as one,
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 2) as other,
    ):
        one.bind((0, 0))
        yield one, lambda data: other.sendto(data, (one.getsockname()[0], 0))


KINDS: dict[str, Callable[[], Any]] = {
    "unix dgram": unix,
    "unix seqpacket": lambda: unix(socket.SOCK_SEQPACKET),
    "udp4": lambda: inet(socket.AF_INET, "127.0.0.1", "127.0.0.1"),
    "udp6": lambda: inet(socket.AF_INET6, "::1", "::1"),
    "udp4 on an IPv6 socket": lambda: inet(socket.AF_INET6, "::", "127.0.0.1"),
    "raw4": lambda: raw(socket.AF_INET, 253, "127.0.0.1"),
    "raw6": lambda: raw(socket.AF_INET6, 253, "::1"),
    "netlink": netlink,
}
NEEDS_ROOT = ("raw4", "raw6")


def kinds(*without: str) -> list[Any]:
    root = pytest.mark.requires("kernel")
    return [pytest.param(name, marks=root if name in NEEDS_ROOT else ()) for name in KINDS if name not in without]


def received(target: Any) -> list[bytes]:
    target.setblocking(False)
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            found.append(target.recv(65536))
    return found


NET, LL, AD = cbpf.NET_OFF, cbpf.LL_OFF, cbpf.AD_OFF
#: What the reconstruction promises to be right, by what it returns.
LOADS = {
    **{f"byte {k}": returns_load(cbpf.B, k) for k in range(12)},
    **{
        f"network byte {k}": returns_load(cbpf.B, NET + k)
        for k in (0, 1, 2, 3, 8, 9, 12, 15, 16, 19, 20, 23, 24, 39, 40, 45, 200)
    },
    **{f"link half {k}": returns_load(cbpf.H, LL + k) for k in (0, 12, 13)},
    "len": [cbpf.stmt(cbpf.LD | cbpf.W | cbpf.LEN), cbpf.stmt(cbpf.RET | cbpf.A)],
    "pkttype": [
        *returns_load(cbpf.W, AD + 4)[:1],
        cbpf.stmt(cbpf.ALU | cbpf.ADD | cbpf.K, 9),
        cbpf.stmt(cbpf.RET | cbpf.A),
    ],
    "ifindex": returns_load(cbpf.W, AD + 8),
    "hatype": [
        *returns_load(cbpf.W, AD + 28)[:1],
        cbpf.stmt(cbpf.ALU | cbpf.SUB | cbpf.K, 760),
        cbpf.stmt(cbpf.RET | cbpf.A),
    ],
    "protocol": [
        *returns_load(cbpf.W, AD)[:1],
        cbpf.stmt(cbpf.ALU | cbpf.MOD | cbpf.K, 29),
        cbpf.stmt(cbpf.RET | cbpf.A),
    ],
    "all": returns(0xFFFFFFFF),
    "sign bit": returns(0x80000000),
    **{f"cut to {k}": returns(k) for k in (0, 1, 7, 8, 9, 12)},
}


@pytest.mark.parametrize("name", kinds())
def test_real_sockets_give_the_reader_what_the_kernel_gives(name: str) -> None:
    payloads = [bytes(range(1, 90)), b"\x05", b"abcdefghijkl", bytes(range(100, 250))]
    unknown: tuple[str, ...]
    # The checksum that UDP senders put in is not told.
    unknown = ("byte 6", "byte 7", "network byte 46", "network byte 47") if name.startswith("udp") else ()
    if name == "raw4":  # The identification and the checksum are the sending kernel's.
        unknown = ("byte 4", "byte 5", "byte 10", "byte 11")
    passed = 0
    with KINDS[name]() as (reader, send):
        for program, code in LOADS.items():
            results = []
            for side in (Kernel(), Emulator()):
                filtered = side.attach(reader, code)
                for payload in payloads:
                    send(payload)
                got = received(filtered)
                side.detach(reader)
                # The identification and checksum of raw IPv4 packets are the sender's kernel's.
                results.append([d[:4] + d[6:10] + d[12:] for d in got] if name == "raw4" else got)
            assert results[0] == results[1] or program in unknown, program
            passed += len(results[0])
    assert passed > 50


@pytest.mark.requires("netns")
@pytest.mark.parametrize(("family", "host", "start"), [(socket.AF_INET, "127.0.0.1", 20), (socket.AF_INET6, "::1", 0)])
def test_raw_sockets_for_udp_give_the_udp_header_to_the_filter(
    netns: NetworkNamespace, side: Any, family: int, host: str, start: int
) -> None:
    with (
        netns.socket(family, socket.SOCK_RAW, socket.IPPROTO_UDP) as reader,
        netns.socket(family, socket.SOCK_DGRAM) as sender,
    ):
        filtered = side.attach(reader, passes_if(cbpf.H, start + 2, 7070))
        for port, payload in ((9, b"no"), (7070, b"yes")):
            sender.sendto(payload, (host, port))
        data = filtered.recv(100)
        assert data[start + 2 :] == struct.pack("!HH", 7070, 11) + data[start + 6 : start + 8] + b"yes"


@pytest.mark.parametrize("name", kinds())
def test_a_filter_that_drops_is_not_seen_by_blocking_readers(name: str, side: Any) -> None:
    last = 0 if name.startswith(("unix", "netlink", "raw6")) else 28 if name == "raw4" else 8
    offset = {"raw4": 20}.get(name, last)
    with KINDS[name]() as (reader, send):
        filtered = side.attach(reader, passes_if(cbpf.B, offset, ord("y")))
        for payload in (b"nononono", b"nonono", b"yes", b"no"):
            send(payload)
        filtered.settimeout(2)
        assert filtered.recv(65536).endswith(b"yes")
        filtered.setblocking(False)
        with pytest.raises(BlockingIOError):
            filtered.recv(100)


def test_the_timeout_counts_over_all_that_is_dropped(side: Any) -> None:
    with unix() as (reader, send):
        filtered = side.attach(reader, returns(0))
        stop = threading.Event()

        def chatter() -> None:
            while not stop.wait(0.02):
                send(b"x")

        thread = threading.Thread(target=chatter)
        thread.start()
        filtered.settimeout(0.2)
        start = time.monotonic()
        with pytest.raises(TimeoutError):
            filtered.recv(10)
        stop.set()
        thread.join()
        assert time.monotonic() - start > 0.15


@pytest.mark.parametrize("name", ["unix dgram", "udp4", "netlink"])
def test_flags_and_buffers_work_on_what_the_filter_left(name: str, side: Any) -> None:
    header = 8 if name == "udp4" else 0
    with KINDS[name]() as (reader, send):
        filtered = side.attach(reader, returns(header + 6))
        filtered.settimeout(1)
        for _ in range(6):
            send(b"0123456789")
        assert filtered.recv(100, socket.MSG_PEEK) == b"012345"
        assert filtered.recv(4) == b"0123"
        assert len(filtered.recv(2, socket.MSG_TRUNC)) == 6
        data, ancillary, flags, _ = filtered.recvmsg(3, 256)
        assert (data, ancillary, flags) == (b"012", [], socket.MSG_TRUNC)
        buffer = bytearray(10)
        assert filtered.recv_into(buffer) == 6 and buffer == b"012345\0\0\0\0"
        parts = [bytearray(4), bytearray(4)]
        assert filtered.recvmsg_into(parts)[0] == 6 and parts == [b"0123", b"45\0\0"]
        count, address = (send(b"0123456789"), filtered.recvfrom(2))[1]
        assert count == b"01" and (name != "udp4" or address[0] == "127.0.0.1")


def test_peeking_passes_over_what_is_dropped(side: Any) -> None:
    with unix() as (reader, send):
        filtered = side.attach(reader, passes_if(cbpf.B, 0, ord("y")))
        filtered.settimeout(1)
        for payload in (b"no", b"yes"):
            send(payload)
        assert filtered.recv(10, socket.MSG_PEEK) == b"yes"
        assert filtered.recv(10) == b"yes"


def test_descriptors_in_dropped_messages_are_closed(side: Any) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    with unix() as (reader, _), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        del sender
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        with one, other:
            filtered = side.attach(one, passes_if(cbpf.B, 0, ord("y")))
            filtered.settimeout(1)
            before = descriptors()
            for payload in (b"no", b"yes"):
                socket.send_fds(other, [payload], [reader.fileno()])
            data, ancillary, _, _ = filtered.recvmsg(10, 256)
            assert data == b"yes" and ancillary[0][:2] == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
            got = array.array("i")
            got.frombytes(ancillary[0][2])
            assert descriptors() == before + 1
            os.close(got[0])


def test_an_empty_datagram_passes_a_filter_that_passes(side: Any) -> None:
    with unix() as (reader, send):
        filtered = side.attach(reader, returns(5))
        send(b"")
        assert received(filtered) == [b""]
        side.attach(reader, returns(0))
        send(b"")
        assert received(filtered) == []


def test_the_other_end_of_a_seqpacket_socket_closing_is_the_end(side: Any) -> None:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        filtered = side.attach(one, returns(0))
        other.send(b"dropped")
        other.close()
        filtered.settimeout(1)
        assert filtered.recv(10) == b""


def test_the_slot_s_errors_are_linux_s(side: Any) -> None:
    def failing(function: Callable[..., Any], *arguments: Any) -> str:
        with pytest.raises(OSError) as raised:
            function(*arguments)
        return errno.errorcode[raised.value.errno or 0]

    with unix() as (reader, send):
        assert failing(side.detach, reader) == "ENOENT"
        filtered = side.attach(reader, returns(0))
        side.attach(reader, returns(3))
        send(b"12345")
        assert received(filtered) == [b"123"]
        side.detach(reader)
        assert failing(side.detach, reader) == "ENOENT"
        side.lock(reader)
        side.lock(reader)
        assert failing(side.detach, reader) == "EPERM"
        assert failing(side.attach, reader, returns(1)) == "EPERM"
        assert failing(side.attach, reader, []) == "EPERM"


class Everything:
    def run_packet(self, packet: Packet) -> int:
        return 0xFFFFFFFF


def test_an_ebpf_program_cannot_be_read_back() -> None:
    code = cbpf.encode(returns(1))
    with EmulatedPacketSocket() as target:
        assert sockets.get_filter(target) == b""
        sockets.attach(target, ClassicProgram(returns(1)), code)
        assert sockets.get_filter(target) == code
        sockets.attach(target, Everything(), None)
        with pytest.raises(PermissionError):
            sockets.get_filter(target)
        sockets.detach(target)
        assert sockets.get_filter(target) == b""
    with pytest.raises(OSError) as raised:
        sockets.get_filter(target)
    assert raised.value.errno == errno.EBADF


def test_streams_are_refused_because_nobody_sees_their_packets() -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        client = stack.enter_context(socket.create_connection(server.getsockname()))
        pair = socket.socketpair()
        for stream in (server, client, *map(stack.enter_context, pair)):
            with pytest.raises(OSError, match="stream") as raised:
                sockets.wrap(stream)
            assert raised.value.errno == errno.EOPNOTSUPP


def test_what_is_no_socket_is_refused_and_leaks_nothing() -> None:
    with Path("/dev/null").open("rb") as file, pytest.raises(OSError) as raised:
        sockets.wrap(file)
    assert raised.value.errno == errno.ENOTSOCK
    with unix() as (reader, _):
        with pytest.raises(OSError) as raised:
            sockets.attach(reader, Everything(), None)
        assert raised.value.errno == errno.ENOTSOCK
        wrapped = sockets.wrap(reader)
    with pytest.raises(OSError) as raised:
        sockets.attach(wrapped, Everything(), None)
    assert raised.value.errno == errno.EBADF


def test_a_socket_has_one_slot_however_often_it_is_wrapped() -> None:
    with unix() as (reader, _):
        first = sockets.wrap(reader)
        assert sockets.wrap(reader) is first and sockets.wrap(first) is first
        assert sockets.is_emulated(first) and not sockets.is_emulated(reader)
        assert first.fileno() == reader.fileno() and first.family == socket.AF_UNIX


def test_drain_empties_the_queue_and_keeps_the_blocking_mode() -> None:
    with inet(socket.AF_INET, "127.0.0.1", "127.0.0.1") as (reader, send):
        wrapped = sockets.wrap(reader)
        for _ in range(3):
            send(b"x")
        assert sockets.drainable(wrapped) and sockets.drain(wrapped) == 3 and reader.gettimeout() is None
    with unix() as (reader, _):
        assert not sockets.drainable(sockets.wrap(reader))


def test_ancillary_data_that_the_caller_asked_for_still_comes() -> None:
    with inet(socket.AF_INET, "127.0.0.1", "127.0.0.1") as (reader, send):
        reader.setsockopt(socket.SOL_IP, 12, 1)
        wrapped = sockets.wrap(reader)
        sockets.attach(wrapped, Everything(), None)
        send(b"x")
        assert [(level, kind) for level, kind, _ in wrapped.recvmsg(10, 256)[1]] == [(0, 2)]


def test_asyncio_s_sockets_can_be_wrapped() -> None:
    async def run() -> bytes:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(asyncio.DatagramProtocol, local_addr=("127.0.0.1", 0))
        try:
            loop_socket = transport.get_extra_info("socket")
            wrapped = sockets.wrap(loop_socket)
            assert isinstance(wrapped, FilteredSocket) and sockets.layout_of(wrapped).name == "udp"
            sockets.attach(wrapped, ClassicProgram(returns(10)), b"")
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                sender.sendto(b"abcdef", loop_socket.getsockname())
            return wrapped.recv(10)
        finally:
            transport.close()

    assert asyncio.run(run()) == b"ab"


def test_layouts_are_those_of_the_socket() -> None:
    expected = {
        "unix dgram": "unix",
        "unix seqpacket": "unix",
        "udp4": "udp",
        "udp6": "udp",
        "udp4 on an IPv6 socket": "udp",
        "netlink": "netlink",
    }
    for name, layout in expected.items():
        with KINDS[name]() as (reader, _):
            assert sockets.layout_of(sockets.wrap(reader)).name == layout
    for interface, kind, layout in (("lo", 3, "packet_ethernet"), ("lo", 2, "packet_dgram"), (None, 3, "packet")):
        with EmulatedPacketSocket(interface, kind) as emulated:
            assert sockets.layout_of(emulated).name == layout


@pytest.mark.requires("netns")
@pytest.mark.parametrize("kind", [socket.SOCK_RAW, socket.SOCK_DGRAM])
def test_real_packet_sockets_filter_as_in_the_kernel(netns: Any, kind: int) -> None:
    rng = random.Random(3)
    loads = [returns_load(cbpf.B, k) for k in (0, 12, 13, 14, 20)]
    loads += [returns_load(cbpf.B, NET + k) for k in (0, 1, 9)]
    loads += [returns_load(cbpf.W, AD + k) for k in (4, 8, 28, 48)] + [LOADS["len"], LOADS["protocol"], returns(7)]
    for program in loads:
        readers = []
        for side in (Kernel(), Emulator()):
            reader = netns.socket(socket.AF_PACKET, kind, 0)
            reader.bind(("lo", 3))
            readers.append(side.attach(reader, program))
        with netns.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender:
            sender.bind(("lo", 0))
            for _ in range(20):
                tag = rng.choice([b"", b"\x81\0\x60\x64"])
                sender.send(bytes(12) + tag + b"\x08\0" + rng.randbytes(40))
        kernel, emulated = map(received, readers)
        for reader in readers:
            reader.close()
        assert kernel == emulated
