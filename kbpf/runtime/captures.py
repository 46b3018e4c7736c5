"""Whole captures through a filter: counted, and what matches written out.

Files are mapped, or read in pieces where they are compressed or come through a pipe, and gone through by native code
(`kbpf.emulator.jit.scan`) without the interpreter's lock. Where a record is not in order `kbpf.pcapfile` reads it, so
that damage is met with the same words everywhere: what comes before is counted and written, then the error is raised.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeAlias, cast

from kbpf.errors import FilterError
from kbpf.pcapfile import CaptureError
from kbpf.runtime.codecs import total
from kbpf.runtime.collection import Collection
from kbpf.runtime.filter import Filter, compile
from kbpf.runtime.program import Program
from kbpf.runtime.scanning import Output, Scanner, hidden, is_file
from kbpf.specs import FILE_LAYOUTS, CollectionSpec, FilterSpec

if TYPE_CHECKING:
    from kbpf.backend import Engine

Source: TypeAlias = "str | os.PathLike[str] | BinaryIO"


class CaptureResult(NamedTuple):
    """What became of the packets.

    How many there were, and how many of them the filter kept, or the program returned other than 0 for. Of a program
    also how often it returned each value, how many packets it could not be run over, and of one that was loaded for the
    captures what its maps hold, by name and key.
    """

    packets: int
    matched: int
    values: dict[int, int] = {}  # noqa: RUF012  # never changed
    refused: int = 0
    maps: dict[str, dict[Any, Any]] = {}  # noqa: RUF012


def run_capture(
    filter: str | Filter | Program | CollectionSpec,
    paths: Source | Iterable[Source],
    *,
    program: str | None = None,
    write: str | os.PathLike[str] | None = None,
    engine: Engine = "auto",
    executor: Executor | None = None,
    progress: Callable[[int], object] | None = None,
) -> CaptureResult:
    """Run a filter over captures, pcap or pcapng, plain or compressed with gzip or zstd; ``"-"`` is standard input.

    `filter` is an expression, compiled for the link type of each interface in the files, or a `Filter` for one link
    type. It may also be a program that BPF_PROG_TEST_RUN runs over Ethernet frames (`Program.run_all`): one that is
    loaded, or a collection's spec, whose `program` is loaded into the emulator for this; what its maps hold then is
    part of the result.

    With `write`, the matching packets are written to that file, in the order of `paths` and in the files' own format,
    each record as it was; of pcapng files all other blocks are kept, too. Files of different formats, byte orders, link
    types or resolutions cannot be written into one pcap file (`KbpfError`). The file gets its name when it is whole:
    after an error it is not there, or still the old one. What is there and no regular file, such as a pipe, is written
    to as it is, and so is ``"-"``, standard output.

    With `executor`, any of concurrent.futures' or one that behaves like it, each file is a task, and its result is
    added up here; the files must then be named by path, and where the tasks run. A program is given by its collection's
    spec; numbers in its maps are added up key by key, in structs and arrays too. `progress` is told now and then how
    many bytes of the files have been gone through since the last time; with `executor`, whenever a file is done.

    Raises `FilterError` for an expression or a link type that cannot be filtered. For a file that is cut off or corrupt
    `CaptureError`, with the offset in the file (after decompression): what came before, and the other files, have been
    counted and written, and the error's `result` says how much that was.
    """
    sources = _listed(paths)
    if executor is not None:
        return _spread(filter, sources, program, write, engine, executor, progress)
    if isinstance(filter, CollectionSpec):
        return _load_and_run(filter, sources, program, write, engine, progress)
    if isinstance(filter, Program):
        scanner = Scanner(_no_filter, engine, progress, filter)
    else:
        scanner = Scanner(_filters(filter), engine, progress)
    damage: list[CaptureError] = []
    with Output(write) as output, scanner:
        for source in sources:
            try:
                scanner.file(source, output)
            except CaptureError as error:
                damage.append(error)
    return _whole(CaptureResult(scanner.packets, scanner.matched, dict(scanner.values), scanner.refused), damage)


def _whole(result: CaptureResult, damage: list[CaptureError]) -> CaptureResult:
    """The result of files that were in order; raises the first of the errors otherwise."""
    if damage:
        first, *damage[0].others = damage
        first.result = result
        raise first
    return result


def _load_and_run(
    spec: CollectionSpec,
    sources: list[Source],
    program: str | None,
    write: str | os.PathLike[str] | None,
    engine: Engine,
    progress: Callable[[int], object] | None,
) -> CaptureResult:
    name = _program_name(spec, program)
    one = CollectionSpec(maps=spec.maps, programs={name: spec.programs[name]})
    with Collection.from_spec(one, backend="emulator", engine=engine) as collection:

        def maps() -> dict[str, dict[Any, Any]]:
            shown = {name: map for name, map in collection.maps.items() if not name.startswith(".")}
            return {name: map.snapshot() for name, map in shown.items() if map.shape.key_size}

        try:
            result = run_capture(collection.programs[name], sources, write=write, progress=progress)
        except CaptureError as error:
            error.result = error.result._replace(maps=maps())
            raise
        return result._replace(maps=maps())


def _program_name(spec: CollectionSpec, wanted: str | None) -> str:
    names = ", ".join(spec.programs) or "none"
    if wanted is None and len(spec.programs) != 1:
        raise ValueError(f"which program? There are {names}")
    name = wanted or next(iter(spec.programs))
    if name not in spec.programs:
        raise ValueError(f"there is no program {name}; there are {names}")
    return name


def _no_filter(dlt: int) -> Filter:
    raise AssertionError("a program needs no filter")


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
    filter: str | Filter | Program | CollectionSpec,
    sources: Sequence[Source],
    program: str | None,
    write: str | os.PathLike[str] | None,
    engine: Engine,
    executor: Executor,
    progress: Callable[[int], object] | None,
) -> CaptureResult:
    """Each file a task; a task writes to a file of its own beside the wanted one."""
    paths = [os.fspath(source) for source in sources if isinstance(source, (str, os.PathLike))]
    if len(paths) < len(sources) or "-" in paths:
        raise ValueError("with an executor, captures are named by path")
    if isinstance(filter, Program):
        raise ValueError("with an executor, a program is given by its collection's spec")
    task = filter.spec if isinstance(filter, Filter) else filter
    with TemporaryDirectory() as spare:
        parts = _parts(write, spare, len(paths))
        pairs = list(zip(paths, parts, strict=True))
        running = [executor.submit(_part, task, path, program, part, engine) for path, part in pairs]
        result, damage = CaptureResult(0, 0), list[CaptureError]()
        try:
            with Output(write) as output:
                for future, (path, part) in zip(running, pairs, strict=True):
                    done, error = future.result()
                    result = _added(result, done)
                    damage += [error] if error is not None else []
                    # Of a file that is no capture there is none.
                    if part is not None and (error is None or Path(part).exists()):
                        output.append(part)
                    if progress is not None:
                        progress(Path(path).stat().st_size)
        finally:
            for future in running:
                # What a task writes is to be there before it is removed.
                if not future.cancel():
                    future.exception()
            for part in parts:
                if part is not None:
                    Path(part).unlink(missing_ok=True)
    return _whole(result, damage)


def _parts(write: str | os.PathLike[str] | None, spare: str, count: int) -> list[str] | list[None]:
    """Where tasks write: beside the wanted file, or in the directory `spare` where that is no regular file."""
    if write is None:
        return [None] * count
    path = Path(write)
    base = hidden(path.resolve() if is_file(path) else Path(spare, "out"), spare)
    return [f"{base}.part{number}" for number in range(count)]


def _added(one: CaptureResult, other: CaptureResult) -> CaptureResult:
    """Two results in one; raises `TypeError` where values of maps are bytes, of which nobody knows what they count."""
    maps = {name: dict(held) for name, held in one.maps.items()}
    for name, held in other.maps.items():
        mine = maps.setdefault(name, {})
        for key, value in held.items():
            mine[key] = total([mine[key], value]) if key in mine else value
    values = dict(Counter(one.values) + Counter(other.values))
    return CaptureResult(
        one.packets + other.packets, one.matched + other.matched, values, one.refused + other.refused, maps
    )


def _part(
    filter: str | FilterSpec | CollectionSpec, path: str, program: str | None, write: str | None, engine: Engine
) -> tuple[CaptureResult, CaptureError | None]:
    """One task: what was counted, and the damage that ended it."""
    try:
        made = Filter.from_spec(filter) if isinstance(filter, FilterSpec) else filter
        return run_capture(made, path, program=program, write=write, engine=engine), None
    except CaptureError as error:
        return error.result or CaptureResult(0, 0), error
