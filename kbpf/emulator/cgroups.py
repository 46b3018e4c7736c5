"""Control groups, and the programs that run in their hooks (kernel/bpf/cgroup.c).

A group is known by its id: one of the emulated machine's own (`add_cgroup`), or one of the operating system's, whose
directory's inode number is its id. The emulated process is in the group of `environment.cgroup_id`, and a socket in the
one that its process was in when it was made. What is attached to a group runs for the groups below it too.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from kbpf.emulator.cgroup import Cgroup
from kbpf.emulator.environment import environment
from kbpf.emulator.maps.base import refused
from kbpf.emulator.maps.owners import group_behind

if TYPE_CHECKING:
    from kbpf.emulator.program import Program

#: Where groups of the emulated machine are.
ROOT = "/sys/fs/cgroup"


@dataclass(kw_only=True, eq=False)
class Group(Cgroup):
    """A control group with its directory, and the ids of those around it from the root on."""

    path: str
    ancestors: tuple[int, ...] = ()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Have the emulated process in this group meanwhile, and sockets that it makes."""
        before = environment.cgroup_id, environment.cgroup_ancestors
        environment.cgroup_id, environment.cgroup_ancestors = self.id, self.ancestors
        try:
            yield
        finally:
            environment.cgroup_id, environment.cgroup_ancestors = before


_ids = itertools.count(1 << 32)
_made = {ROOT: Group(path=ROOT, id=1)}


def add_cgroup(path: str) -> Group:
    """Make a group below one that is there: ``/sys/fs/cgroup/web``. `OSError` EEXIST, and ENOENT where no parent is."""
    path = path.rstrip("/")
    parent, _, name = path.rpartition("/")
    if path in _made:
        raise refused(errno.EEXIST)
    if parent not in _made or not name:
        raise refused(errno.ENOENT)
    around = _made[parent]
    made = _made[path] = Group(path=path, id=next(_ids), ancestors=(*around.ancestors, around.id))
    return made


def remove_cgroup(path: str) -> None:
    """Take a group away, and what is attached to it; `OSError` ENOENT, EBUSY where there are groups in it."""
    path = path.rstrip("/")
    if path == ROOT or any(other.startswith(path + "/") for other in _made):
        raise refused(errno.EBUSY)
    group = _made.pop(path, None)
    if group is None:
        raise refused(errno.ENOENT)
    for places in _places.values():
        for attachment in places.pop(group.id, Place()).attachments:
            attachment.forget()


def find(path: str) -> Group:
    """The group with this directory; `OSError` of open(2), EBADF where it is no group of version 2."""
    made = _made.get(path.rstrip("/"))
    if made is not None:
        return made
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return Group(path=path, id=group_behind(descriptor, "cgroup2"))
    finally:
        os.close(descriptor)


class Attachment(Protocol):
    """A program in a hook of a group."""

    @property
    def program(self) -> Program: ...

    #: Whether it runs before what is attached to groups below (BPF_F_PREORDER, Linux 6.16).
    @property
    def preorder(self) -> bool: ...

    def forget(self) -> None:
        """The group is gone."""
        ...


class Place:
    """A hook of one group: what is attached there, in order, and a number that each change makes larger."""

    def __init__(self) -> None:
        self.attachments: list[Attachment] = []
        self.revision = 1


#: By attach type and group's id.
_places: defaultdict[int, dict[int, Place]] = defaultdict(dict)


def place(attach_type: int, group: int) -> Place:
    """A hook, to be changed by who attaches."""
    return _places[attach_type].setdefault(group, Place())


def effective(attach_type: int, group: int, ancestors: tuple[int, ...]) -> list[tuple[int, Program]]:
    """What runs for a group, and which group it is attached to (`compute_effective_progs`).

    First what runs early, from the root on; then the group's own and those of the groups around it.
    """
    places = _places.get(attach_type)
    if not places:
        return []
    path = [(at, places[at].attachments) for at in (group, *reversed(ancestors)) if at in places]
    early = [(at, found) for at, attachments in reversed(path) for found in attachments if found.preorder]
    others = [(at, found) for at, attachments in path for found in attachments if not found.preorder]
    return [(at, found.program) for at, found in early + others]
