"""Sockets in maps whose programs have a say in what they receive and send: a scenario is run on both sides."""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from mapcode import EXIT, Code, call, copy, mov, stack, the_map
from sides import Side

from kbpf import emulator as emulated
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.specs import MapSpec, ProgramSpec
from kbpf.uapi.structs import STRUCTS

I = Instruction  # noqa: E741
DROP, PASS = 0, 1
INGRESS = 1
HERE = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
STREAM, DATAGRAM = socket.SOCK_STREAM, socket.SOCK_DGRAM
#: The attach types, and the types of program that go there.
VERDICT, PARSER, ANY_VERDICT = "sk_skb_stream_verdict", "sk_skb_stream_parser", "sk_skb_verdict"
MESSAGE = "sk_msg_verdict"
_RECORD = 64
LOG = MapSpec(type="queue", key_size=0, value_size=_RECORD, max_entries=256)
_SIZES = {2: ebpf.H, 4: ebpf.W, 8: ebpf.DW}


def returns(value: int) -> Code:
    return [*mov(0, value), EXIT]


def field(structure: str, name: str, register: int = 1) -> Code:
    """Load a field of the context, which R9 is, whole."""
    at = STRUCTS[structure].fields[name]
    return [I(ebpf.LDX | ebpf.MEM | _SIZES[at.size], register, 9, at.offset)]


def logs(structure: str, *names: str) -> Code:
    """Note fields down in the first map, each with 8 bytes. R9 is the context before and after."""
    code: Code = [I(ebpf.ST | ebpf.MEM | ebpf.DW, ebpf.FP, 0, at) for at in range(-_RECORD, 0, 8)]
    for number, name in enumerate(names):
        code += [*field(structure, name), I(ebpf.STX | ebpf.MEM | ebpf.DW, ebpf.FP, 1, 8 * number - _RECORD)]
    return [*code, *the_map(1, 0), *stack(2, -_RECORD), *mov(3, 0), *call("map_push_elem")]


def redirects(helper: str, key: int, flags: int = 0, map: int = 1) -> Code:
    """To what the map has at the key, which is a number."""
    code: Code = [*copy(1, 9), *the_map(2, map), *mov(3, key), *mov(4, flags)]
    if helper.endswith("hash"):
        code = [I(ebpf.ST | ebpf.MEM | ebpf.W, ebpf.FP, 0, -_RECORD - 8, key), *code, *stack(3, -_RECORD - 8)]
    return [*code, *call(helper), EXIT]


class World(NamedTuple):
    """One side, and what it must close."""

    side: Side
    stack: ExitStack

    @property
    def emulated(self) -> bool:
        return self.side.backend.name == "emulator"

    def keep(self, made: Any) -> Any:
        made.settimeout(0.3)
        return self.stack.enter_context(made)

    def open(self, family: int = socket.AF_INET, type: int = STREAM) -> Any:
        return self.keep((emulated.socket if self.emulated else socket.socket)(family, type))

    def listener(self, family: int = socket.AF_INET) -> Any:
        made = self.open(family)
        made.bind((HERE[family], 0))
        made.listen()
        return made

    def tcp(self, family: int = socket.AF_INET) -> tuple[Any, Any]:
        """A connection: who has connected, and who has accepted. What is sent goes at once."""
        server, client = self.listener(family), self.open(family)
        client.connect(server.getsockname())
        accepted = self.keep(server.accept()[0])
        for end in (client, accepted):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return client, accepted

    def map(self, type: str = "sockmap", size: int = 8) -> int:
        return self.fd(self.side.backend.map_create(MapSpec(type=type, key_size=4, value_size=8, max_entries=size)))

    def fd(self, fd: int) -> int:
        self.stack.callback(self.side.backend.close, fd)
        return fd

    def log(self) -> int:
        return self.fd(self.side.backend.map_create(LOG))

    def logged(self, log: int, fields: int) -> list[list[int]]:
        """What the programs have noted down, which is then forgotten."""
        found = []
        while True:
            try:
                record = self.side.backend.map_lookup_and_delete(log, None, _RECORD)
            except OSError as error:
                assert error.errno == errno.ENOENT
                return found
            found.append(list(memoryview(record).cast("Q"))[:fields])

    def load(self, code: Code, maps: Sequence[int] = (), place: str = VERDICT) -> int:
        type = "sk_msg" if place == MESSAGE else "sk_skb"
        spec = ProgramSpec(type=type, instructions=(*copy(9, 1), *code), expected_attach_type=place, license="GPL")
        return self.fd(self.side.backend.program_load(spec, maps))

    def run(self, map: int, code: Code, maps: Sequence[int] = (), place: str = VERDICT) -> int:
        """Have a program run for the sockets that are put into the map from now on; gives the link."""
        return self.fd(self.side.backend.link_create(self.load(code, maps, place), map, place))

    def refused(self, call: Any, *arguments: Any) -> Any:
        """What a command gives, "fd" for a descriptor, or the name of its errno."""
        given = said(call, *arguments)
        return "fd" if isinstance(given, int) and self.fd(given) else given

    def put(self, map: int, key: int, sock: Any, flags: int = 0) -> None:
        value = sock.fileno().to_bytes(8, "little")
        self.side.backend.map_update(map, key.to_bytes(4, "little"), value, flags)

    def take(self, map: int, key: int) -> None:
        self.side.backend.map_delete(map, key.to_bytes(4, "little"))


@contextmanager
def two_worlds(kernel: Side, emulator: Side) -> Iterator[tuple[World, World]]:
    emulated.reset()
    with ExitStack() as first, ExitStack() as second:
        yield World(kernel, first), World(emulator, second)


def same(worlds: tuple[World, World], scenario: Callable[[World], Any]) -> Any:
    """Run it on both; what it gives must be equal."""
    truth, found = (scenario(world) for world in worlds)
    assert found == truth
    return truth


def comes(sock: Any) -> bool:
    """Wait until there is something to read; what is redirected takes the kernel a moment."""
    return bool(select.select([sock], [], [], 2)[0])


def until(condition: Callable[[], bool]) -> bool:
    """Wait until it is so, which takes the kernel a moment, and the emulator none."""
    for _ in range(200):
        if condition():
            return True
        time.sleep(0.01)
    return False


def whole(sock: Any, size: int) -> bytes:
    """So many bytes, in however many pieces they come; fewer where no more come."""
    found = b""
    while len(found) < size:
        part = said(sock.recv, size - len(found))
        if not isinstance(part, bytes) or not part:
            break
        found += part
    return found


def said(call: Callable[..., Any], *arguments: Any) -> Any:
    """What it gives, or the name of the errno that it ends with; None where it waits in vain."""
    try:
        return call(*arguments)
    except TimeoutError:
        return None
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, os.strerror(error.errno or 0))
