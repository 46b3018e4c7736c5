"""Lookups of sockets, against real sockets in a network namespace."""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import Iterator
from random import Random

import pytest
from mapcode import Code, call, copy, mov, unless_null
from sides import Side
from socks import COMMON, WORDS, Scene, here, keep, keep_result, looker, lookers, looks_up, tuple_of

from kbpf.backend import LoadRefused
from kbpf.emulator.environment import environment
from kbpf.emulator.sock import MAPPED, Sock
from kbpf.errors import EmulationFault
from kbpf.isa import cbpf
from kbpf.testing.network import NetworkNamespace
from kbpf.uapi.constants import BPF_TCP_NEW_SYN_RECV, BPF_TCP_TIME_WAIT
from kbpf.uapi.structs import STRUCTS

pytestmark = pytest.mark.requires("kernel")

ADDRESSES4 = ("127.0.0.1", "127.0.0.2", "127.0.0.6")
ADDRESSES6 = ("::1", "::ffff:127.0.0.1", "::ffff:127.0.0.2")


@pytest.fixture(scope="module")
def namespace() -> Iterator[NetworkNamespace]:
    with NetworkNamespace() as made:
        yield made


@pytest.fixture
def scene(namespace: NetworkNamespace) -> Iterator[Scene]:
    before = environment.sockets
    with Scene(namespace, environment) as scene:
        yield scene
    environment.sockets = before


def questions(rng: Random, count: int, ports: tuple[int, ...]) -> list[bytes]:
    """Tuples among few addresses and ports."""
    made = []
    for _ in range(count):
        addresses = rng.choice((ADDRESSES4, ADDRESSES6))
        made.append(tuple_of(rng.choice(addresses), rng.choice(ports), rng.choice(addresses), rng.choice(ports)))
    return made


# The later seeds connect two sockets to the same, and ask for the address that IPv6 sockets have kept.
@pytest.mark.parametrize("seed", (*range(5), 11, 161))
def test_udp_sockets_are_found_as_the_kernel_scores_them(
    kernel: Side, emulator: Side, namespace: NetworkNamespace, scene: Scene, seed: int
) -> None:
    rng, ports = Random(seed), (5001, 5002)
    bound = (*ADDRESSES4, *ADDRESSES6, "0.0.0.0", "::", "0.0.0.0", "::")
    for _ in range(14):
        address = rng.choice(bound)
        try:
            opened = scene.udp(address, rng.choice(ports), rng.choice(("", "", "lo")), reuse=True)
        except OSError:
            continue
        if rng.random() < 0.3:
            with contextlib.suppress(OSError):
                opened.connect((rng.choice(ADDRESSES6 if ":" in address else ADDRESSES4), rng.choice(ports)))
        scene.listed(opened)
    for size in (12, 36):
        with lookers(kernel, emulator, namespace, looks_up("sk_lookup_udp", size, WORDS)) as (one, other):
            found = 0
            for question in questions(rng, 150, ports):
                if len(question) == size:
                    expected = one(question)
                    assert other(question) == expected, question.hex()
                    found += expected[0]
            assert found > 10


class Tcp:
    """A listener for both versions, connections by IPv4 and IPv6, the remains of one, and a request for one."""

    def __init__(self, scene: Scene) -> None:
        self.listener = scene.socket(socket.AF_INET6, socket.SOCK_STREAM)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind(("::", 80))
        self.listener.listen()
        listening = scene.listed(self.listener)
        self.questions = [
            tuple_of(remote, 9, local, 80)
            for addresses in (ADDRESSES4, ADDRESSES6)
            for remote in addresses[:1]
            for local in addresses
        ]
        for family, address in (
            (socket.AF_INET, "127.0.0.1"),
            (socket.AF_INET6, "::1"),
            (socket.AF_INET6, ADDRESSES6[1]),
        ):
            client = scene.socket(family, socket.SOCK_STREAM)
            client.connect((address, 80))
            accepted, _ = self.listener.accept()
            scene.listed(scene.own(accepted), accepted=True)
            scene.listed(client)
            self.ask(address, client.getsockname()[1])
        self.remains(scene)
        self.request(scene, listening, socket.AF_INET, "127.0.0.1")
        self.request(scene, listening, socket.AF_INET6, "::1")

    def ask(self, address: str, port: int) -> None:
        """By the address and, where it has two, by the other; from the client's side too."""
        for one in {address, address.removeprefix("::ffff:"), f"::ffff:{address}" if "." in address else address}:
            if not one.startswith("::ffff:::ffff:"):
                self.questions += [tuple_of(one, port, one, 80), tuple_of(one, 80, one, port)]

    def remains(self, scene: Scene) -> None:
        # Of AF_INET, its IPv6 addresses would be whatever lay there.
        client = scene.namespace.socket(socket.AF_INET6, socket.SOCK_STREAM)
        client.connect(("::ffff:127.0.0.1", 80))
        accepted, _ = self.listener.accept()
        port = client.getsockname()[1]
        client.shutdown(socket.SHUT_WR)
        accepted.recv(1)
        accepted.close()
        client.recv(1)
        client.close()
        local = MAPPED + socket.inet_aton("127.0.0.1")
        scene.table.add(
            Sock(
                family=socket.AF_INET6, type=socket.SOCK_STREAM, protocol=socket.IPPROTO_TCP, state=BPF_TCP_TIME_WAIT,
                local=local, local_port=port, remote=local, remote_port=80,
            )
        )  # fmt: skip
        self.ask("127.0.0.1", port)

    def request(self, scene: Scene, listening: Sock, family: int, address: str) -> None:
        """The client drops what the listener answers, and so never completes the connection."""
        client = scene.socket(family, socket.SOCK_STREAM)
        drop_all(client)
        client.setblocking(False)
        client.connect_ex((address, 80))
        port, local = client.getsockname()[1], socket.inet_pton(family, address)
        # A process is not told whom it is connecting to.
        scene.listed(client, remote=local, remote_port=80)
        local = local if family == socket.AF_INET6 else MAPPED + local
        scene.table.add(
            Sock(
                family=socket.AF_INET6, type=socket.SOCK_STREAM, protocol=socket.IPPROTO_TCP, accepted=True,
                state=BPF_TCP_NEW_SYN_RECV, listener=listening,
                local=local, local_port=80, remote=local, remote_port=port,
            )
        )  # fmt: skip
        self.ask(address, port)


def drop_all(opened: socket.socket) -> None:
    from kbpf.kernel.backend import KernelBackend

    KernelBackend().socket_attach_filter(opened, cbpf.encode([cbpf.Instruction(cbpf.RET | cbpf.K, 0, 0, 0)]))


@pytest.fixture
def tcp(scene: Scene) -> Tcp:
    return Tcp(scene)


@pytest.mark.parametrize("helper, body", [("sk_lookup_tcp", WORDS), ("skc_lookup_tcp", COMMON)])
@pytest.mark.parametrize("type", ["sched_cls", "xdp", "cgroup_skb"])
def test_tcp_sockets_are_found_and_shown(
    kernel: Side, emulator: Side, namespace: NetworkNamespace, tcp: Tcp, helper: str, body: Code, type: str
) -> None:
    for size in (12, 36):
        with lookers(kernel, emulator, namespace, looks_up(helper, size, body), type) as (one, other):
            results = []
            for question in tcp.questions:
                if len(question) == size:
                    results.append(one(question))
                    assert other(question) == results[-1], question.hex()
            assert sum(found for found, *_ in results) > 3


VIEWS = (
    "sk_fullsock", "tcp_sock", "get_listener_sock", "skc_to_tcp_sock", "skc_to_tcp6_sock", "skc_to_tcp_timewait_sock",
    "skc_to_tcp_request_sock", "skc_to_udp6_sock", "skc_to_unix_sock", "skc_to_mptcp_sock",
)  # fmt: skip


@pytest.mark.parametrize("view", VIEWS)
def test_views_are_there_or_not(
    kernel: Side, emulator: Side, namespace: NetworkNamespace, tcp: Tcp, scene: Scene, view: str
) -> None:
    body = [*copy(1, 8), *call(view), *unless_null(0, mov(0, 1)), *keep_result(0)]
    for size in (12, 36):
        with lookers(kernel, emulator, namespace, looks_up("skc_lookup_tcp", size, body)) as (one, other):
            for question in tcp.questions:
                if len(question) == size:
                    assert other(question) == one(question), question.hex()


@pytest.mark.parametrize(
    "size, netns, flags",
    [(12, -1, 0), (12, -1, 1), (12, 0, 0), (12, 1, 0), (12, -7, 0), (12, 0x7FFFFFFF, 0), (11, -1, 0), (13, -1, 0),
     (35, -1, 0), (1, -1, 0)],
)  # fmt: skip
@pytest.mark.parametrize("type", ["sched_cls", "xdp", "cgroup_skb"])
def test_only_whole_tuples_of_the_own_namespace_are_looked_up(
    kernel: Side,
    emulator: Side,
    namespace: NetworkNamespace,
    scene: Scene,
    type: str,
    size: int,
    netns: int,
    flags: int,
) -> None:
    scene.listed(scene.udp("0.0.0.0", 53))
    program = looks_up("sk_lookup_udp", size, WORDS, netns, flags)
    with lookers(kernel, emulator, namespace, program, type) as (one, other):
        question = tuple_of("127.0.0.1", 9, "127.0.0.1", 53)
        expected = one(question)
        assert other(question) == expected
        assert expected[0] == (size == 12 and netns < 0 and not flags)


def test_loads_from_a_socket_are_those_that_the_verifier_allows(
    kernel: Side, emulator: Side, namespace: NetworkNamespace, scene: Scene
) -> None:
    opened = scene.udp("127.0.0.1", 0x1234)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, 0x7654321)
    opened.connect(("127.0.0.2", 0x5678))
    scene.listed(opened)
    question = tuple_of("127.0.0.2", 0x5678, "127.0.0.1", 0x1234)
    for offset, size in itertools.product(range(84), (1, 2, 4, 8)):
        results: list[tuple[int, ...] | None] = []
        for side, run in ((kernel, namespace.call), (emulator, here)):
            try:
                with looker(side, looks_up("sk_lookup_udp", 12, keep(offset, size, 0)), run) as look:
                    results.append(look(question))
            except (OSError, EmulationFault):
                results.append(None)
        assert results[1] == results[0], (offset, size)


@pytest.mark.parametrize("releases, fault", [(0, "in its hands"), (2, "not held")])
def test_a_socket_is_released_once(
    kernel: Side, emulator: Side, namespace: NetworkNamespace, scene: Scene, releases: int, fault: str
) -> None:
    scene.listed(scene.udp("0.0.0.0", 53))
    program = looks_up("sk_lookup_udp", 12, [])
    release = program[-4:-2]
    program[-4:-2] = release * releases
    with pytest.raises(LoadRefused), looker(kernel, program, namespace.call):
        pass
    with looker(emulator, program, here) as look, pytest.raises(EmulationFault, match=fault):
        look(tuple_of("127.0.0.1", 9, "127.0.0.1", 53))


@pytest.mark.parametrize("seed", range(4))
def test_a_socket_of_the_group_is_found(
    kernel: Side, emulator: Side, namespace: NetworkNamespace, scene: Scene, seed: int
) -> None:
    """Which one of it, Linux leaves to a secret hash."""
    rng, ports = Random(seed), (5001, 5002)
    groups: dict[int, object] = {}
    for _ in range(10):
        opened = scene.socket(*rng.choice(((socket.AF_INET, 2), (socket.AF_INET6, 2))))
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if rng.random() < 0.3:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
        anywhere = "0.0.0.0" if opened.family == socket.AF_INET else "::"
        own = ADDRESSES4[0] if opened.family == socket.AF_INET else ADDRESSES6[0]
        opened.bind((rng.choice((anywhere, own)), rng.choice(ports)))
        sock = scene.listed(opened)
        groups[sock.mark] = sock.reuseport
    mark = 1 + STRUCTS["bpf_sock"].fields["mark"].offset // 4
    for size in (12, 36):
        with lookers(kernel, emulator, namespace, looks_up("sk_lookup_udp", size, WORDS)) as (one, other):
            for question in questions(rng, 60, ports):
                if len(question) == size:
                    truth, got = one(question), other(question)
                    assert (got[0], groups.get(got[mark])) == (truth[0], groups.get(truth[mark])), question.hex()
