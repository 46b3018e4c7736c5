"""Sockets as programs hold them: the kernel's ``struct sock``, and what ``struct bpf_sock`` shows of it.

Whoever has a socket (an emulated one, one of the operating system's, BPF_PROG_TEST_RUN) keeps a `Sock` up to date;
programs get its address and load from there. Which loads are allowed are the rules of `bpf_sock_is_valid_access` and
`bpf_tcp_sock_is_valid_access` (net/core/filter.c). Programs write nothing there; what those of a control group may set
of a new socket is `WRITABLE`.
"""

from __future__ import annotations

import itertools
import socket
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from kbpf.emulator.memory import M32, Region
from kbpf.uapi.constants import BPF_TCP_CLOSE, BPF_TCP_LISTEN, BPF_TCP_NEW_SYN_RECV, BPF_TCP_TIME_WAIT
from kbpf.uapi.structs import STRUCTS

if TYPE_CHECKING:
    from kbpf.emulator.connection import Connection
    from kbpf.emulator.psock import Psock
    from kbpf.emulator.socket_table import ReuseportGroup

#: Counted from a socket's address: where ``struct bpf_tcp_sock`` starts, and the kernel's own structure, which is not
#: shown.
TCP, STRUCTURE = 0x1000, 0x2000
ANY4, ANY6 = bytes(4), bytes(16)
_ANY = {int(socket.AF_INET): ANY4, int(socket.AF_INET6): ANY6}
#: How IPv6 addresses start that stand for IPv4 ones.
MAPPED = bytes(10) + b"\xff\xff"
#: What the kernel keeps as the IPv4 address of a socket that has an IPv6 one.
LOOPBACK4_IPV6 = bytes((127, 0, 0, 6))


@dataclass(kw_only=True, eq=False)
class Sock:
    """A socket. Addresses are packed (4 bytes for AF_INET, 16 for AF_INET6), ports and the rest in host order.

    Where nothing is bound or connected, addresses are zeroes and ports 0. Sockets of other families have neither.
    """

    family: int
    type: int = 0
    protocol: int = 0
    local: bytes = b""
    local_port: int = 0
    remote: bytes = b""
    remote_port: int = 0
    #: The device that it is bound to (SO_BINDTODEVICE), by index.
    bound_dev_if: int = 0
    mark: int = 0
    priority: int = 0
    #: BPF_TCP_*, for sockets that are not TCP's too: CLOSE, or ESTABLISHED where they are connected.
    state: int = BPF_TCP_CLOSE
    #: The queue that its packets came in by; None where none is noted.
    rx_queue_mapping: int | None = None
    #: Whether the other side has connected to it.
    accepted: bool = False
    #: IPV6_V6ONLY.
    v6only: bool = False
    uid: int = 0
    #: The control group that it was made in, and those around it from the root on.
    cgroup_id: int = 1
    cgroup_ancestors: tuple[int, ...] = ()
    #: The listener that a request (BPF_TCP_NEW_SYN_RECV) came to.
    listener: Sock | None = None
    #: The group that it shares its port with (SO_REUSEPORT).
    reuseport: ReuseportGroup | None = None
    #: Gives it a packed address and a port, 0 for none yet, as bpf_bind does; `OSError`. None: nobody can.
    bind: Callable[[bytes, int], None] | None = field(default=None, repr=False)
    #: What sock_ops programs are asked about the socket (BPF_SOCK_OPS_*_CB_FLAG), and the hash that it sends with.
    sock_ops_cb_flags: int = 0
    tx_hash: int = 0
    #: When it last answered a connection with a SYN cookie, by `environment.clock`.
    syn_cookie_sent: int | None = None
    #: Whether it is a TCP socket of the emulated network's; its connection, once there is one; what it has in maps.
    tcp_here: bool = False
    connection: weakref.ref[Connection] | None = field(default=None, repr=False)
    psock: Psock | None = field(default=None, repr=False)
    #: Whether nobody has it open any more.
    closed: bool = False
    #: Options that programs have set, by level and name (see `kbpf.emulator.socket_options`), and congestion control.
    options: dict[tuple[int, int], int] = field(default_factory=dict)
    congestion: str = "cubic"
    #: What ``struct bpf_tcp_sock`` shows, by field; what is not there is 0.
    tcp: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.family in _ANY:
            self.local, self.remote = self.local or _ANY[self.family], self.remote or _ANY[self.family]
        this: weakref.ref[Any] = weakref.ref(self)
        self._region = Region(readable=False, writable=False, owner=this, fields=_Shown(this))

    @property
    def address(self) -> int:
        """Where programs find ``struct bpf_sock``."""
        return self._region.address

    @cached_property
    def cookie(self) -> int:
        """A number that no other socket has, made when it is first asked for."""
        return next(_cookies)

    def look(self) -> bool:
        """Whether it is still open; one that somebody else keeps is brought up to date."""
        return not self.closed

    @property
    def full(self) -> bool:
        """Whether it is more than the remains of a connection, or a request for one (`sk_fullsock`)."""
        return self.state not in (BPF_TCP_TIME_WAIT, BPF_TCP_NEW_SYN_RECV)

    @property
    def refcounted(self) -> bool:
        """Whether a reference keeps it, rather than the RCU read lock (`sk_is_refcounted`): UDP sockets, raw sockets
        and listeners need none.
        """
        counted = self.protocol == socket.IPPROTO_TCP or self.family not in (socket.AF_INET, socket.AF_INET6)
        return not self.full or (counted and self.state != BPF_TCP_LISTEN)

    # What the kernel keeps of addresses beside those of the family: IPv4 ones of AF_INET6 sockets and the reverse.

    @property
    def local4(self) -> bytes:
        kept = as_ipv4(self.local)
        # A socket that no protocol has bound (a test run's) has kept nothing.
        return kept if kept is not None else LOOPBACK4_IPV6 if self.protocol else ANY4

    @property
    def remote4(self) -> bytes:
        kept = as_ipv4(self.remote)
        return kept if kept is not None else LOOPBACK4_IPV6 if self.accepted else ANY4

    @property
    def local6(self) -> bytes:
        return self._as_ipv6(self.local)

    @property
    def remote6(self) -> bytes:
        return self._as_ipv6(self.remote)

    def _as_ipv6(self, address: bytes) -> bytes:
        if self.family == socket.AF_INET6:
            return address
        connected = self.protocol == socket.IPPROTO_TCP and any(self.remote) and self.state != BPF_TCP_TIME_WAIT
        return MAPPED + address if self.family == socket.AF_INET and connected else ANY6


#: Beyond those that Linux gives.
_cookies = itertools.count(1 << 48)


def as_ipv4(address: bytes) -> bytes | None:
    """A packed address as IPv4 packets meet it, who reach sockets of AF_INET6 too; None for one of IPv6's own."""
    if address.startswith(MAPPED):
        return address[12:]
    if not any(address):
        return ANY4
    return address if len(address) == 4 else None


class _Shown:
    """A socket's region: ``struct bpf_sock``, and ``struct bpf_tcp_sock`` from `TCP` on."""

    __slots__ = ("_sock",)

    def __init__(self, sock: weakref.ref[Sock]) -> None:
        self._sock = sock

    def load(self, offset: int, size: int) -> int | None:
        sock = self._sock()
        if sock is None or offset % size:
            return None
        return load(sock, offset, size) if offset < TCP else _load_tcp(sock, offset - TCP, size)

    def store(self, offset: int, size: int, value: int) -> bool:
        return False


class _Word(NamedTuple):
    """Four bytes of ``struct bpf_sock``."""

    read: Callable[[Sock], int]
    #: How many bytes the kernel keeps of it.
    kept: int = 4
    #: How many of its bytes a load of less than four may start at.
    starts: int = 1


def _number(attribute: str) -> Callable[[Sock], int]:
    return lambda sock: getattr(sock, attribute) & M32


def _part(attribute: str, word: int) -> Callable[[Sock], int]:
    return lambda sock: int.from_bytes(getattr(sock, attribute)[4 * word : 4 * word + 4], sys.byteorder)


def _rx_queue(sock: Sock) -> int:
    return M32 if sock.rx_queue_mapping is None else sock.rx_queue_mapping


_LAYOUT = STRUCTS["bpf_sock"].fields
_AT = {
    _LAYOUT[name].offset: word
    for name, word in {
        "bound_dev_if": _Word(_number("bound_dev_if"), starts=0),
        "family": _Word(_number("family"), kept=2),
        "type": _Word(_number("type"), kept=2),
        "protocol": _Word(_number("protocol"), kept=2),
        "mark": _Word(_number("mark"), starts=0),
        "priority": _Word(_number("priority"), starts=0),
        "src_ip4": _Word(_part("local4", 0), starts=4),
        "src_port": _Word(_number("local_port"), kept=2),
        # In network order.
        "dst_port": _Word(lambda sock: socket.htons(sock.remote_port), kept=2, starts=2),
        "dst_ip4": _Word(_part("remote4", 0), starts=4),
        "state": _Word(_number("state"), kept=1),
        "rx_queue_mapping": _Word(_rx_queue),
    }.items()
} | {
    _LAYOUT[name].offset + 4 * word: _Word(_part(attribute, word), starts=4)
    for name, attribute in (("src_ip6", "local6"), ("dst_ip6", "remote6"))
    for word in range(4)
}
#: Fields of ``struct bpf_sock`` that programs of some types may set, by offset; all 4 bytes.
WRITABLE = {_LAYOUT[name].offset: name for name in ("bound_dev_if", "mark", "priority")}


def load(sock: Sock, offset: int, size: int) -> int | None:
    """A load from ``struct bpf_sock``; None where it is not allowed."""
    word = _AT.get(offset & ~3)
    if word is None or offset % size or size > 4 or (size < 4 and offset & 3 >= word.starts):
        return None
    value = word.read(sock)
    # The kernel shifts and masks what it keeps wider than the load, and gives what it keeps narrower as it is.
    return value if size >= word.kept else value >> 8 * (offset & 3) & (1 << 8 * size) - 1


_TCP_AT = {(where.offset, where.size): name for name, where in STRUCTS["bpf_tcp_sock"].fields.items()}


def _load_tcp(sock: Sock, offset: int, size: int) -> int | None:
    name = _TCP_AT.get((offset, size))
    return None if name is None else sock.tcp.get(name, 0) & (1 << 8 * size) - 1
