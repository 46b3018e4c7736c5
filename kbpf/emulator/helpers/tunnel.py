"""Helpers over the tunnel that a packet is to leave by (net/core/filter.c, Linux 4.3).

A test run's packets came in by no tunnel; what a program sets, it can read back, with the two ends exchanged.
"""

from __future__ import annotations

import errno
import sys

from kbpf.emulator.helpers.packet import check_context
from kbpf.emulator.interpreter import HelperFunction, Run
from kbpf.emulator.memory import M32, M64
from kbpf.emulator.packet import Tunnel
from kbpf.uapi import constants as uapi
from kbpf.uapi.structs import STRUCTS

_FIELDS = STRUCTS["bpf_tunnel_key"].fields
_SIZE = STRUCTS["bpf_tunnel_key"].size
#: Sizes of the structure as it was before it grew.
_ONLY_IPV4 = _FIELDS["remote_ipv6"].offset + 4
_OLDER = (_FIELDS["local_ipv6"].offset, _FIELDS["tunnel_label"].offset, _FIELDS["tunnel_ext"].offset)
_SET_FLAGS = (
    uapi.BPF_F_TUNINFO_IPV6
    | uapi.BPF_F_ZERO_CSUM_TX
    | uapi.BPF_F_DONT_FRAGMENT
    | uapi.BPF_F_SEQ_NUMBER
    | uapi.BPF_F_NO_TUNNEL_KEY
)
_MOST_OPTIONS = 255
_LABEL = 0xFFFFF
# Bits of what BPF_F_TUNINFO_FLAGS gives (IP_TUNNEL_*_BIT, linux/if_tunnel.h), as they are stored.
_CSUM, _KEY, _SEQUENCE, _DONT_FRAGMENT, _NOCACHE = 1 << 0, 1 << 2, 1 << 3, 1 << 8, 1 << 13
#: For Geneve, VXLAN, ERSPAN and GTP.
_OPTIONS = 1 << 11 | 1 << 12 | 1 << 14 | 1 << 15


def _get(key: bytes, name: str) -> int:
    field = _FIELDS[name]
    return int.from_bytes(key[field.offset : field.offset + field.size], sys.byteorder)


def _raw(key: bytes, name: str) -> bytes:
    field = _FIELDS[name]
    return key[field.offset : field.offset + field.size * field.count]


def skb_set_tunnel_key(run: Run, skb: int, address: int, size: int, flags: int, _: int) -> int:
    check_context(skb)
    size &= M32
    given = run.read(address, size)
    if flags & ~_SET_FLAGS & M64 or (size != _SIZE and size not in (*_OLDER, _ONLY_IPV4)):
        return -errno.EINVAL
    key = given.ljust(_SIZE, b"\0")
    six = bool(flags & uapi.BPF_F_TUNINFO_IPV6)
    if (not six and _get(key, "tunnel_label")) or _get(key, "tunnel_ext"):
        return -errno.EINVAL
    run.packet.tunnel = Tunnel(key=key, flags=flags)
    return 0


def skb_get_tunnel_key(run: Run, skb: int, address: int, size: int, flags: int, _: int) -> int:
    check_context(skb)
    size, tunnel = size & M32, run.packet.tunnel
    run.check_writable(address, size)
    failed = 0
    if tunnel is None or flags & ~(uapi.BPF_F_TUNINFO_IPV6 | uapi.BPF_F_TUNINFO_FLAGS) & M64:
        failed = errno.EINVAL
    elif (tunnel.flags ^ flags) & uapi.BPF_F_TUNINFO_IPV6:
        failed = errno.EPROTO
    elif size not in (_SIZE, *_OLDER) and (size != _ONLY_IPV4 or flags & uapi.BPF_F_TUNINFO_IPV6):
        failed = errno.EINVAL
    if failed or tunnel is None:
        run.write(address, bytes(size))
        return -failed
    run.write(address, _exchanged(tunnel, flags)[:size])
    return 0


def _exchanged(tunnel: Tunnel, flags: int) -> bytes:
    """What was set, as the other end would see it."""
    key, out = tunnel.key, bytearray(_SIZE)

    def put(name: str, value: bytes) -> None:
        out[_FIELDS[name].offset : _FIELDS[name].offset + len(value)] = value

    for name in ("tunnel_id", "tunnel_tos", "tunnel_ttl"):
        put(name, _raw(key, name))
    width = 16 if flags & uapi.BPF_F_TUNINFO_IPV6 else 4
    put("remote_ipv6", _raw(key, "local_ipv6")[:width])
    put("local_ipv6", _raw(key, "remote_ipv6")[:width])
    if width == 16:
        put("tunnel_label", (_get(key, "tunnel_label") & _LABEL).to_bytes(4, sys.byteorder))
    if flags & uapi.BPF_F_TUNINFO_FLAGS:
        put("tunnel_ext", tunnel_flags(tunnel).to_bytes(2, "big"))
    return bytes(out)


def tunnel_flags(tunnel: Tunnel) -> int:
    """TUNNEL_* of what was set, in host order."""
    out = _CSUM | _KEY | _NOCACHE
    if tunnel.flags & uapi.BPF_F_DONT_FRAGMENT:
        out |= _DONT_FRAGMENT
    if tunnel.flags & uapi.BPF_F_ZERO_CSUM_TX:
        out &= ~_CSUM
    if tunnel.flags & uapi.BPF_F_SEQ_NUMBER:
        out |= _SEQUENCE
    if tunnel.flags & uapi.BPF_F_NO_TUNNEL_KEY:
        out &= ~_KEY
    return out | (_OPTIONS if tunnel.options is not None else 0)


def skb_set_tunnel_opt(run: Run, skb: int, address: int, size: int, *_: int) -> int:
    check_context(skb)
    size &= M32
    options = run.read(address, size)
    if run.packet.tunnel is None or size & 3:
        return -errno.EINVAL
    if size > _MOST_OPTIONS:
        return -errno.ENOMEM
    run.packet.tunnel.options = options
    return 0


def skb_get_tunnel_opt(run: Run, skb: int, address: int, size: int, *_: int) -> int:
    check_context(skb)
    size &= M32
    run.check_writable(address, size)
    options = None if run.packet.tunnel is None else run.packet.tunnel.options
    if options is None or len(options) > size:
        run.write(address, bytes(size))
        return -errno.ENOENT if options is None else -errno.ENOMEM
    run.write(address, options.ljust(size, b"\0"))
    return len(options)


HELPERS: dict[str, HelperFunction] = {
    "skb_get_tunnel_key": skb_get_tunnel_key,
    "skb_set_tunnel_key": skb_set_tunnel_key,
    "skb_get_tunnel_opt": skb_get_tunnel_opt,
    "skb_set_tunnel_opt": skb_set_tunnel_opt,
}
