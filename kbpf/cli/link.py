"""``kbpf link``: what BPF links there are, and where they lead."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import click

import kbpf
from kbpf.cli import objects
from kbpf.cli.objects import as_json, with_pins
from kbpf.info import LinkInfo
from kbpf.uapi.constants import BPF_F_UPROBE_MULTI_RETURN, PERF_TYPE_HARDWARE, PERF_TYPE_SOFTWARE

Shown = tuple[dict[str, Any], str]

# As perf list has them, by PERF_TYPE_*, PERF_COUNT_HW_* and PERF_COUNT_SW_*.
_EVENT_TYPES = ("hardware", "software", "tracepoint", "hw-cache", "raw", "breakpoint")
_EVENTS = {
    PERF_TYPE_HARDWARE: (
        "cpu-cycles",
        "instructions",
        "cache-references",
        "cache-misses",
        "branch-instructions",
        "branch-misses",
        "bus-cycles",
        "stalled-cycles-frontend",
        "stalled-cycles-backend",
        "ref-cycles",
    ),
    PERF_TYPE_SOFTWARE: (
        "cpu-clock",
        "task-clock",
        "page-faults",
        "context-switches",
        "cpu-migrations",
        "minor-faults",
        "major-faults",
        "alignment-faults",
        "emulation-faults",
        "dummy",
        "bpf-output",
        "cgroup-switches",
    ),
}
# By NFPROTO_*, and their hooks by number.
_FAMILIES = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}
_HOOKS = ("prerouting", "input", "forward", "output", "postrouting")
_ARP_HOOKS = ("input", "output")
# By enum bpf_cgroup_iter_order.
_ORDERS = ("order_unspec", "self_only", "descendants_pre", "descendants_post", "ancestors_up")


@click.group("link")
def command() -> None:
    """Look at the BPF links: what programs are attached to."""


@command.command("show")
@click.argument("which", nargs=-1, metavar="[id N | pinned PATH]")
@with_pins
@as_json
def show(which: tuple[str, ...], bpffs: bool, as_json: bool) -> None:
    """Show all links, or one by its id or pin, as ``bpftool link show`` does.

    What is attached without a link (to sockets, by netlink or the older ways to control groups) is not among them.
    """
    if which and objects.selector(which)[0] == "name":
        raise click.UsageError("Links have no names: give an id or a pin.")
    found, is_list = objects.listed(which, "link", _all, kbpf.Link.open)
    objects.write(found, is_list, as_json, objects.pins("link") if bpffs else None, _fields, _text)


command.add_command(show, "list")


def _all() -> Iterator[LinkInfo]:
    return kbpf.links(objects.backend())


def _fields(info: LinkInfo) -> dict[str, Any]:
    """bpftool's, in its order."""
    return {"id": info.id, "type": info.type, "prog_id": info.program_id} | _shown(info)[0]


def _text(info: LinkInfo) -> tuple[list[str], list[str]]:
    head, text = f"{info.id}: {info.type}  prog {info.program_id}", _shown(info)[1]
    if info.type == "iter":
        return [f"{head}  {text}"], []
    return [head, *([text] if text else [])], []


def _shown(info: LinkInfo) -> Shown:
    """What is told of links of its type, as fields and as text."""
    if info.type in _SHAPES:
        return _SHAPES[info.type](info.details)
    fields: dict[str, Any] = {}
    words: list[str] = []
    if info.type in ("xdp", "tcx", "netkit"):
        device = _device(info.ifindex)
        fields |= {"devname": device, "ifindex": info.ifindex}
        words.append(f"ifindex {device}" + ("" if device.startswith("(") else f"({info.ifindex})"))
    if info.type == "cgroup":
        fields["cgroup_id"] = info.cgroup_id
    # Of tracing links it comes before the rest.
    attached = {"attach_type": info.attach_type} if info.attach_type and info.type != "xdp" else {}
    fields |= attached | dict(info.details) if info.type == "tracing" else dict(info.details) | attached
    words += [f"{name} {value}" for name, value in fields.items() if name not in ("devname", "ifindex")]
    return fields, "  ".join(words)


def _device(index: int) -> str:
    """The interface's name, as bpftool has it for those that have none."""
    if not index:
        return "(detached)"
    try:
        return socket.if_indextoname(index)
    except OSError:
        return "(unknown)"


def _raw_tracepoint(details: Mapping[str, Any]) -> Shown:
    return dict(details), f"tp '{details['tp_name']}'" + _cookie(details)


def _iter(details: Mapping[str, Any]) -> Shown:
    fields = dict(details)
    if "order" in fields:
        fields["order"] = _named(_ORDERS, fields["order"])
    # The thread or the process that it is about, if it is about one.
    if fields.get("tid"):
        del fields["pid"]
    fields = {name: value for name, value in fields.items() if value or name not in ("tid", "pid")}
    return fields, "  ".join(f"{name} {value}" for name, value in fields.items())


def _netfilter(details: Mapping[str, Any]) -> Shown:
    family, number, priority, flags = (details[name] for name in ("pf", "hooknum", "priority", "flags"))
    hook = _named(_ARP_HOOKS if _FAMILIES.get(family) == "arp" else _HOOKS, number)
    words = [_FAMILIES.get(family, f"pf: {family}"), hook if isinstance(hook, str) else f"hook {hook}"]
    words += [f"prio {priority}", *([f"flags 0x{flags:x}"] if flags else [])]
    return {"pf": family, "hook": number, "prio": priority, "flags": flags}, " ".join(words)


def _uprobe_multi(details: Mapping[str, Any]) -> Shown:
    returning = bool(details["flags"] & BPF_F_UPROBE_MULTI_RETURN)
    places = list(zip(details["offsets"], details["ref_ctr_offsets"], details["cookies"], strict=True))
    fields = {
        "retprobe": returning,
        "path": details["path"],
        "func_cnt": details["count"],
        "pid": details["pid"],
        "funcs": [dict(zip(("offset", "ref_ctr_offset", "cookie"), place, strict=True)) for place in places],
    }
    head = f"{'uretprobe' if returning else 'uprobe'}.multi  path {details['path']}  func_cnt {details['count']}"
    head += f"  pid {details['pid']}" if details["pid"] else ""
    rows = [f"{'offset':16}   {'ref_ctr_offset':16}   cookies"]
    rows += [" ".join(f"0x{number:<16x}" for number in place).rstrip() for place in places]
    return fields, "\n\t".join([head, *rows])


def _perf_event(details: Mapping[str, Any]) -> Shown:
    if not details:
        return {}, ""  # Linux before 6.6 tells nothing.
    event, cookie = details["event"], {"cookie": details.get("cookie", 0)}
    returning = event in ("kretprobe", "uretprobe")
    if event == "event":
        type = _named(_EVENT_TYPES, details["type"])
        config = _named(_EVENTS.get(details["type"], ()), details["config"])
        return {"event_type": type, "event_config": config} | cookie, f"event {type}:{config}" + _cookie(details)
    if event == "tracepoint":
        return {"tracepoint": details["tp_name"]} | cookie, f"tracepoint {details['tp_name']}" + _cookie(details)
    if event in ("uprobe", "uretprobe"):
        fields = {"retprobe": returning, "file": details["file_name"], "offset": details["offset"]}
        return fields | cookie, f"{event} {details['file_name']}+{details['offset']:#x}" + _cookie(details)
    if event not in ("kprobe", "kretprobe"):
        return dict(details), f"event {event}"
    fields = {"retprobe": returning, "addr": details["addr"], "func": details["func_name"]}
    fields |= {"offset": details["offset"], "missed": details["missed"]}
    words = [event, *([f"{details['addr']:x}"] if details["addr"] else [])]
    words.append(details["func_name"] + (f"+{details['offset']:#x}" if details["offset"] else ""))
    missed = f"  missed {details['missed']}" if details["missed"] else ""
    return fields | cookie, " ".join(words) + missed + _cookie(details)


def _cookie(details: Mapping[str, Any]) -> str:
    return f"  cookie {details['cookie']}" if details.get("cookie") else ""


def _named(names: tuple[str, ...], number: int) -> str | int:
    return names[number] if number < len(names) else number


_SHAPES: dict[str, Callable[[Mapping[str, Any]], Shown]] = {
    "raw_tracepoint": _raw_tracepoint,
    "iter": _iter,
    "netfilter": _netfilter,
    "uprobe_multi": _uprobe_multi,
    "perf_event": _perf_event,
}
