"""Programs that choose among sockets that share a port, on real and emulated sockets: both do the same."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest

import kbpf
from kbpf import emulator
from kbpf.isa import cbpf, ebpf
from kbpf.isa.ebpf import Instruction, ld_imm64
from kbpf.specs import MapSpec, ProgramSpec
from kbpf.testing.network import NetworkNamespace
from kbpf.uapi.enums import HELPERS

pytestmark = pytest.mark.requires("kernel", "netns")

I = Instruction  # noqa: E741
UDP, TCP = socket.SOCK_DGRAM, socket.SOCK_STREAM
HOSTS = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
PORT = 7000
ARRAY = MapSpec(type="reuseport_sockarray", key_size=4, value_size=8, max_entries=3)
#: Senders' ports by their low byte: the place in the map, one that is not there, and what is to be dropped.
FIRST, LAST, NOWHERE, DROPPED = 0x1B00, 0x1B02, 0x1B07, 0x1B09


def choosing() -> ProgramSpec:
    """Choose by the low byte of the source port."""
    code = [
        I(ebpf.ALU64 | ebpf.MOV | ebpf.X, 6, 1),
        I(ebpf.ST | ebpf.MEM | ebpf.DW, 10, 0, -8),
        I(ebpf.ALU64 | ebpf.MOV, 2, 0, 0, 1),
        I(ebpf.ALU64 | ebpf.MOV | ebpf.X, 3, 10),
        I(ebpf.ALU64 | ebpf.ADD, 3, 0, 0, -8),
        I(ebpf.ALU64 | ebpf.MOV, 4, 0, 0, 1),
        I(ebpf.JMP | ebpf.CALL, 0, 0, 0, HELPERS["skb_load_bytes"]),
        I(ebpf.LDX | ebpf.MEM | ebpf.B, 7, 10, -8),
        I(ebpf.ALU64 | ebpf.MOV, 0, 0, 0, 0),
        I(ebpf.JMP | ebpf.JEQ, 7, 0, 8, DROPPED & 0xFF),
        I(ebpf.ALU64 | ebpf.MOV | ebpf.X, 1, 6),
        *ld_imm64(2, 0, ebpf.PSEUDO_MAP_IDX),
        I(ebpf.ALU64 | ebpf.MOV | ebpf.X, 3, 10),
        I(ebpf.ALU64 | ebpf.ADD, 3, 0, 0, -8),
        I(ebpf.ALU64 | ebpf.MOV, 4, 0, 0, 0),
        I(ebpf.JMP | ebpf.CALL, 0, 0, 0, HELPERS["sk_select_reuseport"]),
        I(ebpf.ALU64 | ebpf.MOV, 0, 0, 0, 1),
        I(ebpf.JMP | ebpf.EXIT),
    ]
    return ProgramSpec(
        type="sk_reuseport", instructions=tuple(code), maps=(ARRAY,), expected_attach_type="sk_reuseport_select"
    )


def returning(type: str, value: int, attach_type: str | None = None) -> ProgramSpec:
    code = (I(ebpf.ALU64 | ebpf.MOV, 0, 0, 0, value), I(ebpf.JMP | ebpf.EXIT))
    return ProgramSpec(type=type, instructions=code, expected_attach_type=attach_type)


class Side:
    """One backend, and three sockets that share a port."""

    def __init__(
        self, backend: str, stack: contextlib.ExitStack, family: int = socket.AF_INET, type: int = UDP
    ) -> None:
        self.backend, self.stack, self.family, self.type = backend, stack, family, type
        self.place = HOSTS[socket.AddressFamily(family)], PORT
        self.group = [self.member() for _ in range(3)]

    def open(self, type: int | None = None) -> Any:
        make = emulator.socket if self.backend == "emulator" else socket.socket
        made = self.stack.enter_context(make(self.family, self.type if type is None else type))
        made.settimeout(5)
        return made

    def member(self) -> Any:
        made = self.open()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.bind(self.place)
        if self.type == TCP:
            made.listen()
        return made

    def load(self, spec: ProgramSpec) -> kbpf.Program:
        return self.stack.enter_context(kbpf.load_program(spec, backend=self.backend))

    def send(self, port: int) -> Any:
        """Send from a port, or connect; who got it, or the errno."""
        sender = self.open()
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sender.bind((self.place[0], port))
        try:
            sender.connect(self.place)
            if self.type == UDP:
                sender.send(b"data")
            heard = self.heard()
            if self.type == UDP and not heard:
                # What came back is told of the next time.
                sender.send(b"data")
            return heard
        except OSError as failure:
            return errno.errorcode[failure.errno or 0]
        finally:
            if self.type == TCP:
                # Without a rest that waits.
                sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
            sender.close()

    def heard(self) -> list[int]:
        """The places of the sockets that something came to."""
        found = []
        for place, one in enumerate(self.group):
            one.settimeout(0)
            with contextlib.suppress(BlockingIOError):
                if self.type == UDP:
                    one.recv(10)
                else:
                    one.accept()[0].close()
                found.append(place)
        return found


def same(namespace: NetworkNamespace, scenario: Callable[[Side], Any], *how: int) -> Any:
    def on(backend: str) -> Any:
        emulator.reset()
        with contextlib.ExitStack() as stack:
            return scenario(Side(backend, stack, *how))

    expected = namespace.call(on, "kernel")
    assert on("emulator") == expected
    return expected


@pytest.mark.parametrize("type", [UDP, TCP])
@pytest.mark.parametrize("family", HOSTS)
def test_a_program_chooses_from_a_map(netns: NetworkNamespace, family: int, type: int) -> None:
    def scenario(side: Side) -> Any:
        program = side.load(choosing())
        # The second is not in the map.
        for place in (0, 2):
            program.maps[0][place] = side.group[place]
        with program.attach(side.group[1]) as link:
            assert (link.attached, link.socket, link.backend) == (program, side.group[1], side.backend)
            chosen = [side.send(port) for port in (FIRST, LAST, LAST + 0x100, FIRST + 0x100)]
            # Left to the hash, which is not the same on both.
            answers = [chosen, len(side.send(NOWHERE)), side.send(DROPPED)]
        # As if no program was there ever.
        return [*answers, len(side.send(DROPPED + 0x100)), link.attached, link.detach()]

    assert same(netns, scenario, family, type) == [[[0], [2], [2], [0]], 1, "ECONNREFUSED", 1, None, False]


@pytest.mark.parametrize("type", [UDP, TCP])
def test_filters_return_the_place(netns: NetworkNamespace, type: int) -> None:
    def scenario(side: Side) -> Any:
        second = kbpf.Filter([cbpf.stmt(cbpf.RET | cbpf.K, 1)])
        answers = []
        with kbpf.attach_reuseport(side.group[0], second) as link:
            answers.append(side.send(FIRST))
            link.replace(side.load(returning("socket_filter", 2)))
            answers.append(side.send(FIRST + 0x100))
            other = kbpf.attach_reuseport(side.group[2], side.load(returning("socket_filter", 0)))
            answers += [side.send(FIRST + 0x200), link.detach(), other.detach(), other.attached]
        return [*answers, len(side.send(FIRST + 0x300))]

    assert same(netns, scenario, socket.AF_INET, type) == [[1], [2], [0], True, False, None, 1]


def test_what_is_refused(netns: NetworkNamespace) -> None:
    def outcome(action: Callable[..., Any], *arguments: Any) -> Any:
        try:
            action(*arguments)
        except kbpf.BpfError as refused:
            return type(refused).__name__, errno.errorcode.get(refused.errno or 0, refused.errno)

    def scenario(side: Side) -> Any:
        chooser, returns = side.load(choosing()), side.load(returning("socket_filter", 1))
        other = side.load(returning("xdp", 2))
        filter = kbpf.Filter([cbpf.stmt(cbpf.RET | cbpf.K, 1)])
        alone, bound = side.open(), side.open()
        bound.bind((side.place[0], 0))
        shares = side.open()
        shares.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made = [(alone, bound, shares, side.group[0]), (chooser, returns, other, filter)]
        answers = [outcome(kbpf.attach_reuseport, one, what) for one in made[0] for what in made[1]]
        answers.append(kbpf.attach(side.group[0], filter, drain=False).lock())
        answers += [outcome(kbpf.attach_reuseport, side.group[0], what) for what in made[1]]
        with chooser.attach(side.group[1]) as link:
            answers.append(outcome(link.replace, other))
            assert link.attached is chooser
            side.group[1].close()
        return [*answers, outcome(link.detach)]

    answers = same(netns, scenario)
    assert ("BpfError", "EINVAL") in answers and ("PermissionDeniedError", "EPERM") in answers and None in answers


def test_the_emulator_chooses_among_its_own_sockets_only() -> None:
    with (
        kbpf.load_program(returning("socket_filter", 1), backend="emulator") as program,
        socket.socket(type=UDP) as real,
    ):
        with pytest.raises(kbpf.NotSupportedError, match="emulated sockets only"):
            kbpf.attach_reuseport(real, program, backend="emulator")
        with pytest.raises(ValueError, match="emulator"):
            kbpf.attach_reuseport(real, program)
