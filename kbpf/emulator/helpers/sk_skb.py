"""Helpers of sk_skb programs: where a packet goes to, and its bytes, which move to the front when asked for."""

from __future__ import annotations

import errno
from collections.abc import Callable

from kbpf.emulator.helpers.maps import map_at
from kbpf.emulator.helpers.packet import check_context, skb_pull_data, skb_store_bytes
from kbpf.emulator.helpers.room import skb_change_head, skb_change_tail
from kbpf.emulator.interpreter import HelperFunction, Run
from kbpf.emulator.maps.sockets import SocketMap, SockHash, SockMap
from kbpf.emulator.memory import M32, M64
from kbpf.emulator.psock_send import SK_DROP, SK_PASS
from kbpf.emulator.sk_msg import SkMsg
from kbpf.emulator.sk_skb import StreamBuff
from kbpf.emulator.sock import Sock
from kbpf.errors import EmulationFault
from kbpf.uapi.constants import BPF_F_INGRESS, BPF_TCP_LISTEN

_MOST_ROOM = 0xFFF
_RECEIVED = "what a socket has received"


def target(found: SocketMap, key: bytes) -> Sock | None:
    """The socket that data may be redirected to (`sock_map_redirect_allowed`)."""
    sock = found.sock_at(key)
    if sock is None or sock.state == BPF_TCP_LISTEN:
        return None
    if sock.psock is None:
        raise EmulationFault("the emulator redirects to its own TCP sockets only")
    return sock


def redirect(kind: type[SocketMap], data_of: Callable[[Run, int], StreamBuff | SkMsg], what: str) -> HelperFunction:
    """A helper that sends what a program looks at to a socket of a map; `what` that is, for messages."""

    def helper(run: Run, context: int, map: int, key: int, flags: int, _: int) -> int:
        data, found = data_of(run, context), map_at(run, map)
        if not isinstance(found, kind):
            raise EmulationFault(f"{what} cannot be redirected by a {found.type} map", address=map)
        if flags & M64 & ~BPF_F_INGRESS:
            return SK_DROP
        given = run.read(key, found.key_size) if kind is SockHash else (key & M32).to_bytes(4, "little")
        sock = target(found, given)
        if sock is None:
            return SK_DROP
        data.redirect = sock, bool(flags & BPF_F_INGRESS)
        return SK_PASS

    return helper


def _received(run: Run, skb: int) -> StreamBuff:
    check_context(skb)
    return _buff(run)


def _buff(run: Run) -> StreamBuff:
    buff = run.context
    if not isinstance(buff, StreamBuff):
        raise EmulationFault("this program is not of type sk_skb")
    return buff


def _reach(run: Run, linear: int) -> None:
    """So many bytes are now reached directly, by new addresses."""
    buff = _buff(run)
    buff.linear = linear
    buff.show(run)


def pull_data(run: Run, skb: int, size: int, *rest: int) -> int:
    failed = skb_pull_data(run, skb, size, *rest)
    if not failed:
        _reach(run, max(_buff(run).linear, size & M32))
    return failed


def store_bytes(run: Run, skb: int, offset: int, start: int, size: int, flags: int) -> int:
    failed = skb_store_bytes(run, skb, offset, start, size, flags)
    if not failed:
        _reach(run, max(_buff(run).linear, (offset & M32) + (size & M32)))
    return failed


def change_tail(run: Run, skb: int, length: int, *rest: int) -> int:
    failed = skb_change_tail(run, skb, length, *rest)
    if not failed:
        _reach(run, length & M32)
    return failed


def change_head(run: Run, skb: int, size: int, *rest: int) -> int:
    failed = skb_change_head(run, skb, size, *rest)
    if not failed:
        _reach(run, _buff(run).linear + (size & M32))
    return failed


def adjust_room(run: Run, skb: int, difference: int, mode: int, flags: int, _: int) -> int:
    """Zeroes come to the front, or bytes go from there (`sk_skb_adjust_room`)."""
    check_context(skb)
    packet, buff = run.packet, _buff(run)
    difference = (difference & M32 ^ 1 << 31) - (1 << 31)
    if flags or mode & M32:
        return -errno.EINVAL
    if abs(difference) > _MOST_ROOM:
        return -errno.EFAULT
    if difference >= 0:
        if not packet.has_headroom(difference):
            return -errno.ENOMEM
        packet.push(difference)
        buffer = bytearray(packet.buffer)
        buffer[packet.offset : packet.offset + difference] = bytes(difference)
        packet.buffer = buffer
    else:
        if -difference > packet.length:
            return -errno.ENOMEM
        packet.pull(-difference)
    _reach(run, max(buff.linear, -difference) + difference)
    return 0


HELPERS: dict[str, HelperFunction] = {
    "sk_redirect_map": redirect(SockMap, _received, _RECEIVED),
    "sk_redirect_hash": redirect(SockHash, _received, _RECEIVED),
    "skb_pull_data": pull_data,
    "skb_store_bytes": store_bytes,
    "skb_change_tail": change_tail,
    "skb_change_head": change_head,
    "skb_adjust_room": adjust_room,
}
