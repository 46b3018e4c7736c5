"""``kbpf load``: load an object file, attach its socket filters, show its maps."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack, closing
from pathlib import Path

import click

import kbpf
from kbpf.cli.output import Table, map_table, plain, redrawn, show, until_interrupted, watch
from kbpf.runtime.backends import select_for_socket


@click.command("load")
@click.argument("object", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--attach", "interface", required=True, metavar="IFACE", help="Interface to see the packets of.")
@click.option("--interval", type=click.FloatRange(0.05), default=1.0, show_default=True, metavar="SECONDS")
@click.option("--duration", type=click.FloatRange(0), metavar="SECONDS", help="Stop after this time.")
@click.option("--json", "as_json", is_flag=True, help="Write a JSON object a line, one each interval.")
def command(object: Path, interface: str, interval: float, duration: float | None, as_json: bool) -> None:
    """Load OBJECT, attach its socket filters to packet sockets on IFACE, and show its maps until Ctrl-C."""
    backend = select_for_socket(None).name
    with ExitStack() as stack:
        collection = stack.enter_context(kbpf.load(object, backend=backend))
        filters = [program for program in collection.programs.values() if program.type == "socket_filter"]
        if not filters:
            raise click.ClickException(f"{object} has no socket filter program, only {_others(collection)}.")
        for program in filters:
            # Each has a socket of its own: a socket has one slot.
            socket = stack.enter_context(closing(kbpf.packet_socket(interface, backend=backend)))
            stack.enter_context(program.attach(socket))
        start = time.monotonic()
        with until_interrupted(), redrawn() as draw:
            for elapsed in watch(interval, duration, None):
                if as_json:
                    click.echo(_as_json(collection, elapsed, final=False))
                else:
                    draw(_tables(collection))
        if as_json:
            click.echo(_as_json(collection, time.monotonic() - start, final=True))
        else:
            show(_tables(collection))


def _others(collection: kbpf.Collection) -> str:
    return ", ".join(f"{name} ({program.type})" for name, program in collection.programs.items()) or "no program at all"


def _shown(collection: kbpf.Collection) -> dict[str, kbpf.Map]:
    """The maps that somebody declared, without those that hold a section's variables."""
    return {name: map for name, map in collection.maps.items() if not name.startswith(".")}


def _as_json(collection: kbpf.Collection, elapsed: float, *, final: bool) -> str:
    maps = {
        name: [{"key": plain(key), "value": plain(value)} for key, value in map.items()]
        for name, map in _shown(collection).items()
    }
    return json.dumps({"elapsed": round(elapsed, 3), "final": final, "backend": collection.backend, "maps": maps})


def _tables(collection: kbpf.Collection) -> list[Table]:
    return [map_table(name, map.type, map.snapshot()) for name, map in _shown(collection).items()]
