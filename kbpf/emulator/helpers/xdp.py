"""Helpers of XDP programs (net/core/filter.c)."""

from __future__ import annotations

import errno

from kbpf.emulator.helpers.packet import check_context
from kbpf.emulator.interpreter import HelperFunction, Run
from kbpf.emulator.memory import M32
from kbpf.emulator.packet import Redirect
from kbpf.emulator.xdp import FRAME, RESERVED, SHARED_INFO, XdpBuff
from kbpf.errors import EmulationFault

_ETHERNET = 14
#: The most metadata that the kernel can note down, and its step.
_MOST_METADATA, _METADATA_STEP = 255, 4
_MOST_BYTES = 0xFFFF
_ABORTED, _REDIRECT = 0, 4


def _buff(run: Run, address: int) -> XdpBuff:
    check_context(address)
    buff = run.context
    if not isinstance(buff, XdpBuff):
        raise EmulationFault("this is no XDP context", address=address)
    return buff


def _signed(value: int) -> int:
    return (value & M32 ^ 1 << 31) - (1 << 31)


def is_metadata_length(size: int) -> bool:
    return size % _METADATA_STEP == 0 and 0 <= size <= _MOST_METADATA


def xdp_adjust_head(run: Run, xdp: int, offset: int, *_: int) -> int:
    """The metadata move along."""
    buff, offset = _buff(run, xdp), _signed(offset)
    size = buff.data - buff.meta
    if not RESERVED + size <= buff.data + offset <= buff.end - _ETHERNET:
        return -errno.EINVAL
    metadata = buff.memory[buff.meta : buff.data]
    buff.meta += offset
    buff.data += offset
    buff.memory[buff.meta : buff.data] = metadata
    buff.show(run)
    return 0


def xdp_adjust_meta(run: Run, xdp: int, offset: int, *_: int) -> int:
    buff = _buff(run, xdp)
    meta = buff.meta + _signed(offset)
    if not RESERVED <= meta <= buff.data:
        return -errno.EINVAL
    if not is_metadata_length(buff.data - meta):
        return -errno.EACCES
    buff.meta = meta
    buff.show(run)
    return 0


def xdp_adjust_tail(run: Run, xdp: int, offset: int, *_: int) -> int:
    buff, offset = _buff(run, xdp), _signed(offset)
    if buff.fragments:
        failed = _lengthen(buff, offset) if offset >= 0 else _shorten(buff, -offset)
    else:
        end = buff.end + offset
        failed = 0 if buff.data + _ETHERNET <= end <= len(buff.memory) - SHARED_INFO else -errno.EINVAL
        if not failed:
            buff.memory[buff.end : end] = bytes(max(offset, 0))
            buff.end = end
    buff.show(run)
    return failed


def _lengthen(buff: XdpBuff, size: int) -> int:
    last = buff.fragments[-1]
    if size > FRAME - len(last):
        return -errno.EINVAL
    last += bytes(size)
    return 0


def _shorten(buff: XdpBuff, size: int) -> int:
    """Take bytes from the last fragments, and from the first piece when no fragment is left."""
    if size > buff.length - _ETHERNET:
        return -errno.EINVAL
    while size and buff.fragments:
        last = buff.fragments[-1]
        cut = min(size, len(last))
        del last[len(last) - cut :]
        size -= cut
        if not last:
            buff.fragments.pop()
    buff.end -= size
    return 0


def xdp_get_buff_len(run: Run, xdp: int, *_: int) -> int:
    return _buff(run, xdp).length


def _range_error(buff: XdpBuff, offset: int, size: int) -> int:
    if offset > _MOST_BYTES or size > _MOST_BYTES:
        return -errno.EFAULT
    return -errno.EINVAL if offset + size > buff.length else 0


def xdp_load_bytes(run: Run, xdp: int, offset: int, to: int, size: int, _: int) -> int:
    buff, offset, size = _buff(run, xdp), offset & M32, size & M32
    run.check_writable(to, size)
    failed = _range_error(buff, offset, size)
    if not failed:
        run.write(to, buff.read(offset, size))
    return failed


def xdp_store_bytes(run: Run, xdp: int, offset: int, start: int, size: int, _: int) -> int:
    buff, offset, size = _buff(run, xdp), offset & M32, size & M32
    data = run.read(start, size)
    failed = _range_error(buff, offset, size)
    if not failed:
        buff.write(offset, data)
    return failed


def redirect(run: Run, index: int, flags: int, *_: int) -> int:
    if flags:
        return _ABORTED
    buff = run.context
    assert isinstance(buff, XdpBuff)
    buff.redirect = Redirect(index & M32)
    buff.redirected_by = None
    return _REDIRECT


HELPERS: dict[str, HelperFunction] = {
    "xdp_adjust_head": xdp_adjust_head,
    "xdp_adjust_meta": xdp_adjust_meta,
    "xdp_adjust_tail": xdp_adjust_tail,
    "xdp_get_buff_len": xdp_get_buff_len,
    "xdp_load_bytes": xdp_load_bytes,
    "xdp_store_bytes": xdp_store_bytes,
    "redirect": redirect,
}
