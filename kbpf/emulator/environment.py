"""What a program can ask of the machine around it: stand-ins that a test can set."""

from __future__ import annotations

import os
import random
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kbpf.emulator.routes import Route
from kbpf.emulator.socket_table import SocketTable
from kbpf.emulator.syncookies import SynCookies
from kbpf.emulator.xfrm import XfrmState
from kbpf.specs import Tracepoint

if TYPE_CHECKING:
    from kbpf.emulator.task import Task


def _possible_cpus() -> int:
    """Processors that Linux makes room for, which may be more than are there."""
    try:
        last = Path("/sys/devices/system/cpu/possible").read_text().strip().split(",")[-1].split("-")[-1]
        return int(last) + 1
    except (OSError, ValueError):
        return os.cpu_count() or 1


def _comm() -> bytes:
    try:
        return Path("/proc/self/comm").read_bytes().rstrip(b"\n")
    except OSError:
        return b""


@dataclass(slots=True, kw_only=True)
class Environment:
    """The emulated machine. Set its attributes to make runs repeatable."""

    #: Processors that per-CPU values of maps made from now on have slots for.
    cpus: int = field(default_factory=_possible_cpus)
    #: The processor that programs run on, less than `cpus`.
    cpu: int = 0
    #: CLOCK_MONOTONIC in nanoseconds.
    clock: Callable[[], int] = time.monotonic_ns
    #: A random 32-bit number.
    random32: Callable[[], int] = lambda: random.getrandbits(32)
    #: Nanoseconds that the machine was suspended: what CLOCK_BOOTTIME is ahead of CLOCK_MONOTONIC.
    suspended: int = 0
    #: CLOCK_REALTIME in nanoseconds.
    real_clock: Callable[[], int] = time.time_ns
    #: CLOCK_TAI in nanoseconds.
    tai_clock: Callable[[], int] = lambda: time.clock_gettime_ns(time.CLOCK_TAI)
    #: Jiffies in a second (CONFIG_HZ).
    ticks: int = 250
    numa_node: int = 0
    #: The process that programs run in: its thread group and thread, group and user, and name.
    pid_tgid: Callable[[], int] = lambda: os.getpid() << 32 | threading.get_native_id()
    uid_gid: Callable[[], int] = lambda: os.getgid() << 32 | os.getuid()
    comm: Callable[[], bytes] = _comm
    #: Device and inode of its PID namespace.
    pid_namespace: tuple[int, int] = (0, 0)
    #: Its control group's id, those of the groups around it from the root on, and its net_cls number.
    cgroup_id: int = 1
    cgroup_ancestors: tuple[int, ...] = ()
    cgroup_classid: int = 0
    #: Signals that programs have sent to it.
    signals: list[int] = field(default_factory=list)
    #: Its memory, by address and size; None where there is none.
    user_memory: Callable[[int, int], bytes | None] = lambda address, size: None
    #: Threads by id, see `kbpf.emulator.current_task`.
    tasks: dict[int, Task] = field(default_factory=dict)
    #: The last branches that the processor has taken, ``struct perf_branch_entry`` back to back.
    branches: bytes = b""
    #: Formats of tracepoints as tracefs shows them, and how many arguments raw tracepoints have, beside the kernel's.
    tracepoints: dict[Tracepoint, str] = field(default_factory=dict)
    raw_tracepoints: dict[str, int] = field(default_factory=dict)
    #: The network namespace.
    netns_cookie: int = 1
    #: The realm of a packet's route.
    route_realm: int = 0
    #: What a flow's hash is made by, of the packet from offset 0 on.
    flow_hash: Callable[[bytes], int] = zlib.crc32
    #: The kernel's BTF, by which programs name its variables and types; None: the running kernel's, where it has one.
    kernel_btf: bytes | None = None
    #: Per-CPU variables of the kernel by name: for each processor the bytes.
    kernel_variables: dict[str, Sequence[bytes | bytearray]] = field(default_factory=dict)
    #: Routes beside those of the emulated interfaces' addresses, and link addresses of neighbours by IP address.
    routes: list[Route] = field(default_factory=list)
    neighbours: dict[str, bytes] = field(default_factory=dict)
    #: Sockets that packets and programs find.
    sockets: SocketTable = field(default_factory=SocketTable)
    #: When connections are answered with SYN cookies (net.ipv4.tcp_syncookies), and who makes them.
    tcp_syncookies: int = 1
    syncookies: SynCookies = field(default_factory=SynCookies)
    #: What IPsec has done to packets on their way in, the outermost first.
    xfrm_states: tuple[XfrmState, ...] = ()
    #: Where bpf_trace_printk writes; None: nowhere.
    trace: Callable[[str], object] | None = None


#: The one that all programs run in.
environment = Environment()
