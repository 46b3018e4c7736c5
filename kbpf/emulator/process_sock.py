"""Sockets of the operating system that this process holds, as far as a process can tell what the kernel keeps.

It is not told whom a socket is connecting to, by which queue packets came, which end has connected to the other,
whether SO_REUSEPORT was set before or after a port was taken (before is assumed), and of TCP where its windows are.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
from collections.abc import Hashable
from pathlib import Path
from weakref import WeakValueDictionary

from kbpf.emulator.environment import environment
from kbpf.emulator.maps.base import refused
from kbpf.emulator.sock import Sock
from kbpf.emulator.socket_table import ReuseportGroup
from kbpf.uapi.constants import (
    BPF_TCP_CLOSE,
    BPF_TCP_ESTABLISHED,
    BPF_TCP_LISTEN,
    SO_ACCEPTCONN,
    SO_BINDTOIFINDEX,
    SO_COOKIE,
    SO_DOMAIN,
    SO_MARK,
    SO_NETNS_COOKIE,
    SO_PRIORITY,
    SO_PROTOCOL,
    SO_REUSEPORT,
    SO_TYPE,
    SOL_SOCKET,
)

_COOKIE = struct.Struct("=Q")
_BYTE, _WORD, _LONG = struct.Struct("=B"), struct.Struct("=I"), struct.Struct("=Q")
#: What ``struct bpf_tcp_sock`` shows, and where ``struct tcp_info`` (linux/tcp.h) tells it.
_TCP_INFO = {
    "icsk_retransmits": (2, _BYTE),
    "mss_cache": (16, _WORD),
    "packets_out": (24, _WORD),
    "sacked_out": (28, _WORD),
    "lost_out": (32, _WORD),
    "retrans_out": (36, _WORD),
    "srtt_us": (68, _WORD),
    "snd_ssthresh": (76, _WORD),
    "snd_cwnd": (80, _WORD),
    "total_retrans": (100, _WORD),
    "bytes_acked": (120, _LONG),
    "bytes_received": (128, _LONG),
    "segs_out": (136, _WORD),
    "segs_in": (140, _WORD),
    "rtt_min": (148, _WORD),
    "data_segs_in": (152, _WORD),
    "data_segs_out": (156, _WORD),
    "delivered": (192, _WORD),
    "delivered_ce": (196, _WORD),
    "dsack_dups": (216, _WORD),
}
_TCP_INFO_SIZE = 220
#: By the socket's inode: sockets that a `Sock` is kept for.
_SOCKS: WeakValueDictionary[int, Sock] = WeakValueDictionary()
#: By what they share: namespace, protocol, family, address, port and device.
_GROUPS: WeakValueDictionary[Hashable, ReuseportGroup] = WeakValueDictionary()


def keep(descriptor: int, sock: Sock) -> None:
    """From now on `sock` is what the descriptor, and each duplicate of it, stands for."""
    _SOCKS[os.fstat(descriptor).st_ino] = sock


def sock_of(descriptor: int) -> Sock:
    """The socket behind a descriptor, as it is now; EBADF, ENOTSOCK."""
    try:
        file = os.fstat(descriptor)
    except (OSError, OverflowError):
        raise refused(errno.EBADF) from None
    if not stat.S_ISSOCK(file.st_mode):
        raise refused(errno.ENOTSOCK)
    found = _SOCKS.get(file.st_ino)
    if found is None:
        found = _SOCKS[file.st_ino] = _ProcessSock(descriptor, file)
    found.look()
    return found


class _ProcessSock(Sock):
    """A socket of the operating system's, of which this process has, or has had, a descriptor."""

    def __init__(self, descriptor: int, file: os.stat_result) -> None:
        self.descriptor, self.inode = descriptor, file.st_ino
        with socket.socket(fileno=os.dup(descriptor)) as opened:
            super().__init__(
                family=_option(opened, SO_DOMAIN),
                uid=file.st_uid,
                cgroup_id=environment.cgroup_id,
                cgroup_ancestors=environment.cgroup_ancestors,
            )
            # Python's own takes no buffers for AF_VSOCK, whose cookie is then of the emulator's.
            if self.family != socket.AF_VSOCK:
                self.cookie = _COOKIE.unpack(opened.getsockopt(SOL_SOCKET, SO_COOKIE, _COOKIE.size))[0]

    def look(self) -> bool:
        if self.is_open():
            try:
                with socket.socket(fileno=os.dup(self.descriptor)) as opened:
                    _look(self, opened)
            except OSError:
                # Another thread has closed it in the meantime.
                return self.is_open()
        return not self.closed

    def is_open(self) -> bool:
        """A socket is only to be asked by a descriptor, so that it is gone when there is none."""
        if not self.closed and not _is_socket(self.descriptor, self.inode):
            numbers = (int(entry.name) for entry in Path("/proc/self/fd").iterdir())
            found = next((number for number in numbers if _is_socket(number, self.inode)), None)
            self.closed, self.descriptor = found is None, -1 if found is None else found
            if self.closed and self.reuseport is not None:
                self.reuseport.remove(self)
        return not self.closed


def _is_socket(descriptor: int, inode: int) -> bool:
    try:
        file = os.fstat(descriptor)
    except OSError:
        return False
    return file.st_ino == inode and stat.S_ISSOCK(file.st_mode)


def _option(opened: socket.socket, option: int) -> int:
    return opened.getsockopt(SOL_SOCKET, option)


def _look(sock: Sock, opened: socket.socket) -> None:
    if sock.family == socket.AF_VSOCK:
        sock.type = opened.type
        return
    sock.type, sock.protocol = _option(opened, SO_TYPE), _option(opened, SO_PROTOCOL)
    sock.mark, sock.priority = _option(opened, SO_MARK), _option(opened, SO_PRIORITY)
    sock.bound_dev_if = _option(opened, SO_BINDTOIFINDEX)
    peer = _peer(opened)
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.local, sock.local_port = _packed(sock.family, *opened.getsockname()[:2])
        nobody = bytes(len(sock.local)), 0
        sock.remote, sock.remote_port = nobody if peer is None else _packed(sock.family, *peer[:2])
        if sock.family == socket.AF_INET6:
            sock.v6only = bool(opened.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY))
    sock.state = _state(sock, opened, peer is not None)
    _join(sock, opened)


def _peer(opened: socket.socket) -> tuple[str, int] | None:
    """Whom the socket is connected to. A netlink socket that has not been connected says: the kernel."""
    try:
        peer: tuple[str, int] = opened.getpeername()
    except OSError:
        return None
    return None if opened.family == socket.AF_NETLINK and not any(peer) else peer


def _packed(family: int, address: str, port: int) -> tuple[bytes, int]:
    return socket.inet_pton(family, address.partition("%")[0]), port


def _state(sock: Sock, opened: socket.socket, connected: bool) -> int:
    if (sock.type, sock.protocol) == (socket.SOCK_STREAM, socket.IPPROTO_TCP):
        info = opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_SIZE).ljust(_TCP_INFO_SIZE, b"\0")
        state = info[0]
        if state != BPF_TCP_LISTEN:
            sock.tcp = {name: field.unpack_from(info, at)[0] for name, (at, field) in _TCP_INFO.items()}
            # The three bits that Linux keeps beyond microseconds are not told.
            sock.tcp["srtt_us"] <<= 3
        return state
    if connected:
        return BPF_TCP_ESTABLISHED
    return BPF_TCP_LISTEN if _option(opened, SO_ACCEPTCONN) else BPF_TCP_CLOSE


def _join(sock: Sock, opened: socket.socket) -> None:
    """Put the socket into the group that it shares its port with, which it leaves when it is connected."""
    waits = sock.state == (BPF_TCP_LISTEN if sock.protocol == socket.IPPROTO_TCP else BPF_TCP_CLOSE)
    bound = sock.local_port > 0 and sock.family in (socket.AF_INET, socket.AF_INET6)
    if not (bound and waits and _option(opened, SO_REUSEPORT)):
        # One that has the option no longer stays where it is.
        if sock.reuseport is not None and not waits:
            sock.reuseport.remove(sock)
    elif sock.reuseport is None:
        namespace = opened.getsockopt(SOL_SOCKET, SO_NETNS_COOKIE, _COOKIE.size)
        shared = namespace, sock.protocol, sock.family, sock.local, sock.local_port, sock.bound_dev_if
        group = _GROUPS.setdefault(shared, ReuseportGroup())
        for other in list(group.socks):
            # Those that are gone leave.
            assert isinstance(other, _ProcessSock)
            other.is_open()
        group.add(sock)
