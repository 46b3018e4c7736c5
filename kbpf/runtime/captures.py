"""Whole captures through a filter: counted, and what matches written out.

Files are mapped, or read in pieces where they are compressed or come through a pipe, and gone through by native code
(`kbpf.emulator.jit.scan`) without the interpreter's lock. Where a record is not in order `kbpf.pcapfile` reads it, so
that damage is met with the same words everywhere: what comes before is counted and written, then the error is raised.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, TypeAlias, cast

from kbpf.errors import FilterError
from kbpf.pcapfile import CaptureError
from kbpf.runtime.filter import Filter, compile
from kbpf.runtime.scanning import Output, Scanner
from kbpf.specs import FILE_LAYOUTS, FilterSpec

if TYPE_CHECKING:
    from kbpf.backend import Engine

Source: TypeAlias = "str | os.PathLike[str] | BinaryIO"


class CaptureResult(NamedTuple):
    """How many packets there were, and how many of them the filter kept."""

    packets: int
    matched: int


def run_capture(
    filter: str | Filter,
    paths: Source | Iterable[Source],
    *,
    write: str | os.PathLike[str] | None = None,
    engine: Engine = "auto",
    executor: Executor | None = None,
    progress: Callable[[int], object] | None = None,
) -> CaptureResult:
    """Run a filter over captures, pcap or pcapng, plain or compressed with gzip or zstd; ``"-"`` is standard input.

    `filter` is an expression, compiled for the link type of each interface in the files, or a `Filter` for one link
    type. With `write`, the matching packets are written to that file, in the order of `paths` and in the files' own
    format, each record as it was; of pcapng files all other blocks are kept, too. Files of different formats, byte
    orders, link types or resolutions cannot be written into one pcap file. The file gets its name when it is whole:
    after an error it is not there, or still the old one.

    With `executor`, any of concurrent.futures' or one that behaves like it, each file is a task, and its result is
    added up here; the files must then be named by path, and where the tasks run. `progress` is told now and then how
    many bytes of the files have been gone through since the last time; with `executor`, whenever a file is done.

    Raises `FilterError` for an expression or a link type that cannot be filtered. For a file that is cut off or corrupt
    `CaptureError`, with the offset in the file (after decompression): what came before has been counted and written,
    and the error's `result` says how much that was; files behind it were not read, where there is no `executor`.
    """
    sources = _listed(paths)
    if executor is not None:
        return _spread(filter, sources, write, engine, executor, progress)
    scanner = Scanner(_filters(filter), engine, progress)
    damage: CaptureError | None = None
    with Output(write) as output, scanner:
        try:
            for source in sources:
                scanner.file(source, output)
        except CaptureError as error:
            damage = error
    result = CaptureResult(scanner.packets, scanner.matched)
    if damage is not None:
        damage.result = result
        raise damage
    return result


def _listed(paths: Source | Iterable[Source]) -> list[Source]:
    if isinstance(paths, (str, os.PathLike)) or callable(getattr(paths, "read", None)):
        return [cast(Source, paths)]
    return list(cast("Iterable[Source]", paths))


def _filters(filter: str | Filter) -> Callable[[int], Filter]:
    """The filter for packets of a link type (DLT_*); raises `FilterError`."""

    def of_link_type(dlt: int) -> Filter:
        if isinstance(filter, Filter):
            if filter.layout.dlt != dlt:
                raise FilterError(f"the capture has packets of link type {dlt}, the filter is for {filter.layout.name}")
            return filter
        return compile(filter, link=link_name(dlt))

    return of_link_type


def link_name(dlt: int) -> str:
    """The name that `kbpf.compile` has for a link type; raises `FilterError` for one that it cannot filter."""
    for layout in FILE_LAYOUTS.values():
        if layout.dlt == dlt:
            return layout.name
    raise FilterError(f"packets of link type {dlt} cannot be filtered; there are {', '.join(FILE_LAYOUTS)}")


def _spread(
    filter: str | Filter,
    sources: Sequence[Source],
    write: str | os.PathLike[str] | None,
    engine: Engine,
    executor: Executor,
    progress: Callable[[int], object] | None,
) -> CaptureResult:
    """Each file a task; a task writes to a file of its own beside the wanted one."""
    paths = [os.fspath(source) for source in sources if isinstance(source, (str, os.PathLike))]
    if len(paths) < len(sources) or "-" in paths:
        raise ValueError("with an executor, captures are named by path")
    task = filter if isinstance(filter, str) else filter.spec
    parts = [None if write is None else f"{os.fspath(write)}.part{number}" for number in range(len(paths))]
    running = [executor.submit(_part, task, path, part, engine) for path, part in zip(paths, parts, strict=True)]
    packets = matched = 0
    damage: CaptureError | None = None
    try:
        with Output(write) as output:
            for future, path, part in zip(running, paths, parts, strict=True):
                done, error = future.result()
                packets, matched = packets + done.packets, matched + done.matched
                damage = damage or error
                if part is not None:
                    output.append(part)
                if progress is not None:
                    progress(Path(path).stat().st_size)
    finally:
        for future in running:
            future.cancel()
        for part in parts:
            if part is not None:
                Path(part).unlink(missing_ok=True)
    result = CaptureResult(packets, matched)
    if damage is not None:
        damage.result = result
        raise damage
    return result


def _part(
    filter: str | FilterSpec, path: str, write: str | None, engine: Engine
) -> tuple[CaptureResult, CaptureError | None]:
    """One task: what was counted, and the damage that ended it."""
    try:
        made = filter if isinstance(filter, str) else Filter.from_spec(filter)
        return run_capture(made, path, write=write, engine=engine), None
    except CaptureError as error:
        return error.result or CaptureResult(0, 0), error
