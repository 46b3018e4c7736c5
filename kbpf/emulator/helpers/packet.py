"""Helpers that read and write the packet's bytes (net/core/filter.c)."""

from __future__ import annotations

import errno

from kbpf.emulator.interpreter import CONTEXT_ADDRESS, HelperFunction, Run
from kbpf.emulator.memory import M32, M64
from kbpf.errors import EmulationFault
from kbpf.uapi.constants import BPF_F_INVALIDATE_HASH, BPF_F_RECOMPUTE_CSUM

# enum bpf_hdr_start_off
_FROM_MAC, _FROM_NETWORK = 0, 1
_INT_MAX = 0x7FFFFFFF


def check_context(address: int) -> None:
    if address != CONTEXT_ADDRESS:
        raise EmulationFault("this is not the context", address=address)


def overwrite(run: Run, offset: int, data: bytes) -> None:
    """Put bytes into a packet that its programs may write."""
    buffer = run.packet.buffer
    if isinstance(buffer, bytes):
        raise EmulationFault("the packet may not be written")
    at = run.packet.offset + offset
    buffer[at : at + len(data)] = data


def _copy(run: Run, start: int | None, size: int, to: int) -> int:
    """Copy bytes of the packet's buffer to the program, or zeroes if they are not all there."""
    run.check_writable(to, size)
    data = b"" if start is None else bytes(run.packet.buffer[start : start + size])
    if len(data) < size or start is None:
        run.write(to, bytes(size))
        return -errno.EFAULT
    run.write(to, data)
    return 0


def skb_load_bytes(run: Run, skb: int, offset: int, to: int, size: int, _: int) -> int:
    check_context(skb)
    offset &= M32
    return _copy(run, run.packet.offset + offset if offset <= _INT_MAX else None, size & M32, to)


def skb_load_bytes_relative(run: Run, skb: int, offset: int, to: int, size: int, start: int) -> int:
    check_context(skb)
    packet, offset = run.packet, offset & M32
    base = {_FROM_MAC: packet.mac, _FROM_NETWORK: packet.network}.get(start & M32)
    return _copy(run, None if base is None or offset > 0xFFFF else base + offset, size & M32, to)


def skb_store_bytes(run: Run, skb: int, offset: int, start: int, size: int, flags: int) -> int:
    check_context(skb)
    packet, offset, size = run.packet, offset & M32, size & M32
    data = run.read(start, size)
    if flags & ~(BPF_F_RECOMPUTE_CSUM | BPF_F_INVALIDATE_HASH) & M64:
        return -errno.EINVAL
    if offset > _INT_MAX or offset + size > packet.length:
        return -errno.EFAULT
    if flags & BPF_F_RECOMPUTE_CSUM:
        at = packet.offset + offset
        packet.sum_out(bytes(packet.buffer[at : at + size]), offset)
        packet.sum_in(data, offset)
    overwrite(run, offset, data)
    if flags & BPF_F_INVALIDATE_HASH:
        packet.hash, packet.hash_known = 0, False
    return 0


def skb_pull_data(run: Run, skb: int, size: int, *_: int) -> int:
    """Emulated packets lie in one piece, so that this only says whether there is so much."""
    check_context(skb)
    return 0 if size & M32 <= run.packet.length else -errno.ENOMEM


def flow_load_bytes(run: Run, context: int, offset: int, to: int, size: int, _: int) -> int:
    """A flow dissector's bpf_skb_load_bytes, which finds nothing in test runs: they have no socket buffer."""
    check_context(context)
    return _copy(run, None, size & M32, to)


HELPERS: dict[str, HelperFunction] = {
    "skb_load_bytes": skb_load_bytes,
    "skb_load_bytes_relative": skb_load_bytes_relative,
    "skb_store_bytes": skb_store_bytes,
    "skb_pull_data": skb_pull_data,
}
