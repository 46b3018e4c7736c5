"""Programs on hooks of netfilter: the same traffic in a network namespace and on the emulated network."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import resource
import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest
from hosts import Host, emulated_host, outcome, received, same_on_both
from mapcode import EXIT, Code, call, copy, mov, the_map

import kbpf
from kbpf import Netfilter
from kbpf.errors import EmulationFault
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.runtime.backends import get_backend
from kbpf.specs import NETFILTER_HOOKS, MapSpec, ProgramSpec
from kbpf.testing.network import NetworkNamespace

pytestmark = pytest.mark.requires("kernel", "netns")

I = Instruction  # noqa: E741
DROP, ACCEPT = 0, 1
LOG = MapSpec(type="queue", value_size=16, max_entries=256)
HOOKS = tuple(NETFILTER_HOOKS)
ADDRESSES = {"ipv4": "127.0.0.1", "ipv6": "::1"}
FAMILIES = tuple(ADDRESSES)
INET = {"ipv4": socket.AF_INET, "ipv6": socket.AF_INET6}
LEAST, MOST = -(1 << 31), (1 << 31) - 1


def noting(who: int, verdict: int) -> Code:
    """Push who it is, the hook and the family, and give a verdict."""
    load, store = ebpf.LDX | ebpf.MEM, ebpf.STX | ebpf.MEM
    code = [I(load | ebpf.DW, 6, 1, 0), I(load | ebpf.B, 7, 6, 0), I(load | ebpf.B, 8, 6, 1)]
    code += [I(ebpf.ST | ebpf.MEM | ebpf.DW, ebpf.FP, 0, -16, who)]
    code += [I(store | ebpf.W, ebpf.FP, 7, -8), I(store | ebpf.W, ebpf.FP, 8, -4)]
    code += [*the_map(1, 0), *copy(2, ebpf.FP), I(ebpf.ALU64 | ebpf.ADD, 2, 0, 0, -16), *mov(3, 0)]
    return [*code, *call("map_push_elem"), *mov(0, verdict), EXIT]


class Noting:
    """Programs of a host that all push to one map."""

    def __init__(self, host: Host, stack: contextlib.ExitStack) -> None:
        self.backend = host.backend.name
        self._stack = stack
        self._log = stack.enter_context(kbpf.BpfMap.create(LOG, self.backend))
        self._numbers = itertools.count(1)

    def program(self, verdict: int = ACCEPT) -> kbpf.Program:
        code = noting(next(self._numbers), verdict)
        spec = ProgramSpec(type="netfilter", instructions=tuple(code), maps=(LOG,), expected_attach_type="netfilter")
        return self._stack.enter_context(kbpf.load_program(spec, maps=[self._log], backend=self.backend))

    def keep(self, link: kbpf.BpfLink) -> kbpf.BpfLink:
        return self._stack.enter_context(link)

    def hook(self, family: str, hook: str, priority: int = 0, verdict: int = ACCEPT, **how: Any) -> kbpf.BpfLink:
        target = Netfilter(family=family, hook=hook, priority=priority, **how)  # type: ignore[arg-type]
        return self.keep(self.program(verdict).attach(target))

    def noted(self) -> list[tuple[int, int, int]]:
        """Who ran since the last time, at what hook and of what family."""
        found = []
        with contextlib.suppress(FileNotFoundError):
            while True:
                raw = get_backend(self.backend).map_lookup_and_delete(self._log.fileno(), None, 16)
                found.append(struct.unpack("=QII", raw))
        return found


def same(netns: NetworkNamespace, scenario: Callable[..., Any], *arguments: Any) -> Any:
    def with_programs(host: Host, *given: Any) -> Any:
        with contextlib.ExitStack() as stack:
            return scenario(host, Noting(host, stack), *given)

    return same_on_both(netns, with_programs, *arguments)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_datagram_passes_four_hooks(netns: NetworkNamespace, family: str) -> None:
    def scenario(host: Host, programs: Noting) -> Any:
        for at, hook in itertools.product(FAMILIES, HOOKS):
            programs.hook(at, hook)
        end = host.udp(ADDRESSES[family])
        end.sendto(b"data", end.getsockname())
        return end.recv(10), programs.noted()

    data, noted = same(netns, scenario)
    assert data == b"data"
    hooks = ("local_out", "postrouting", "prerouting", "local_in")
    assert [(hook, number) for _, hook, number in noted] == [(NETFILTER_HOOKS[hook], INET[family]) for hook in hooks]


def test_programs_run_in_the_order_of_their_priorities_until_one_drops(netns: NetworkNamespace) -> None:
    def scenario(host: Host, programs: Noting) -> Any:
        end = host.udp()
        links = [programs.hook("ipv4", "local_in", priority) for priority in (5, -7, LEAST + 1, MOST - 1, 0)]
        end.sendto(b"one", end.getsockname())
        answers = [programs.noted(), received(end)]
        programs.hook("ipv4", "local_in", 1, DROP)
        end.sendto(b"two", end.getsockname())
        answers += [programs.noted(), received(end)]
        links[1].close()
        end.sendto(b"three", end.getsockname())
        return [*answers, programs.noted(), received(end)]

    answers = same(netns, scenario)
    assert [[who for who, _, _ in noted] for noted in answers[::2]] == [[3, 2, 5, 1, 4], [3, 2, 5, 6], [3, 5, 6]]
    assert answers[1::2] == [[b"one"], [], []]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_senders_see_of_a_drop(netns: NetworkNamespace, family: str, hook: str) -> None:
    def scenario(host: Host, programs: Noting) -> Any:
        end, echo = host.udp(ADDRESSES[family]), b"\x08\0\0\0\0\0\0\1" if family == "ipv4" else b"\x80\0\0\0\0\0\0\1"
        proto = socket.IPPROTO_ICMP if family == "ipv4" else socket.IPPROTO_ICMPV6
        raw = host.open(INET[family], socket.SOCK_RAW, 253)
        ping = host.open(INET[family], socket.SOCK_RAW, proto)
        with programs.hook(family, hook, 0, DROP):
            sent = [outcome(end.sendto, b"data", end.getsockname())]
            sent += [outcome(one.sendto, echo, (ADDRESSES[family], 0)) for one in (raw, ping)]
            answers = [*sent, programs.noted(), [received(one) != [] for one in (end, raw, ping)]]
        return [*answers, outcome(end.sendto, b"data", end.getsockname()), received(end), programs.noted()]

    answers = same(netns, scenario)
    drops = hook != "forward"
    assert answers[:3] == (["EPERM"] * 3 if hook in ("local_out", "postrouting") else [4, 8, 8])
    assert answers[4:] == [[not drops] * 3, 4, [b"data"], []]


@pytest.mark.parametrize("hook", [hook for hook in HOOKS if hook != "forward"])
def test_a_connection_is_not_made(netns: NetworkNamespace, hook: str) -> None:
    def scenario(host: Host, programs: Noting) -> Any:
        server = host.open(socket.AF_INET, socket.SOCK_STREAM)
        server.bind(("127.0.0.1", 0))
        server.listen()
        with programs.hook("ipv4", hook, 0, DROP):
            client = host.open(socket.AF_INET, socket.SOCK_STREAM)
            client.settimeout(0.1)
            answers = [outcome(client.connect, server.getsockname()), programs.noted()]
        other = host.open(socket.AF_INET, socket.SOCK_STREAM)
        return [*answers, outcome(other.connect, server.getsockname())]

    assert same(netns, scenario) == ["TimeoutError", [(1, NETFILTER_HOOKS[hook], 2)], None]


def test_each_segment_of_a_connection_is_seen(netns: NetworkNamespace) -> None:
    def scenario(host: Host, programs: Noting) -> Any:
        server = host.open(socket.AF_INET, socket.SOCK_STREAM)
        server.bind(("127.0.0.1", 0))
        server.listen()
        programs.hook("ipv4", "local_out")
        programs.hook("ipv4", "local_in")
        client = host.open(socket.AF_INET, socket.SOCK_STREAM)
        client.connect(server.getsockname())
        accepted = host.keep(server.accept()[0])
        return programs.noted(), accepted.getpeername() == client.getsockname()

    assert same(netns, scenario) == ([(1, 3, 2), (2, 1, 2)] * 3, True)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_nobody_waits_for_is_answered_through_the_hooks(netns: NetworkNamespace, family: str) -> None:
    """An ICMP error, a reset, and a reply to an echo pass them too."""
    here, inet = ADDRESSES[family], INET[family]
    kind, proto = (b"\x08", socket.IPPROTO_ICMP) if family == "ipv4" else (b"\x80", socket.IPPROTO_ICMPV6)

    def scenario(host: Host, programs: Noting) -> Any:
        for at, hook in itertools.product(FAMILIES, HOOKS):
            programs.hook(at, hook)
        answers = []
        end = host.udp(here)
        end.connect((here, 9))
        answers += [outcome(end.send, b"x"), outcome(end.send, b"x"), programs.noted()]
        client = host.open(inet, socket.SOCK_STREAM)
        answers += [outcome(client.connect, (here, 9)), programs.noted()]
        # The checksum is IPv4's own affair; the kernel makes ICMPv6's.
        message = kind + bytes(7)
        if family == "ipv4":
            message = kind + b"\0\xf7\xff" + bytes(4)
        ping = host.open(inet, socket.SOCK_RAW, proto)
        answers += [outcome(ping.sendto, message, (here, 0)), programs.noted()]
        return answers

    first, second, _, refused, _, sent, pinged = same(netns, scenario)
    assert (first, second, refused, sent, len(pinged)) == (1, "ECONNREFUSED", "ECONNREFUSED", 8, 8)


def test_broadcasts(netns: NetworkNamespace) -> None:
    def scenario(host: Host, programs: Noting) -> Any:
        for hook in HOOKS:
            programs.hook("ipv4", hook)
        end, sender = host.udp("127.255.255.255", 7000), host.udp("127.0.0.1")
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        return outcome(sender.sendto, b"all", ("127.255.255.255", 7000)), received(end), programs.noted()

    same(netns, scenario)


@pytest.mark.parametrize("hook", [hook for hook in HOOKS if hook != "forward"])
def test_a_program_that_goes_wrong_leaves_the_network_as_it_is(hook: str) -> None:
    load = I(ebpf.LDX | ebpf.MEM | ebpf.DW, 0, 0, 0)
    spec = ProgramSpec(type="netfilter", instructions=(*mov(0, 5), load, EXIT), expected_attach_type="netfilter")
    with emulated_host() as host, kbpf.load_program(spec, backend="emulator") as program:
        end = host.udp()
        with program.attach(Netfilter(family="ipv4", hook=hook, priority=0)):  # type: ignore[arg-type]
            for _ in range(3):
                with pytest.raises(EmulationFault):
                    end.sendto(b"wrong", end.getsockname())
        end.sendto(b"right", end.getsockname())
        assert received(end) == [b"right"]


@pytest.mark.parametrize("defragment", [False, True])
@pytest.mark.parametrize("priority", [LEAST, LEAST + 1, -401, -400, -399, 0, MOST - 1, MOST])
def test_priorities(netns: NetworkNamespace, priority: int, defragment: bool) -> None:
    def scenario(host: Host, programs: Noting) -> Any:
        def attach() -> Any:
            return programs.hook("ipv6", "local_in", priority, defragment=defragment).info.details

        return outcome(attach), outcome(attach)

    first, second = same(netns, scenario)
    if first != "ERANGE":
        assert (first["priority"], first["flags"], second) == (priority, int(defragment), "EBUSY")


def test_a_link_is_detached_and_never_updated(netns: NetworkNamespace) -> None:
    path = f"/sys/fs/bpf/kbpf-test-{os.getpid()}"

    def scenario(host: Host, programs: Noting) -> Any:
        backend = get_backend(programs.backend)
        link, other = programs.hook("ipv4", "postrouting", -3), programs.program(DROP)
        end = host.udp()
        before = link.info
        answers = [outcome(link.update, other), before.type, before.attach_type, before.details]
        link.pin(path)
        try:
            link.close()
            end.sendto(b"one", end.getsockname())
            answers.append(programs.noted())
            with kbpf.Link.open(path=path, backend=programs.backend) as again:
                backend.link_detach(again.fileno())
                answers += [outcome(again.update, other), again.info == before, again.detach()]
        finally:
            backend.unpin(path)
        end.sendto(b"two", end.getsockname())
        return [*answers, programs.noted()]

    details = {"pf": 2, "hooknum": 4, "priority": -3, "flags": 0}
    no = errno.errorcode[errno.EOPNOTSUPP]
    assert same(netns, scenario) == [no, "netfilter", "", details, [(1, 4, 2)], no, True, True, []]


@pytest.mark.parametrize("type", ["socket_filter", "xdp", "kprobe"])
def test_programs_of_other_types_have_no_hook(netns: NetworkNamespace, type: str) -> None:
    def scenario(host: Host) -> Any:
        fd = host.load([*mov(0, 1), EXIT], type)
        hook = Netfilter(family="ipv4", hook="local_in", priority=0)
        return outcome(host.backend.netfilter_link, fd, hook)

    assert same_on_both(netns, scenario) == "EINVAL"


def test_a_hook_has_so_many_programs_at_most(netns: NetworkNamespace) -> None:
    def scenario(host: Host, programs: Noting) -> Any:
        program = programs.program()

        def attach(priority: int) -> kbpf.BpfLink:
            return programs.keep(program.attach(Netfilter(family="ipv4", hook="forward", priority=priority)))

        made = [outcome(attach, priority) for priority in range(1024)]
        return [type(link).__name__ for link in made], outcome(attach, 1024), outcome(attach, 0)

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    try:
        assert same(netns, scenario) == (["BpfLink"] * 1024, "E2BIG", "EBUSY")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
