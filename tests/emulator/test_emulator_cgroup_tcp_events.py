"""What sock_ops programs are told of TCP connections: the same scenario on the kernel and in the emulator."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
from cgroupworld import HERE, INET4, INET6, World, free_ports, same, two_worlds
from hooks import CONTEXT, call, load, returns
from sides import Side

from kbpf.errors import EmulationFault
from kbpf.isa import cbpf, ebpf
from kbpf.isa.ebpf import Instruction, ld_imm64
from kbpf.specs import MapSpec, ProgramSpec
from kbpf.uapi import constants as uapi
from kbpf.uapi.enums import HELPERS
from kbpf.uapi.structs import STRUCTS

pytestmark = pytest.mark.requires("kernel")

I = Instruction  # noqa: E741
STREAM = socket.SOCK_STREAM
FIELDS = STRUCTS["bpf_sock_ops"].fields
OPS = {
    value: name.removeprefix("BPF_SOCK_OPS_").removesuffix("_CB")
    for name, value in vars(uapi).items()
    if name.startswith("BPF_SOCK_OPS_") and (name.endswith(("_CB", "_INIT", "ECN", "RTT")))
}
STATES = {value: name.removeprefix("BPF_TCP_") for name, value in vars(uapi).items() if name.startswith("BPF_TCP_")}
NOTED = (
    "op", "args", "state", "is_fullsock", "family", "local_port", "remote_port", "bpf_sock_ops_cb_flags", "skb_len",
)  # fmt: skip
_WORDS = [FIELDS[name].offset + 4 * at for name in NOTED for at in range(FIELDS[name].count)]
_SIZE = 8 * ((4 * len(_WORDS) + 7) // 8)


class Event(NamedTuple):
    op: str
    args: tuple[int, ...]
    state: str
    full: int
    family: int
    local_port: int
    remote_port: int
    flags: int
    length: int


class Told:
    """A program that notes down all events, and asks for more of them with `flags` when it is told `at`."""

    def __init__(self, world: World, flags: int = 0, at: Sequence[int] = (), reply: tuple[int, int] = (0, 0)) -> None:
        self.world, backend = world, world.side.backend
        self._map = backend.map_create(MapSpec(type="queue", value_size=_SIZE, max_entries=1024))
        world.stack.callback(backend.close, self._map)
        code = [I(ebpf.ALU64 | ebpf.MOV | ebpf.X, CONTEXT, 1)]
        code += [I(ebpf.ST | ebpf.MEM | ebpf.DW, ebpf.FP, 0, at) for at in range(-_SIZE, 0, 8)]
        for number, offset in enumerate(_WORDS):
            code += [*load(offset, 4), I(ebpf.STX | ebpf.MEM | ebpf.W, ebpf.FP, 0, 4 * number - _SIZE)]
        code += [*ld_imm64(1, self._map, ebpf.PSEUDO_MAP_FD), I(ebpf.ALU64 | ebpf.MOV | ebpf.X, 2, ebpf.FP)]
        code += [I(ebpf.ALU64 | ebpf.ADD, 2, 0, 0, -_SIZE), I(ebpf.ALU64 | ebpf.MOV, 3, 0, 0, 0)]
        code += [I(ebpf.JMP | ebpf.CALL, 0, 0, 0, HELPERS["map_push_elem"])]
        asking = call("sock_ops_cb_flags_set", "context", flags)
        for op in at:
            code += [*load(FIELDS["op"].offset, 4), I(ebpf.JMP | ebpf.JNE, 0, 0, len(asking), op), *asking]
        op, value = reply
        code += [*load(FIELDS["op"].offset, 4), I(ebpf.JMP | ebpf.JNE, 0, 0, 3, op), *ld_imm64(1, value)]
        code += [I(ebpf.STX | ebpf.MEM | ebpf.W, CONTEXT, 1, FIELDS["reply"].offset), *returns(1)]
        spec = ProgramSpec(type="sock_ops", instructions=tuple(code), expected_attach_type="cgroup_sock_ops")
        fd = backend.program_load(spec, [])
        link = world.groups.attach(fd, "cgroup_sock_ops")
        backend.close(fd)
        world.stack.callback(backend.close, link)

    def events(self, least: int = 0) -> list[Event]:
        """Those since the last time: all until nothing moves any more, or so many at least."""
        deadline, found = time.monotonic() + 10, self._taken()
        while len(found) < least and time.monotonic() < deadline:
            time.sleep(0.01)
            found += self._taken()
        if not least:
            # The kernel's acknowledgements may wait for 40 ms.
            time.sleep(0.06)
            found += self._taken()
        return found

    def _taken(self) -> list[Event]:
        found = []
        while True:
            try:
                raw = self.world.side.backend.map_lookup_and_delete(self._map, None, _SIZE)
            except FileNotFoundError:
                return found
            op, *args, state, full, family, local, remote, flags, length = struct.unpack_from(f"={len(_WORDS)}I", raw)
            where = family, local, socket.ntohs(remote >> 16)
            event = Event(OPS[op], tuple(args), STATES[state], full, *where, flags, length)
            if event.op == "RTT":
                # The smoothed time is in eighths, and never all of one more than the last.
                assert event.args[0] // 8 <= event.args[1] and event.args[2:] == (0, 0)
                event = event._replace(args=())
            found.append(event)


@pytest.fixture
def worlds(kernel: Side, emulator: Side) -> Iterator[tuple[World, World]]:
    with two_worlds(kernel, emulator) as both:
        yield both


def watched(worlds: tuple[World, World], family: int, act: Callable[[Ends], Any], **how: Any) -> list[list[Event]]:
    """Do the same on both sides; what programs were told in each step must be equal."""
    ports = free_ports(family, 4, STREAM)

    def scenario(world: World) -> list[list[Event]]:
        ends = Ends(world, family, ports, Told(world, **how))
        act(ends)
        return ends.steps

    return same(worlds, scenario)  # type: ignore[no-any-return]


class Ends:
    """A listener and clients, at ports known before, and what is told of them in each step."""

    def __init__(self, world: World, family: int, ports: Sequence[int], told: Told) -> None:
        self.world, self.family, self.told = world, family, told
        self._ports = iter(ports)
        self.steps: list[list[Event]] = []
        self.server = self.open()
        self.server.listen()
        self.step()

    def open(self) -> Any:
        made = self.world.open(self.family, STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((HERE[self.family], next(self._ports)))
        return made

    def connected(self) -> tuple[Any, Any]:
        """A connection, of which the client's end comes first."""
        client = self.open()
        client.connect(self.server.getsockname())
        accepted = self.world.keep(self.server.accept()[0])
        self.step()
        return client, accepted

    def step(self, least: int = 0) -> None:
        self.steps.append(self.told.events(least)[: least or None])


ASKED = {"at": (uapi.BPF_SOCK_OPS_TCP_CONNECT_CB, uapi.BPF_SOCK_OPS_TCP_LISTEN_CB)}
STATE, RTT = uapi.BPF_SOCK_OPS_STATE_CB_FLAG, uapi.BPF_SOCK_OPS_RTT_CB_FLAG
RETRANS, RTO = uapi.BPF_SOCK_OPS_RETRANS_CB_FLAG, uapi.BPF_SOCK_OPS_RTO_CB_FLAG
DROP_ALL = cbpf.encode([cbpf.stmt(cbpf.RET | cbpf.K, 0)])
AT_ONCE = bytes((1, 0, 0, 0, 0, 0, 0, 0))


def names(events: list[Event]) -> list[str]:
    return [event.op for event in events]


@pytest.mark.parametrize("family", [INET4, INET6])
@pytest.mark.parametrize("flags", [0, STATE, STATE | RTT])
def test_a_connection_begins_carries_data_and_ends(worlds: tuple[World, World], family: int, flags: int) -> None:
    def act(ends: Ends) -> None:
        client, accepted = ends.connected()
        client.send(b"question")
        accepted.recv(10)
        accepted.send(b"answer")
        client.recv(10)
        ends.step()
        for end in (client, accepted, ends.server):
            end.close()
            ends.step()

    listen, connect, data, *closed = watched(worlds, family, act, flags=flags, **ASKED)
    assert names(listen) == ["TCP_LISTEN"]
    asked = ["RWND_INIT", "TIMEOUT_INIT", "NEEDS_ECN"]
    plain = [name for name in names(connect) if name not in ("STATE", "RTT")]
    assert plain == ["TCP_CONNECT", *asked, *asked, "ACTIVE_ESTABLISHED", "PASSIVE_ESTABLISHED"]
    assert names(data) == ["RTT"] * 2 * bool(flags & RTT)
    states = [[event.args[:2] for event in events if event.op == "STATE"] for events in closed]
    if flags:
        assert states == [[(1, 4), (1, 8), (4, 5), (5, 7)], [(8, 9), (9, 7)], [(10, 7)]]
    else:
        assert closed == [[], [], []]


def shut_down_first(ends: Ends) -> None:
    client, accepted = ends.connected()
    client.shutdown(socket.SHUT_WR)
    ends.step()
    accepted.close()
    ends.step()
    client.close()


def closed_half_way(ends: Ends) -> None:
    client, accepted = ends.connected()
    client.shutdown(socket.SHUT_WR)
    ends.step()
    client.close()
    ends.step()
    accepted.close()


def reset(ends: Ends) -> None:
    client, accepted = ends.connected()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
    client.close()
    ends.step()
    accepted.close()


def closed_unread(ends: Ends) -> None:
    client, accepted = ends.connected()
    client.send(b"never read")
    ends.step()
    accepted.close()
    ends.step()
    client.close()


def never_accepted(ends: Ends) -> None:
    client = ends.open()
    client.connect(ends.server.getsockname())
    ends.step()
    ends.server.listen(1)
    ends.step()
    ends.server.close()
    ends.step()
    client.close()


def refused(ends: Ends) -> None:
    target = ends.server.getsockname()
    ends.server.shutdown(socket.SHUT_RD)
    ends.step()
    client = ends.open()
    assert client.connect_ex(target)
    ends.step()
    client.close()


@pytest.mark.parametrize("act", [shut_down_first, closed_half_way, reset, closed_unread, never_accepted, refused])
def test_states_of_all_ends(worlds: tuple[World, World], act: Callable[[Ends], None]) -> None:
    def whole(ends: Ends) -> None:
        act(ends)
        ends.step()

    assert sum(map(len, watched(worlds, INET4, whole, flags=STATE, **ASKED))) > 4


def told_alike(events: list[Event]) -> list[tuple[Any, ...]]:
    """With sequence numbers and times in units of the first one of their kind."""
    first: dict[str, int] = {}
    found = []
    for event in events:
        args = event.args
        if event.op == "RETRANS":
            args = (args[0] - first.setdefault("seq", args[0]), *args[1:])
        elif event.op == "RTO":
            args = (args[0], round(args[1] / first.setdefault("timeout", args[1])), *args[2:])
        found.append((*event._replace(args=args),))
    return found


def test_what_is_lost_is_sent_again(worlds: tuple[World, World]) -> None:
    ports = free_ports(INET4, 2, STREAM)

    def scenario(world: World) -> Any:
        ends = Ends(world, INET4, ports, Told(world, RETRANS | RTO, **ASKED))
        client, accepted = ends.connected()
        world.side.backend.socket_attach_filter(accepted, DROP_ALL)
        client.send(b"lost")
        ends.step(5)
        world.side.backend.socket_detach(accepted)
        accepted.settimeout(5)
        return told_alike(ends.steps[-1]), accepted.recv(10)

    told, data = same(worlds, scenario)
    assert [op for op, *_ in told] == ["RETRANS", "RTO", "RETRANS", "RTO", "RETRANS"]
    assert [args for op, args, *_ in told if op == "RTO"] == [(0, 1, 0, 0), (1, 2, 0, 0)]
    assert data == b"lost"


def test_a_program_says_when_a_connection_is_tried_again(worlds: tuple[World, World]) -> None:
    ports = free_ports(INET4, 2, STREAM)
    timeout = 25

    def scenario(world: World) -> Any:
        told = Told(world, RETRANS | RTO, reply=(uapi.BPF_SOCK_OPS_TIMEOUT_INIT, timeout), **ASKED)
        ends = Ends(world, INET4, ports, told)
        world.side.backend.socket_attach_filter(ends.server, DROP_ALL)
        client = ends.open()
        client.setblocking(False)
        assert client.connect_ex(ends.server.getsockname())
        ends.step(9)
        client.close()
        rtos = [event.args for event in ends.steps[-1] if event.op == "RTO"]
        return told_alike(ends.steps[-1]), rtos

    told, rtos = same(worlds, scenario)
    assert [op for op, *_ in told][4:] == ["RTO", "RETRANS", "TIMEOUT_INIT", "TIMEOUT_INIT", "RTO"]
    assert rtos == [(0, timeout, 0, 0), (1, timeout, 0, 0)]


@pytest.mark.parametrize("op", [uapi.BPF_SOCK_OPS_RWND_INIT, uapi.BPF_SOCK_OPS_TIMEOUT_INIT])
@pytest.mark.parametrize("answer", [20, 0xFFFFFFFF])
def test_whatever_a_program_answers_there_is_a_connection(worlds: tuple[World, World], op: int, answer: int) -> None:
    def act(ends: Ends) -> None:
        client, accepted = ends.connected()
        client.send(b"data")
        assert accepted.recv(10) == b"data"

    watched(worlds, INET4, act, reply=(op, answer))


WRONG_AT = [
    "TCP_LISTEN_CB", "TCP_CONNECT_CB", "RWND_INIT", "TIMEOUT_INIT", "NEEDS_ECN", "STATE_CB", "RTT_CB",
    "ACTIVE_ESTABLISHED_CB", "PASSIVE_ESTABLISHED_CB",
]  # fmt: skip


@pytest.mark.parametrize("op", WRONG_AT)
def test_a_program_that_goes_wrong_leaves_others_alone(worlds: tuple[World, World], op: str) -> None:
    """The fault comes out of what was called, and the next connection is like any other."""
    world, number = worlds[1], getattr(uapi, f"BPF_SOCK_OPS_{op}")
    asking = call("sock_ops_cb_flags_set", "context", STATE | RTT)
    code = [I(ebpf.ALU64 | ebpf.MOV | ebpf.X, CONTEXT, 1), *load(FIELDS["op"].offset, 4)]
    code += [I(ebpf.JMP | ebpf.JNE, 0, 0, 2, number), *load(-8, 8), *load(-8, 8), *asking, *returns(1)]
    link = world.attach("sock_ops", "cgroup_sock_ops", code)

    def connection() -> bytes:
        with world.open(INET4, STREAM) as server, world.open(INET4, STREAM) as client:
            server.bind((HERE[INET4], 0))
            server.listen()
            client.connect(server.getsockname())
            accepted = server.accept()[0]
            with accepted:
                client.send(b"data")
                return accepted.recv(10)

    with pytest.raises(EmulationFault):
        connection()
    world.side.backend.link_detach(link)
    assert connection() == b"data"
