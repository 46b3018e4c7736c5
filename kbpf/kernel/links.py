"""Link commands of bpf(2): create (Linux 5.7), update (5.7), detach (5.9), info (5.8); and queries of a place (4.15).

A link needs CAP_NET_ADMIN. It goes with its last descriptor or pin, and with the interface or the control group it
becomes a link to nothing. What an interface runs by netlink (clsact, ``ip link set xdp``) is in places of its own.
"""

from __future__ import annotations

import errno
import os
import socket

from kbpf.backend import Attached, LinkInfo
from kbpf.kernel import syscall
from kbpf.kernel.attrs import Attr, Info, command
from kbpf.uapi.constants import BPF_F_REPLACE
from kbpf.uapi.enums import ATTACH_TYPES, LINK_TYPES

_TYPE_NAMES = {number: name for name, number in LINK_TYPES.items()}
_ATTACH_NAMES = {number: name for name, number in ATTACH_TYPES.items()}
#: bpf_mprog_max(): the most programs that a place with an order has.
_MOST_PROGRAMS = 64


class LinkCommands:
    """The links' part of the backend."""

    def link_create(
        self, program: int, target: int, attach_type: str, flags: int = 0, relative: int = 0, revision: int = 0
    ) -> int:
        return command(
            "link_create",
            prog_fd=program,
            target_ifindex=target,
            attach_type=ATTACH_TYPES[attach_type],
            flags=flags,
            **{"tcx.relative_fd": relative, "tcx.expected_revision": revision},
        )

    def link_update(self, link: int, program: int, old: int | None = None) -> None:
        expected = {} if old is None else {"old_prog_fd": old, "flags": BPF_F_REPLACE}
        command("link_update", link_fd=link, new_prog_fd=program, **expected)

    def link_detach(self, link: int) -> None:
        command("link_detach", link_fd=link)

    def link_info(self, link: int) -> LinkInfo:
        info = Info("bpf_link_info", link)
        type = _TYPE_NAMES.get(info["type"], str(info["type"]))
        attach_type, ifindex, group = "", 0, 0
        if type == "xdp":
            attach_type, ifindex = "xdp", info["xdp.ifindex"]
        elif type == "tcx":
            attach_type, ifindex = _ATTACH_NAMES[info["tcx.attach_type"]], info["tcx.ifindex"]
        elif type == "cgroup":
            attach_type, group = _ATTACH_NAMES[info["cgroup.attach_type"]], info["cgroup.cgroup_id"]
        return LinkInfo(type, info["id"], info["prog_id"], attach_type, ifindex, group)

    def program_query(self, target: int, attach_type: str) -> Attached:
        programs, links = syscall.Buffer(4 * _MOST_PROGRAMS), syscall.Buffer(4 * _MOST_PROGRAMS)
        attr = Attr(
            "prog_query",
            target_ifindex=target,
            attach_type=ATTACH_TYPES[attach_type],
            prog_ids=programs.address,
            link_ids=links.address,
            count=_MOST_PROGRAMS,
            # For control groups it is written only where the attributes are said to reach so far.
            revision=1,
        )
        attr.issue()
        found = [tuple(memoryview(ids.read(4 * attr["count"])).cast("I")) for ids in (programs, links)]
        return Attached(attr["revision"], found[0], found[1] if any(found[1]) else ())

    def cgroup_open(self, path: str) -> int:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def interface_index(self, name: str) -> int:
        try:
            return socket.if_nametoindex(name)
        except OSError:
            raise syscall.failure(errno.ENODEV) from None
