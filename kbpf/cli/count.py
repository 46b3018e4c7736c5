"""``kbpf count``: packets and bytes by expression, live on an interface or from a capture."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import click

import kbpf
from kbpf.cli.output import Table, redrawn, show, until_interrupted, watch
from kbpf.pcapfile import CaptureError, open_capture
from kbpf.runtime.counting import CaptureCounter, Count, Counter

_NAMED = re.compile(r"([\w.-]+)=(.*)", re.DOTALL)


@click.command("count")
@click.argument("arguments", nargs=-1, required=True, metavar="[IFACE] NAME=EXPR...")
@click.option("--read", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Count a capture file.")
@click.option("--interval", type=click.FloatRange(0.05), default=1.0, show_default=True, metavar="SECONDS")
@click.option("--duration", type=click.FloatRange(0), metavar="SECONDS", help="Stop after this time.")
@click.option("--count", type=click.IntRange(1), metavar="N", help="Stop after N intervals.")
@click.option("--json", "as_json", is_flag=True, help="Write a JSON object a line, one each interval.")
def command(
    arguments: tuple[str, ...],
    read: Path | None,
    interval: float,
    duration: float | None,
    count: int | None,
    as_json: bool,
) -> None:
    """Count the packets on IFACE that each expression matches, until Ctrl-C.

    One eBPF socket filter counts them all in the kernel; packets are neither copied nor kept. On loopback each
    packet is counted once, as it comes in. With --read there is no IFACE: the capture is counted in user space.
    """
    if read is not None:
        _count_capture(read, _expressions(arguments), as_json)
        return
    interface = arguments[0]
    if _NAMED.fullmatch(interface):
        raise click.UsageError("The first argument is the interface; with --read FILE there is none.")
    expressions = _expressions(arguments[1:])
    with closing(kbpf.packet_socket(interface)) as socket, Counter(socket, expressions) as counter:
        start = time.monotonic()
        with until_interrupted(), redrawn() as draw:
            for elapsed in watch(interval, duration, count):
                totals = counter.counts()
                if as_json:
                    click.echo(_as_json(totals, counter.backend, elapsed, final=False))
                else:
                    draw([_table(totals, elapsed)])
        # Ctrl-C comes between two ticks; packets of that time are in the totals.
        _print_totals(counter.counts(), counter.backend, time.monotonic() - start, as_json)


def _count_capture(path: Path, expressions: Mapping[str, str], as_json: bool) -> None:
    counter = CaptureCounter(expressions)
    with open_capture(path) as capture, until_interrupted():
        try:
            for record in capture:
                counter.add(record)
        except CaptureError:
            # What came before the damage was counted, and is said before the error.
            _print_totals(counter.counts(), "emulator", 0.0, as_json)
            raise
    _print_totals(counter.counts(), "emulator", 0.0, as_json)


def _expressions(arguments: tuple[str, ...]) -> dict[str, str]:
    expressions: dict[str, str] = {}
    for argument in arguments:
        named = _NAMED.fullmatch(argument)
        if named is None:
            raise click.UsageError(f"{argument!r} is not NAME=EXPR, as in dns='udp port 53'.")
        name, expression = named.groups()
        if name in expressions:
            raise click.UsageError(f"Two expressions are called {name!r}.")
        expressions[name] = expression
    if not expressions:
        raise click.UsageError("Nothing to count: give NAME=EXPR, as in dns='udp port 53'.")
    return expressions


def _print_totals(totals: Mapping[str, Count], backend: str, elapsed: float, as_json: bool) -> None:
    if as_json:
        click.echo(_as_json(totals, backend, elapsed, final=True))
    else:
        show([_table(totals, elapsed)])


def _as_json(totals: Mapping[str, Count], backend: str, elapsed: float, *, final: bool) -> str:
    counts = {name: total._asdict() for name, total in totals.items()}
    return json.dumps({"elapsed": round(elapsed, 3), "final": final, "backend": backend, "counts": counts})


def _table(totals: Mapping[str, Count], elapsed: float) -> Table:
    columns = ["name", "packets", "bytes"]
    rows = [[name, f"{total.packets:,}", f"{total.bytes:,}"] for name, total in totals.items()]
    if elapsed:
        columns += ["packets/s", "bytes/s"]
        for row, total in zip(rows, totals.values(), strict=True):
            row += [f"{total.packets / elapsed:,.1f}", f"{total.bytes / elapsed:,.1f}"]
    return Table("", columns, rows)
