"""Network namespaces of the test's own, and traffic in them or on loopback.

Needs root and iproute2. Everything is in namespaces that the test made and goes away with them: nothing of the
host's network changes. A Python thread can be in another namespace than its process, which is how `call` works:
sockets that it makes stay in the namespace.
"""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")

_numbers = itertools.count(1)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class NetworkNamespace:
    """A named network namespace with loopback up; a context manager that deletes it."""

    def __init__(self) -> None:
        self.name = f"kbpf-test-{os.getpid()}-{next(_numbers)}"
        _ip("netns", "add", self.name)
        _ip("-n", self.name, "link", "set", "lo", "up")

    def call(self, function: Callable[..., T], *arguments: Any, **keywords: Any) -> T:
        """Call `function` in a thread that is inside the namespace, and give what it gives."""
        from pyroute2 import netns

        outcome: list[T] = []
        failure: list[BaseException] = []

        def inside() -> None:
            try:
                netns.setns(self.name)
                outcome.append(function(*arguments, **keywords))
            except BaseException as error:  # handed to the caller's thread
                failure.append(error)

        thread = threading.Thread(target=inside, name=self.name)
        thread.start()
        thread.join()
        if failure:
            raise failure[0]
        return outcome[0]

    def socket(self, *arguments: int) -> socket.socket:
        """A socket of this namespace, of the family, type and protocol given."""
        return self.call(socket.socket, *arguments)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command inside; CalledProcessError when it fails."""
        return subprocess.run(
            ["ip", "netns", "exec", self.name, *command], check=True, capture_output=True, text=True, timeout=60
        )

    def close(self) -> None:
        _ip("netns", "delete", self.name)

    def __enter__(self) -> NetworkNamespace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, kw_only=True)
class VethEnd:
    """One end of a veth pair: its namespace, device and addresses (of the documentation ranges)."""

    namespace: NetworkNamespace
    interface: str
    mac: str
    ipv4: str
    ipv6: str


def connect(left: NetworkNamespace, right: NetworkNamespace) -> tuple[VethEnd, VethEnd]:
    """Join two namespaces by a veth pair, up, with addresses in one /24 and one /64.

    IPv6 comes up without duplicate address detection, and the devices do not resolve or solicit anything by themselves.
    """
    ends = tuple(
        VethEnd(
            namespace=namespace,
            interface="veth0",
            mac=f"02:00:00:00:00:{number:02x}",
            ipv4=f"192.0.2.{number}",
            ipv6=f"2001:db8::{number}",
        )
        for number, namespace in enumerate((left, right), 1)
    )
    one, two = ends
    _ip(
        *("link", "add", one.interface, "address", one.mac, "netns", left.name, "type", "veth"),
        *("peer", "name", two.interface, "address", two.mac, "netns", right.name),
    )
    for end in ends:
        inside = ("-n", end.namespace.name)
        _ip(*inside, "link", "set", end.interface, "addrgenmode", "none")
        _ip(*inside, "address", "add", f"{end.ipv4}/24", "dev", end.interface)
        _ip(*inside, "address", "add", f"{end.ipv6}/64", "dev", end.interface, "nodad")
        _ip(*inside, "link", "set", end.interface, "up")
    for here, there in (ends, ends[::-1]):
        for address in (there.ipv4, there.ipv6):
            _ip("-n", here.namespace.name, "neighbour", "add", address, "lladdr", there.mac, "dev", here.interface)
    return one, two


def _send_all(connection: socket.socket, payload: bytes) -> None:
    connection.sendall(payload)
    connection.shutdown(socket.SHUT_WR)


class LoopbackTraffic:
    """Traffic on loopback, each method giving the ports it used so that a filter or a count can be checked."""

    def udp(self, count: int = 1, payload: bytes = b"kbpf", *, family: int = socket.AF_INET) -> tuple[int, int]:
        """`count` UDP datagrams, received again; gives the source and destination ports."""
        host = "127.0.0.1" if family == socket.AF_INET else "::1"
        with (
            socket.socket(family, socket.SOCK_DGRAM) as receiver,
            socket.socket(family, socket.SOCK_DGRAM) as sender,
        ):
            receiver.bind((host, 0))
            receiver.settimeout(5)
            sender.connect(receiver.getsockname())
            for _ in range(count):
                sender.send(payload)
                receiver.recv(65536)
            return sender.getsockname()[1], receiver.getsockname()[1]

    def tcp(self, payload: bytes = b"kbpf", *, family: int = socket.AF_INET) -> tuple[int, int]:
        """One TCP connection that carries `payload` and is closed in order; gives the client's and server's ports."""
        host = "127.0.0.1" if family == socket.AF_INET else "::1"
        with socket.create_server((host, 0), family=family) as server:
            ports: tuple[int, int]
            with socket.create_connection((host, server.getsockname()[1])) as client:
                ports = client.getsockname()[1], server.getsockname()[1]
                accepted, _ = server.accept()
                with accepted:
                    sending = threading.Thread(target=_send_all, args=(client, payload))
                    sending.start()
                    while accepted.recv(65536):
                        pass
                    sending.join()
            return ports
