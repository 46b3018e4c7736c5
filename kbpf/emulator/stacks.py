"""Stack traces as programs get them (kernel/bpf/stackmap.c): which frames of a thread's stacks, and in what form."""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence

from kbpf.emulator.maps.base import refused
from kbpf.emulator.task import Task, current_task
from kbpf.uapi import constants as uapi

#: kernel.perf_event_max_stack, as it is by default.
MOST_FRAMES = 127
#: Bytes of a frame: an address, or a struct bpf_stack_build_id.
ADDRESS, BUILD_ID = 8, 32
#: Status, build id, and the offset into the file or the address.
_BUILD_ID = struct.Struct("=i20sQ")
_VALID, _IP = 1, 2


def frames(task: Task, flags: int, room: int) -> Sequence[int]:
    """The frames after those that `flags` skip, at most `room`; `OSError` EFAULT where there are fewer than skipped."""
    skip = flags & uapi.BPF_F_SKIP_FIELD_MASK
    stack = task.user_stack if flags & uapi.BPF_F_USER_STACK else task.kernel_stack
    stack = stack[: min(room + skip, MOST_FRAMES)]
    if len(stack) < skip:
        raise refused(errno.EFAULT)
    return stack[skip:]


def addresses(stack: Sequence[int]) -> bytes:
    return struct.pack(f"={len(stack)}Q", *stack)


def build_ids(task: Task, stack: Sequence[int], user: bool) -> bytes:
    """Each frame's place in a file, or its address where that is not known, as it never is of the kernel's."""
    out = b""
    for address in stack:
        area = task.area(address) if user else None
        if area is None or not area.build_id:
            out += _BUILD_ID.pack(_IP, b"", address)
        else:
            out += _BUILD_ID.pack(_VALID, area.build_id, address - area.start + area.offset)
    return out


def stack(task: Task, size: int, flags: int, named: bool) -> bytes:
    """What bpf_get_stack writes, and bpf_get_task_stack, where the program has `named` the thread.

    Raises `OSError` with the kernel's errno.
    """
    user, by_build_id = flags & uapi.BPF_F_USER_STACK, flags & uapi.BPF_F_USER_BUILD_ID
    if flags & ~(uapi.BPF_F_SKIP_FIELD_MASK | uapi.BPF_F_USER_STACK | uapi.BPF_F_USER_BUILD_ID):
        raise refused(errno.EINVAL)
    frame = BUILD_ID if by_build_id else ADDRESS
    if (by_build_id and not user) or size % frame:
        raise refused(errno.EINVAL)
    if named and user and not task.in_user_space:
        raise refused(errno.EFAULT)
    if named and user and task is not current_task():
        raise refused(errno.EOPNOTSUPP)
    found = frames(task, flags, size // frame)
    return build_ids(task, found, bool(user)) if by_build_id else addresses(found)
