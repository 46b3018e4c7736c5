"""``kbpf run``: whole captures through a filter."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from pathlib import Path

import click

from kbpf.cli.output import Table, map_table, plain, show
from kbpf.pcapfile import CaptureError
from kbpf.runtime.captures import CaptureResult, run_capture
from kbpf.specs import CollectionSpec

#: Files of fewer bytes are gone through before a bar could be read.
_LONG = 1 << 28


@click.command("run")
@click.argument("filter", metavar="EXPR|OBJECT")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--program", metavar="NAME", help="Which of OBJECT's programs to run.")
@click.option("-w", "write", metavar="OUT", help="Write the packets that match to OUT, as they were read.")
@click.option("--count", "count_only", is_flag=True, help="Print how many packets match, and nothing else.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Files to go through at a time.")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object.")
def command(
    filter: str,
    files: tuple[str, ...],
    program: str | None,
    write: str | None,
    count_only: bool,
    jobs: int,
    as_json: bool,
) -> None:
    """Run an expression, or a program in an OBJECT file, over captures: pcap or pcapng, plain, gzip or zstd.

    Prints how many packets there were and how many matched: of a program, those that it returned other than 0 for, how
    often it returned what, and its maps; it runs in the emulator. As FILE, - is standard input, and as OUT standard
    output; the rest goes to standard error then. Of a file that is cut off or corrupt, what can be read is counted and
    written before the error is said.
    """
    what = _object(filter)
    if program is not None and not (isinstance(what, CollectionSpec) and program in what.programs):
        raise click.UsageError(f"--program: {filter} has no program {program}.")
    start = time.monotonic()
    damage = None
    try:
        with _progress(files) as progress, _executor(what, min(jobs, len(files))) as executor:
            result = run_capture(what, files, program=program, write=write, executor=executor, progress=progress)
    except CaptureError as error:
        damage, result = error, error.result or CaptureResult(0, 0)
    # Packets that go to standard output are alone there.
    with redirect_stdout(sys.stderr) if write == "-" else nullcontext():
        if count_only and not as_json:
            click.echo(str(result.matched))
        elif as_json:
            maps = {
                name: [{"key": plain(key), "value": plain(value)} for key, value in held.items()]
                for name, held in result.maps.items()
            }
            click.echo(json.dumps({**result._asdict(), "maps": maps, "elapsed": round(time.monotonic() - start, 3)}))
        else:
            click.echo(f"{result.matched:,} of {result.packets:,} packets match")
            if not isinstance(what, str):
                show(_tables(result, what))
    if damage is not None:
        *before, last = damage, *damage.others
        for each in before:
            click.echo(f"kbpf: {each}", err=True)
        raise last


def _object(filter: str) -> str | CollectionSpec:
    """What an object file holds; anything else is an expression."""
    try:
        with Path(filter).open("rb") as file:
            if file.read(4) != b"\x7fELF":
                return filter
    except (OSError, ValueError):
        return filter
    from kbpf.elf import read_object

    return read_object(filter)


def _executor(what: str | CollectionSpec, jobs: int) -> AbstractContextManager[Executor | None]:
    """What runs so many files at a time: filters run without Python's lock, programs' helpers do not."""
    if jobs <= 1:
        return nullcontext()
    return ThreadPoolExecutor(jobs) if isinstance(what, str) else ProcessPoolExecutor(jobs)


def _tables(result: CaptureResult, spec: CollectionSpec) -> list[Table]:
    values = [[str(value), f"{count:,}"] for value, count in sorted(result.values.items())]
    if result.refused:
        values.append(["refused", f"{result.refused:,}"])
    maps = [map_table(name, spec.maps[name].type, held) for name, held in result.maps.items()]
    return [Table("", ["value", "packets"], values), *maps]


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
