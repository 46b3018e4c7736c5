"""Helpers that send a packet elsewhere. What they did is kept with the packet: `redirected` and `copies`."""

from __future__ import annotations

import errno

from kbpf.emulator.environment import environment
from kbpf.emulator.helpers.packet import check_context
from kbpf.emulator.interpreter import HelperFunction, Run
from kbpf.emulator.memory import M32, M64
from kbpf.uapi.constants import BPF_F_INGRESS

_TC_ACT_SHOT, _TC_ACT_REDIRECT = 2, 7
#: sizeof(struct bpf_redir_neigh).
_NEIGHBOUR = 20


def _to(run: Run, index: int, flags: int, allowed: int = 0) -> int:
    if flags & ~allowed & M64:
        return _TC_ACT_SHOT
    run.packet.redirected = index & M32, flags
    return _TC_ACT_REDIRECT


def redirect(run: Run, index: int, flags: int, *_: int) -> int:
    return _to(run, index, flags, BPF_F_INGRESS)


def redirect_peer(run: Run, index: int, flags: int, *_: int) -> int:
    return _to(run, index, flags)


def redirect_neigh(run: Run, index: int, neighbour: int, size: int, flags: int, _: int) -> int:
    size &= M32
    return _TC_ACT_SHOT if 0 < size < _NEIGHBOUR else _to(run, index, flags)


def clone_redirect(run: Run, skb: int, index: int, flags: int, *_: int) -> int:
    """Send a copy, to an interface that the environment has."""
    check_context(skb)
    packet, index = run.packet, index & M32
    if flags & ~BPF_F_INGRESS & M64:
        return -errno.EINVAL
    if packet.gso_size:
        # Without a type of segmentation, as test runs set it up.
        return -errno.EBADMSG
    if index not in environment.interfaces:
        return -errno.EINVAL
    if not packet.length or packet.mac is None or packet.network is None or packet.mac >= packet.network:
        # Devices as loopback want a link header with something behind it.
        return -errno.ERANGE
    packet.copies.append((index, flags, packet.data))
    return 0


HELPERS: dict[str, HelperFunction] = {
    "redirect": redirect,
    "redirect_peer": redirect_peer,
    "redirect_neigh": redirect_neigh,
    "clone_redirect": clone_redirect,
}
