"""Link commands of bpf(2): create (Linux 5.7), update (5.7), detach (5.9), info (5.8); and queries of a place (4.15).

A link needs CAP_NET_ADMIN. It goes with its last descriptor or pin, and with the interface or the control group it
becomes a link to nothing. What an interface runs by netlink (clsact, ``ip link set xdp``) is in places of its own.
"""

from __future__ import annotations

import errno
import os
import socket
from typing import Any

from kbpf.backend import Attached
from kbpf.info import LinkInfo
from kbpf.kernel import syscall
from kbpf.kernel.attrs import Attr, Info, command, newer
from kbpf.specs import NETFILTER_FAMILIES, NETFILTER_HOOKS, Netfilter
from kbpf.uapi.constants import BPF_F_NETFILTER_IP_DEFRAG, BPF_F_REPLACE
from kbpf.uapi.enums import ATTACH_TYPES, LINK_TYPES
from kbpf.uapi.structs import STRUCTS

_TYPE_NAMES = {number: name for name, number in LINK_TYPES.items()}
_ATTACH_NAMES = {number: name for name, number in ATTACH_TYPES.items()}
#: Members that are text elsewhere, and the members that say how long it is.
_STRINGS = {
    "raw_tracepoint.tp_name": "raw_tracepoint.tp_name_len",
    "iter.target_name": "iter.target_name_len",
    "uprobe_multi.path": "uprobe_multi.path_size",
    "perf_event.uprobe.file_name": "perf_event.uprobe.name_len",
    "perf_event.kprobe.func_name": "perf_event.kprobe.name_len",
    "perf_event.tracepoint.tp_name": "perf_event.tracepoint.name_len",
}
#: Members that say where lists of ``count`` u64 go.
_LISTS = {
    "kprobe_multi": ("addrs", "cookies"),
    "uprobe_multi": ("offsets", "ref_ctr_offsets", "cookies"),
}
#: What a link to an iterator is over, by the iterator's name.
_ITERATED = {
    "bpf_map_elem": ("map_id",),
    "bpf_sk_storage_map": ("map_id",),
    "sockmap": ("map_id",),
    "cgroup": ("cgroup_id", "order"),
    **dict.fromkeys(("task", "task_file", "task_vma"), ("tid", "pid")),
}
_UPROBE = ("uprobe.file_name", "uprobe.offset", "uprobe.cookie")
_KPROBE = ("kprobe.func_name", "kprobe.offset", "kprobe.addr", "kprobe.missed", "kprobe.cookie")
#: By enum bpf_perf_event_type.
_EVENTS = {
    1: ("uprobe", _UPROBE),
    2: ("uretprobe", _UPROBE),
    3: ("kprobe", _KPROBE),
    4: ("kretprobe", _KPROBE),
    5: ("tracepoint", ("tracepoint.tp_name", "tracepoint.cookie")),
    6: ("event", ("event.type", "event.config", "event.cookie")),
}
#: bpf_mprog_max(): the most programs that a place with an order has.
_MOST_PROGRAMS = 64


class LinkCommands:
    """The links' part of the backend."""

    def link_create(
        self, program: int, target: int, attach_type: str, flags: int = 0, relative: int = 0, revision: int = 0
    ) -> int:
        number = ATTACH_TYPES[attach_type]
        values = {"prog_fd": program, "target_ifindex": target, "attach_type": number, "flags": flags}
        values |= {"tcx.relative_fd": relative, "tcx.expected_revision": revision}
        if not flags or not attach_type.startswith("cgroup_"):
            return command("link_create", **values)
        # Which flags there are, this command looks at before it looks at programs.
        known = {"target_fd": -1, "attach_bpf_fd": -1, "attach_type": number, "attach_flags": flags}
        with newer("places before and after others in control groups", "6.17", "prog_attach", **known):
            return command("link_create", **values)

    def netfilter_link(self, program: int, hook: Netfilter) -> int:
        return command(
            "link_create",
            prog_fd=program,
            attach_type=ATTACH_TYPES["netfilter"],
            **{
                "netfilter.pf": NETFILTER_FAMILIES[hook.family],
                "netfilter.hooknum": NETFILTER_HOOKS[hook.hook],
                "netfilter.priority": hook.priority,
                "netfilter.flags": BPF_F_NETFILTER_IP_DEFRAG if hook.defragment else 0,
            },
        )

    def link_update(self, link: int, program: int, old: int | None = None) -> None:
        expected = {} if old is None else {"old_prog_fd": old, "flags": BPF_F_REPLACE}
        command("link_update", link_fd=link, new_prog_fd=program, **expected)

    def link_detach(self, link: int) -> None:
        command("link_detach", link_fd=link)

    def link_info(self, link: int) -> LinkInfo:
        info = Info("bpf_link_info", link)
        type = _TYPE_NAMES.get(info["type"], str(info["type"]))
        details = _details(type, info)
        number = details.pop("attach_type", None)
        attach_type = "xdp" if type == "xdp" else _ATTACH_NAMES.get(number, str(number)) if number is not None else ""
        ifindex, group = details.pop("ifindex", 0), 0
        if type == "cgroup":
            group = details.pop("cgroup_id")
        return LinkInfo(type, info["id"], info["prog_id"], attach_type, ifindex, group, details)

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
        try:
            attr.issue()
        except OSError as error:
            # Before Linux 6.6 there was neither an order that has revisions, nor links to be told of: EINVAL where
            # some other command's attributes are longer.
            if error.errno not in (errno.E2BIG, errno.EINVAL):
                raise
            attr = Attr(
                "prog_query",
                target_ifindex=target,
                attach_type=ATTACH_TYPES[attach_type],
                prog_ids=programs.address,
                count=_MOST_PROGRAMS,
            )
            attr.issue()
        found = [tuple(memoryview(ids.read(4 * attr["count"])).cast("I")) for ids in (programs, links)]
        return Attached(attr["revision"], found[0], found[1] if any(found[1]) else ())

    def program_attach(
        self, program: int, target: int, attach_type: str, flags: int = 0, replaced: int | None = None
    ) -> None:
        replacing = {} if replaced is None else {"replace_bpf_fd": replaced}
        command(
            "prog_attach",
            target_fd=target,
            attach_bpf_fd=program,
            attach_type=ATTACH_TYPES[attach_type],
            attach_flags=flags | (0 if replaced is None else BPF_F_REPLACE),
            **replacing,
        )

    def program_detach(self, program: int | None, target: int, attach_type: str) -> None:
        command("prog_detach", target_fd=target, attach_bpf_fd=program or 0, attach_type=ATTACH_TYPES[attach_type])

    def cgroup_open(self, path: str) -> int:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def namespace_open(self, path: str) -> int:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def interface_index(self, name: str) -> int:
        try:
            return socket.if_nametoindex(name)
        except OSError:
            raise syscall.failure(errno.ENODEV) from None


def _details(type: str, info: Info) -> dict[str, Any]:
    """What the structure tells of links of this type, by the names of its members."""
    if type == "perf_event":
        return _event_details(info)
    found: dict[str, Any] = {}
    for name in STRUCTS["bpf_link_info"].fields:
        of, _, member = name.partition(".")
        if of != type or member.endswith(("_len", "path_size")) or member in _LISTS.get(type, ()):
            continue
        if (length := _STRINGS.get(name)) is not None:
            found[member] = info.string(name, length)
        else:
            found[member.rpartition(".")[2]] = info[name]
    if type in _LISTS:
        found |= {member: info.list(f"{type}.{member}", f"{type}.count") for member in _LISTS[type]}
    if type == "iter":
        # Which of the members there are, the iterator's name says.
        kept = _ITERATED.get(str(found["target_name"]), ())
        found = {name: value for name, value in found.items() if name == "target_name" or name in kept}
    if type == "netfilter":
        # The one member of them all that has a sign.
        found["priority"] -= (found["priority"] >> 31) << 32
    return found


def _event_details(info: Info) -> dict[str, Any]:
    number = info["perf_event.type"]
    if not number:
        return {}  # Linux before 6.6 tells nothing of events.
    type, members = _EVENTS.get(number, (str(number), ()))
    found: dict[str, Any] = {"event": type}
    for name in members:
        path = f"perf_event.{name}"
        member = name.partition(".")[2]
        found[member] = info.string(path, _STRINGS[path]) if path in _STRINGS else info[path]
    return found
