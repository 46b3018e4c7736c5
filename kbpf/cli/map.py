"""``kbpf map``: look at maps that are there already."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import click

import kbpf
from kbpf.cli import objects
from kbpf.cli.objects import SELECTOR, as_json
from kbpf.cli.output import Table, plain, text
from kbpf.cli.output import show as show_tables
from kbpf.info import MapInfo


@click.group("map")
def command() -> None:
    """Look at the maps of running programs."""


@command.command("show")
@click.argument("which", nargs=-1, metavar=f"[{SELECTOR}]")
@as_json
def show(which: tuple[str, ...], as_json: bool) -> None:
    """Show all maps, or one by its id, pin or name, as ``bpftool map show`` does."""
    found, is_list = objects.listed(which, "map", _all, kbpf.Map.open)
    objects.write(found, is_list, as_json, _fields, _text)


command.add_command(show, "list")


@command.command("dump")
@click.argument("which", nargs=-1, required=True, metavar=SELECTOR)
@click.option("--json", "as_json", is_flag=True, help="Write one JSON array of keys and values.")
def dump(which: tuple[str, ...], as_json: bool) -> None:
    """Print what is in a map, given by its id, pin or name.

    Keys and values are typed where the map says what they are (BTF), and hexadecimal digits otherwise.
    """
    with opened(which) as map:
        if as_json:
            click.echo(json.dumps([{"key": plain(key), "value": plain(value)} for key, value in map.items()]))
        else:
            rows = [[text(key), text(value)] for key, value in map.items()]
            show_tables([Table(f"{map.name or 'unnamed'} ({map.type})", ["key", "value"], rows)])


def opened(which: tuple[str, ...]) -> kbpf.Map:
    """The map that a selector names."""
    return kbpf.Map.open(**objects.one_id(which, "map", _all), backend=objects.backend())


def _all() -> Iterator[MapInfo]:
    return kbpf.maps(objects.backend())


def _fields(info: MapInfo) -> dict[str, Any]:
    """bpftool's, in its order."""
    fields: dict[str, Any] = {"id": info.id, "type": info.type}
    if info.name:
        fields["name"] = info.name
    fields |= {
        "flags": info.flags,
        "bytes_key": info.key_size,
        "bytes_value": info.value_size,
        "max_entries": info.max_entries,
    }
    if info.memlock:
        fields["bytes_memlock"] = info.memlock
    if info.owner_type:
        fields |= {"owner_prog_type": info.owner_type, "owner_jited": info.owner_jited}
    fields["frozen"] = int(info.frozen)
    if info.btf_id:
        fields["btf_id"] = info.btf_id
    return fields


def _text(info: MapInfo) -> str:
    head = [f"{info.id}: {info.type}", *([f"name {info.name}"] if info.name else []), f"flags 0x{info.flags:x}"]
    sizes = [f"key {info.key_size}B", f"value {info.value_size}B", f"max_entries {info.max_entries}"]
    if info.memlock:
        sizes.append(f"memlock {info.memlock}B")
    lines = ["  ".join(head), "\t" + "  ".join(sizes)]
    if info.owner_type:
        lines.append(f"\towner_prog_type {info.owner_type}  owner {'' if info.owner_jited else 'not '}jited")
    more = [*([f"btf_id {info.btf_id}"] if info.btf_id else []), *(["frozen"] if info.frozen else [])]
    return "\n".join([*lines, *(["\t" + "  ".join(more)] if more else [])])
