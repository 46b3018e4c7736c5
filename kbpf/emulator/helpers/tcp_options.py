"""Helpers of sock_ops programs: what they want to be asked about (Linux 4.16), and options of TCP headers (5.10)."""

from __future__ import annotations

import errno

from kbpf.emulator.helpers.packet import check_context
from kbpf.emulator.interpreter import HelperFunction, Run
from kbpf.emulator.memory import M32, M64
from kbpf.emulator.sock_ops import SockOps
from kbpf.errors import EmulationFault
from kbpf.uapi import constants as uapi

_HEADER = 20
_END, _NOTHING = 0, 1
#: Kinds of experiments (RFC 6994), told apart by the number that follows.
_EXPERIMENTS = (253, 254)


def _context(run: Run, address: int) -> SockOps:
    check_context(address)
    if not isinstance(run.context, SockOps):
        raise EmulationFault("the program's context is not of TCP")
    return run.context


def sock_ops_cb_flags_set(run: Run, context: int, flags: int, *_: int) -> int:
    """The flags that there are not."""
    ops = _context(run, context)
    if not ops.locked:
        return -errno.EOPNOTSUPP
    if not ops.sock.full:
        return -errno.EINVAL
    ops.sock.sock_ops_cb_flags = flags & uapi.BPF_SOCK_OPS_ALL_CB_FLAGS
    unknown = flags & M32 & ~uapi.BPF_SOCK_OPS_ALL_CB_FLAGS
    return unknown - (unknown >> 31 << 32)


def _find(options: bytes, kind: int, magic: bytes) -> tuple[bytes | None, int]:
    """The option, and ENOMSG where there is none, EFAULT where the options are not right; 0 if a list's end was met."""
    at = 0
    while at < len(options):
        found = options[at]
        if found == _END:
            return None, 0
        if found == _NOTHING:
            at += 1
            continue
        size = options[at + 1] if at + 1 < len(options) else 0
        if size < 2 or at + size > len(options):
            return None, errno.EFAULT
        if found == kind:
            if len(magic) > size - 2:
                return None, errno.ENOMSG
            if options[at + 2 : at + 2 + len(magic)] == magic:
                return options[at : at + size], 0
        at += size
    return None, errno.ENOMSG


def load_hdr_opt(run: Run, context: int, wanted: int, size: int, flags: int, _: int) -> int:
    """The option's whole length; ENOSPC where it is cut. `wanted` says the kind, and for experiments the number."""
    ops, size = _context(run, context), size & M32
    if not ops.locked:
        return -errno.EOPNOTSUPP
    if size < 2 or flags & ~uapi.BPF_LOAD_HDR_OPT_TCP_SYN & M64:
        return -errno.EINVAL
    run.check_writable(wanted, size)
    search = run.read(wanted, size)
    kind, length = search[0], search[1]
    sizes = (4, 6) if kind in _EXPERIMENTS else (0,)
    if kind in (_END, _NOTHING) or length > size or length not in sizes:
        return -errno.EINVAL
    if flags:
        # No SYN is saved.
        return -errno.ENOENT
    if ops.segment is None or ops.op == uapi.BPF_SOCK_OPS_HDR_OPT_LEN_CB:
        return -errno.EPERM
    found, failed = _find(bytes(ops.segment[_HEADER:]), kind, search[2:length])
    if found is None:
        return -(failed or errno.ENOMSG)
    run.write(wanted, found[:size])
    return len(found) if len(found) <= size else -errno.ENOSPC


def store_hdr_opt(run: Run, context: int, option: int, size: int, flags: int, _: int) -> int:
    """Add an option to the header, if it has none of the kind, within what was reserved."""
    ops, size = _context(run, context), size & M32
    if ops.op != uapi.BPF_SOCK_OPS_WRITE_HDR_OPT_CB or ops.segment is None:
        return -errno.EPERM
    if size < 2 or flags & M64:
        return -errno.EINVAL
    new = run.read(option, size)
    kind, length = new[0], new[1]
    if kind in (_END, _NOTHING) or length > size:
        return -errno.EINVAL
    if length > ops.room:
        return -errno.ENOSPC
    if kind in _EXPERIMENTS and length < 4:
        return -errno.EINVAL
    found, failed = _find(bytes(ops.segment[_HEADER:]), kind, new[2:4] if kind in _EXPERIMENTS else b"")
    if found is not None:
        return -errno.EEXIST
    if failed != errno.ENOMSG:
        return -(failed or errno.ENOSPC)
    ops.segment = ops.segment + new[:length]
    ops.room -= length
    ops.show(run)
    return 0


def reserve_hdr_opt(run: Run, context: int, size: int, flags: int, *_: int) -> int:
    """Ask for room for options in headers to come."""
    ops, size = _context(run, context), size & M32
    if ops.op != uapi.BPF_SOCK_OPS_HDR_OPT_LEN_CB:
        return -errno.EPERM
    if flags & M64 or size < 2:
        return -errno.EINVAL
    if size > ops.room:
        return -errno.ENOSPC
    ops.room -= size
    return 0


HELPERS: dict[str, HelperFunction] = {
    "sock_ops_cb_flags_set": sock_ops_cb_flags_set,
    "load_hdr_opt": load_hdr_opt,
    "store_hdr_opt": store_hdr_opt,
    "reserve_hdr_opt": reserve_hdr_opt,
}
