"""``kbpf events``: print what programs write to a ring buffer or perf event array."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

import click

import kbpf
from kbpf.cli.map import opened
from kbpf.cli.objects import SELECTOR
from kbpf.cli.output import plain, text, until_interrupted


@click.command("events")
@click.argument("which", nargs=-1, required=True, metavar=SELECTOR)
@click.option("--type", "format", metavar="FORMAT", help="What an event is, in the letters of Python's struct: IQ16s.")
@click.option("--count", type=click.IntRange(1), metavar="N", help="Stop after so many events.")
@click.option("--duration", type=click.FloatRange(0), metavar="SECONDS", help="Stop after this time.")
@click.option("--json", "as_json", is_flag=True, help="Write a JSON value a line.")
def command(
    which: tuple[str, ...], format: str | None, count: int | None, duration: float | None, as_json: bool
) -> None:
    """Print the events of a ring buffer or perf event array, given by its id, pin or name, until Ctrl-C.

    Events that are printed here no other reader gets: from a ring buffer they are taken, and a perf event array belongs
    to whoever opened it last. Without --type they are hexadecimal digits.
    """
    with opened(which) as map, _reader(map, format) as events:
        with until_interrupted():
            for event in islice(_coming(events, duration), count):
                click.echo(json.dumps(plain(event)) if as_json else text(event))
        if events.lost:
            click.echo(f"{events.lost} events found no room", err=True)


def _reader(map: kbpf.BpfMap, format: str | None) -> kbpf.Events:
    try:
        return map.events(format)
    except (TypeError, ValueError) as error:
        raise click.UsageError(f"{error}.") from None


def _coming(events: kbpf.Events, duration: float | None) -> Iterator[Any]:
    return iter(events) if duration is None else events.during(duration)
