"""What is loaded: programs, maps, links and BTF by their ids, as bpftool lists them, and the counting of runs.

Ids are of Linux 4.13, those of links of 5.8. Listing takes CAP_SYS_ADMIN. Objects come and go while they are listed:
what has gone before it is looked at is left out, what comes meanwhile may be.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from kbpf.backend import Backend, ObjectKind
from kbpf.info import BtfInfo, LinkInfo, MapInfo, ProgramInfo
from kbpf.runtime.backends import select
from kbpf.runtime.failures import doing

Told = TypeVar("Told", MapInfo, ProgramInfo, LinkInfo, BtfInfo)


def programs(backend: str | None = None) -> Iterator[ProgramInfo]:
    """What there is to tell of each program that is loaded, by rising id. ``Program.open(id=...)`` opens one.

    Raises `PermissionDeniedError` where this process may not list them.
    """
    chosen = select(backend)
    return _each(chosen, "program", "prog", chosen.program_info)


def maps(backend: str | None = None) -> Iterator[MapInfo]:
    """The same of each map: see `programs`."""
    chosen = select(backend)
    return _each(chosen, "map", "map", chosen.map_info)


def links(backend: str | None = None) -> Iterator[LinkInfo]:
    """The same of each BPF link (Linux 5.8): see `programs`. What was attached without a link is not among them."""
    chosen = select(backend)
    return _each(chosen, "link", "link", chosen.link_info)


def btfs(backend: str | None = None) -> Iterator[BtfInfo]:
    """The same of each BTF (Linux 5.11): the kernel's own, its modules', and those of programs and maps."""
    chosen = select(backend)
    return _each(chosen, "btf", "btf", chosen.btf_info)


def pins(kind: ObjectKind, backend: str | None = None) -> dict[int, list[str]]:
    """Where objects are pinned on the BPF file systems, by their ids, as far as this process may open the pins."""
    found: dict[int, list[str]] = {}
    for id, path in select(backend).pins(kind):
        found.setdefault(id, []).append(path)
    return found


@contextmanager
def statistics(backend: str | None = None) -> Iterator[None]:
    """Have the runs of all programs and their time counted in the block (BPF_ENABLE_STATS, Linux 5.8).

    They are in `ProgramInfo.run_count` and `run_time_ns`, which begin at 0 when a program is loaded and only grow. The
    counting costs each run some nanoseconds. Needs CAP_SYS_ADMIN. Others may have it on at the same time, also with
    ``kernel.bpf_stats_enabled``.
    """
    chosen = select(backend)
    with doing(chosen, "have runs of programs counted", operation="enable_stats"):
        fd = chosen.statistics_enable()
    try:
        yield
    finally:
        chosen.close(fd)


def _each(chosen: Backend, kind: ObjectKind, short: str, told: Callable[[int], Told]) -> Iterator[Told]:
    with doing(chosen, f"list all {kind}s", operation=f"{short}_get_next_id"):
        ids = chosen.ids(kind)
    for id in ids:
        with doing(chosen, f"open {kind} {id}", operation=f"{short}_get_fd_by_id"):
            try:
                fd = chosen.open_by_id(kind, id)
            except OSError as error:
                # Gone, or a link that is not all there yet.
                if error.errno in (errno.ENOENT, errno.EAGAIN):
                    continue
                raise
        try:
            with doing(chosen, f"read the info of {kind} {id}", operation="obj_get_info_by_fd"):
                info = told(fd)
        finally:
            chosen.close(fd)
        yield info
