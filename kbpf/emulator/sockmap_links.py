"""Programs of sockmaps and sockhashes: by links (Linux 6.10), and attached without one (net/core/sock_map.c)."""

from __future__ import annotations

import errno

from kbpf.backend import Attached
from kbpf.emulator.links import Link
from kbpf.emulator.maps.base import Map, refused
from kbpf.emulator.maps.file import release
from kbpf.emulator.maps.sockets import SocketMap
from kbpf.emulator.program import Program
from kbpf.emulator.psock import ANY_VERDICT, STREAM_VERDICT
from kbpf.emulator.psock_send import MESSAGE
from kbpf.info import LinkInfo

#: The type of programs that each place takes.
PLACES = {STREAM_VERDICT: "sk_skb", ANY_VERDICT: "sk_skb", MESSAGE: "sk_msg"}
#: Those of Linux that are not here.
LACKING = ("sk_skb_stream_parser",)
#: Of the two verdicts, a map has one.
_OTHER = {STREAM_VERDICT: ANY_VERDICT, ANY_VERDICT: STREAM_VERDICT}


class SockMapLink(Link):
    """A program at a place of a map, which the link keeps."""

    type = "sockmap"

    def __init__(self, program: Program, map: SocketMap, attach_type: str) -> None:
        super().__init__(program, attach_type)
        self.map: SocketMap | None = map
        map.users += 1

    @property
    def attached(self) -> bool:
        return self.map is not None

    @property
    def info(self) -> LinkInfo:
        map_id = 0 if self.map is None else self.map.id
        return LinkInfo(self.type, self.id, self.program.id, self.attach_type, details={"map_id": map_id})

    def update(self, program: Program, old: Program | None) -> None:
        if old is not None and old is not self.program:
            raise refused(errno.EPERM)
        if (program.type, program.attach_type) != (self.program.type, self.program.attach_type):
            raise refused(errno.EINVAL)
        if self.map is None:
            raise refused(errno.ENOLINK)
        self.replace(program)
        self.program = program

    def replace(self, program: Program) -> None:
        assert self.map is not None
        self.map.programs[self.attach_type] = program

    def detach(self) -> None:
        found, self.map = self.map, None
        if found is not None:
            del found.programs[self.attach_type], found.program_links[self.attach_type]
            release(found)


def check(program: Program, attach_type: str, flags: int = 0) -> None:
    """What is refused before the map is looked at."""
    if PLACES[attach_type] != program.type or flags:
        raise refused(errno.EINVAL)


def attach_link(program: Program, found: Map, attach_type: str) -> SockMapLink:
    """BPF_LINK_CREATE for a program that has passed `check` (`sock_map_link_create`)."""
    if not isinstance(found, SocketMap):
        raise refused(errno.EINVAL)
    _refuse_other(found, attach_type)
    if attach_type in found.program_links:
        raise refused(errno.EBUSY)
    made = SockMapLink(program, found, attach_type)
    found.programs[attach_type] = program
    found.program_links[attach_type] = made
    return made


def attach(program: Program, found: Map, attach_type: str) -> None:
    """BPF_PROG_ATTACH (`sock_map_get_from_fd`): another program that was attached so gives way."""
    _of_sockets(found, attach_type).programs[attach_type] = program


def detach(program: Program, found: Map, attach_type: str) -> None:
    """BPF_PROG_DETACH (`sock_map_prog_detach`)."""
    there = _of_sockets(found, attach_type).programs
    if there.get(attach_type) is not program:
        raise refused(errno.ENOENT)
    del there[attach_type]


def query(found: Map, attach_type: str) -> Attached:
    """BPF_PROG_QUERY (`sock_map_bpf_prog_query`)."""
    if not isinstance(found, SocketMap):
        raise refused(errno.EOPNOTSUPP)
    _refuse_other(found, attach_type)
    program = found.programs.get(attach_type)
    return Attached(1, () if program is None else (program.id,), ())


def _of_sockets(found: Map, attach_type: str) -> SocketMap:
    """The map, where no link has that place."""
    if not isinstance(found, SocketMap):
        raise refused(errno.EOPNOTSUPP)
    _refuse_other(found, attach_type)
    if attach_type in found.program_links:
        raise refused(errno.EBUSY)
    return found


def _refuse_other(found: SocketMap, attach_type: str) -> None:
    if _OTHER.get(attach_type) in found.programs:
        raise refused(errno.EBUSY)
