"""Helpers of tracing programs: the event that they run for, and the thread that they run in.

Some of them are for programs of all types. The thread is a `kbpf.emulator.task.Task`, the event a
`kbpf.emulator.tracing.Event`, as a test sets them.
"""

from __future__ import annotations

import errno
import struct

from kbpf.emulator import stacks
from kbpf.emulator.environment import environment
from kbpf.emulator.helpers.maps import map_at
from kbpf.emulator.helpers.packet import check_context
from kbpf.emulator.helpers.system import (
    is_region,
    probe_read_kernel,
    probe_read_kernel_str,
    probe_read_user,
    probe_read_user_str,
)
from kbpf.emulator.interpreter import CONTEXT_ADDRESS, HelperFunction, Run
from kbpf.emulator.maps.stack_trace import StackTrace
from kbpf.emulator.memory import M32, Region
from kbpf.emulator.task import Task, current_task
from kbpf.emulator.tracing import Event, TracingContext
from kbpf.errors import EmulationFault
from kbpf.uapi import constants as uapi

#: struct bpf_perf_event_value: counter, enabled, running.
_VALUE = struct.Struct("=QQQ")
#: Bytes of a struct perf_branch_entry.
_BRANCH = 24
#: TASK_SIZE of x86-64: where user space ends.
_USER_END = 0x7FFF_FFFF_F000


def task_at(run: Run, address: int) -> Task:
    """The thread that a program names by an address that it has been given."""
    owner = run.owner(address)
    if not isinstance(owner, Task):
        raise EmulationFault("this is no task", address=address)
    return owner


def event_at(run: Run, context: int) -> Event:
    """The event that a program names by its context."""
    if context != CONTEXT_ADDRESS or not isinstance(run.context, TracingContext):
        raise EmulationFault("this is no context of a tracing program", address=context)
    return run.context.event


def get_current_task(run: Run, *_: int) -> int:
    return current_task().address


def task_pt_regs(run: Run, task: int, *_: int) -> int:
    return task_at(run, task).registers_region.address


def _stack(run: Run, task: Task, to: int, size: int, flags: int, named: bool) -> int:
    """How many bytes of frames there are; the rest of the buffer is cleared, all of it on failure."""
    size &= M32
    run.check_writable(to, size)
    try:
        found = stacks.stack(task, size, flags, named)
    except OSError as error:
        run.write(to, bytes(size))
        return -(error.errno or 0)
    run.write(to, found.ljust(size, b"\0"))
    return len(found)


def get_stack(run: Run, context: int, to: int, size: int, flags: int, _: int) -> int:
    check_context(context)
    return _stack(run, current_task(), to, size, flags, named=False)


def get_task_stack(run: Run, task: int, to: int, size: int, flags: int, _: int) -> int:
    return _stack(run, task_at(run, task), to, size, flags, named=True)


def get_stackid(run: Run, context: int, map: int, flags: int, *_: int) -> int:
    check_context(context)
    found = map_at(run, map)
    if not isinstance(found, StackTrace):
        raise EmulationFault(f"a {found.type} map holds no stacks")
    try:
        return found.keep(current_task(), flags)
    except OSError as error:
        return -(error.errno or 0)


def find_vma(run: Run, task: int, address: int, callback: int, context: int, flags: int) -> int:
    """Call ``callback(task, area, context)`` for the area that the address lies in; ENOENT if there is none."""
    found = task_at(run, task)
    if flags:
        return -errno.EINVAL
    area = found.area(address)
    if area is None:
        return -errno.ENOENT
    region = Region(area.memory(), writable=False)
    run.call(callback, task, region.address, context, 0, 0)
    return 0


def get_branch_snapshot(run: Run, to: int, size: int, flags: int, *_: int) -> int:
    """ENOENT where the processor keeps no record of branches."""
    size &= M32
    run.check_writable(to, size)
    if flags:
        return -errno.EINVAL
    found = environment.branches[: size // _BRANCH * _BRANCH]
    if not found:
        return -errno.ENOENT
    run.write(to, found)
    return len(found)


def read_branch_records(run: Run, context: int, to: int, size: int, flags: int, _: int) -> int:
    """ENOENT where the event does not sample branches."""
    branches, size = event_at(run, context).branches, size & M32
    if flags & ~uapi.BPF_F_GET_BRANCH_RECORDS_SIZE:
        return -errno.EINVAL
    if branches is None:
        return -errno.ENOENT
    if flags & uapi.BPF_F_GET_BRANCH_RECORDS_SIZE:
        return len(branches)
    if not to or size % _BRANCH:
        return -errno.EINVAL
    run.write(to, branches[:size])
    return min(size, len(branches))


def perf_prog_read_value(run: Run, context: int, to: int, size: int, *_: int) -> int:
    value, size = event_at(run, context).value, size & M32
    run.check_writable(to, size)
    if size != _VALUE.size:
        run.write(to, bytes(size))
        return -errno.EINVAL
    run.write(to, _VALUE.pack(*value))
    return 0


def _is_user(address: int) -> bool:
    """Whether bpf_probe_read takes an address for user space's; regions of the emulator's are the kernel's."""
    return address < _USER_END and not is_region(address >> 32)


def probe_read(run: Run, to: int, size: int, address: int, *_: int) -> int:
    return (probe_read_user if _is_user(address) else probe_read_kernel)(run, to, size, address)


def probe_read_str(run: Run, to: int, size: int, address: int, *_: int) -> int:
    return (probe_read_user_str if _is_user(address) else probe_read_kernel_str)(run, to, size, address)


def copy_from_user_task(run: Run, to: int, size: int, address: int, task: int, flags: int) -> int:
    """Of the thread's own memory only; another's is not there."""
    found, size = task_at(run, task), size & M32
    run.check_writable(to, size)
    if flags:
        return -errno.EINVAL
    if found is not current_task() and size:
        run.write(to, bytes(size))
        return -errno.EFAULT
    return probe_read_user(run, to, size, address)


#: What all programs may call.
HELPERS: dict[str, HelperFunction] = {
    "copy_from_user": probe_read_user,
    "copy_from_user_task": copy_from_user_task,
    "find_vma": find_vma,
    "get_branch_snapshot": get_branch_snapshot,
    "get_current_task": get_current_task,
    "get_current_task_btf": get_current_task,
    "get_task_stack": get_task_stack,
    "task_pt_regs": task_pt_regs,
}
_OF_TRACING: dict[str, HelperFunction] = {
    "get_attach_cookie": lambda run, context, *_: event_at(run, context).cookie,
    "get_stack": get_stack,
    "get_stackid": get_stackid,
    "probe_read": probe_read,
    "probe_read_str": probe_read_str,
}
#: What only programs of these types may call, or another function under the same name.
OF_TYPE: dict[str, dict[str, HelperFunction]] = {
    **dict.fromkeys(("tracepoint", "raw_tracepoint", "raw_tracepoint_writable"), _OF_TRACING),
    "kprobe": {**_OF_TRACING, "get_func_ip": lambda run, context, *_: event_at(run, context).function},
    "perf_event": {
        **_OF_TRACING,
        "perf_prog_read_value": perf_prog_read_value,
        "read_branch_records": read_branch_records,
    },
    "syscall": {name: _OF_TRACING[name] for name in ("get_stack", "probe_read", "probe_read_str")},
}
