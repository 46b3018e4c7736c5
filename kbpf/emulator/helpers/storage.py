"""Values of what programs hold: of tasks (Linux 5.11) and control groups (6.2), in maps of local storage."""

from __future__ import annotations

import errno
from collections.abc import Hashable

from kbpf.emulator.cgroup import Cgroup
from kbpf.emulator.helpers.maps import map_at
from kbpf.emulator.helpers.tracing import task_at
from kbpf.emulator.interpreter import HelperFunction, Run
from kbpf.emulator.maps.local_storage import CgroupStorage, LocalStorage, TaskStorage
from kbpf.errors import EmulationFault
from kbpf.uapi.constants import BPF_LOCAL_STORAGE_GET_F_CREATE


def _storage(run: Run, map: int, kind: type[LocalStorage]) -> LocalStorage:
    found = map_at(run, map)
    if not isinstance(found, kind):
        raise EmulationFault(f"a {found.type} map has no such values", address=map)
    return found


def _get(run: Run, storage: LocalStorage, owner: Hashable | None, value: int, flags: int) -> int:
    """The address of the owner's value, which is made if it is asked for; 0 if there is none."""
    initial = run.read(value, storage.value_size) if value else bytes(storage.value_size)
    if flags & ~BPF_LOCAL_STORAGE_GET_F_CREATE or owner is None:
        return 0
    region = storage.value_of(owner)
    if region is None and flags:
        region = storage.put(owner, initial)
    return 0 if region is None else region.address


def _delete(run: Run, storage: LocalStorage, owner: Hashable | None) -> int:
    if owner is None:
        return -errno.EINVAL
    try:
        run.keep(storage.drop(owner))
    except OSError as error:
        return -(error.errno or 0)
    return 0


def _task(run: Run, address: int) -> int | None:
    """What a task's values are kept by; None for NULL."""
    return task_at(run, address).pid if address else None


def _cgroup(run: Run, address: int) -> int | None:
    """What a group's values are kept by; None for NULL."""
    found = run.owner(address) if address else None
    if address and not isinstance(found, Cgroup):
        raise EmulationFault("this is no control group", address=address)
    return found.id if isinstance(found, Cgroup) else None


def task_storage_get(run: Run, map: int, task: int, value: int, flags: int, _: int) -> int:
    return _get(run, _storage(run, map, TaskStorage), _task(run, task), value, flags)


def task_storage_delete(run: Run, map: int, task: int, *_: int) -> int:
    return _delete(run, _storage(run, map, TaskStorage), _task(run, task))


def cgrp_storage_get(run: Run, map: int, cgroup: int, value: int, flags: int, _: int) -> int:
    return _get(run, _storage(run, map, CgroupStorage), _cgroup(run, cgroup), value, flags)


def cgrp_storage_delete(run: Run, map: int, cgroup: int, *_: int) -> int:
    return _delete(run, _storage(run, map, CgroupStorage), _cgroup(run, cgroup))


HELPERS: dict[str, HelperFunction] = {
    "task_storage_get": task_storage_get,
    "task_storage_delete": task_storage_delete,
    "cgrp_storage_get": cgrp_storage_get,
    "cgrp_storage_delete": cgrp_storage_delete,
}
