"""Helpers that make and check SYN cookies, for a listener (Linux 5.2, 5.3) and without one (6.0; net/core/filter.c).

The secret is the emulated machine's, which two machines do not share either.
"""

from __future__ import annotations

import errno
import socket
from typing import NamedTuple

from kbpf.emulator.environment import environment
from kbpf.emulator.helpers.references import sock_at
from kbpf.emulator.interpreter import HelperFunction, Run
from kbpf.emulator.memory import M32
from kbpf.emulator.sock import Sock
from kbpf.emulator.syncookies import MOST_AGE, SIZES4, SIZES6, segment_size
from kbpf.uapi.constants import BPF_TCP_LISTEN

_TCP_HEADER = 20
_FIN, _SYN, _RST, _ACK = 1, 2, 4, 16
_MINUTE = 60 * 10**9
#: net.ipv4.tcp_syncookies: never, when too many connections are half open, always.
_NEVER, _ALWAYS = 0, 2


class _Version(NamedTuple):
    """A version of IP: its header's size, where in it the two addresses are, segment sizes that cookies tell."""

    header: int
    addresses: slice
    sizes: tuple[int, ...]
    #: The segment size of who names none: without a listener, and of one.
    plain: int
    clamp: int


_IPV4 = _Version(20, slice(12, 20), SIZES4, 536, 536)
_IPV6 = _Version(40, slice(8, 40), SIZES6, 1220, 1220)


def _minute() -> int:
    return environment.clock() // _MINUTE


def _made(version: _Version, ip: bytes, tcp: bytes, size: int) -> int:
    """The cookie for a SYN, above it the segment size that it says."""
    index = max([at for at, known in enumerate(version.sizes) if size >= known], default=0)
    connection = ip[version.addresses] + tcp[:4]
    cookie = environment.syncookies.make(connection, int.from_bytes(tcp[4:8], "big"), index, _minute())
    return cookie | version.sizes[index] << 32


def _good(version: _Version, ip: bytes, tcp: bytes) -> bool:
    """Whether an ACK answers a cookie."""
    sequence, cookie = (int.from_bytes(tcp[at : at + 4], "big") - 1 & M32 for at in (4, 8))
    index = environment.syncookies.check(cookie, ip[version.addresses] + tcp[:4], sequence, _minute())
    return index is not None and index < len(version.sizes)


def _raw_gen(version: _Version) -> HelperFunction:
    def helper(run: Run, ip_at: int, tcp_at: int, size: int, *_: int) -> int:
        ip, tcp = run.read(ip_at, version.header), run.read(tcp_at, size & M32)
        if len(tcp) < _TCP_HEADER or len(tcp) != tcp[12] >> 4 << 2:
            return -errno.EINVAL
        return _made(version, ip, tcp, segment_size(tcp[_TCP_HEADER:]) or version.plain)

    return helper


def _raw_check(version: _Version) -> HelperFunction:
    def helper(run: Run, ip_at: int, tcp_at: int, *_: int) -> int:
        good = _good(version, run.read(ip_at, version.header), run.read(tcp_at, _TCP_HEADER))
        return 0 if good else -errno.EACCES

    return helper


def _version(sock: Sock, ip: bytes) -> _Version | int:
    """The version of an IP header that a listener takes, or an error; `ip` is an IPv4 header's length at least."""
    number = ip[0] >> 4
    if number == 4:
        return -errno.EINVAL if sock.family == socket.AF_INET6 and sock.v6only else _IPV4
    if number == 6:
        return _IPV6 if len(ip) >= _IPV6.header and sock.family == socket.AF_INET6 else -errno.EINVAL
    return -errno.EPROTONOSUPPORT


def _listens(sock: Sock) -> bool:
    return sock.state == BPF_TCP_LISTEN and sock.protocol == socket.IPPROTO_TCP


def tcp_check_syncookie(run: Run, sock: int, ip_at: int, ip_size: int, tcp_at: int, tcp_size: int) -> int:
    found = sock_at(run, sock)
    ip, tcp = run.read(ip_at, ip_size & M32), run.read(tcp_at, tcp_size & M32)
    if len(tcp) < _TCP_HEADER or not _listens(found) or environment.tcp_syncookies == _NEVER:
        return -errno.EINVAL
    if tcp[13] & (_ACK | _RST | _SYN) != _ACK:
        return -errno.ENOENT
    if len(ip) < _IPV4.header:
        return -errno.EINVAL
    sent = (found.reuseport or found).syn_cookie_sent
    if sent is None or environment.clock() - sent > MOST_AGE * _MINUTE:
        return -errno.ENOENT
    version = _version(found, ip)
    if isinstance(version, int):
        return version
    return 0 if _good(version, ip, tcp) else -errno.ENOENT


def tcp_gen_syncookie(run: Run, sock: int, ip_at: int, ip_size: int, tcp_at: int, tcp_size: int) -> int:
    """Only where connections are always answered with cookies: the emulator's listeners are never overrun."""
    found = sock_at(run, sock)
    ip, tcp = run.read(ip_at, ip_size & M32), run.read(tcp_at, tcp_size & M32)
    if len(tcp) < _TCP_HEADER or len(tcp) != tcp[12] >> 4 << 2 or not _listens(found):
        return -errno.EINVAL
    if environment.tcp_syncookies == _NEVER:
        return -errno.ENOENT
    if tcp[13] & (_SYN | _ACK | _FIN | _RST) != _SYN or len(ip) < _IPV4.header:
        return -errno.EINVAL
    version = _version(found, ip)
    if isinstance(version, int):
        return version
    if environment.tcp_syncookies != _ALWAYS:
        return -errno.ENOENT
    made = _made(version, ip, tcp, segment_size(tcp[_TCP_HEADER:]) or version.clamp)
    (found.reuseport or found).syn_cookie_sent = environment.clock()
    return made


HELPERS: dict[str, HelperFunction] = {
    "tcp_check_syncookie": tcp_check_syncookie,
    "tcp_gen_syncookie": tcp_gen_syncookie,
    "tcp_raw_gen_syncookie_ipv4": _raw_gen(_IPV4),
    "tcp_raw_gen_syncookie_ipv6": _raw_gen(_IPV6),
    "tcp_raw_check_syncookie_ipv4": _raw_check(_IPV4),
    "tcp_raw_check_syncookie_ipv6": _raw_check(_IPV6),
}
