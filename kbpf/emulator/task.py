"""Threads that programs run in or name: stand-ins for ``struct task_struct``, as a test sets them.

``current_task().user_stack = (0x401136, 0x401020)`` is what bpf_get_stack gives of the user's stack from then on.
"""

from __future__ import annotations

import struct
import sys
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field

from kbpf.emulator.environment import environment
from kbpf.emulator.memory import M32, Region
from kbpf.emulator.tracing import REGISTERS, packed

#: Bytes of a task and of an area that programs can read.
_TASK_SIZE, _AREA_SIZE = 1 << 14, 1 << 8
#: __USER_CS and __USER_DS of x86-64: the thread came from user space.
_USER = {"cs": 0x33, "ss": 0x2B}


@dataclass(frozen=True)
class Area:
    """An area of a thread's memory (``struct vm_area_struct``): from `start` up to `end`.

    `build_id` is that of the file that is mapped there from `offset` bytes on; empty if it has none.
    """

    start: int
    end: int
    build_id: bytes = b""
    offset: int = 0

    def memory(self) -> bytes:
        """What programs read of it: ``vm_start`` and ``vm_end``, where Linux 6.18 has them."""
        return struct.pack("=QQ", self.start, self.end).ljust(_AREA_SIZE, b"\0")


@dataclass(kw_only=True, eq=False)
class Task:
    """A thread. Programs get its address from bpf_get_current_task and its kin, and may read `memory`."""

    pid: int
    tgid: int
    #: The bytes of the structure, all 0 but for what a test puts there. A program that was compiled for a kernel looks
    #: where that kernel's BTF says.
    memory: bytearray = field(default_factory=lambda: bytearray(_TASK_SIZE))
    #: Addresses of instructions, the innermost first: what helpers take for its stacks.
    kernel_stack: tuple[int, ...] = ()
    user_stack: tuple[int, ...] = ()
    #: ``struct pt_regs``, see `set_registers`.
    registers: bytearray = field(default_factory=lambda: bytearray(packed("kprobe", _USER)))
    #: Its memory; None for a kernel thread, which has none.
    areas: Iterable[Area] | None = ()
    region: Region = field(init=False)
    registers_region: Region = field(init=False)

    def __post_init__(self) -> None:
        self.region = Region(self.memory, writable=False, owner=weakref.ref(self))
        self.registers_region = Region(self.registers, writable=False)

    @property
    def address(self) -> int:
        return self.region.address

    @property
    def in_user_space(self) -> bool:
        """Whether its registers are those with which it left user space."""
        cs = REGISTERS["cs"]
        return bool(int.from_bytes(self.registers[cs.offset : cs.offset + cs.size], sys.byteorder) & 3)

    def set_registers(self, **values: int) -> None:
        """Registers by the kernel's names, others 0 but for the segments; `ValueError` for what is none."""
        self.registers[:] = packed("kprobe", _USER | values)

    def area(self, address: int) -> Area | None:
        """The area that an address lies in."""
        return next((area for area in self.areas or () if area.start <= address < area.end), None)


def current_task() -> Task:
    """The thread that programs run in, by `environment.pid_tgid`; made when it is first asked for."""
    pid_tgid = environment.pid_tgid()
    pid = pid_tgid & M32
    task = environment.tasks.get(pid)
    if task is None:
        task = environment.tasks[pid] = Task(pid=pid, tgid=pid_tgid >> 32)
    return task
