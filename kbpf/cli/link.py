"""``kbpf link``: what BPF links there are, and where they lead."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import click

import kbpf
from kbpf.cli import objects
from kbpf.cli.objects import as_json
from kbpf.info import LinkInfo


@click.group("link")
def command() -> None:
    """Look at the BPF links: what programs are attached to."""


@command.command("show")
@click.argument("which", nargs=-1, metavar="[id N | pinned PATH]")
@as_json
def show(which: tuple[str, ...], as_json: bool) -> None:
    """Show all links, or one by its id or pin, as ``bpftool link show`` does.

    What is attached without a link (to sockets, by netlink or the older ways to control groups) is not among them.
    """
    if which and objects.selector(which)[0] == "name":
        raise click.UsageError("Links have no names: give an id or a pin.")
    found, is_list = objects.listed(which, "link", _all, kbpf.Link.open)
    objects.write(found, is_list, as_json, _fields, _text)


command.add_command(show, "list")


def _all() -> Iterator[LinkInfo]:
    return kbpf.links(objects.backend())


def _fields(info: LinkInfo) -> dict[str, Any]:
    fields: dict[str, Any] = {"id": info.id, "type": info.type, "prog_id": info.program_id}
    if info.type in ("xdp", "tcx", "netkit"):
        fields |= {"devname": _device(info.ifindex), "ifindex": info.ifindex}
    if info.type == "cgroup":
        fields["cgroup_id"] = info.cgroup_id
    fields |= info.details
    if info.attach_type and info.type != "xdp":
        fields["attach_type"] = info.attach_type
    return fields


def _text(info: LinkInfo) -> str:
    fields = _fields(info)
    head = f"{fields.pop('id')}: {fields.pop('type')}  prog {fields.pop('prog_id')}"
    return "\n\t".join([head, *(["  ".join(f"{name} {value}" for name, value in fields.items())] if fields else [])])


def _device(index: int) -> str:
    """The interface's name, as bpftool has it for those that have none."""
    if not index:
        return "(detached)"
    try:
        return socket.if_indextoname(index)
    except OSError:
        return "(unknown)"
