"""Helpers of programs that run in a control group's hooks, and of those that choose a socket for a packet.

What a hook's system call is to return is kept with the context, which all programs of the hook share (Linux 5.18).
"""

from __future__ import annotations

import errno
import socket
import sys

from kbpf.emulator.cgroup_machine import DeviceAccess, SysctlAccess
from kbpf.emulator.cgroup_sock import SockContext
from kbpf.emulator.cgroup_sockopt import SockoptContext
from kbpf.emulator.helpers.maps import map_at
from kbpf.emulator.helpers.packet import check_context
from kbpf.emulator.helpers.references import sock_at
from kbpf.emulator.helpers.sock import sk_storage_get
from kbpf.emulator.interpreter import HelperFunction, Run
from kbpf.emulator.maps.perf import PerfEventArray
from kbpf.emulator.memory import M32, M64
from kbpf.emulator.sock_addr import SockAddr
from kbpf.emulator.sock_ops import SockOps
from kbpf.errors import EmulationFault
from kbpf.uapi.constants import BPF_F_INDEX_MASK

#: Where a packed address starts and ends in its family's ``struct sockaddr``, and the size of IPv4's.
_ADDRESS = {int(socket.AF_INET): (4, 8), int(socket.AF_INET6): (8, 24)}
_SOCKADDR_IN = 16


def _context(run: Run) -> SockContext | SockAddr | SockOps | SockoptContext:
    context = run.context
    if not isinstance(context, (SockContext, SockAddr, SockOps, SockoptContext)):
        raise EmulationFault("the program runs in no hook of a socket")
    return context


def _returning(run: Run) -> SockContext | SockAddr | SockOps | SockoptContext | DeviceAccess | SysctlAccess:
    context = run.context
    return context if isinstance(context, (DeviceAccess, SysctlAccess)) else _context(run)


def get_retval(run: Run, *_: int) -> int:
    return _returning(run).retval


def set_retval(run: Run, value: int, *_: int) -> int:
    value &= M32
    _returning(run).retval = value - (value >> 31 << 32)
    return 0


def context_cookie(run: Run, context: int, *_: int) -> int:
    check_context(context)
    return _context(run).sock.cookie


def bind(run: Run, context: int, address: int, size: int, *_: int) -> int:
    """Give a socket that is about to connect an address of its own, and a port where it is not 0 (Linux 4.17)."""
    check_context(context)
    sock = _context(run).sock
    given = run.read(address, size & M32)
    if len(given) < 2:
        return -errno.EINVAL
    family = int.from_bytes(given[:2], sys.byteorder)
    at, end = _ADDRESS.get(family, (0, 0))
    if not end:
        return -errno.EAFNOSUPPORT
    if len(given) < max(end, _SOCKADDR_IN):
        return -errno.EINVAL
    if family != sock.family:
        return -errno.EAFNOSUPPORT
    if sock.bind is None:
        raise EmulationFault("there is nobody to bind the socket")
    try:
        sock.bind(given[at:end], int.from_bytes(given[2:4], "big"))
    except OSError as error:
        return -(error.errno or 0)
    return 0


def context_storage_get(run: Run, map: int, context: int, value: int, flags: int, _: int) -> int:
    """bpf_sk_storage_get of the socket that is the context."""
    check_context(context)
    return sk_storage_get(run, map, _context(run).sock.address, value, flags, 0)


def event_output(run: Run, context: int, map: int, flags: int, data: int, size: int) -> int:
    """bpf_perf_event_output where no packet can follow the data."""
    check_context(context)
    found = map_at(run, map)
    if not isinstance(found, PerfEventArray):
        raise EmulationFault("bpf_perf_event_output takes a perf event array")
    if flags & ~BPF_F_INDEX_MASK & M64:
        return -errno.EINVAL
    try:
        found.output(flags, run.read(data, size))
    except OSError as error:
        return -(error.errno or 0)
    return 0


def sock_cookie(run: Run, sock: int, *_: int) -> int:
    """0 for no socket."""
    return sock_at(run, sock).cookie if sock else 0


#: For programs of hooks, of those for cgroup_sock too, and for sk_reuseport.
HELPERS: dict[str, HelperFunction] = {
    "get_retval": get_retval,
    "set_retval": set_retval,
    "get_socket_cookie": context_cookie,
    "perf_event_output": event_output,
    "bind": bind,
}
CGROUP_SOCK: dict[str, HelperFunction] = {"sk_storage_get": context_storage_get}
REUSEPORT: dict[str, HelperFunction] = {"get_socket_cookie": sock_cookie}
