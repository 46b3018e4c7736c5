"""What the commands that watch something share: an orderly end by signal, tables that are redrawn, values as JSON."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from types import FrameType
from typing import Any, NamedTuple

import click

# Rows of a map that a table shows; --json gives them all.
_ROWS = 20
# Rows that are aligned with each other where there are more.
_BLOCK = 1000


class Table(NamedTuple):
    """Rows of text below a heading; all columns but the first are numbers or values, aligned to the right."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        cells = [tuple(self.columns), *map(tuple, self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in cells
        ]
        return "\n".join([self.title, *lines] if self.title else lines)

    def __rich__(self) -> Any:
        from rich.table import Table as RichTable
        from rich.text import Text

        drawn = RichTable(title=self.title or None, title_justify="left")
        for index, column in enumerate(self.columns):
            drawn.add_column(Text(column), justify="right" if index else "left")
        for row in self.rows:
            drawn.add_row(*map(Text, row))
        return drawn


def watch(interval: float, duration: float | None, count: int | None) -> Iterator[float]:
    """Give the seconds since the start, every `interval` seconds until `duration` or `count` is reached."""
    start = time.monotonic()
    ticks = 0
    while count is None or ticks < count:
        ticks += 1
        until = ticks * interval if duration is None else min(ticks * interval, duration)
        time.sleep(max(0.0, start + until - time.monotonic()))
        yield time.monotonic() - start
        if duration is not None and until >= duration:
            return


@contextmanager
def until_interrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the block and not the program, so that totals can be printed and all be closed."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def redrawn() -> Iterator[Callable[[Sequence[Table]], None]]:
    """A function that shows tables in place of the ones before; on what is no terminal it shows nothing."""
    if not sys.stdout.isatty():
        yield lambda tables: None
        return
    from rich.console import Group
    from rich.live import Live

    with Live(auto_refresh=False, transient=True) as live:
        yield lambda tables: live.update(Group(*tables), refresh=True)


def show(tables: Sequence[Table]) -> None:
    """Print tables: drawn on a terminal, plain text otherwise."""
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(*tables, sep="\n")
    else:
        click.echo("\n\n".join(map(str, tables)))


def show_rows(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table of any length: what is long is aligned, and held in memory, a block at a time."""
    left = iter(rows)
    block, following = list(islice(left, _BLOCK)), list(islice(left, _BLOCK))
    if not following:
        show([Table(title, columns, block)])
        return
    click.echo(str(Table(title, columns, block)))
    while following:
        click.echo(str(Table("", columns, following)).partition("\n")[2])
        following = list(islice(left, _BLOCK))


def write_array(elements: Iterable[Any]) -> None:
    """Write a JSON array, an element at a time."""
    before = "["
    for element in elements:
        sys.stdout.write(before + json.dumps(element))
        before = ", "
    sys.stdout.write("]\n" if before == ", " else "[]\n")


def plain(value: Any) -> Any:
    """A key or value of a map as JSON has it: bytes as hexadecimal digits, structs as objects, networks as text."""
    if isinstance(value, bytes):
        return value.hex()
    if hasattr(value, "_asdict"):
        return {name: plain(member) for name, member in value._asdict().items()}
    if isinstance(value, (tuple, list)):
        return [plain(element) for element in value]
    return value if isinstance(value, (int, float, str, type(None))) else str(value)


def text(value: Any) -> str:
    """A key or value of a map on one line."""
    value = plain(value)
    if isinstance(value, dict):
        return " ".join(f"{name}={text(member)}" for name, member in value.items())
    if isinstance(value, list):
        return f"[{' '.join(map(text, value))}]"
    return str(value)


def map_table(name: str, type: str, held: Mapping[Any, Any]) -> Table:
    """A map's first elements; zeroes of an array say nothing."""
    found = [(key, value) for key, value in held.items() if not (type.endswith("array") and _is_zero(value))]
    rows = [[text(key), text(value)] for key, value in found[:_ROWS]]
    left = f", the first {_ROWS} of {len(found)}" if len(found) > _ROWS else ""
    return Table(f"{name} ({type}{left})", ["key", "value"], rows)


def _is_zero(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_zero, value))
    return not any(value) if isinstance(value, bytes) else not value
