"""Programs on events: what is attached to tracepoints, uprobes and perf events, and events that a test makes.

``fire(Tracepoint("sched", "sched_switch"), {"prev_pid": 1})`` runs the programs that are attached there. Nothing else
makes events happen. What Linux looks at in the code under a uprobe (ENOEXEC for what is no instruction) is not looked
at.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kbpf.emulator import tracepoints
from kbpf.emulator.environment import environment
from kbpf.emulator.links import Link
from kbpf.emulator.maps.base import refused
from kbpf.emulator.program import Program
from kbpf.emulator.tracing import Event
from kbpf.errors import ENOTSUPP
from kbpf.info import LinkInfo, TaskEvent
from kbpf.specs import EventSource, PerfEvent, RawTracepoint, Tracepoint, Uprobe
from kbpf.uapi.constants import PERF_TYPE_SOFTWARE

#: BPF_TRACE_MAX_PROGS: programs on one tracepoint.
_MOST_PROGRAMS = 64
#: PERF_COUNT_SW_MAX.
_SOFTWARE_EVENTS = 12


class Attachment(Link):
    """A program on an event, until its last descriptor or pin goes: a link that neither changes nor is detached."""

    def __init__(self, program: Program, source: EventSource, cookie: int) -> None:
        self.type = "raw_tracepoint" if isinstance(source, RawTracepoint) else "perf_event"
        super().__init__(program, "perf_event")
        self.source = source
        self.cookie = cookie

    @property
    def attached(self) -> bool:
        return True

    @property
    def info(self) -> LinkInfo:
        return LinkInfo(self.type, self.id, self.program.id, details={**_described(self.source), "cookie": self.cookie})

    def update(self, program: Program, old: Program | None) -> None:
        raise refused(errno.EINVAL)

    def detach(self) -> None:
        raise refused(errno.EOPNOTSUPP)

    def gone(self) -> None:
        ATTACHED.remove(self)


def _described(source: EventSource) -> dict[str, int | str]:
    """What the kernel tells of an event (`bpf_perf_link_fill_link_info`)."""
    if isinstance(source, RawTracepoint):
        return {"tp_name": source.name}
    if isinstance(source, Tracepoint):
        return {"event": "tracepoint", "tp_name": source.name}
    if isinstance(source, Uprobe):
        assert isinstance(source.offset, int)
        event = "uretprobe" if source.returns else "uprobe"
        return {"event": event, "file_name": source.path, "offset": source.offset}
    return {"event": "event", "type": source.type, "config": source.config}


#: In the order in which programs run.
ATTACHED: list[Attachment] = []


def attach(program: Program, source: EventSource, cookie: int) -> Attachment:
    """Attach as Linux does; raises `OSError` with its errno."""
    if isinstance(source, RawTracepoint):
        _check_raw(program, source)
    elif isinstance(source, Tracepoint):
        _check_tracepoint(program, source)
    elif isinstance(source, Uprobe):
        _check_uprobe(source)
        _check_type(program, "kprobe")
    else:
        _check_event(source)
        _check_type(program, "perf_event")
    attached = Attachment(program, source, cookie)
    ATTACHED.append(attached)
    return attached


def query(found: object) -> TaskEvent:
    """What BPF_TASK_FD_QUERY tells of what is behind a descriptor: of links it knows raw tracepoints."""
    if not isinstance(found, Attachment) or not isinstance(found.source, RawTracepoint):
        raise refused(ENOTSUPP)
    return TaskEvent(found.program.id, "raw_tracepoint", found.source.name)


def _check_type(program: Program, *types: str) -> None:
    if program.type not in types:
        raise refused(errno.EINVAL)


def _check_raw(program: Program, source: RawTracepoint) -> None:
    _check_type(program, "raw_tracepoint", "raw_tracepoint_writable")
    if program.context_end > 8 * tracepoints.argument_count(source):
        raise refused(errno.EINVAL)


def _check_tracepoint(program: Program, source: Tracepoint) -> None:
    size = tracepoints.format_of(source).size
    _check_type(program, "tracepoint")
    if program.context_end > size:
        raise refused(errno.EACCES)
    there = [attached.program for attached in ATTACHED if attached.source == source]
    if program in there:
        raise refused(errno.EEXIST)
    if len(there) == _MOST_PROGRAMS:
        raise refused(errno.E2BIG)


def _check_uprobe(source: Uprobe) -> None:
    assert isinstance(source.offset, int)
    if not source.path:
        raise refused(errno.EINVAL)
    try:
        file = Path(source.path).stat()
    except OSError as error:
        raise refused(error.errno or errno.ENOENT) from None
    if not stat.S_ISREG(file.st_mode) or source.offset > file.st_size:
        raise refused(errno.EINVAL)
    _check_process(source.pid)


def _check_event(source: PerfEvent) -> None:
    if source.type != PERF_TYPE_SOFTWARE or not 0 <= source.config < _SOFTWARE_EVENTS:
        raise refused(errno.ENOENT)
    if source.cpu is not None and not 0 <= source.cpu < environment.cpus:
        raise refused(errno.EINVAL)
    _check_process(source.pid)


def _check_process(pid: int | None) -> None:
    if pid is None or pid == environment.pid_tgid() >> 32:
        return
    try:
        os.kill(pid, 0)
    except PermissionError:
        pass
    except (OSError, OverflowError):
        raise refused(errno.ESRCH) from None


def fire(
    source: EventSource, context: Mapping[str, Any] | bytes | None = None, event: Event | None = None
) -> tuple[int, ...]:
    """Make an event happen; returns what the programs on it return, in the order in which they were attached.

    `context` is for a tracepoint its fields by name, or the whole record; for the others what
    `kbpf.emulator.run_program` takes. `event` is what programs can ask beside it, without the cookie, which is each
    program's own. Programs of a process run if that is the one of `environment.pid_tgid`, and on a processor if that
    is `environment.cpu`. Raises `OSError` (ENOENT) for a tracepoint whose format is not known, `ValueError` for fields
    that are not there, `EmulationFault` for what a verifier would have refused.
    """
    from kbpf.emulator.events import run_event

    if isinstance(source, Tracepoint) and not isinstance(context, bytes):
        context = tracepoints.format_of(source).pack(context or {})
    found = [attached for attached in ATTACHED if _happens(attached.source, source)]
    return tuple(
        run_event(attached.program, context, event=replace(event or Event(), cookie=attached.cookie)).value
        for attached in found
    )


def _happens(attached: EventSource, source: EventSource) -> bool:
    """Whether programs attached to the one run for the other."""
    if isinstance(attached, Uprobe) and isinstance(source, Uprobe):
        same = (attached.offset, attached.returns) == (source.offset, source.returns)
        return same and _is_here(attached.pid) and Path(attached.path).samefile(source.path)
    if isinstance(attached, PerfEvent) and isinstance(source, PerfEvent):
        same = (attached.type, attached.config) == (source.type, source.config)
        return same and _is_here(attached.pid) and attached.cpu in (None, environment.cpu)
    return attached == source


def _is_here(pid: int | None) -> bool:
    return pid is None or pid == environment.pid_tgid() >> 32
