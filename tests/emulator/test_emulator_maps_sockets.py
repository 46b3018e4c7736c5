"""Maps of sockets against the kernel, over sockets that this process holds."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from random import Random
from typing import Any

import pytest
from mapcode import Code, attempt, call, copy, described_value, made, mov, put, stack, the_map
from sides import Side
from socks import MAPS, OUT, WORDS, element, here, keep, keep_result, looker

from kbpf.emulator.backend import EmulatorBackend
from kbpf.emulator.events import run_event
from kbpf.emulator.packet import Packet
from kbpf.emulator.process_sock import sock_of
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.specs import MapSpec, ProgramSpec
from kbpf.uapi import constants as uapi
from kbpf.uapi.structs import STRUCTS

pytestmark = pytest.mark.requires("kernel")

KINDS = ["sockmap", "sockhash", "reuseport_sockarray"]


def test_a_sockhash_has_no_more_buckets_than_the_kernel_has_room_for(kernel: Side, emulator: Side) -> None:
    spec = MapSpec(type="sockhash", key_size=4, value_size=4, max_entries=1 << 28)
    refused = [attempt(partial(side.backend.map_create, spec)) for side in (kernel, emulator)]
    assert refused == [("EINVAL", None)] * 2


class Sockets:
    """Sockets of many kinds and states, by name."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self.named: dict[str, socket.socket] = {}

    def __enter__(self) -> Sockets:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def make(self, name: str, *kind: int, reuse: bool = False, bind: str | None = None) -> socket.socket:
        made = self.own(name, socket.socket(*kind))
        if reuse:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if bind is not None:
            made.bind((bind, 0))
        return made

    def own(self, name: str, made: socket.socket) -> socket.socket:
        self.named[name] = self._open.enter_context(made)
        return made


INET, INET6, UNIX = socket.AF_INET, socket.AF_INET6, socket.AF_UNIX
STREAM, DGRAM, SEQPACKET, RAW = socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET, socket.SOCK_RAW
LOOPBACK, LOOPBACK6 = "127.0.0.1", "::1"


@pytest.fixture
def sockets() -> Iterator[Sockets]:
    with Sockets() as made:
        make = made.make
        make("tcp", INET, STREAM)
        make("tcp bound", INET, STREAM, bind=LOOPBACK)
        listener = make("tcp listener", INET, STREAM, bind=LOOPBACK)
        listener.listen()
        made.own("tcp client", socket.create_connection(listener.getsockname()))
        made.own("tcp child", listener.accept()[0])
        make("tcp6 listener", INET6, STREAM, bind=LOOPBACK6).listen()
        make("tcp listener that shares", INET, STREAM, bind=LOOPBACK, reuse=True).listen()
        make("tcp that shares", INET, STREAM, bind=LOOPBACK, reuse=True)
        make("udp", INET, DGRAM)
        make("udp that would share", INET, DGRAM, reuse=True)
        make("udp bound", INET, DGRAM, bind=LOOPBACK)
        make("udp connected", INET, DGRAM).connect((LOOPBACK, 9))
        make("udp that shares", INET, DGRAM, bind=LOOPBACK, reuse=True)
        make("udp6 that shares", INET6, DGRAM, bind=LOOPBACK6, reuse=True)
        make("udp6 for both that shares", INET6, DGRAM, bind="::", reuse=True)
        make("udp that shared", INET, DGRAM, bind=LOOPBACK, reuse=True).connect((LOOPBACK, 9))
        make("raw", INET, RAW, socket.IPPROTO_ICMP)
        make("raw6", INET6, RAW, socket.IPPROTO_ICMPV6)
        make("packet", socket.AF_PACKET, RAW, 0)
        make("netlink", socket.AF_NETLINK, RAW, 0)
        make("unix datagrams", UNIX, DGRAM)
        make("unix stream", UNIX, STREAM)
        unix = make("unix listener", UNIX, STREAM)
        unix.bind("")
        unix.listen()
        for kind, name in ((DGRAM, "datagrams"), (STREAM, "stream"), (SEQPACKET, "packets")):
            one, other = socket.socketpair(UNIX, kind)
            made.own(f"unix {name}, one end", one)
            made.own(f"unix {name}, other end", other)
        with contextlib.suppress(OSError):
            make("vsock", socket.AF_VSOCK, STREAM)
        with contextlib.suppress(OSError):
            make("mptcp", INET, STREAM, socket.IPPROTO_MPTCP)
        yield made


def both(
    kernel: Side, emulator: Side, type: str, value_size: int, entries: int, script: Callable[[Side, int], list[Any]]
) -> None:
    """What a script gives on both sides is the same."""
    results = []
    for side in (kernel, emulator):
        with made(side, MapSpec(type=type, key_size=4, value_size=value_size, max_entries=entries)) as (fd,):
            results.append(script(side, fd))
    assert results[1] == results[0]


def key(index: int) -> bytes:
    return struct.pack("=I", index)


@pytest.mark.parametrize("type", KINDS)
def test_which_sockets_a_map_takes(kernel: Side, emulator: Side, type: str, sockets: Sockets) -> None:
    def script(side: Side, fd: int) -> list[Any]:
        backend, results = side.backend, []
        for name, one in sockets.named.items():
            update = partial(backend.map_update, fd, value=struct.pack("=q", one.fileno()))
            steps: list[Callable[[], Any]] = [
                partial(update, key(0)), partial(backend.map_lookup, fd, key(0), 8), partial(update, key(1)),
                *(partial(backend.map_delete, fd, key(index)) for index in (0, 0, 1)),
            ]  # fmt: skip
            results += [name, *map(attempt, steps)]
        return results

    both(kernel, emulator, type, 8, 2, script)


@pytest.mark.parametrize("value_size", [4, 8])
@pytest.mark.parametrize("type", KINDS)
def test_commands_in_random_order(kernel: Side, emulator: Side, type: str, value_size: int, sockets: Sockets) -> None:
    names = ["tcp listener that shares", "udp that shares", "udp6 that shares", "tcp", "unix datagrams", "packet"]
    descriptors = [*(sockets.named[name].fileno() for name in names), 0, 98765, -1, -7]

    def script(side: Side, fd: int) -> list[Any]:
        rng, backend, results = Random(type), side.backend, []
        for _ in range(400):
            number = rng.choice(descriptors)
            value = number.to_bytes(value_size, "little", signed=True)
            command, arguments = [
                ("map_update", (key(rng.randrange(4)), value, rng.choice((0, 0, 1, 2, 3, 4, 8)))),
                ("map_lookup", (key(rng.randrange(4)), value_size, rng.choice((0, 0, 0, 4)))),
                ("map_delete", (key(rng.randrange(4)),)),
                ("map_lookup_and_delete", (key(0), value_size)),
            ][rng.choice((0, 0, 0, 1, 1, 2, 3))]
            results.append((command, arguments, attempt(lambda: getattr(backend, command)(fd, *arguments))))  # noqa: B023
        return results

    both(kernel, emulator, type, value_size, 3, script)


@pytest.mark.parametrize("type", KINDS)
def test_keys_follow_one_another(kernel: Side, emulator: Side, type: str, sockets: Sockets) -> None:
    def script(side: Side, fd: int) -> list[Any]:
        backend = side.backend
        value = struct.pack("=q", sockets.named["udp that shares"].fileno())
        backend.map_update(fd, key(1), value)
        keys = (None, key(0), key(1), key(2), key(3))
        return [attempt(lambda: backend.map_next_key(fd, given, 4)) for given in keys]  # noqa: B023

    both(kernel, emulator, type, 8, 3, script)


@pytest.mark.parametrize("type", KINDS)
def test_a_closed_socket_is_in_no_map(kernel: Side, emulator: Side, type: str, sockets: Sockets) -> None:
    def script(side: Side, fd: int) -> list[Any]:
        with socket.socket(INET, DGRAM) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            one.bind((LOOPBACK, 0))
            side.backend.map_update(fd, key(0), struct.pack("=q", one.fileno()))
            other = one.dup()
        there = len(side.backend.map_lookup(fd, key(0), 8))
        other.close()
        return [there, attempt(lambda: side.backend.map_lookup(fd, key(0), 8))]

    both(kernel, emulator, type, 8, 1, script)


@pytest.mark.parametrize("change", ["connect", "stop listening", "share no longer"])
@pytest.mark.parametrize("type", KINDS)
def test_a_socket_that_changes(kernel: Side, emulator: Side, type: str, change: str) -> None:
    def script(side: Side, fd: int) -> list[Any]:
        with socket.socket(INET, STREAM if change == "stop listening" else DGRAM) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            one.bind((LOOPBACK, 0))
            if change == "stop listening":
                one.listen()
            side.backend.map_update(fd, key(0), struct.pack("=q", one.fileno()))
            if change == "connect":
                one.connect((LOOPBACK, 9))
            elif change == "stop listening":
                one.shutdown(socket.SHUT_RDWR)
            else:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)
            found = attempt(lambda: side.backend.map_lookup(fd, key(0), 8))
            return [found if isinstance(found, tuple) else len(found)]

    both(kernel, emulator, type, 8, 1, script)


def test_a_socket_is_in_an_array_or_in_socket_maps(kernel: Side, emulator: Side, sockets: Sockets) -> None:
    def script(side: Side, array: int) -> list[Any]:
        backend, value = side.backend, struct.pack("=q", sockets.named["udp that shares"].fileno())
        with made(side, MapSpec(type="sockmap", key_size=4, value_size=8, max_entries=1)) as (other,):
            steps: list[Callable[[], Any]] = [
                lambda: backend.map_update(array, key(0), value),
                lambda: backend.map_update(other, key(0), value),
                lambda: backend.map_delete(array, key(0)),
                lambda: backend.map_update(other, key(0), value),
                lambda: backend.map_update(array, key(0), value),
                lambda: backend.map_delete(other, key(0)),
                lambda: backend.map_update(array, key(0), value),
            ]
            return [attempt(step) for step in steps]

    both(kernel, emulator, "reuseport_sockarray", 8, 1, script)


def test_batches_are_not_supported(kernel: Side, emulator: Side) -> None:
    def script(side: Side, fd: int) -> list[Any]:
        return [
            attempt(lambda: side.backend.map_lookup_batch(fd, None, 1, 4, 8)),
            attempt(lambda: side.backend.map_update_batch(fd, key(0), bytes(8), 1)),
            attempt(lambda: side.backend.map_delete_batch(fd, key(0), 1)),
        ]

    both(kernel, emulator, "sockhash", 8, 1, script)


def found_in_map(body: Code, index: int = 2) -> Code:
    """A program that looks into a map of sockets at 0, and runs `body` with the socket in R8."""
    return [
        *copy(9, 1), *element(1), *copy(7, 0),
        *put(-8, 0), *the_map(1, index), *stack(2, -8), *call("map_lookup_elem"),
        Instruction(ebpf.JMP | ebpf.JNE, 0, 0, 2), *mov(0, 0), EXIT,
        *copy(8, 0), *body, *copy(1, 8), *call("sk_release"), *mov(0, 1), EXIT,
    ]  # fmt: skip


EXIT = Instruction(ebpf.JMP | ebpf.EXIT)


@pytest.mark.parametrize("type", ["sockmap", "sockhash"])
def test_programs_find_sockets(kernel: Side, emulator: Side, type: str, sockets: Sockets) -> None:
    for name, one in sockets.named.items():
        results = []
        for side in (kernel, emulator):
            with made(side, MapSpec(type=type, key_size=4, value_size=8, max_entries=1)) as (fd,):
                with contextlib.suppress(OSError):
                    side.backend.map_update(fd, key(0), struct.pack("=q", one.fileno()))
                with looker(side, found_in_map(WORDS), here, more=(fd,)) as look:
                    results.append(look(b""))
        if name == "tcp child":
            # A process is not told which end has connected, on which what IPv4 address is kept depends.
            continue
        assert results[1] == results[0], name


@pytest.mark.parametrize("type", ["sockmap", "sockhash"])
@pytest.mark.parametrize("flags", [0, 1, 2, 3])
def test_programs_put_sockets_in_and_take_them_out(
    kernel: Side, emulator: Side, type: str, flags: int, sockets: Sockets
) -> None:
    spec = MapSpec(type=type, key_size=4, value_size=8, max_entries=2)
    for index in (0, 1, 2):
        body = [
            *put(-16, index), *the_map(1, 2), *stack(2, -16), *copy(3, 8), *mov(4, flags), *call("map_update_elem"),
            *keep_result(0), *the_map(1, 2), *stack(2, -16), *call("map_delete_elem"), *keep_result(8),
            *the_map(1, 2), *stack(2, -16), *call("map_delete_elem"), *keep_result(16),
        ]  # fmt: skip
        results = []
        for side in (kernel, emulator):
            with made(side, spec) as (fd,):
                value = struct.pack("=q", sockets.named["udp bound"].fileno())
                side.backend.map_update(fd, key(0), value)
                with looker(side, found_in_map(body), here, more=(fd,)) as look:
                    results.append((look(b""), attempt(lambda: side.backend.map_lookup(fd, key(0), 8))))  # noqa: B023
        assert results[1] == results[0], index


LOOKUP = STRUCTS["bpf_sk_lookup"].fields


def asks(family: int, protocol: int) -> bytes:
    given = bytearray(STRUCTS["bpf_sk_lookup"].size)
    for name, value in (("family", family), ("protocol", protocol), ("local_port", 53)):
        given[LOOKUP[name].offset : LOOKUP[name].offset + 4] = struct.pack("=I", value)
    return bytes(given)


def assigns(flags: tuple[int, ...], null_last: bool = False) -> Code:
    """A lookup program that assigns the socket with each of the flags, and returns whether all went well."""
    assigned: Code = []
    for number, flag in enumerate(flags):
        sock = mov(2, 0) if null_last and number == len(flags) - 1 else copy(2, 8)
        assigned += [*copy(1, 9), *sock, *mov(3, flag), *call("sk_assign"), *keep_result(8 * number)]
    chosen = [
        Instruction(ebpf.LDX | ebpf.MEM | ebpf.DW, 1, 9, LOOKUP["sk"].offset), *mov(0, 1),
        Instruction(ebpf.JMP | ebpf.JEQ | ebpf.X, 1, 8, 3), *mov(0, 2), Instruction(ebpf.JMP | ebpf.JEQ, 1, 0, 1),
        *mov(0, 3), *keep_result(56),
    ]  # fmt: skip
    return found_in_map([*assigned, *chosen])


@pytest.mark.parametrize("flags", [(0,), (1,), (2,), (4,), (0, 0), (0, 1), (2, 1), (1 << 31,)])
@pytest.mark.parametrize("null_last", [False, True])
def test_lookup_programs_assign_sockets(
    kernel: Side, emulator: Side, flags: tuple[int, ...], null_last: bool, sockets: Sockets
) -> None:
    names = ["tcp listener", "tcp client", "tcp6 listener", "tcp listener that shares", "udp bound", "udp connected",
             "udp that shares", "udp6 that shares", "udp6 for both that shares", "unix datagrams",
             "unix stream, one end"]  # fmt: skip
    contexts = [asks(family, protocol) for family in (INET, INET6) for protocol in (6, 17)]
    results: list[list[Any]] = []
    for side in (kernel, emulator):
        given: list[Any] = []
        results.append(given)
        maps = [MapSpec(type="array", key_size=4, value_size=36, max_entries=1),
                MapSpec(type="array", key_size=4, value_size=160, max_entries=1),
                MapSpec(type="sockmap", key_size=4, value_size=8, max_entries=1)]  # fmt: skip
        with made(side, *maps) as fds:
            spec = ProgramSpec(
                type="sk_lookup", expected_attach_type="sk_lookup", instructions=tuple(assigns(flags, null_last))
            )
            program = side.backend.program_load(spec, fds)
            for name in names:
                side.backend.map_update(fds[2], key(0), struct.pack("=q", sockets.named[name].fileno()))
                for context in contexts:
                    ran = attempt(lambda: side.backend.program_run(program, b"", context))  # noqa: B023
                    shown = ran if isinstance(ran, tuple) and len(ran) == 2 else (ran.value, ran.context)
                    kept = side.backend.map_lookup(fds[1], key(0), 160)[:64]
                    given.append((name, context, shown, kept))
            side.backend.close(program)
    assert results[1] == results[0]
    if flags == (0,) and not null_last:
        assert any(shown[0] == 1 and any(shown[1][:8]) for _, _, shown, _ in results[0])
        assert any(shown[0] == "ENOTSUP" for _, _, shown, _ in results[0])


def test_an_emulated_socket_is_what_its_descriptor_stands_for(kernel: Side, emulator: Side) -> None:
    storage = MapSpec(
        type="sk_storage", key_size=4, value_size=8, flags=uapi.BPF_F_NO_PREALLOC, **described_value("u64")
    )
    results = []
    for side in (kernel, emulator):
        backend = side.backend
        with (
            made(side, MapSpec(type="sockmap", key_size=4, value_size=8, max_entries=1), storage) as (fd, values),
            backend.packet_socket(None) as one,
        ):
            value = struct.pack("=q", one.fileno())
            given = [attempt(partial(backend.map_update, fd, key(0), value))]
            backend.map_update(values, value[:4], b"12345678")
            given += [backend.map_lookup(values, value[:4], 8)]
            given += [attempt(partial(backend.map_delete, values, value[:4])) for _ in range(2)]
            results.append(given)
    assert results[1] == results[0]


@pytest.mark.parametrize("type", KINDS)
def test_a_socket_of_the_group_is_selected(kernel: Side, emulator: Side, type: str, sockets: Sockets) -> None:
    first = sockets.make("first of the group", INET, DGRAM, bind=LOOPBACK, reuse=True)
    second = sockets.make("second of the group", INET, DGRAM, reuse=True)
    second.bind(first.getsockname())
    names = ["udp that shares", "tcp listener that shares", "udp6 that shares", "first of the group", "udp bound",
             "second of the group", "tcp client", "unix datagrams", None]  # fmt: skip
    selects = [*copy(9, 1), *element(1), *copy(7, 0)]
    for index in range(len(names)):
        selects += [
            *put(-16, index), *copy(1, 9), *the_map(2, 2), *stack(3, -16), *mov(4, index % 2),
            *call("sk_select_reuseport"), *keep_result(8 * index),
        ]  # fmt: skip
    program = [*selects, *mov(0, 1), EXIT]
    results = []
    for side in (kernel, emulator):
        spec = MapSpec(type=type, key_size=4, value_size=8, max_entries=len(names))
        with made(side, *MAPS, spec) as fds:
            for index, name in enumerate(names):
                if name is not None:
                    value = struct.pack("=q", sockets.named[name].fileno())
                    attempt(partial(side.backend.map_update, fds[2], key(index), value))
            loaded = side.backend.program_load(
                ProgramSpec(type="sk_reuseport", instructions=tuple(program), license="GPL"), fds
            )
            selected = by_kernel(loaded, first, second) if side is kernel else by_emulator(loaded, side, first)
            results.append((selected, memoryview(side.backend.map_lookup(fds[1], key(0), OUT)).cast("q").tolist()))
            side.backend.close(loaded)
    assert results[1] == results[0]
    assert results[0][0] == second.fileno()


def by_kernel(program: int, *group: socket.socket) -> int:
    """Which socket of the group a datagram comes to."""
    group[0].setsockopt(socket.SOL_SOCKET, uapi.SO_ATTACH_REUSEPORT_EBPF, program)
    with socket.socket(INET, DGRAM) as sender:
        sender.sendto(b"data", group[0].getsockname())
    ready, _, _ = select.select(group, [], [], 5)
    group[0].setsockopt(socket.SOL_SOCKET, uapi.SO_DETACH_REUSEPORT_BPF, 0)
    return int(ready[0].fileno())


def by_emulator(program: int, side: Side, first: socket.socket) -> int:
    assert isinstance(side.backend, EmulatorBackend)
    packet = Packet(buffer=struct.pack("!HHHH", 9, first.getsockname()[1], 12, 0) + b"data")
    event = run_event(side.backend.program(program), sock=sock_of(first.fileno()), packet=packet)
    selected = event.context["selected"]
    return int(selected.descriptor)


#: What a process is not told, or not all bits of.
UNTOLD = {"rcv_nxt", "snd_nxt", "snd_una", "ecn_flags", "rate_delivered", "rate_interval_us", "srtt_us"}


@pytest.mark.parametrize("name", ["tcp client", "tcp child"])
def test_what_a_connection_has_counted(kernel: Side, emulator: Side, sockets: Sockets, name: str) -> None:
    client, child = sockets.named["tcp client"], sockets.named["tcp child"]
    for one, other in ((client, child), (child, client)) * 3:
        one.sendall(bytes(5000))
        left = 5000
        while left:
            left -= len(other.recv(left))
    fields = [(name, field) for name, field in STRUCTS["bpf_tcp_sock"].fields.items() if name not in UNTOLD]
    body: Code = []
    for place, (_, field) in enumerate(fields):
        body += keep(field.offset, field.size, 8 * place, 6)
    program = found_in_map([
        *copy(1, 8), *call("tcp_sock"), Instruction(ebpf.JMP | ebpf.JEQ, 0, 0, len(body) + 1), *copy(6, 0), *body
    ])  # fmt: skip
    results = []
    for side in (kernel, emulator):
        with made(side, MapSpec(type="sockmap", key_size=4, value_size=8, max_entries=1)) as (fd,):
            side.backend.map_update(fd, key(0), struct.pack("=q", sockets.named[name].fileno()))
            with looker(side, program, here, more=(fd,)) as look:
                shown = memoryview(struct.pack("=40I", *look(b"")[1:])).cast("Q")
                results.append({name: shown[place] for place, (name, _) in enumerate(fields)})
    assert results[1] == results[0]
