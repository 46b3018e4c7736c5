"""What this process may do: capabilities, sysctls, lockdown, seccomp, user namespaces.

Read afresh each time it is asked for: a process may give up privileges, enter a namespace or get a seccomp filter at
any moment, and asking takes less time than making a map.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import NamedTuple

from kbpf.kernel.attrs import command
from kbpf.kernel.attrs import read_text as read_text
from kbpf.kernel.tokens import command_with_token, delegates_program, in_initial_user_namespace
from kbpf.uapi import constants as uapi
from kbpf.uapi.enums import MAP_TYPES
from kbpf.uapi.structs import ATTRS

#: The capabilities that decide over BPF, by name.
CAPABILITIES = {
    name: getattr(uapi, name)
    for name in ("CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON", "CAP_NET_RAW", "CAP_SYS_ADMIN", "CAP_SYS_RESOURCE")
}

# What loading takes beyond CAP_BPF (is_net_admin_prog_type and is_perfmon_prog_type in kernel/bpf/syscall.c).
_NET_ADMIN_PROGRAMS = frozenset(
    [
        "sched_cls",
        "sched_act",
        "xdp",
        "lwt_in",
        "lwt_out",
        "lwt_xmit",
        "lwt_seg6local",
        "sk_skb",
        "sk_msg",
        "lirc_mode2",
        "flow_dissector",
        "cgroup_device",
        "cgroup_sock",
        "cgroup_sock_addr",
        "cgroup_sockopt",
        "cgroup_sysctl",
        "sock_ops",
        "ext",
        "netfilter",
    ]
)
_PERFMON_PROGRAMS = frozenset(
    [
        "kprobe",
        "tracepoint",
        "perf_event",
        "raw_tracepoint",
        "raw_tracepoint_writable",
        "tracing",
        "lsm",
        "struct_ops",
        "ext",
    ]
)
# What a process without capabilities may have where kernel.unprivileged_bpf_disabled is 0.
_OPEN_PROGRAMS = frozenset(["socket_filter", "cgroup_skb"])
_OPEN_MAPS = frozenset(
    [
        "array",
        "percpu_array",
        "prog_array",
        "perf_event_array",
        "cgroup_array",
        "array_of_maps",
        "hash",
        "percpu_hash",
        "hash_of_maps",
        "ringbuf",
        "user_ringbuf",
        "cgroup_storage",
        "percpu_cgroup_storage",
    ]
)
_NET_ADMIN_MAPS = frozenset(["sockmap", "sockhash", "devmap", "devmap_hash", "xskmap"])


#: Helpers that programs have only where they are loaded with CAP_PERFMON, if their type has them at all
#: (bpf_base_func_proto in kernel/bpf/helpers.c, bpf_sk_base_func_proto in net/core/filter.c; measured on Linux 6.18).
PERFMON_HELPERS = frozenset(
    [
        "copy_from_user",
        "copy_from_user_task",
        "find_vma",
        "get_branch_snapshot",
        "get_current_comm",
        "get_current_task",
        "get_current_task_btf",
        "get_task_stack",
        "perf_event_read",
        "perf_event_read_value",
        "probe_read_kernel",
        "probe_read_kernel_str",
        "probe_read_user",
        "probe_read_user_str",
        "send_signal",
        "send_signal_thread",
        "skc_to_mptcp_sock",
        "skc_to_tcp6_sock",
        "skc_to_tcp_request_sock",
        "skc_to_tcp_sock",
        "skc_to_tcp_timewait_sock",
        "skc_to_udp6_sock",
        "skc_to_unix_sock",
        "snprintf",
        "snprintf_btf",
        "sys_bpf",
        "task_pt_regs",
        "trace_printk",
        "trace_vprintk",
    ]
)


class Privileges(NamedTuple):
    """What this thread may do. None where it cannot be read."""

    #: Names of `CAPABILITIES` that are effective, in whatever user namespace this is.
    effective: frozenset[str]
    #: Capabilities count for bpf(2) only in the first user namespace.
    initial_user_namespace: bool
    #: ``kernel.unprivileged_bpf_disabled``: 0 no, 1 for good, 2 until changed.
    unprivileged_bpf_disabled: int | None
    #: ``none``, ``integrity``, ``confidentiality``.
    lockdown: str | None
    #: 0 none, 1 strict, 2 a filter.
    seccomp: int
    no_new_privs: bool

    def has(self, capability: str) -> bool:
        """Whether a capability counts for bpf(2). CAP_SYS_ADMIN includes those that were split off it."""
        return self.initial_user_namespace and not self.effective.isdisjoint((capability, "CAP_SYS_ADMIN"))

    def lacks(self, capabilities: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in capabilities if not self.has(name))


def privileges() -> Privileges:
    status = _status()
    effective = int(status.get("CapEff", "0"), 16)
    disabled = read_text("/proc/sys/kernel/unprivileged_bpf_disabled")
    return Privileges(
        frozenset(name for name, bit in CAPABILITIES.items() if effective >> bit & 1),
        in_initial_user_namespace(),
        int(disabled) if disabled is not None else None,
        lockdown(),
        int(status.get("Seccomp", "0")),
        status.get("NoNewPrivs") == "1",
    )


def asker() -> tuple[object, ...]:
    """What the kernel's answers depend on, besides the kernel: other capabilities, another namespace or filter."""
    status = _status()
    try:
        namespace = Path("/proc/thread-self/ns/user").stat().st_ino
    except OSError:
        namespace = 0
    return status.get("CapEff"), status.get("Seccomp"), status.get("Seccomp_filters"), namespace


def may_use_bpf(program_type: str | None = None) -> bool:
    """Whether this process may create maps, and load programs of this type where one is given.

    Answered by creating the smallest map and letting it go, which asks everybody who may refuse (capabilities, sysctl,
    seccomp, security modules, a token), and from the capabilities that the program type takes. Where lockdown alone
    stands in the way it is still true: that is for the load to report.
    """
    if not _may_create_map():
        return False
    if program_type is None or program_type in _OPEN_PROGRAMS:
        return True
    process, needed = privileges(), program_capabilities(program_type)
    if process.initial_user_namespace:
        return not process.lacks(needed)
    # There a token makes the namespace's own capabilities count.
    return all(process.effective & {name, "CAP_SYS_ADMIN"} for name in needed) and delegates_program(program_type)


def program_capabilities(program_type: str) -> tuple[str, ...]:
    """The capabilities that loading a program of this type takes (Linux 5.8; all of them CAP_SYS_ADMIN before)."""
    needed = ["CAP_BPF"]
    if program_type in _NET_ADMIN_PROGRAMS:
        needed.append("CAP_NET_ADMIN")
    if program_type in _PERFMON_PROGRAMS:
        needed.append("CAP_PERFMON")
    return tuple(needed)


def map_capabilities(map_type: str) -> tuple[str, ...]:
    """The capabilities that creating a map of this type takes."""
    return ("CAP_BPF", "CAP_NET_ADMIN") if map_type in _NET_ADMIN_MAPS else ("CAP_BPF",)


def open_to_all(*, program_type: str = "", map_type: str = "") -> bool:
    """Whether ``kernel.unprivileged_bpf_disabled=0`` would be enough."""
    return program_type in _OPEN_PROGRAMS or map_type in _OPEN_MAPS


def bpf_answers(operation: str = "map_lookup_elem") -> int:
    """0 if bpf(2) is there and let through to the kernel, else the errno that it meets: ENOSYS, or what seccomp says.

    Asked with a command on a map's descriptor that cannot be, or with one that makes something and is not told what:
    EBADF, or of the others anything that is not a refusal, is the answer of a kernel that is asked.
    """
    on_map = "map_fd" in ATTRS[operation].fields
    try:
        command(operation, **({"map_fd": -1} if on_map else {}))
    except OSError as error:
        number = error.errno or 0
        if on_map:
            return 0 if number == errno.EBADF else number
        return number if number in (errno.EPERM, errno.EACCES, errno.ENOSYS) else 0
    return 0


def charges_memlock() -> bool:
    """Whether this kernel charges BPF's memory to RLIMIT_MEMLOCK, as all did before Linux 5.11.

    Distributions' kernels may have the change with an older number: what came with it is asked for then, the helper
    bpf_ktime_get_coarse_ns.
    """
    release = re.match(r"(\d+)\.(\d+)", os.uname().release)
    if release is None or (int(release[1]), int(release[2])) >= (5, 11):
        return False
    from kbpf.kernel.features import loads_call

    return not loads_call("ktime_get_coarse_ns")


def lockdown() -> str | None:
    """The level of kernel lockdown; None where securityfs is not mounted or the kernel has no lockdown."""
    text = read_text("/sys/kernel/security/lockdown")
    return next((word.strip("[]") for word in (text or "").split() if word.startswith("[")), None)


def _status() -> dict[str, str]:
    # Capabilities belong to the thread.
    text = read_text("/proc/thread-self/status") or ""
    return {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}


def _may_create_map() -> bool:
    try:
        fd = command_with_token("map_create", map_type=MAP_TYPES["array"], key_size=4, value_size=4, max_entries=1)
    except OSError as error:
        # Lack of memory or descriptors says nothing about permission: the user's own call is to report that.
        return error.errno not in (errno.EPERM, errno.EACCES, errno.ENOSYS)
    os.close(fd)
    return True
