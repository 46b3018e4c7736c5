"""Helpers that read the packet (net/core/filter.c)."""

from __future__ import annotations

import errno

from kbpf.emulator.interpreter import HelperFunction, Run
from kbpf.emulator.memory import CONTEXT, M32
from kbpf.errors import EmulationFault

# enum bpf_hdr_start_off
_FROM_MAC, _FROM_NETWORK = 0, 1


def _check_context(address: int) -> None:
    if address != CONTEXT << 32:
        raise EmulationFault("this is not the context", address=address)


def _copy(run: Run, start: int | None, size: int, to: int) -> int:
    """Copy bytes of the packet's buffer to the program, or zeroes if they are not all there."""
    run.check_writable(to, size)
    data = b"" if start is None else run.packet.buffer[start : start + size]
    if len(data) < size or start is None:
        run.write(to, bytes(size))
        return -errno.EFAULT
    run.write(to, data)
    return 0


def skb_load_bytes(run: Run, skb: int, offset: int, to: int, size: int, _: int) -> int:
    _check_context(skb)
    offset &= M32
    return _copy(run, run.packet.offset + offset if offset <= 0x7FFFFFFF else None, size & M32, to)


def skb_load_bytes_relative(run: Run, skb: int, offset: int, to: int, size: int, start: int) -> int:
    _check_context(skb)
    packet, offset = run.packet, offset & M32
    base = {_FROM_MAC: packet.mac, _FROM_NETWORK: packet.network}.get(start & M32)
    return _copy(run, None if base is None or offset > 0xFFFF else base + offset, size & M32, to)


HELPERS: dict[str, HelperFunction] = {
    "skb_load_bytes": skb_load_bytes,
    "skb_load_bytes_relative": skb_load_bytes_relative,
}
