"""Helpers that send a packet elsewhere: at once (a copy), or when the program has said so by its return value."""

from __future__ import annotations

import errno

from kbpf.emulator import network
from kbpf.emulator.context import SkBuff
from kbpf.emulator.helpers.packet import check_context
from kbpf.emulator.interpreter import HelperFunction, Run
from kbpf.emulator.memory import M32, M64
from kbpf.emulator.packet import Redirect
from kbpf.uapi.constants import BPF_F_INGRESS

_TC_ACT_SHOT, _TC_ACT_REDIRECT = 2, 7
#: sizeof(struct bpf_redir_neigh).
_NEIGHBOUR = 20


def _to(run: Run, redirect: Redirect, allowed: int = 0) -> int:
    if redirect.flags & ~allowed & M64:
        return _TC_ACT_SHOT
    run.packet.redirect = redirect
    return _TC_ACT_REDIRECT


def redirect(run: Run, index: int, flags: int, *_: int) -> int:
    return _to(run, Redirect(index & M32, flags), BPF_F_INGRESS)


def redirect_peer(run: Run, index: int, flags: int, *_: int) -> int:
    return _to(run, Redirect(index & M32, flags, peer=True))


def redirect_neigh(run: Run, index: int, neighbour: int, size: int, flags: int, _: int) -> int:
    size &= M32
    if 0 < size < _NEIGHBOUR:
        return _TC_ACT_SHOT
    return _to(run, Redirect(index & M32, flags, neighbour=run.read(neighbour, _NEIGHBOUR) if size else b""))


def clone_redirect(run: Run, skb: int, index: int, flags: int, *_: int) -> int:
    """Send a copy, now; its way ends before this program goes on, or waits in the backlog."""
    check_context(skb)
    packet = run.packet
    if flags & ~BPF_F_INGRESS & M64:
        return -errno.EINVAL
    if packet.gso_size and not packet.gso_kind:
        # Without a kind of segments, as test runs set it up.
        return -errno.EBADMSG
    # The device of test runs is loopback.
    on = packet.device.network if packet.device is not None else network.current()
    target = None if on is None else on.by_index(index & M32)
    if on is None or target is None:
        return -errno.EINVAL
    copy = packet.copy()
    buff = run.context
    if isinstance(buff, SkBuff):
        copy.cb = buff.words
    return on.path.send_on(copy, target, flags)


HELPERS: dict[str, HelperFunction] = {
    "redirect": redirect,
    "redirect_peer": redirect_peer,
    "redirect_neigh": redirect_neigh,
    "clone_redirect": clone_redirect,
}
