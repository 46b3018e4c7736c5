"""Maps of sockets: sockmap and sockhash (net/core/sock_map.c), and the array that sk_reuseport programs choose from.

User space puts descriptors in and reads cookies out; programs look sockets up and hold them. A socket that is closed
is in no map. One of the operating system's is taken for closed when this process has no descriptor of it.
"""

from __future__ import annotations

import errno
import socket
import struct
import sys
import weakref
from typing import TYPE_CHECKING

from kbpf.emulator import psock
from kbpf.emulator.maps.base import MAPS, Map, refused
from kbpf.emulator.maps.descriptors import number
from kbpf.emulator.process_sock import sock_of
from kbpf.emulator.sock import Sock
from kbpf.errors import ENOTSUPP
from kbpf.uapi import constants as uapi

if TYPE_CHECKING:
    from kbpf.emulator.links import Link

_MOST_DESCRIPTOR = 0x7FFFFFFF
#: What a key of a sockhash may take (MAX_BPF_STACK), and how many buckets there may be.
_MOST_KEY, _MOST_BUCKETS = 512, 1 << 27
_COOKIE = 8
_TCP = (socket.SOCK_STREAM, socket.IPPROTO_TCP)
_UDP = (socket.SOCK_DGRAM, socket.IPPROTO_UDP)


class SocketHolder(Map):
    """Sockets by key."""

    creation_flags = uapi.BPF_F_NUMA_NODE | uapi.BPF_F_RDONLY | uapi.BPF_F_WRONLY

    def check_creation(self) -> None:
        if not self.max_entries or self.value_size not in (4, _COOKIE):
            raise refused(errno.EINVAL)
        super().check_creation()

    def allocate(self) -> None:
        self._socks: dict[bytes, Sock] = {}

    def sock_at(self, key: bytes) -> Sock | None:
        """The socket at a key, as it is now; None if there is none."""
        sock = self._socks.get(key)
        if sock is None or self.stays(sock):
            return sock
        del self._socks[key]
        return None

    def stays(self, sock: Sock) -> bool:
        """Whether a socket that was put in has not left since."""
        return sock.look()

    def keys(self) -> list[bytes]:
        return [key for key in list(self._socks) if self.sock_at(key) is not None]

    def __contains__(self, sock: Sock) -> bool:
        return any(self.sock_at(key) is sock for key in list(self._socks))

    def read(self, key: bytes) -> bytes:
        if self.value_size != _COOKIE:
            raise refused(errno.ENOSPC)
        sock = self.sock_at(key)
        if sock is None:
            raise refused(errno.ENOENT)
        return sock.cookie.to_bytes(_COOKIE, sys.byteorder)

    def check_key(self, key: bytes, flags: int) -> None:
        """Raise what an update with these flags does where there is a socket at the key, or none."""
        there = self.sock_at(key) is not None
        if there and flags == uapi.BPF_NOEXIST:
            raise refused(errno.EEXIST)
        if not there and flags == uapi.BPF_EXIST:
            raise refused(errno.ENOENT)


def _next_index(key: bytes | None, count: int) -> bytes:
    index = -1 if key is None else number(key)
    if index == count - 1:
        raise refused(errno.ENOENT)
    return struct.pack("=I", index + 1 if index < count else 0)


class SocketMap(SocketHolder):
    """Sockets that programs find, and redirect to; with programs for what they receive (`kbpf.emulator.psock`)."""

    def allocate(self) -> None:
        super().allocate()
        self.programs = psock.Programs()
        #: Links that have put programs there, by attach type.
        self.program_links: dict[str, Link] = {}
        weakref.finalize(self, _emptied, self._socks, self.programs).atexit = False

    def abandoned(self) -> None:
        super().abandoned()
        self.programs.clear()

    def store(self, key: bytes, value: bytes, flags: int) -> None:
        descriptor = number(value)
        if descriptor > _MOST_DESCRIPTOR:
            raise refused(errno.EINVAL)
        self._put(key, sock_of(descriptor), flags)

    def put(self, key: bytes, sock: Sock, flags: int) -> None:
        """Put a socket in that a program has; raises what the update does."""
        if not sock.full:
            raise refused(errno.EINVAL)
        self._put(key, sock, flags)

    def _put(self, key: bytes, sock: Sock, flags: int) -> None:
        if not _takes_part(sock):
            raise refused(errno.EOPNOTSUPP)
        self.link(key, sock, flags)

    def link(self, key: bytes, sock: Sock, flags: int) -> None:
        """Put a socket in that is known to be one for such maps."""
        if flags > uapi.BPF_EXIST:
            raise refused(errno.EINVAL)
        self.check_index(key)
        if _held_by(sock, ReuseportSockArray):
            raise refused(errno.EBUSY)
        joined = psock.join(sock, self.programs)
        try:
            self.check_key(key, flags)
            self.check_room(key)
        except OSError:
            if joined is not None:
                joined.settle()
            raise
        if joined is not None:
            joined.links.append((self.programs, key))
        before = self._socks.get(key)
        self._socks[key] = sock
        if before is not None:
            psock.leave(before, self.programs, key)

    def take_out(self, key: bytes) -> None:
        """Take out the socket that is at the key."""
        psock.leave(self._socks.pop(key), self.programs, key)

    def check_index(self, key: bytes) -> None:
        """Raise what an update does for a key that no element can have."""

    def check_room(self, key: bytes) -> None:
        """Raise what an update does where there is no room for one more."""


def _emptied(socks: dict[bytes, Sock], programs: psock.Programs) -> None:
    """The map is gone."""
    for key, sock in socks.items():
        psock.leave(sock, programs, key)


def _takes_part(sock: Sock) -> bool:
    """Whether the protocol has its sockets in such maps, and in the state that this one is in."""
    kind = sock.type, sock.protocol
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        if kind == _TCP:
            return sock.state in (uapi.BPF_TCP_ESTABLISHED, uapi.BPF_TCP_LISTEN)
        return kind == _UDP and bool(sock.local_port)
    if sock.family == socket.AF_UNIX:
        connected = sock.state == uapi.BPF_TCP_ESTABLISHED
        return sock.type == socket.SOCK_DGRAM or (sock.type == socket.SOCK_STREAM and connected)
    return False


def _held_by(sock: Sock, kind: type[SocketHolder]) -> bool:
    """Whether the socket is in a map of this kind."""
    return any(isinstance(held, kind) and sock in held for held in list(MAPS.values()))


class SockMap(SocketMap):
    """By index. Linux 4.14."""

    type = "sockmap"

    def check_creation(self) -> None:
        if self.key_size != 4:
            raise refused(errno.EINVAL)
        super().check_creation()

    def check_index(self, key: bytes) -> None:
        if number(key) >= self.max_entries:
            raise refused(errno.E2BIG)

    def remove(self, key: bytes) -> None:
        if self.sock_at(key) is None:
            raise refused(errno.EINVAL)
        self.take_out(key)

    def following(self, key: bytes | None) -> bytes:
        return _next_index(key, self.max_entries)


class SockHash(SocketMap):
    """By any key. Linux 4.18."""

    type = "sockhash"

    def check_creation(self) -> None:
        if not self.key_size:
            raise refused(errno.EINVAL)
        super().check_creation()
        if self.key_size > _MOST_KEY:
            raise refused(errno.E2BIG)
        if self.max_entries > _MOST_BUCKETS:
            raise refused(errno.EINVAL)

    def check_room(self, key: bytes) -> None:
        if self.sock_at(key) is None and len(self.keys()) >= self.max_entries:
            raise refused(errno.E2BIG)

    def remove(self, key: bytes) -> None:
        if self.sock_at(key) is None:
            raise refused(errno.ENOENT)
        self.take_out(key)

    def following(self, key: bytes | None) -> bytes:
        keys = self.keys()
        at = keys.index(key) + 1 if key in keys else 0
        if at == len(keys):
            raise refused(errno.ENOENT)
        return keys[at]


class ReuseportSockArray(SocketHolder):
    """Sockets that share ports, by index; each in one place only. Linux 4.19."""

    type = "reuseport_sockarray"
    creation_flags = SocketHolder.creation_flags | uapi.BPF_F_RDONLY_PROG | uapi.BPF_F_WRONLY_PROG

    def check_creation(self) -> None:
        if self.key_size != 4:
            raise refused(errno.EINVAL)
        super().check_creation()

    def stays(self, sock: Sock) -> bool:
        return sock.look() and sock.reuseport is not None

    def store(self, key: bytes, value: bytes, flags: int) -> None:
        if flags > uapi.BPF_EXIST:
            raise refused(errno.EINVAL)
        if number(key) >= self.max_entries:
            raise refused(errno.E2BIG)
        descriptor = number(value)
        if descriptor > _MOST_DESCRIPTOR:
            raise refused(errno.EINVAL if self.value_size == _COOKIE else errno.EBADF)
        sock = sock_of(descriptor)
        self.check_key(key, flags)
        if sock.family not in (socket.AF_INET, socket.AF_INET6) or (sock.type, sock.protocol) not in (_TCP, _UDP):
            raise refused(ENOTSUPP)
        if sock.refcounted or not sock.local_port or sock.reuseport is None:
            raise refused(errno.EINVAL)
        if _held_by(sock, SocketHolder):
            raise refused(errno.EBUSY)
        self._socks[key] = sock

    def remove(self, key: bytes) -> None:
        if number(key) >= self.max_entries:
            raise refused(errno.E2BIG)
        if self.sock_at(key) is None:
            raise refused(errno.ENOENT)
        del self._socks[key]

    def following(self, key: bytes | None) -> bytes:
        return _next_index(key, self.max_entries)
