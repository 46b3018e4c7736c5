"""``kbpf map``: look at maps that are there already."""

from __future__ import annotations

import json

import click

import kbpf
from kbpf.cli.output import Table, plain, show, text
from kbpf.runtime.backends import select_for_socket


@click.group("map")
def command() -> None:
    """Look at the maps of running programs."""


@command.command("dump")
@click.argument("which", nargs=-1, required=True, metavar="PATH | id N")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON array of keys and values.")
def dump(which: tuple[str, ...], as_json: bool) -> None:
    """Print what is in a map, given by the path of a pin or by its id.

    Keys and values are typed where the map says what they are (BTF), and hexadecimal digits otherwise.
    """
    with _opened(which) as map:
        if as_json:
            click.echo(json.dumps([{"key": plain(key), "value": plain(value)} for key, value in map.items()]))
        else:
            rows = [[text(key), text(value)] for key, value in map.items()]
            show([Table(f"{map.name or 'unnamed'} ({map.type})", ["key", "value"], rows)])


def _opened(which: tuple[str, ...]) -> kbpf.Map:
    # The emulator of a new process has no maps: it is asked only by name.
    backend = select_for_socket(None).name
    if len(which) == 2 and which[0] == "id" and which[1].isdecimal():
        return kbpf.Map.open(id=int(which[1]), backend=backend)
    if len(which) == 1:
        return kbpf.Map.open(path=which[0], backend=backend)
    raise click.UsageError("Give the path of a pinned map, or id and a number.")
