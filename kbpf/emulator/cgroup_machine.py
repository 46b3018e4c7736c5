"""`struct bpf_cgroup_dev_ctx` and `struct bpf_sysctl`: what processes of a control group do with devices and sysctls.

Programs say yes or no; a sysctl's may also change what is written (kernel/bpf/cgroup.c, Linux 4.15 and 5.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kbpf.emulator.fields import given, narrow
from kbpf.emulator.interpreter import Run
from kbpf.emulator.memory import M32
from kbpf.emulator.packet import Packet
from kbpf.emulator.sock import Sock
from kbpf.uapi.structs import STRUCTS

if TYPE_CHECKING:
    from kbpf.emulator.program import Program

_DEVICE, _SYSCTL = STRUCTS["bpf_cgroup_dev_ctx"].fields, STRUCTS["bpf_sysctl"].fields


class DeviceAccess:
    """A `kbpf.emulator.interpreter.Context`.

    `access_type` is BPF_DEVCG_ACC_* in the upper half, BPF_DEVCG_DEV_* in the lower.
    """

    __slots__ = ("access_type", "attach_type", "major", "minor", "retval")

    def __init__(self, attach_type: int, access_type: int = 0, major: int = 0, minor: int = 0) -> None:
        self.attach_type = attach_type
        self.access_type = access_type
        self.major = major
        self.minor = minor
        #: What the system call is to return: 0, or a negative errno.
        self.retval = 0

    def show(self, run: Run) -> None:
        """There is no packet."""

    def load(self, offset: int, size: int) -> int | None:
        if offset % size or size > 4:
            return None
        if offset & ~3 == _DEVICE["access_type"].offset:
            return narrow(self.access_type, offset, size)
        whole = {_DEVICE["major"].offset: self.major, _DEVICE["minor"].offset: self.minor}
        return whole.get(offset) if size == 4 else None

    def store(self, offset: int, size: int, value: int) -> bool:
        return False

    def result(self) -> dict[str, Any]:
        """Programs set no fields."""
        return {}


def make_device(program: Program, fields: Mapping[str, Any], sock: Sock | None, packet: Packet) -> DeviceAccess:
    """A context of the fields' values."""
    context = DeviceAccess(program.attach_type)
    for name, _, value in given("bpf_cgroup_dev_ctx", fields, tuple(_DEVICE)):
        setattr(context, name, value)
    return context


class SysctlAccess:
    """A `kbpf.emulator.interpreter.Context`.

    `name` is the sysctl's, with slashes; `current` its value as it is read, `new` what is written.
    """

    __slots__ = ("attach_type", "current", "file_pos", "name", "new", "retval", "updated", "write")

    def __init__(self, attach_type: int, name: str = "", current: bytes = b"", new: bytes | None = None) -> None:
        self.attach_type = attach_type
        self.name = name
        self.current = current
        self.new = new or b""
        self.write = int(new is not None)
        self.file_pos = 0
        #: Whether a program has replaced what is written.
        self.updated = False
        #: What the system call is to return: 0, or a negative errno.
        self.retval = 0

    def show(self, run: Run) -> None:
        """There is no packet."""

    def load(self, offset: int, size: int) -> int | None:
        if offset % size or size > 4:
            return None
        value = {_SYSCTL["write"].offset: self.write, _SYSCTL["file_pos"].offset: self.file_pos & M32}.get(offset & ~3)
        return None if value is None else narrow(value, offset, size)

    def store(self, offset: int, size: int, value: int) -> bool:
        if (offset, size) != (_SYSCTL["file_pos"].offset, 4):
            return False
        self.file_pos = value
        return True

    def result(self) -> dict[str, Any]:
        """The position in the file, and what a program has put in place of what is written."""
        return {"file_pos": self.file_pos, "new_value": self.new if self.updated else None}


def make_sysctl(program: Program, fields: Mapping[str, Any], sock: Sock | None, packet: Packet) -> SysctlAccess:
    """A context of the fields' values, and of ``name``, ``current_value`` and ``new_value``, which helpers give."""
    rest = dict(fields)
    context = SysctlAccess(
        program.attach_type, rest.pop("name", ""), rest.pop("current_value", b""), rest.pop("new_value", None)
    )
    for name, _, value in given("bpf_sysctl", rest, ("write", "file_pos")):
        setattr(context, name, value)
    return context
