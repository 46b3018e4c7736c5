"""Helpers that ask the machine: time, randomness, processor, process. Tests set `environment` to fix the answers."""

from __future__ import annotations

import errno

from kbpf.emulator.environment import environment
from kbpf.emulator.interpreter import HelperFunction, Run
from kbpf.emulator.memory import CONTEXT, FIRST_SHARED, M32, M64, REGIONS
from kbpf.emulator.tracing import TracingContext
from kbpf.errors import EmulationFault

_NANOSECONDS = 1_000_000_000
_TYPE_NAMESPACE = 8
#: User space has the lower half of x86-64's 48-bit addresses.
_USER_BITS = 47
#: With five levels of page tables, as processors have today.
_ADDRESS_BITS = 57
#: _NSIG: 0 asks whether a signal could be sent.
_MOST_SIGNAL = 64


def get_current_comm(run: Run, buffer: int, size: int, *_: int) -> int:
    size &= M32
    run.check_writable(buffer, size)
    if not size:
        return -errno.EINVAL
    name = environment.comm()[: size - 1]
    run.write(buffer, name + bytes(size - len(name)))
    return 0


def get_ns_current_pid_tgid(run: Run, device: int, inode: int, to: int, size: int, _: int) -> int:
    size &= M32
    run.check_writable(to, size)
    if size == _TYPE_NAMESPACE and (device, inode) == environment.pid_namespace:
        pid_tgid = environment.pid_tgid()
        run.store(to, 4, pid_tgid)
        run.store(to + 4, 4, pid_tgid >> 32)
        return 0
    run.write(to, bytes(size))
    return -errno.EINVAL


def get_current_ancestor_cgroup_id(run: Run, level: int, *_: int) -> int:
    """The group's own level is the last."""
    path, level = (*environment.cgroup_ancestors, environment.cgroup_id), level & M32
    return path[level] if level < len(path) else 0


def _probe(run: Run, to: int, size: int, read: bytes | None, failed: int = errno.EFAULT) -> int:
    run.write(to, bytes(size) if read is None else read)
    return -failed if read is None else 0


def is_region(number: int) -> bool:
    """Whether there may be a region of that number, of the run or for all."""
    return 0 < number < FIRST_SHARED or number in REGIONS


def no_kernel_memory(address: int) -> int:
    """Why a read failed: what is no region of ours and lies where user space would be is no address of the kernel's.

    Nor is what does not fit the 57 bits that addresses have.
    """
    address &= M64
    number = address >> 32
    if (address + (1 << _ADDRESS_BITS - 1) & M64) >> _ADDRESS_BITS:
        return errno.ERANGE
    return errno.EFAULT if address >> _USER_BITS or is_region(number) else errno.ERANGE


def _kernel_memory(run: Run, address: int, size: int) -> bytes:
    """A tracing program's context is memory of the kernel's, where others' are made up as they are read."""
    if (address & M64) >> 32 == CONTEXT and isinstance(run.context, TracingContext):
        return run.context.read(address & M32, size)
    return run.read(address, size)


def probe_read_kernel(run: Run, to: int, size: int, address: int, *_: int) -> int:
    """Of the kernel's memory a program's own regions are there."""
    size &= M32
    run.check_writable(to, size)
    try:
        return _probe(run, to, size, _kernel_memory(run, address, size))
    except EmulationFault:
        return _probe(run, to, size, None, no_kernel_memory(address))


def probe_read_user(run: Run, to: int, size: int, address: int, *_: int) -> int:
    size &= M32
    run.check_writable(to, size)
    return _probe(run, to, size, environment.user_memory(address, size) if size else b"")


def probe_read_kernel_str(run: Run, to: int, size: int, address: int, *_: int) -> int:
    """How many bytes were copied, with the NUL that is always put at the end."""
    size &= M32
    run.check_writable(to, size)
    out = bytearray()
    try:
        while len(out) < size and (byte := _kernel_memory(run, address + len(out), 1)) != b"\0":
            out += byte
    except EmulationFault:
        return _probe(run, to, size, None, no_kernel_memory(address))
    return _text(run, to, size, out)


def _text(run: Run, to: int, size: int, out: bytearray) -> int:
    """The last byte is read, too, and a NUL is put in its place."""
    out = out[: max(size - 1, 0)]
    run.write(to, (bytes(out) + b"\0")[:size])
    return len(out) + 1 if size else 0


def probe_read_user_str(run: Run, to: int, size: int, address: int, *_: int) -> int:
    """As `probe_read_kernel_str`, of the environment's user memory."""
    size &= M32
    run.check_writable(to, size)
    out = bytearray()
    while len(out) < size:
        byte = environment.user_memory(address + len(out), 1)
        if byte is None:
            return _probe(run, to, size, None)
        if byte == b"\0":
            break
        out += byte
    return _text(run, to, size, out)


def _send_signal(run: Run, number: int, *_: int) -> int:
    number &= M32
    if number > _MOST_SIGNAL:
        return -errno.EINVAL
    if number:
        environment.signals.append(number)
    return 0


HELPERS: dict[str, HelperFunction] = {
    "ktime_get_ns": lambda run, *_: environment.clock(),
    "ktime_get_boot_ns": lambda run, *_: environment.clock() + environment.suspended,
    "ktime_get_coarse_ns": lambda run, *_: environment.clock(),
    "ktime_get_tai_ns": lambda run, *_: environment.tai_clock(),
    "jiffies64": lambda run, *_: environment.clock() * environment.ticks // _NANOSECONDS & M64,
    "get_prandom_u32": lambda run, *_: environment.random32(),
    "get_smp_processor_id": lambda run, *_: environment.cpu,
    "get_numa_node_id": lambda run, *_: environment.numa_node,
    "get_current_pid_tgid": lambda run, *_: environment.pid_tgid(),
    "get_current_uid_gid": lambda run, *_: environment.uid_gid(),
    "get_current_comm": get_current_comm,
    "get_ns_current_pid_tgid": get_ns_current_pid_tgid,
    "get_current_cgroup_id": lambda run, *_: environment.cgroup_id,
    "get_current_ancestor_cgroup_id": get_current_ancestor_cgroup_id,
    "get_netns_cookie": lambda run, *_: environment.netns_cookie,
    "probe_read_kernel": probe_read_kernel,
    "probe_read_kernel_str": probe_read_kernel_str,
    "probe_read_user": probe_read_user,
    "probe_read_user_str": probe_read_user_str,
    "send_signal": _send_signal,
    "send_signal_thread": _send_signal,
}
