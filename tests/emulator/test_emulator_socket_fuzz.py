"""Random calls on random sockets, which must end alike on the kernel and in the emulator."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable
from typing import Any

import pytest
from hosts import KEEP, Host, outcome, passes_if, returns, same_on_both

from kbpf.isa import cbpf
from kbpf.testing.network import NetworkNamespace
from kbpf.uapi.constants import SO_REUSEPORT

pytestmark = [pytest.mark.requires("kernel", "netns"), pytest.mark.fuzz]

SEEDS = range(200 if os.environ.get("KBPF_FUZZ") == "full" else 10)
UDP = [(socket.AF_INET, socket.SOCK_DGRAM), (socket.AF_INET6, socket.SOCK_DGRAM)]
UNIX = [(socket.AF_UNIX, type) for type in (socket.SOCK_DGRAM, socket.SOCK_SEQPACKET, socket.SOCK_STREAM)]
# TCP's ends depend on timers.
KINDS = {"udp": UDP, "unix": UNIX}
FILTERS = [returns(KEEP), returns(0), returns(10), returns(41), passes_if(cbpf.B, 8, ord("y"))]


class Calls:
    """A sequence of calls that depends on the seed only, and what became of them."""

    def __init__(self, host: Host, kind: str, seed: int) -> None:
        self.host, self.kind = host, kind
        self.chance = random.Random(seed)
        self.sockets: list[Any] = []
        self.found: list[Any] = []

    def address(self, family: int) -> Any:
        if family == socket.AF_UNIX:
            return b"\0kbpf-%d" % self.chance.randrange(4)
        hosts = ["127.0.0.1", "127.0.0.1", "127.0.0.2", "0.0.0.0"]
        if family == socket.AF_INET6:
            hosts = ["::1", "::1", "::ffff:127.0.0.1", "::"]
        return self.chance.choice(hosts), 7000 + self.chance.randrange(3)

    def make(self) -> str:
        made = self.host.open(*self.chance.choice(KINDS[self.kind]))
        made.setblocking(False)
        self.sockets.append(made)
        if self.kind != "unix" and self.chance.random() < 0.7:
            made.setsockopt(socket.SOL_SOCKET, self.chance.choice([socket.SO_REUSEADDR, SO_REUSEPORT]), 1)
        return "made"

    def pair(self) -> str:
        for made in self.host.pair(self.chance.choice(UNIX)[1]):
            made.setblocking(False)
            self.sockets.append(made)
        return "pair"

    def accept(self, one: Any) -> Any:
        made = outcome(one.accept)
        if not isinstance(made, tuple):
            return made
        self.host.keep(made[0]).setblocking(False)
        self.sockets.append(made[0])
        return "accepted"

    def actions(self, one: Any) -> list[Callable[[], Any]]:
        chance = self.chance
        data = chance.choice([b"yes", b"no", b"yes, and more of it", b""])
        address = self.address(one.family)
        program = chance.choice(FILTERS)
        how = chance.randrange(3)
        actions: list[Callable[[], Any]] = [
            lambda: outcome(one.bind, address),
            lambda: outcome(one.connect, address),
            lambda: outcome(one.send, data),
            lambda: outcome(one.send, data),
            lambda: outcome(one.recv, 30),
            lambda: outcome(one.recv, 30),
            lambda: outcome(one.close),
            lambda: outcome(self.name, one),
        ]
        if one.type != socket.SOCK_STREAM:
            actions.append(lambda: outcome(one.sendto, data, address))
        actions.append(lambda: outcome(self.host.attach, one, program))
        actions.append(lambda: outcome(self.host.backend.socket_detach, one))
        if one.type != socket.SOCK_DGRAM:
            actions += [lambda: outcome(one.listen, 5), lambda: self.accept(one), lambda: outcome(one.shutdown, how)]
        return actions

    def name(self, one: Any) -> Any:
        """Its own address, unless the port is one that was free."""
        name = one.getsockname()
        return "some" if isinstance(name, tuple) and name[1] > 8000 else name

    def run(self, count: int) -> list[Any]:
        for _ in range(3):
            self.make()
        for _ in range(count):
            roll = self.chance.random()
            if roll < 0.08:
                self.found.append(self.make())
            elif roll < 0.12 and self.kind == "unix":
                self.found.append(self.pair())
            else:
                at = self.chance.randrange(len(self.sockets))
                actions = self.actions(self.sockets[at])
                which = self.chance.randrange(len(actions))
                self.found.append((at, int(self.sockets[at].type), which, actions[which]()))
        return self.found


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("seed", SEEDS)
def test_random_calls_end_alike(netns: NetworkNamespace, kind: str, seed: int) -> None:
    same_on_both(netns, lambda host: Calls(host, kind, seed).run(120))
