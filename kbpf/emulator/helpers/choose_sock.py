"""Helpers that choose the socket that a packet is for (net/core/filter.c)."""

from __future__ import annotations

import errno
import socket

from kbpf.emulator.environment import environment
from kbpf.emulator.helpers.maps import map_at
from kbpf.emulator.helpers.packet import check_context
from kbpf.emulator.helpers.references import sock_at
from kbpf.emulator.interpreter import HelperFunction, Run
from kbpf.emulator.maps.sockets import ReuseportSockArray, SocketHolder
from kbpf.emulator.memory import M64
from kbpf.emulator.sk_lookup import LookupContext
from kbpf.emulator.sk_reuseport import ReuseportContext
from kbpf.errors import EmulationFault
from kbpf.uapi.constants import (
    BPF_SK_LOOKUP_F_NO_REUSEPORT,
    BPF_SK_LOOKUP_F_REPLACE,
    BPF_TCP_CLOSE,
    BPF_TCP_LISTEN,
)

_WAITING = {int(socket.IPPROTO_TCP): BPF_TCP_LISTEN, int(socket.IPPROTO_UDP): BPF_TCP_CLOSE}


def sk_assign(run: Run, context: int, sock: int, flags: int, *_: int) -> int:
    """Traffic control's: the socket that a packet is for, where it has just come in (Linux 5.7)."""
    check_context(context)
    found = sock_at(run, sock)
    if flags:
        return -errno.EINVAL
    if not run.packet.at_ingress or found not in environment.sockets:
        return -errno.EOPNOTSUPP
    run.packet.socket = found
    return 0


def sk_lookup_assign(run: Run, context: int, sock: int, flags: int, *_: int) -> int:
    """A lookup program's choice, or none; `LookupContext.selected` (Linux 5.9)."""
    check_context(context)
    looked = run.context
    if not isinstance(looked, LookupContext):
        raise EmulationFault("the program looks up no socket")
    found = sock_at(run, sock) if sock else None
    if flags & M64 & ~(BPF_SK_LOOKUP_F_REPLACE | BPF_SK_LOOKUP_F_NO_REUSEPORT):
        return -errno.EINVAL
    if found is not None:
        if found.refcounted or found.state != _WAITING.get(found.protocol, found.state):
            return -errno.ESOCKTNOSUPPORT
        if found.protocol != looked.protocol:
            return -errno.EPROTOTYPE
        if found.family != looked.family and (found.family == socket.AF_INET or found.v6only):
            return -errno.EAFNOSUPPORT
    if looked.selected is not None and not flags & BPF_SK_LOOKUP_F_REPLACE:
        return -errno.EEXIST
    looked.selected, looked.no_reuseport = found, bool(flags & BPF_SK_LOOKUP_F_NO_REUSEPORT)
    return 0


def sk_select_reuseport(run: Run, context: int, map: int, key: int, flags: int, _: int) -> int:
    """One of the sockets that share a port; `ReuseportContext.selected` (Linux 4.19). Flags are not looked at."""
    check_context(context)
    chooser, found = run.context, map_at(run, map)
    if not isinstance(chooser, ReuseportContext) or not isinstance(found, SocketHolder):
        raise EmulationFault(f"no socket of a group is chosen by a {found.type} map", address=map)
    chosen = found.sock_at(run.read(key, found.key_size))
    if chosen is None:
        return -errno.ENOENT
    if chosen.reuseport is None:
        return -(errno.ENOENT if isinstance(found, ReuseportSockArray) else errno.EINVAL)
    if chosen.reuseport is not chooser.sock.reuseport:
        if chosen.protocol != chooser.sock.protocol:
            return -errno.EPROTOTYPE
        return -(errno.EAFNOSUPPORT if chosen.family != chooser.sock.family else errno.EBADFD)
    chooser.selected = chosen
    return 0


HELPERS: dict[str, HelperFunction] = {"sk_assign": sk_assign, "sk_select_reuseport": sk_select_reuseport}
#: For socket lookup programs.
LOOKUP: dict[str, HelperFunction] = {"sk_assign": sk_lookup_assign}
