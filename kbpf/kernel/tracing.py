"""Programs on events of the kernel: perf_event_open(2) and a link to it (Linux 5.15), raw tracepoints (4.17).

Needs CAP_PERFMON. A tracepoint's number is read from tracefs, which must be mounted at its usual place.
"""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

from kbpf.info import TaskEvent
from kbpf.kernel import syscall
from kbpf.kernel.attrs import Attr, command, newer
from kbpf.specs import EventSource, PerfEvent, RawTracepoint, Tracepoint, Uprobe
from kbpf.uapi.constants import PERF_TYPE_TRACEPOINT
from kbpf.uapi.enums import ATTACH_TYPES

#: struct perf_event_attr as of Linux 2.6.33: type, size, config, period, what is sampled and read, flags, when to wake
#: up, a breakpoint's type, and two more words of configuration.
_ATTR = struct.Struct("=IIQQQQQIIQQ")
#: By enum bpf_task_fd_type.
_TASK_EVENTS = ("raw_tracepoint", "tracepoint", "kprobe", "kretprobe", "uprobe", "uretprobe")
#: Bytes of the longest name of an event: a path.
_NAME_ROOM = 4096
_TRACEFS = (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing"))
_UPROBES = Path("/sys/bus/event_source/devices/uprobe")


class TracingCommands:
    """The events' part of the backend."""

    def event_attach(self, program: int, source: EventSource, cookie: int = 0) -> int:
        if isinstance(source, RawTracepoint):
            name = syscall.Buffer(source.name.encode() + b"\0")
            with newer("cookies of raw tracepoints", "6.10", "raw_tracepoint_open", prog_fd=-1, cookie=cookie):
                return command("raw_tracepoint_open", name=name.address, prog_fd=program, cookie=cookie)
        event = _open(source)
        try:
            # The link holds the event.
            return command(
                "link_create",
                prog_fd=program,
                target_fd=event,
                attach_type=ATTACH_TYPES["perf_event"],
                **{"perf_event.bpf_cookie": cookie},
            )
        finally:
            os.close(event)

    def event_query(self, pid: int, fd: int) -> TaskEvent:
        name = syscall.Buffer(_NAME_ROOM)
        attr = Attr("task_fd_query", pid=pid, fd=fd, buf=name.address, buf_len=name.size)
        attr.issue()
        text = os.fsdecode(name.read().split(b"\0")[0])
        type = _TASK_EVENTS[attr["fd_type"]]
        return TaskEvent(attr["prog_id"], type, text, attr["probe_offset"], attr["probe_addr"])


def _open(source: Tracepoint | Uprobe | PerfEvent) -> int:
    if isinstance(source, PerfEvent):
        attr = _attr(source.type, source.config, period=source.period)
        return syscall.perf_event_open(attr, -1 if source.cpu is None else source.cpu, _process(source.pid))
    if isinstance(source, Uprobe):
        assert isinstance(source.offset, int)
        path = syscall.Buffer(os.fsencode(source.path) + b"\0")
        attr = _attr(_number(_UPROBES / "type"), int(source.returns), more=(path.address, source.offset))
        # Whoever runs the code, wherever: one processor stands for all.
        return syscall.perf_event_open(attr, 0 if source.pid is None else -1, _process(source.pid))
    attr = _attr(PERF_TYPE_TRACEPOINT, _tracepoint_id(source))
    return syscall.perf_event_open(attr, 0)


def _attr(type: int, config: int, period: int = 0, more: tuple[int, int] = (0, 0)) -> bytes:
    return _ATTR.pack(type, _ATTR.size, config, period, 0, 0, 0, 0, 0, *more)


def _process(pid: int | None) -> int:
    return -1 if pid is None else pid


def _tracepoint_id(source: Tracepoint) -> int:
    for root in _TRACEFS:
        if (root / "events").is_dir():
            return _number(root / "events" / source.system / source.name / "id")
    raise OSError(errno.ENOENT, "tracefs is not mounted at /sys/kernel/tracing: mount -t tracefs nodev there")


def _number(path: Path) -> int:
    return int(path.read_text())
