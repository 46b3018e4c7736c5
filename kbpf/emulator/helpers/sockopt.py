"""Helpers that set and get socket options (Linux 4.13 and 4.15), of the socket that the program's context is about."""

from __future__ import annotations

import errno

from kbpf.emulator import socket_options
from kbpf.emulator.cgroup_sockopt import SockoptContext
from kbpf.emulator.helpers.packet import check_context
from kbpf.emulator.interpreter import HelperFunction, Run
from kbpf.emulator.memory import M32
from kbpf.emulator.sock_addr import SockAddr
from kbpf.emulator.sock_ops import SockOps
from kbpf.errors import EmulationFault
from kbpf.uapi import constants as uapi

_SYN = (uapi.TCP_BPF_SYN, uapi.TCP_BPF_SYN_IP, uapi.TCP_BPF_SYN_MAC)


def _context(run: Run, address: int) -> SockAddr | SockOps | SockoptContext:
    """What the address stands for: cgroup_sockopt programs give their socket's."""
    context = run.context
    if isinstance(context, SockoptContext) and address == context.sock.address:
        return context
    check_context(address)
    if not isinstance(context, (SockAddr, SockOps)):
        raise EmulationFault("the program's context has no socket options")
    return context


def setsockopt(run: Run, context: int, level: int, name: int, value: int, size: int) -> int:
    given, data = _context(run, context), run.read(value, size & M32)
    if isinstance(given, SockOps) and not given.locked:
        return -errno.EOPNOTSUPP
    try:
        socket_options.setsockopt(given.sock, level & M32, name & M32, data)
    except OSError as error:
        return -(error.errno or 0)
    return 0


def getsockopt(run: Run, context: int, level: int, name: int, value: int, size: int) -> int:
    """What is not written of the buffer is zeroes, all of it where it fails."""
    size, level, name = size & M32, level & M32, name & M32
    given = _context(run, context)
    run.check_writable(value, size)
    found, result = b"", 0
    if isinstance(given, SockOps) and level == uapi.SOL_TCP and name in _SYN:
        # No SYN is saved.
        result = -errno.ENOENT
    elif isinstance(given, SockOps) and not given.locked:
        return -errno.EOPNOTSUPP
    else:
        try:
            found = socket_options.getsockopt(given.sock, level, name, size)
        except OSError as error:
            result = -(error.errno or 0)
    run.write(value, found.ljust(size, b"\0"))
    return result


HELPERS: dict[str, HelperFunction] = {"setsockopt": setsockopt, "getsockopt": getsockopt}
