"""Helpers over the Internet's checksum (net/core/filter.c)."""

from __future__ import annotations

import errno
import sys

from kbpf.emulator.helpers.packet import check_context, overwrite
from kbpf.emulator.internet_checksum import add, fold16, partial, subtract
from kbpf.emulator.interpreter import HelperFunction, Run
from kbpf.emulator.memory import M32, M64
from kbpf.emulator.packet import Packet
from kbpf.errors import ENOTSUPP
from kbpf.uapi.constants import (
    BPF_CSUM_LEVEL_DEC,
    BPF_CSUM_LEVEL_INC,
    BPF_CSUM_LEVEL_QUERY,
    BPF_CSUM_LEVEL_RESET,
    BPF_F_HDR_FIELD_MASK,
    BPF_F_MARK_ENFORCE,
    BPF_F_MARK_MANGLED_0,
    BPF_F_PSEUDO_HDR,
)

_BPF_F_IPV6 = 1 << 7
_L4_FLAGS = BPF_F_MARK_MANGLED_0 | BPF_F_MARK_ENFORCE | BPF_F_PSEUDO_HDR | BPF_F_HDR_FIELD_MASK | _BPF_F_IPV6
_MANGLED = 0xFFFF
#: SKB_MAX_CSUM_LEVEL.
_MOST_LEVELS = 3


def csum_diff(run: Run, old: int, old_size: int, new: int, new_size: int, seed: int) -> int:
    """The difference that bytes make to a sum. Sizes need not be even (multiples of 4 before Linux 6.13)."""
    old_size, new_size, seed = old_size & M32, new_size & M32, seed & M32
    before = run.read(old, old_size) if old_size else b""
    after = run.read(new, new_size) if new_size else b""
    if before and after:
        return fold16(add(partial(after, seed), ~partial(before, 0) & M32))
    if after:
        return fold16(partial(after, seed))
    return fold16(~partial(before, ~seed & M32) & M32) if before else fold16(seed)


def _replace(run: Run, offset: int, old: int, new: int, width: int, narrow: bool) -> int:
    """Change a checksum for what has changed beneath it; `width` is 0 where `new` already is the difference.

    `narrow` says that two-byte changes are summed in 16 bits.
    """
    at = run.packet.offset + offset
    value = int.from_bytes(run.packet.buffer[at : at + 2], sys.byteorder)
    if width == 0 and old:
        return -errno.EINVAL
    if width not in (0, 2, 4):
        return -errno.EINVAL
    mask = {0: M32, 2: 0xFFFF, 4: M32}[width]
    old, new = old & mask, new & mask
    if width == 2 and narrow:
        total = _add16(_add16(~value & 0xFFFF, ~old & 0xFFFF), new)
        total = ~total & 0xFFFF
    else:
        total = ~value & M32
        if width:
            total = add(total, ~old & M32)
        total = ~fold16(add(total, new)) & 0xFFFF
    overwrite(run, offset, total.to_bytes(2, sys.byteorder))
    return 0


def _add16(a: int, b: int) -> int:
    total = a + b
    return (total & 0xFFFF) + (total >> 16)


def _reachable(run: Run, offset: int) -> bool:
    return offset <= 0xFFFF and not offset & 1 and offset + 2 <= run.packet.length


def l3_csum_replace(run: Run, skb: int, offset: int, old: int, new: int, flags: int) -> int:
    check_context(skb)
    if flags & ~BPF_F_HDR_FIELD_MASK:
        return -errno.EINVAL
    if not _reachable(run, offset & M32):
        return -errno.EFAULT
    return _replace(run, offset & M32, old, new, flags, narrow=True)


def l4_csum_replace(run: Run, skb: int, offset: int, old: int, new: int, flags: int) -> int:
    check_context(skb)
    offset &= M32
    if flags & ~_L4_FLAGS & M64:
        return -errno.EINVAL
    if not _reachable(run, offset):
        return -errno.EFAULT
    packet = run.packet
    at = packet.offset + offset
    absent = flags & BPF_F_MARK_MANGLED_0
    if absent and not flags & BPF_F_MARK_ENFORCE and not any(packet.buffer[at : at + 2]):
        return 0
    width = flags & BPF_F_HDR_FIELD_MASK
    failed = _replace(run, offset, old, new, width, narrow=False)
    if not failed and flags & BPF_F_PSEUDO_HDR and packet.csum_complete:
        _note_pseudo_header(packet, old, new, width, bool(flags & _BPF_F_IPV6))
    if not failed and absent and not any(run.packet.buffer[at : at + 2]):
        overwrite(run, offset, _MANGLED.to_bytes(2, sys.byteorder))
    return failed


def _note_pseudo_header(packet: Packet, old: int, new: int, width: int, six: bool) -> None:
    """The checksum has changed for what is not in the packet: its sum changes (`inet_proto_csum_replace*`)."""
    if not width:
        if not six:
            packet.csum = ~subtract(new & M32, packet.csum) & M32
        return
    mask = 0xFFFF if width == 2 else M32
    packet.csum = ~add(subtract(~packet.csum & M32, old & mask), new & mask) & M32


def csum_update(run: Run, skb: int, change: int, *_: int) -> int:
    """For packets that the network card has summed up."""
    check_context(skb)
    packet = run.packet
    if not packet.csum_complete:
        return -ENOTSUPP
    packet.csum = add(packet.csum, change & M32)
    return packet.csum


def csum_level(run: Run, skb: int, level: int, *_: int) -> int:
    check_context(skb)
    packet = run.packet
    known = packet.csum_level
    if level == BPF_CSUM_LEVEL_QUERY:
        return -errno.EACCES if known is None else known
    if level == BPF_CSUM_LEVEL_INC:
        if packet.csum_complete:
            return 0
        packet.csum_level = 0 if known is None else min(known + 1, _MOST_LEVELS)
    elif level == BPF_CSUM_LEVEL_DEC:
        packet.csum_level = known - 1 if known else None
    elif level == BPF_CSUM_LEVEL_RESET:
        packet.csum_level = None
    else:
        return -errno.EINVAL
    return 0


HELPERS: dict[str, HelperFunction] = {
    "csum_diff": csum_diff,
    "l3_csum_replace": l3_csum_replace,
    "l4_csum_replace": l4_csum_replace,
    "csum_update": csum_update,
    "csum_level": csum_level,
}
