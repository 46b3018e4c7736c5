"""``kbpf run``: whole captures through a filter."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import click

from kbpf.pcapfile import CaptureError
from kbpf.runtime.captures import CaptureResult, run_capture

#: Files of fewer bytes are gone through before a bar could be read.
_LONG = 1 << 28


@click.command("run")
@click.argument("expression")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("-w", "write", metavar="OUT", help="Write the packets that match to OUT, in the files' own format.")
@click.option("--count", "count_only", is_flag=True, help="Print how many packets match, and nothing else.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Files to go through at a time.")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object.")
def command(
    expression: str, files: tuple[str, ...], write: str | None, count_only: bool, jobs: int, as_json: bool
) -> None:
    """Run EXPRESSION over capture files, pcap or pcapng, plain, gzip or zstd; - is standard input.

    Prints how many packets there were and how many matched. Of a file that is cut off or corrupt, what can be read is
    counted and written before the error is said.
    """
    start = time.monotonic()
    damage = None
    try:
        with _progress(files) as progress:
            if jobs > 1 and len(files) > 1:
                with ThreadPoolExecutor(min(jobs, len(files))) as executor:
                    result = run_capture(expression, files, write=write, executor=executor, progress=progress)
            else:
                result = run_capture(expression, files, write=write, progress=progress)
    except CaptureError as error:
        damage, result = error, error.result or CaptureResult(0, 0)
    if count_only and not as_json:
        click.echo(str(result.matched))
    elif as_json:
        click.echo(json.dumps({**result._asdict(), "elapsed": round(time.monotonic() - start, 3)}))
    else:
        click.echo(f"{result.matched:,} of {result.packets:,} packets match")
    if damage is not None:
        raise damage


@contextmanager
def _progress(files: Sequence[str]) -> Iterator[Callable[[int], object] | None]:
    """A bar on a terminal, for files that take a while."""
    sizes = [Path(name).stat().st_size if Path(name).is_file() else 0 for name in files]
    if not sys.stderr.isatty() or sum(sizes) < _LONG:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=sum(sizes))
        yield lambda octets: bar.advance(task, octets)
