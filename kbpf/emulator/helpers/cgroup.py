"""Helpers about control groups: who is in one, and the values of those that a program is attached to."""

from __future__ import annotations

import errno

from kbpf.emulator.environment import environment
from kbpf.emulator.helpers.maps import map_at
from kbpf.emulator.helpers.packet import check_context
from kbpf.emulator.helpers.sock import full_sock_of
from kbpf.emulator.interpreter import HelperFunction, Run
from kbpf.emulator.maps.cgroup import CgroupArray, SharedCgroupStorage, attached_group
from kbpf.emulator.memory import M32
from kbpf.errors import EmulationFault


def _under(run: Run, map: int, index: int, path: tuple[int, ...]) -> int:
    """Whether the group at an index is one of those on a path from the root."""
    found = map_at(run, map)
    if not isinstance(found, CgroupArray):
        raise EmulationFault(f"a {found.type} map has no groups", address=map)
    index &= M32
    if index >= found.max_entries:
        return -errno.E2BIG
    group = found.held(index)
    return -errno.EAGAIN if group is None else int(group in path)


def current_task_under_cgroup(run: Run, map: int, index: int, *_: int) -> int:
    """Linux 4.9."""
    return _under(run, map, index, (*environment.cgroup_ancestors, environment.cgroup_id))


def skb_under_cgroup(run: Run, skb: int, map: int, index: int, *_: int) -> int:
    """Linux 4.8. Of packets that belong to no socket, ENOENT."""
    check_context(skb)
    sock = run.packet.socket
    full = None if sock is None else full_sock_of(sock)
    if full is None or not full.full:
        return -errno.ENOENT
    return _under(run, map, index, (*full.cgroup_ancestors, full.cgroup_id))


def get_local_storage(run: Run, map: int, flags: int, *_: int) -> int:
    """The value of the group that the program is attached to (Linux 4.19)."""
    found, program = map_at(run, map), run.code.program()
    if not isinstance(found, SharedCgroupStorage) or program is None:
        raise EmulationFault(f"a {found.type} map has no values of attached programs", address=map)
    if flags:
        raise EmulationFault("bpf_get_local_storage has no flags")
    return found.address(attached_group(), program.attach_type)


HELPERS: dict[str, HelperFunction] = {
    "current_task_under_cgroup": current_task_under_cgroup,
    "skb_under_cgroup": skb_under_cgroup,
    "get_local_storage": get_local_storage,
}
