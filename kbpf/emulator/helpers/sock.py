"""Helpers over sockets: lookups and references, views of a socket, and what belongs to it (net/core/filter.c).

A socket that was looked up is held until bpf_sk_release; a program that ends with one in its hands faults. What
bpf_skc_to_* give is the kernel's own structure, as BTF describes it: it is there or NULL as on Linux, and helpers take
it, but the emulator has nothing to load from it.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable

from kbpf.emulator.environment import environment
from kbpf.emulator.helpers.maps import map_at
from kbpf.emulator.helpers.packet import check_context
from kbpf.emulator.helpers.references import hold, sk_release, sock_at
from kbpf.emulator.interpreter import HelperFunction, Run
from kbpf.emulator.maps.local_storage import SocketStorage
from kbpf.emulator.memory import M32
from kbpf.emulator.sock import STRUCTURE, TCP, Sock
from kbpf.emulator.xdp import XdpBuff
from kbpf.errors import EmulationFault
from kbpf.uapi.constants import BPF_SK_STORAGE_GET_F_CREATE, BPF_TCP_LISTEN, BPF_TCP_NEW_SYN_RECV, BPF_TCP_TIME_WAIT

#: The size of a packed address, by that of struct bpf_sock_tuple.
_ADDRESS = {12: 4, 36: 16}


def full_sock_of(sock: Sock) -> Sock:
    """The listener, for a request to it (`sk_to_full_sk`)."""
    return sock.listener if sock.state == BPF_TCP_NEW_SYN_RECV and sock.listener is not None else sock


def _lookup(protocol: int, full: bool) -> HelperFunction:
    def helper(run: Run, context: int, tuple: int, size: int, netns: int, flags: int) -> int:
        check_context(context)
        given = run.read(tuple, size & M32)
        width = _ADDRESS.get(len(given))
        # There is no namespace but the program's own. Linux takes any negative 32-bit number for that.
        if width is None or flags or not netns & 1 << 31:
            return 0
        source, destination, ports = given[:width], given[width : 2 * width], given[2 * width :]
        found = environment.sockets.lookup(
            protocol,
            source,
            int.from_bytes(ports[:2], "big"),
            destination,
            int.from_bytes(ports[2:], "big"),
            _device(run),
        )
        if found is not None and full:
            found = full_sock_of(found)
            found = found if found.full else None
        return hold(run, found)

    return helper


def _device(run: Run) -> int:
    """The device that the packet came in by."""
    if isinstance(run.context, XdpBuff):
        return run.context.ingress_ifindex
    return run.packet.ifindex or 0


def sk_fullsock(run: Run, sock: int, *_: int) -> int:
    found = sock_at(run, sock)
    return found.address if found.full else 0


def _is_tcp(sock: Sock) -> bool:
    return sock.full and sock.protocol == socket.IPPROTO_TCP


def _is_udp6(sock: Sock) -> bool:
    return (sock.full, sock.protocol, sock.type, sock.family) == (
        True,
        socket.IPPROTO_UDP,
        socket.SOCK_DGRAM,
        socket.AF_INET6,
    )


def _view(at: int, shown: Callable[[Sock], bool]) -> HelperFunction:
    """A helper that gives what lies `at` so many bytes from a socket's address, if that is shown."""

    def helper(run: Run, sock: int, *_: int) -> int:
        found = sock_at(run, sock)
        return found.address + at if shown(found) else 0

    return helper


def get_listener_sock(run: Run, sock: int, *_: int) -> int:
    found = full_sock_of(sock_at(run, sock))
    return found.address if found.state == BPF_TCP_LISTEN and not found.refcounted else 0


def cgroup_id(sock: Sock | None) -> int:
    """The id of the control group of a socket; 0 where there is none."""
    found = None if sock is None else full_sock_of(sock)
    return found.cgroup_id if found is not None and found.full else 0


def ancestor_cgroup_id(sock: Sock | None, level: int) -> int:
    """The id of a group around it, counted from the root; the group's own level is the last."""
    found = None if sock is None else full_sock_of(sock)
    if found is None or not found.full:
        return 0
    path, level = (*found.cgroup_ancestors, found.cgroup_id), level & M32
    return path[level] if level < len(path) else 0


def _storage(run: Run, map: int) -> SocketStorage:
    found = map_at(run, map)
    if not isinstance(found, SocketStorage):
        raise EmulationFault(f"a {found.type} map has no values of sockets", address=map)
    return found


def sk_storage_get(run: Run, map: int, sock: int, value: int, flags: int, _: int) -> int:
    storage, found = _storage(run, map), sock_at(run, sock)
    initial = run.read(value, storage.value_size) if value else bytes(storage.value_size)
    if not found.full or flags > BPF_SK_STORAGE_GET_F_CREATE:
        return 0
    region = storage.value_of(found.cookie)
    if region is None and flags:
        region = storage.put(found.cookie, initial)
    return 0 if region is None else region.address


def sk_storage_delete(run: Run, map: int, sock: int, *_: int) -> int:
    storage, found = _storage(run, map), sock_at(run, sock)
    if not found.full:
        return -errno.EINVAL
    try:
        run.keep(storage.drop(found.cookie))
    except OSError as error:
        return -(error.errno or 0)
    return 0


HELPERS: dict[str, HelperFunction] = {
    "sk_lookup_tcp": _lookup(socket.IPPROTO_TCP, full=True),
    "sk_lookup_udp": _lookup(socket.IPPROTO_UDP, full=True),
    "skc_lookup_tcp": _lookup(socket.IPPROTO_TCP, full=False),
    "sk_release": sk_release,
    "sk_fullsock": sk_fullsock,
    "tcp_sock": _view(TCP, _is_tcp),
    "get_listener_sock": get_listener_sock,
    "skc_to_tcp_sock": _view(STRUCTURE, _is_tcp),
    "skc_to_tcp6_sock": _view(STRUCTURE, lambda sock: _is_tcp(sock) and sock.family == socket.AF_INET6),
    "skc_to_tcp_timewait_sock": _view(STRUCTURE, lambda sock: sock.state == BPF_TCP_TIME_WAIT),
    "skc_to_tcp_request_sock": _view(STRUCTURE, lambda sock: sock.state == BPF_TCP_NEW_SYN_RECV),
    "skc_to_udp6_sock": _view(STRUCTURE, _is_udp6),
    "skc_to_unix_sock": _view(STRUCTURE, lambda sock: sock.full and sock.family == socket.AF_UNIX),
    # There are no connections of several paths.
    "skc_to_mptcp_sock": _view(STRUCTURE, lambda sock: False),
    "sk_cgroup_id": lambda run, sock, *_: cgroup_id(sock_at(run, sock)),
    "sk_ancestor_cgroup_id": lambda run, sock, level, *_: ancestor_cgroup_id(sock_at(run, sock), level),
    "sk_storage_get": sk_storage_get,
    "sk_storage_delete": sk_storage_delete,
}
