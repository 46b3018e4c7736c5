"""Attach a program to a control group of version 2, by BPF links (Linux 5.7).

Needs CAP_NET_ADMIN (and CAP_BPF to load the program). A program runs for the processes and sockets of the group and of
the groups below it: those of a socket are in the group that its process was in when it made the socket.
"""

from __future__ import annotations

import os
from typing import Literal

from kbpf.runtime.link import BpfLink, CgroupLink, attaching
from kbpf.runtime.program import Program
from kbpf.uapi import constants as uapi

#: Types whose programs are for one hook only, whatever they were loaded for.
_HOOKS = {"sock_ops": "cgroup_sock_ops", "cgroup_device": "cgroup_device", "cgroup_sysctl": "cgroup_sysctl"}
#: The types that are attached to control groups.
TYPES = (*_HOOKS, "cgroup_skb", "cgroup_sock", "cgroup_sock_addr", "cgroup_sockopt")


def attach_to_cgroup(
    program: Program,
    path: str | os.PathLike[str],
    attach_type: str | None = None,
    *,
    before: BpfLink | Program | Literal["all"] | None = None,
    after: BpfLink | Program | Literal["all"] | None = None,
) -> CgroupLink:
    """What `Program.attach` does for a control group."""
    backend, directory = program._backend, os.fspath(path)
    hook = attach_type or _HOOKS.get(program.type) or program.attach_type
    if hook is None:
        raise ValueError(f"attach {program.label}: say to which hook, such as cgroup_inet_ingress")
    if not hook.startswith("cgroup_"):
        raise ValueError(f"{hook!r} is no hook of a control group")
    if before is not None and after is not None:
        raise ValueError("before and after name two places")
    flags, relative = 0, 0
    for other, flag in ((before, uapi.BPF_F_BEFORE), (after, uapi.BPF_F_AFTER)):
        if other is not None:
            flags |= flag
            if isinstance(other, BpfLink):
                flags |= uapi.BPF_F_LINK
            if not isinstance(other, str):
                relative = other.fileno()
    where = f"{directory} ({hook})"
    with attaching(program, where, hook):
        group = backend.cgroup_open(directory)
        try:
            fd = backend.link_create(program.fileno(), group, hook, flags, relative)
        finally:
            backend.close(group)
    return CgroupLink.of(program, where, fd)
