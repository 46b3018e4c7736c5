"""Attach programs to events of the kernel: tracepoints, raw tracepoints, uprobes, perf events.

Linux 5.15 for links to perf events, 4.17 for raw tracepoints. Needs CAP_PERFMON (CAP_SYS_ADMIN before 5.8).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kbpf.runtime.failures import doing
from kbpf.runtime.program import Program
from kbpf.runtime.resource import Resource
from kbpf.specs import EventSource, PerfEvent, RawTracepoint, Tracepoint, Uprobe

_SOURCES = (Tracepoint, RawTracepoint, Uprobe, PerfEvent)


class EventLink(Resource):
    """A program on an event, as long as this is open."""

    def __init__(self, program: Program, source: EventSource, fd: int) -> None:
        super().__init__(program._backend, fd, f"{program.label} on {source}")
        self.source = source

    def detach(self) -> None:
        """The program runs no more for the event."""
        self.close()


def is_source(target: Any) -> bool:
    """Whether a program is attached to this as to an event."""
    return isinstance(target, _SOURCES)


def attach_event(program: Program, source: EventSource, cookie: int = 0) -> EventLink:
    """Attach to an event; `cookie` is a number that the program can ask for (bpf_get_attach_cookie).

    A uprobe's function by name is looked up in its file: `ObjectError` where it is not there. Raises `BpfError`:
    ENOENT for what there is not, EINVAL for a program of another type, EACCES where it reads more than a tracepoint's
    record has, EEXIST where it is on that tracepoint already.
    """
    if not 0 <= cookie < 1 << 64:
        raise ValueError(f"a cookie has 64 bits, {cookie} does not fit")
    if isinstance(source, Uprobe) and isinstance(source.offset, str):
        from kbpf.elf.executable import function_offset

        source = replace(source, offset=function_offset(source.path, source.offset))
    with doing(program._backend, f"attach {program.label} to {source}", operation="event_attach"):
        fd = program._backend.event_attach(program.fileno(), source, cookie)
    return EventLink(program, source, fd)
