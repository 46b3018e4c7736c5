"""Helpers of cgroup_sysctl programs: the sysctl's name and values (Linux 5.2)."""

from __future__ import annotations

import errno

from kbpf.emulator.cgroup_machine import SysctlAccess
from kbpf.emulator.helpers.packet import check_context
from kbpf.emulator.interpreter import HelperFunction, Run
from kbpf.errors import EmulationFault
from kbpf.uapi.constants import BPF_F_SYSCTL_BASE_NAME

_MOST = 4095


def _context(run: Run, address: int) -> SysctlAccess:
    check_context(address)
    if not isinstance(run.context, SysctlAccess):
        raise EmulationFault("the program's context is no sysctl")
    return run.context


def get_name(run: Run, context: int, buffer: int, size: int, flags: int, _: int) -> int:
    """The name's length; E2BIG where it is cut, which is then written up to the folder that does not fit."""
    access = _context(run, context)
    if size:
        run.check_writable(buffer, size)
    if not buffer:
        return -errno.EINVAL
    *folders, last = access.name.split("/")
    parts = [] if flags & BPF_F_SYSCTL_BASE_NAME else [part for folder in folders for part in (folder, "/")]
    done = 0
    for part in (*parts, last):
        room = size - done
        if not room:
            return -errno.E2BIG
        text = part.encode()
        run.write(buffer + done, text[: room - 1] + b"\0")
        if len(text) >= room:
            return -errno.E2BIG
        done += len(text)
    return done


def _copy(run: Run, buffer: int, size: int, value: bytes) -> int:
    if not buffer:
        return -errno.EINVAL
    if not size:
        return -errno.E2BIG
    run.check_writable(buffer, size)
    if not value:
        run.write(buffer, bytes(size))
        return -errno.EINVAL
    if size > len(value):
        run.write(buffer, value.ljust(size, b"\0"))
        return len(value)
    run.write(buffer, value[: size - 1] + b"\0")
    return -errno.E2BIG


def get_current_value(run: Run, context: int, buffer: int, size: int, *_: int) -> int:
    access = _context(run, context)
    return _copy(run, buffer, size, access.current)


def get_new_value(run: Run, context: int, buffer: int, size: int, *_: int) -> int:
    access = _context(run, context)
    if not access.write:
        if buffer and size:
            run.check_writable(buffer, size)
            run.write(buffer, bytes(size))
        return -errno.EINVAL
    return _copy(run, buffer, size, access.new)


def set_new_value(run: Run, context: int, buffer: int, size: int, *_: int) -> int:
    access = _context(run, context)
    given = run.read(buffer, size) if size else b""
    if not access.write or not access.new or not buffer or not size:
        return -errno.EINVAL
    if size > _MOST:
        return -errno.E2BIG
    access.new, access.updated = given, True
    return 0


HELPERS: dict[str, HelperFunction] = {
    "sysctl_get_name": get_name,
    "sysctl_get_current_value": get_current_value,
    "sysctl_get_new_value": get_new_value,
    "sysctl_set_new_value": set_new_value,
}
