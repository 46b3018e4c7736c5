"""BPF links to control groups (`cgroup_bpf_link_attach`, Linux 5.7; an order of one's own since 6.17)."""

from __future__ import annotations

import errno

from kbpf.backend import Attached
from kbpf.emulator.attach_types import EXPECTED, numbers
from kbpf.emulator.cgroups import Group, Place, place
from kbpf.emulator.links import LINKS, Descriptors, Link
from kbpf.emulator.maps.base import refused
from kbpf.emulator.maps.cgroup import SharedCgroupStorage
from kbpf.emulator.program import Program
from kbpf.info import LinkInfo
from kbpf.uapi import constants as uapi
from kbpf.uapi.enums import ATTACH_TYPES

#: BPF_CGROUP_MAX_PROGS.
_MOST_PROGRAMS = 64
_BESIDE = uapi.BPF_F_BEFORE | uapi.BPF_F_AFTER
_FLAGS = uapi.BPF_F_ID | uapi.BPF_F_LINK | _BESIDE | uapi.BPF_F_PREORDER
_TYPES = {
    **{type: EXPECTED[type] for type in ("cgroup_skb", "cgroup_sock", "cgroup_sock_addr", "cgroup_sockopt")},
    "sock_ops": numbers("cgroup_sock_ops"),
    "cgroup_device": numbers("cgroup_device"),
    "cgroup_sysctl": numbers("cgroup_sysctl"),
}
#: The attach types that control groups have.
ATTACHED = frozenset[int]().union(*_TYPES.values())
#: Those whose programs are checked for one hook only.
_BOUND = ("cgroup_sock", "cgroup_sock_addr", "cgroup_sockopt")


class CgroupLink(Link):
    """A program in a hook of a group."""

    type = "cgroup"

    def __init__(self, program: Program, group: Group, attach_type: str, preorder: bool) -> None:
        super().__init__(program, attach_type)
        #: None once it is detached or the group is gone.
        self.group: Group | None = group
        self.preorder = preorder

    @property
    def attached(self) -> bool:
        return self.group is not None

    @property
    def info(self) -> LinkInfo:
        group = 0 if self.group is None else self.group.id
        return LinkInfo(self.type, self.id, self.program.id, self.attach_type, cgroup_id=group)

    @property
    def _place(self) -> Place:
        assert self.group is not None
        return place(ATTACH_TYPES[self.attach_type], self.group.id)

    def update(self, program: Program, old: Program | None) -> None:
        super().update(program, old)
        self._place.revision += 1

    def replace(self, program: Program) -> None:
        """Any of the type may come, for whatever hook it was loaded (`cgroup_bpf_replace`)."""
        if program.type != self.program.type:
            raise refused(errno.EINVAL)

    def detach(self) -> None:
        if self.group is not None:
            there = self._place
            there.attachments.remove(self)
            there.revision += 1
            self.group = None

    def forget(self) -> None:
        self.group = None


def attach(
    program: Program,
    group: Group,
    attach_type: str,
    flags: int,
    relative: int,
    revision: int,
    descriptors: Descriptors,
) -> CgroupLink:
    """BPF_LINK_CREATE for a program and hook that have passed `check`."""
    number = ATTACH_TYPES[attach_type]
    there = place(number, group.id)
    if revision and revision != there.revision:
        raise refused(errno.ESTALE)
    if len(there.attachments) == _MOST_PROGRAMS:
        raise refused(errno.E2BIG)
    preorder = bool(flags & uapi.BPF_F_PREORDER)
    at = _position(there, flags, _relative(flags, relative, descriptors), preorder)
    made = CgroupLink(program, group, attach_type, preorder)
    there.attachments.insert(at, made)
    there.revision += 1
    for used in program.maps:
        if isinstance(used, SharedCgroupStorage):
            used.address(group.id, number)
    return made


def query(group: Group, attach_type: str) -> Attached:
    """BPF_PROG_QUERY, which tells of programs in the order of the place, whenever they run."""
    there = place(ATTACH_TYPES[attach_type], group.id)
    return Attached(there.revision, tuple(attachment.program.id for attachment in there.attachments), ())


def check(program: Program, attach_type: str, flags: int) -> None:
    """What is refused before the group is looked at."""
    number = ATTACH_TYPES[attach_type]
    if number not in _TYPES.get(program.type, ()) or (program.type in _BOUND and number != program.attach_type):
        raise refused(errno.EINVAL)
    if flags & ~_FLAGS:
        raise refused(errno.EINVAL)


def _relative(flags: int, number: int, descriptors: Descriptors) -> Link | None:
    """The link that the new one is to be next to."""
    beside = flags & _BESIDE
    if not flags & uapi.BPF_F_LINK:
        if flags & uapi.BPF_F_ID or number:
            raise refused(errno.EINVAL)
        return None
    if beside not in (uapi.BPF_F_BEFORE, uapi.BPF_F_AFTER):
        raise refused(errno.EINVAL)
    found = LINKS.get(number) if flags & uapi.BPF_F_ID else descriptors.link(number)
    if found is None:
        raise refused(errno.ENOENT)
    return found


def _position(there: Place, flags: int, relative: Link | None, preorder: bool) -> int:
    before = bool(flags & uapi.BPF_F_BEFORE)
    if relative is None:
        if flags & _BESIDE == _BESIDE and there.attachments:
            raise refused(errno.EINVAL)
        return 0 if before else len(there.attachments)
    for at, attachment in enumerate(there.attachments):
        if attachment is relative:  # type: ignore[comparison-overlap]  # a CgroupLink is both
            if attachment.preorder != preorder:
                raise refused(errno.EINVAL)
            return at if before else at + 1
    raise refused(errno.ENOENT)
