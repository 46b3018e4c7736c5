"""Socket options that programs set and get with bpf_setsockopt and bpf_getsockopt, kept in a `Sock`.

Those that Linux 6.18 lets programs reach, with its ranges, what it makes of values, and its errnos
(`sol_socket_sockopt` and its siblings in net/core/filter.c). They are kept and given back: what they would do to how
a socket sends and receives is another matter. Limits are those that Linux has by default (net.core.wmem_max, rmem_max,
net.ipv4.tcp_rmem), and defaults too, of which TCP's congestion control is cubic.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from kbpf.emulator.environment import environment
from kbpf.emulator.sock import Sock
from kbpf.uapi import constants as uapi
from kbpf.uapi.constants import SOL_IP, SOL_IPV6, SOL_SOCKET, SOL_TCP

#: What is kept instead of a number; raises `OSError` where Linux refuses it.
Take: TypeAlias = Callable[[Sock, int], int]

_INT_MAX, _U32 = 0x7FFFFFFF, 0xFFFFFFFF
#: net.core.wmem_max and rmem_max, and half of net.ipv4.tcp_rmem's last number.
_BUFFER_MAX, _TCP_LOWAT_MAX = 4194304, 16777216
_ECN = 3
#: Priorities that follow from the type of service (rt_tos2priority), by eights.
_PRIORITIES = (0, 2, 6, 4)
#: The names of congestion controls, and how much room the kernel has for one.
CONGESTION, _NAME_SIZE = ("cubic", "reno", "bbr"), 16
_DELAY_LEAST_TICKS, _DELAY_MOST_PER_SECOND = 2, 5


class Option(NamedTuple):
    """An int: what it is at first, how it is set, and which attribute of the `Sock` has it, if not `Sock.options`."""

    default: int | Callable[[Sock], int]
    take: Take
    attribute: str = ""


def _refused(number: int) -> OSError:
    return OSError(number, errno.errorcode.get(number, ""))


def _any(sock: Sock, value: int) -> int:
    return value


def _flag(sock: Sock, value: int) -> int:
    return int(value != 0)


def _between(least: int, most: int) -> Take:
    def take(sock: Sock, value: int) -> int:
        if not least <= value <= most:
            raise _refused(errno.EINVAL)
        return value

    return take


def _within(mask: int) -> Take:
    def take(sock: Sock, value: int) -> int:
        if value & ~mask:
            raise _refused(errno.EINVAL)
        return value

    return take


def _buffer(least: int) -> Take:
    return lambda sock, value: max(2 * min(value & _U32, _BUFFER_MAX), least)


def _size(tcp: int, others: int) -> Callable[[Sock], int]:
    return lambda sock: tcp if _is_tcp(sock) else others


def _lowat(sock: Sock, value: int) -> int:
    most = _INT_MAX
    if _is_tcp(sock):
        given = sock.options.get((SOL_SOCKET, uapi.SO_RCVBUF))
        most = _TCP_LOWAT_MAX if given is None else given >> 1
    return min(_INT_MAX if value < 0 else value or 1, most)


def _rehash(sock: Sock, value: int) -> int:
    if not -1 <= value <= 1:
        raise _refused(errno.EINVAL)
    return abs(value)


def _segment(sock: Sock, value: int) -> int:
    """0 takes back what was set."""
    return _between(88, 32767)(sock, value) if value else sock.tcp.get("mss_cache", 536)


def _clamp(sock: Sock, value: int) -> int:
    if not value:
        if sock.state != uapi.BPF_TCP_CLOSE:
            raise _refused(errno.EINVAL)
        return 0
    return max(value, 1152)


def _ticks(microseconds: int) -> int:
    return -(-microseconds * environment.ticks // 1_000_000)


def _delay(sock: Sock, value: int) -> int:
    """Microseconds, kept in ticks: from two of them to a fifth of a second."""
    ticks = _ticks(value)
    if not _DELAY_LEAST_TICKS <= ticks <= environment.ticks // _DELAY_MOST_PER_SECOND:
        raise _refused(errno.EINVAL)
    return ticks * 1_000_000 // environment.ticks


def _longest(sock: Sock, value: int) -> int:
    return _ticks(_between(1000, 120000)(sock, value) * 1000) * 1000 // environment.ticks


def _service(sock: Sock, value: int) -> int:
    """Of a stream, ECN's two bits stay as they are. The priority follows."""
    value &= 0xFF
    if sock.type == socket.SOCK_STREAM:
        value = value & ~_ECN | sock.options.get((SOL_IP, uapi.IP_TOS), 0) & _ECN
    sock.priority = _PRIORITIES[value >> 3 & 3]
    return value


def _class(sock: Sock, value: int) -> int:
    value = max(_between(-1, 0xFF)(sock, value), 0)
    if sock.type == socket.SOCK_STREAM:
        value = value & ~_ECN | sock.options.get((SOL_IPV6, uapi.IPV6_TCLASS), 0) & _ECN
    return value


_KEEP_SECONDS, _FEW = _between(1, 32767), _between(1, 127)
OPTIONS: dict[tuple[int, int], Option] = {
    (SOL_SOCKET, uapi.SO_REUSEADDR): Option(0, _flag),
    (SOL_SOCKET, uapi.SO_SNDBUF): Option(_size(16384, 212992), _buffer(4608)),
    (SOL_SOCKET, uapi.SO_RCVBUF): Option(_size(131072, 212992), _buffer(2304)),
    (SOL_SOCKET, uapi.SO_KEEPALIVE): Option(0, _flag),
    (SOL_SOCKET, uapi.SO_PRIORITY): Option(0, _any, "priority"),
    (SOL_SOCKET, uapi.SO_REUSEPORT): Option(0, _flag),
    (SOL_SOCKET, uapi.SO_RCVLOWAT): Option(1, _lowat),
    (SOL_SOCKET, uapi.SO_MARK): Option(0, _any, "mark"),
    (SOL_SOCKET, uapi.SO_MAX_PACING_RATE): Option(_U32, _any),
    (SOL_SOCKET, uapi.SO_BINDTOIFINDEX): Option(0, _between(0, _INT_MAX), "bound_dev_if"),
    (SOL_SOCKET, uapi.SO_TXREHASH): Option(1, _rehash),
    (SOL_SOCKET, uapi.SK_BPF_CB_FLAGS): Option(0, _within(uapi.SK_BPF_CB_MASK)),
    (SOL_IP, uapi.IP_TOS): Option(0, _service),
    (SOL_IPV6, uapi.IPV6_TCLASS): Option(0, _class),
    (SOL_IPV6, uapi.IPV6_AUTOFLOWLABEL): Option(1, _flag),
    (SOL_TCP, uapi.TCP_NODELAY): Option(0, _flag),
    (SOL_TCP, uapi.TCP_MAXSEG): Option(lambda sock: sock.tcp.get("mss_cache", 536), _segment),
    (SOL_TCP, uapi.TCP_KEEPIDLE): Option(7200, _KEEP_SECONDS),
    (SOL_TCP, uapi.TCP_KEEPINTVL): Option(75, _KEEP_SECONDS),
    (SOL_TCP, uapi.TCP_KEEPCNT): Option(9, _FEW),
    (SOL_TCP, uapi.TCP_SYNCNT): Option(6, _FEW),
    (SOL_TCP, uapi.TCP_WINDOW_CLAMP): Option(0, _clamp),
    (SOL_TCP, uapi.TCP_THIN_LINEAR_TIMEOUTS): Option(0, _between(0, 1)),
    (SOL_TCP, uapi.TCP_USER_TIMEOUT): Option(0, _between(0, _INT_MAX)),
    (SOL_TCP, uapi.TCP_NOTSENT_LOWAT): Option(0, _any),
    (SOL_TCP, uapi.TCP_SAVE_SYN): Option(0, _between(0, 2)),
    (SOL_TCP, uapi.TCP_RTO_MAX_MS): Option(120000, _longest),
    (SOL_TCP, uapi.TCP_BPF_DELACK_MAX): Option(200000, _delay),
    (SOL_TCP, uapi.TCP_BPF_RTO_MIN): Option(200000, _delay),
    (SOL_TCP, uapi.TCP_BPF_SOCK_OPS_CB_FLAGS): Option(0, _within(uapi.BPF_SOCK_OPS_ALL_CB_FLAGS), "sock_ops_cb_flags"),
}


def _is_tcp(sock: Sock) -> bool:
    return sock.protocol == socket.IPPROTO_TCP and sock.family in (socket.AF_INET, socket.AF_INET6)


def _has_level(sock: Sock, level: int) -> bool:
    if level == SOL_SOCKET:
        return True
    if level == SOL_TCP:
        return _is_tcp(sock)
    if level == SOL_IPV6:
        return sock.family == socket.AF_INET6
    takes_ipv4 = sock.family == socket.AF_INET6 and sock.type != socket.SOCK_RAW and not sock.v6only
    return level == SOL_IP and (sock.family == socket.AF_INET or takes_ipv4)


def _option(sock: Sock, level: int, name: int, size: int) -> Option:
    found = OPTIONS.get((level, name))
    if found is None or not sock.full or not _has_level(sock, level) or size != 4:
        raise _refused(errno.EINVAL)
    if name == uapi.SO_TXREHASH and level == SOL_SOCKET and not _is_tcp(sock):
        raise _refused(errno.EOPNOTSUPP)
    return found


def setsockopt(sock: Sock, level: int, name: int, value: bytes) -> None:
    """Raises `OSError` with the errno that the helper gives."""
    if sock.full and (level, name) == (SOL_SOCKET, uapi.SO_BINDTODEVICE):
        sock.bound_dev_if = _device(value)
    elif sock.full and _is_tcp(sock) and (level, name) == (SOL_TCP, uapi.TCP_CONGESTION):
        sock.congestion = _congestion(value)
    elif sock.full and _is_tcp(sock) and (level, name) in _WINDOWS:
        _window(sock, name, value)
    elif sock.full and _is_tcp(sock) and (level, name) == (SOL_TCP, uapi.TCP_SAVED_SYN) and len(value) >= 4:
        # To be read only.
        raise _refused(errno.ENOPROTOOPT)
    else:
        option = _option(sock, level, name, len(value))
        kept = option.take(sock, _int(value))
        if option.attribute:
            setattr(sock, option.attribute, kept & _U32)
        else:
            sock.options[level, name] = kept


def getsockopt(sock: Sock, level: int, name: int, size: int) -> bytes:
    """At most `size` bytes, the rest is zeroes; raises `OSError` with the errno that the helper gives."""
    if sock.full and _is_tcp(sock) and (level, name) == (SOL_TCP, uapi.TCP_CONGESTION):
        if size < 2:
            raise _refused(errno.EINVAL)
        return sock.congestion.encode()[: size - 1]
    option = _option(sock, level, name, size)
    if option.attribute:
        value = int(getattr(sock, option.attribute))
    else:
        default = option.default if isinstance(option.default, int) else option.default(sock)
        value = sock.options.get((level, name), default)
    return struct.pack("=I", value & _U32)


def _int(value: bytes) -> int:
    if len(value) != 4:
        raise _refused(errno.EINVAL)
    return int(struct.unpack("=i", value)[0])


def _device(value: bytes) -> int:
    """The index of the device of that name; none is no device."""
    from kbpf.emulator.network import current

    name = value[: _NAME_SIZE - 1].split(b"\0")[0]
    return current().interface(name.decode("latin-1")).index if name else 0


def _congestion(value: bytes) -> str:
    if len(value) < 2:
        raise _refused(errno.EINVAL)
    if len(value) >= 3 and value.split(b"\0")[0] == b"cdg":
        raise _refused(524)
    name = value[: _NAME_SIZE - 1].split(b"\0")[0].decode("latin-1")
    if name not in CONGESTION:
        raise _refused(errno.ENOENT)
    return name


_WINDOWS = ((SOL_TCP, uapi.TCP_BPF_IW), (SOL_TCP, uapi.TCP_BPF_SNDCWND_CLAMP))


def _window(sock: Sock, name: int, value: bytes) -> None:
    """The congestion window at first, which nothing may have been sent in yet, and the most that it may be."""
    number = _int(value)
    if number <= 0 or (name == uapi.TCP_BPF_IW and sock.tcp.get("data_segs_out", 0)):
        raise _refused(errno.EINVAL)
    sock.tcp["snd_cwnd" if name == uapi.TCP_BPF_IW else "snd_ssthresh"] = number
