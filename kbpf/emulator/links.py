"""BPF links: programs at a place, as long as somebody holds the link and the place is there; those on network devices.

A device runs one XDP program (net/core/dev.c), and an ordered list of traffic control programs for each direction
(kernel/bpf/tcx.c, mprog.c, Linux 6.6).
"""

from __future__ import annotations

import errno
import itertools
from typing import TYPE_CHECKING, Protocol
from weakref import WeakValueDictionary

from kbpf.emulator.slot import error
from kbpf.info import LinkInfo
from kbpf.uapi import constants as uapi
from kbpf.uapi.enums import ATTACH_TYPES

if TYPE_CHECKING:
    from kbpf.emulator.interface import EmulatedInterface
    from kbpf.emulator.program import Program

#: bpf_mprog_max().
_MOST_PROGRAMS = 64
#: In the network card itself (XDP_FLAGS_HW_MODE) no emulated device runs programs.
_MODES = uapi.XDP_FLAGS_SKB_MODE | uapi.XDP_FLAGS_DRV_MODE


class Descriptors(Protocol):
    """What descriptors and ids mean."""

    def program(self, fd: int) -> Program: ...

    def link(self, fd: int) -> Link: ...

    def program_by_id(self, id: int) -> Program: ...


class Link:
    """A program at a place."""

    #: bpftool's name of the link type.
    type: str

    def __init__(self, program: Program, attach_type: str) -> None:
        self.program = program
        self.attach_type = attach_type
        self.id = next(_ids)
        #: Descriptors and pins: the last one that goes takes the link with it.
        self.users = 0
        LINKS[self.id] = self

    def update(self, program: Program, old: Program | None) -> None:
        """BPF_LINK_UPDATE; `old` is the program that is expected to be there."""
        if not self.attached:
            raise error(errno.ENOLINK)
        if old is not None and old is not self.program:
            raise error(errno.EPERM)
        if program is not self.program:
            self.replace(program)
            self.program = program

    @property
    def attached(self) -> bool:
        """Whether it is there: not detached, and the place not gone."""
        raise NotImplementedError

    @property
    def info(self) -> LinkInfo:
        raise NotImplementedError

    def replace(self, program: Program) -> None:
        """Check another program, and make it the one that runs."""
        raise NotImplementedError

    def detach(self) -> None:
        """BPF_LINK_DETACH; nothing if it is detached."""
        raise NotImplementedError

    def opened(self) -> None:
        self.users += 1

    def closed(self) -> None:
        self.users -= 1
        if not self.users:
            self.gone()
            LINKS.pop(self.id, None)

    def gone(self) -> None:
        """Nobody holds the link any more."""
        self.detach()


_ids = itertools.count(1)
#: Links by id, while anybody holds them.
LINKS: WeakValueDictionary[int, Link] = WeakValueDictionary()


class DeviceLink(Link):
    """A program on a device, which is None once the link is detached or the device is gone."""

    def __init__(self, program: Program, device: EmulatedInterface, attach_type: str) -> None:
        super().__init__(program, attach_type)
        self.device: EmulatedInterface | None = device

    @property
    def attached(self) -> bool:
        return self.device is not None

    @property
    def info(self) -> LinkInfo:
        index = self.device.index if self.device is not None else 0
        return LinkInfo(self.type, self.id, self.program.id, self.attach_type, index)

    def detach(self) -> None:
        device, self.device = self.device, None
        if device is not None:
            self.take_off(device)

    def take_off(self, device: EmulatedInterface) -> None:
        raise NotImplementedError


class XdpLink(DeviceLink):
    type = "xdp"

    @property
    def generic(self) -> bool:
        """Whether the program runs on socket buffers, and not in the device's driver."""
        return self.device is not None and self.device.xdp_generic is self

    def replace(self, program: Program) -> None:
        if (program.type, _expected(program)) != (self.program.type, _expected(self.program)):
            raise error(errno.EINVAL)

    def take_off(self, device: EmulatedInterface) -> None:
        if device.xdp_generic is self:
            device.xdp_generic = None
        else:
            device.xdp_native = None


def _expected(program: Program) -> int:
    given = program.spec.expected_attach_type or 0
    return given if isinstance(given, int) else ATTACH_TYPES[given]


def attach_xdp(program: Program, device: EmulatedInterface, flags: int) -> XdpLink:
    """BPF_LINK_CREATE for XDP (`bpf_xdp_link_attach`); by default in the driver where it has a place for programs."""
    if flags & ~_MODES or flags & flags - 1:
        raise error(errno.EINVAL)
    native = flags & uapi.XDP_FLAGS_DRV_MODE or (not flags and device.runs_xdp)
    if (device.xdp_native if native else device.xdp_generic) is not None:
        raise error(errno.EBUSY)
    if (device.xdp_generic if native else device.xdp_native) is not None:
        raise error(errno.EEXIST)
    if _expected(program) in (ATTACH_TYPES["xdp_devmap"], ATTACH_TYPES["xdp_cpumap"]):
        raise error(errno.EINVAL)
    if native and not device.runs_xdp:
        raise error(errno.EOPNOTSUPP)
    made = XdpLink(program, device, "xdp")
    if native:
        device.xdp_native = made
    else:
        device.xdp_generic = made
    return made


class TcxLink(DeviceLink):
    type = "tcx"

    def replace(self, program: Program) -> None:
        assert self.device is not None
        chain = self.device.tcx[self.attach_type]
        if program.type != "sched_cls":
            raise error(errno.EINVAL)
        chain.refuse_known(program)
        chain.revision += 1

    def take_off(self, device: EmulatedInterface) -> None:
        chain = device.tcx[self.attach_type]
        chain.links.remove(self)
        chain.revision += 1
        if not chain.links:
            del device.tcx[self.attach_type]


class Chain:
    """The programs of one direction of a device, in the order in which they run (``struct bpf_mprog_entry``)."""

    def __init__(self) -> None:
        self.links: list[TcxLink] = []
        self.revision = 1

    def refuse_known(self, program: Program) -> None:
        if any(link.program is program for link in self.links):
            raise error(errno.EEXIST)

    def position(self, flags: int, relative: Link | Program | None) -> int:
        """Where a new program goes (`bpf_mprog_attach`): before or after another, or all, by default at the end."""
        if flags & uapi.BPF_F_REPLACE:
            # There is nothing yet that a new link could replace.
            raise error(errno.ENOENT)
        if len(self.links) == _MOST_PROGRAMS:
            raise error(errno.ERANGE)
        if not flags & (uapi.BPF_F_BEFORE | uapi.BPF_F_AFTER):
            if relative is not None or flags:
                raise error(errno.EINVAL)
            return len(self.links)
        first, last = 0, len(self.links)
        if relative is not None:
            found = [i for i, link in enumerate(self.links) if relative in (link, link.program)]
            if not found:
                raise error(errno.ENOENT)
            first, last = found[0], found[0] + 1
        if flags & uapi.BPF_F_BEFORE and flags & uapi.BPF_F_AFTER:
            # The two rules never mean the same place.
            raise error(errno.ERANGE)
        return first if flags & uapi.BPF_F_BEFORE else last


def attach_tcx(
    program: Program,
    device: EmulatedInterface,
    attach_type: str,
    flags: int,
    relative: int,
    revision: int,
    descriptors: Descriptors,
) -> TcxLink:
    """BPF_LINK_CREATE for traffic control; `relative` is a descriptor or id as the BPF_F_* `flags` say."""
    chain = device.tcx.get(attach_type, Chain())
    if revision and revision != chain.revision:
        raise error(errno.ESTALE)
    chain.refuse_known(program)
    at = chain.position(flags, _relative(program, flags, relative, descriptors))
    made = TcxLink(program, device, attach_type)
    chain.links.insert(at, made)
    chain.revision += 1
    device.tcx[attach_type] = chain
    return made


def _relative(program: Program, flags: int, number: int, descriptors: Descriptors) -> Link | Program | None:
    by_id = flags & uapi.BPF_F_ID
    if flags & uapi.BPF_F_LINK:
        if not by_id and not number:
            raise error(errno.EINVAL)
        link = LINKS.get(number) if by_id else descriptors.link(number)
        if link is None:
            raise error(errno.ENOENT)
        if link.program.type != program.type:
            raise error(errno.EINVAL)
        return link
    if not by_id and not number:
        return None
    found = descriptors.program_by_id(number) if by_id else descriptors.program(number)
    if found.type != program.type:
        raise error(errno.EINVAL)
    return found


def detach_all(device: EmulatedInterface) -> None:
    """The device goes away: its links stay, and are nowhere."""
    links: list[Link | None] = [device.xdp_native, device.xdp_generic]
    for chain in list(device.tcx.values()):
        links += chain.links
    for link in links:
        if link is not None:
            link.detach()
