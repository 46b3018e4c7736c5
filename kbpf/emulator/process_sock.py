"""Sockets of the operating system that this process holds, as far as a process can tell what the kernel keeps.

It is not told whom a socket is connecting to, by which queue packets came, and which end has connected to the other.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
from weakref import WeakValueDictionary

from kbpf.emulator.environment import environment
from kbpf.emulator.maps.base import refused
from kbpf.emulator.sock import Sock
from kbpf.uapi.constants import (
    BPF_TCP_CLOSE,
    BPF_TCP_ESTABLISHED,
    BPF_TCP_LISTEN,
    SO_ACCEPTCONN,
    SO_BINDTOIFINDEX,
    SO_COOKIE,
    SO_DOMAIN,
    SO_MARK,
    SO_PRIORITY,
    SO_PROTOCOL,
    SO_TYPE,
)

_COOKIE = struct.Struct("=Q")
#: By the socket's inode: sockets that a `Sock` is kept for.
_SOCKS: WeakValueDictionary[int, Sock] = WeakValueDictionary()


def keep(descriptor: int, sock: Sock) -> None:
    """From now on `sock` is what the descriptor, and each duplicate of it, stands for."""
    _SOCKS[os.fstat(descriptor).st_ino] = sock


def sock_of(descriptor: int) -> Sock:
    """The socket behind a descriptor, as it is now; EBADF, ENOTSOCK."""
    try:
        file = os.fstat(descriptor)
        if not stat.S_ISSOCK(file.st_mode):
            raise refused(errno.ENOTSOCK)
        duplicate = os.dup(descriptor)
    except OverflowError:
        raise refused(errno.EBADF) from None
    found = _SOCKS.get(file.st_ino)
    with socket.socket(fileno=duplicate) as opened:
        if found is None:
            found = _SOCKS[file.st_ino] = _ProcessSock(
                family=_option(opened, SO_DOMAIN),
                uid=file.st_uid,
                cgroup_id=environment.cgroup_id,
                cgroup_ancestors=environment.cgroup_ancestors,
            )
            found.cookie = _COOKIE.unpack(opened.getsockopt(socket.SOL_SOCKET, SO_COOKIE, _COOKIE.size))[0]
        if isinstance(found, _ProcessSock):
            _look(found, opened)
    return found


class _ProcessSock(Sock):
    """A socket of the operating system's."""


def _option(opened: socket.socket, option: int) -> int:
    return opened.getsockopt(socket.SOL_SOCKET, option)


def _look(sock: Sock, opened: socket.socket) -> None:
    sock.type, sock.protocol = _option(opened, SO_TYPE), _option(opened, SO_PROTOCOL)
    sock.mark, sock.priority = _option(opened, SO_MARK), _option(opened, SO_PRIORITY)
    sock.bound_dev_if = _option(opened, SO_BINDTOIFINDEX)
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.local, sock.local_port = _packed(sock.family, *opened.getsockname()[:2])
        if sock.family == socket.AF_INET6:
            sock.v6only = bool(opened.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY))
    connected = True
    try:
        peer = opened.getpeername()
    except OSError:
        connected = False
    if connected and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.remote, sock.remote_port = _packed(sock.family, *peer[:2])
    if sock.protocol == socket.IPPROTO_TCP and sock.type == socket.SOCK_STREAM:
        sock.state = opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    elif connected:
        sock.state = BPF_TCP_ESTABLISHED
    elif _option(opened, SO_ACCEPTCONN):
        sock.state = BPF_TCP_LISTEN
    else:
        sock.state = BPF_TCP_CLOSE


def _packed(family: int, address: str, port: int) -> tuple[bytes, int]:
    return socket.inet_pton(family, address.partition("%")[0]), port
