"""bpf_sock_map_update and bpf_sock_hash_update: sock_ops programs put connections into maps (Linux 4.14, 4.18)."""

from __future__ import annotations

import errno

from kbpf.emulator.helpers.maps import map_at
from kbpf.emulator.helpers.packet import check_context
from kbpf.emulator.interpreter import HelperFunction, Run
from kbpf.emulator.maps.sockets import SocketMap, SockHash, SockMap
from kbpf.emulator.sock_ops import SockOps
from kbpf.errors import EmulationFault
from kbpf.uapi.constants import (
    BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB,
    BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB,
    BPF_SOCK_OPS_TCP_LISTEN_CB,
)

#: When the socket is ready for it.
_READY = (BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_TCP_LISTEN_CB)


def _update(kind: type[SocketMap]) -> HelperFunction:
    def helper(run: Run, context: int, map: int, key: int, flags: int, _: int) -> int:
        check_context(context)
        hook, found = run.context, map_at(run, map)
        if not isinstance(hook, SockOps) or not isinstance(found, kind):
            raise EmulationFault(f"no connection is put into a {found.type} map here", address=map)
        given = run.read(key, found.key_size)
        if hook.op not in _READY:
            return -errno.EOPNOTSUPP
        try:
            found.link(given, hook.sock, flags)
        except OSError as error:
            return -(error.errno or 0)
        return 0

    return helper


HELPERS: dict[str, HelperFunction] = {"sock_map_update": _update(SockMap), "sock_hash_update": _update(SockHash)}
