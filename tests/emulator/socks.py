"""Programs that look sockets up, and real sockets with emulated ones that are like them."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address
from typing import Any

from mapcode import EXIT, Code, call, copy, made, mov, put, stack, the_map
from sides import FRAME, Side

from kbpf.emulator.environment import Environment
from kbpf.emulator.process_sock import sock_of
from kbpf.emulator.sock import Sock
from kbpf.emulator.socket_table import SocketTable
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.specs import MapSpec, ProgramSpec
from kbpf.testing.network import NetworkNamespace
from kbpf.uapi.constants import SO_MARK

OUT = 160
MAPS = (
    MapSpec(type="array", key_size=4, value_size=36, max_entries=1),
    MapSpec(type="array", key_size=4, value_size=OUT, max_entries=1),
)
SIZES = {1: ebpf.B, 2: ebpf.H, 4: ebpf.W, 8: ebpf.DW}


def tuple_of(remote: str, remote_port: int, local: str, local_port: int) -> bytes:
    """``struct bpf_sock_tuple``."""
    ports = struct.pack("!HH", remote_port, local_port)
    return ip_address(remote).packed + ip_address(local).packed + ports


def element(index: int) -> Code:
    """The address of a map's only element, in R0; the program ends with 0 without."""
    return [
        *put(-8, 0), *the_map(1, index), *stack(2, -8), *call("map_lookup_elem"),
        Instruction(ebpf.JMP | ebpf.JNE, 0, 0, 2), *mov(0, 0), EXIT,
    ]  # fmt: skip


def keep(offset: int, size: int, to: int, sock: int = 8) -> Code:
    """Copy what lies at `offset` of a socket to the second map's value, which R7 points to."""
    width = SIZES[size]
    return [
        Instruction(ebpf.LDX | ebpf.MEM | width, 3, sock, offset),
        Instruction(ebpf.STX | ebpf.MEM | width, 7, 3, to),
    ]


def keep_result(to: int) -> Code:
    return [Instruction(ebpf.STX | ebpf.MEM | ebpf.DW, 7, 0, to)]


#: All that ``struct bpf_sock`` has, but for rx_queue_mapping, which depends on how packets came.
WORDS: Code = [i for at in range(0, 76, 4) for i in keep(at, 4, at)]
#: The same without what a socket that may not be whole does not show.
COMMON: Code = [i for at in (0, 4, *range(24, 76, 4)) for i in keep(at, 4, at)]


def looks_up(helper: str, size: int, body: Sequence[Instruction], netns: int = -1, flags: int = 0) -> Code:
    """A program that looks up the tuple in the first map, and runs `body` with the socket in R8, the value of the
    second map in R7 and the context in R9. Returns whether there was one.
    """
    return [
        *copy(9, 1), *element(0), *copy(6, 0), *element(1), *copy(7, 0),
        *copy(1, 9), *copy(2, 6), *mov(3, size), *mov(4, netns), *mov(5, flags), *call(helper),
        Instruction(ebpf.JMP | ebpf.JNE, 0, 0, 2), *mov(0, 0), EXIT,
        *copy(8, 0), *body, *copy(1, 8), *call("sk_release"), *mov(0, 1), EXIT,
    ]  # fmt: skip


def here(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call it in no namespace: the emulator has its own."""
    return function(*arguments)


class Looker:
    """A loaded program of one side that looks sockets up."""

    def __init__(self, side: Side, fds: tuple[int, ...], program: int, run: Callable[..., Any]) -> None:
        self.backend = side.backend
        self.given, self.kept = fds
        self.program = program
        self.run = run

    def __call__(self, tuple: bytes, data: bytes = FRAME) -> tuple[int, ...]:
        """What the program returned, and the words that it kept."""
        self.backend.map_update(self.given, bytes(4), tuple.ljust(36, b"\0"))
        self.backend.map_update(self.kept, bytes(4), bytes(OUT))
        ran = self.run(self.backend.program_run, self.program, data, b"")
        return ran.value, *memoryview(self.backend.map_lookup(self.kept, bytes(4), OUT)).cast("I")


@contextmanager
def looker(
    side: Side, program: Code, run: Callable[..., Any], type: str = "sched_cls", more: Sequence[int] = ()
) -> Iterator[Looker]:
    """`more` are descriptors of maps behind the first two."""
    attach = "cgroup_inet_egress" if type == "cgroup_skb" else None
    with made(side, *MAPS) as fds:
        spec = ProgramSpec(type=type, expected_attach_type=attach, instructions=tuple(program), license="GPL")
        fd = side.backend.program_load(spec, [*fds, *more])
        try:
            yield Looker(side, fds, fd, run)
        finally:
            side.backend.close(fd)


@contextmanager
def lookers(
    kernel: Side, emulator: Side, namespace: NetworkNamespace, program: Code, type: str = "sched_cls"
) -> Iterator[tuple[Looker, Looker]]:
    """The program on both sides; the kernel's runs in the namespace."""
    with (
        looker(kernel, program, namespace.call, type) as one,
        looker(emulator, program, here, type) as other,
    ):
        yield one, other


class Scene:
    """Real sockets in a namespace, and the emulator's table with sockets like them."""

    def __init__(self, namespace: NetworkNamespace, machine: Environment) -> None:
        self.namespace = namespace
        self.table = machine.sockets = SocketTable()
        self._open = ExitStack()
        self._marks = 0
        self.socks: dict[socket.socket, Sock] = {}

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def own(self, opened: socket.socket) -> socket.socket:
        """Close it at the end; until then it has a mark of its own."""
        self._open.enter_context(opened)
        self._marks += 1
        opened.setsockopt(socket.SOL_SOCKET, SO_MARK, self._marks)
        return opened

    def socket(self, family: int, type: int) -> socket.socket:
        return self.own(self.namespace.socket(family, type))

    def listed(self, opened: socket.socket, **fields: Any) -> Sock:
        """Put a socket into the table, as it is now."""
        sock = self.socks[opened] = sock_of(opened.fileno())
        for name, value in fields.items():
            setattr(sock, name, value)
        self.table.add(sock)
        return sock

    def udp(self, address: str, port: int, device: str = "", reuse: bool = False) -> socket.socket:
        opened = self.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        if reuse:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if device:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
        opened.bind((address, port))
        return opened
