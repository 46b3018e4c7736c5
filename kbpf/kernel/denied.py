"""Why EPERM or EACCES came: what this process lacks, and what to do about it.

Only what was read from this process and this kernel is said. Memory limits are a reason only on kernels that charge
BPF to RLIMIT_MEMLOCK: since Linux 5.11 it is the memory control group that pays, and a refusal for memory is ENOMEM.
"""

from __future__ import annotations

import errno as errnos
import os
import re
import resource
import stat
from contextlib import suppress
from pathlib import Path

from kbpf.backend import SocketLike
from kbpf.kernel import probes
from kbpf.kernel.attrs import bpffs
from kbpf.kernel.sockets import socket_option
from kbpf.refusals import LOCKED, refused_by_object
from kbpf.uapi import constants as uapi
from kbpf.uapi.enums import COMMANDS

_EMULATE = "set KBPF_BACKEND=emulator"
_LET_THROUGH = "let the container's seccomp profile allow bpf, or set KBPF_BACKEND=emulator"
_PARANOID = Path("/proc/sys/kernel/perf_event_paranoid")
#: The largest value that has a meaning in Linux itself.
_MOST_PARANOID = 2
_CGROUP_PROGRAMS = frozenset(
    [
        "cgroup_skb",
        "cgroup_sock",
        "cgroup_device",
        "cgroup_sock_addr",
        "cgroup_sysctl",
        "cgroup_sockopt",
        "sock_ops",
    ]
)
# Commands that need a capability whatever they work on (kernel/bpf/syscall.c).
_ADMIN_COMMANDS = frozenset(
    [
        "prog_get_next_id",
        "map_get_next_id",
        "btf_get_next_id",
        "link_get_next_id",
        "prog_get_fd_by_id",
        "map_get_fd_by_id",
        "btf_get_fd_by_id",
        "link_get_fd_by_id",
        "enable_stats",
        "task_fd_query",
    ]
)

# Commands that make something. With nothing said they fail for that, when nobody refuses them before.
_MAKING = ("map_create", "prog_load", "btf_load")
# What the verifier lets only those with CAP_PERFMON do: have addresses seen, or guessed by speculation.
_LEAKS = re.compile(r"leaks? addr|pointer comparison prohibited|prohibited for !root|corrupt spilled pointer")
_NOT_FOR_THE_TYPE = re.compile(r"cannot use helper (?:bpf_)?(\w+)#|unknown func (?:bpf_)?(\w+)#")
# Those that lockdown may refuse.
_TRACING = ("prog_load", "link_create", "raw_tracepoint_open", "iter_create", "perf_event_open")
_ATTACHING = ("link_create", "prog_attach", "prog_detach", "link_update", "link_detach")


def explain_denied(
    operation: str,
    errno: int,
    *,
    program_type: str = "",
    map_type: str = "",
    socket: SocketLike | None = None,
    path: str = "",
) -> tuple[str, ...]:
    """Reasons and remedies, a line each; see `kbpf.backend.Backend.explain_denied`.

    `operation` is a bpf(2) command (``prog_load``), a socket option (``SO_ATTACH_FILTER``) or
    ``socket(AF_PACKET)``. With `socket` the reason for a refused option is read from it, not inferred.
    """
    if errno == errnos.ENOSYS:
        return _blocked(errno) if operation in COMMANDS and probes.bpf_answers() == errno else ()
    if operation == "socket(AF_PACKET)":
        return _capability_in_namespace("CAP_NET_RAW", "opening a packet socket")
    if operation.startswith("SO_"):
        return _socket_option(operation, errno, socket)
    if operation == "event_attach":
        # With the capability perf_event_open(2) refuses nothing.
        lacking = probes.privileges().lacks(("CAP_PERFMON",))
        return _perf_event() if lacking else refused_by_object(operation, errno)
    if operation == "perf_event_open":
        return _perf_event()
    if operation == "mmap":
        return refused_by_object(operation, errno)
    if operation not in COMMANDS:
        return ()
    blocked = probes.bpf_answers()
    if blocked:
        return _blocked(blocked)
    if operation in ("obj_get", "obj_pin"):
        return _pin(operation, errno, path)
    by_object = refused_by_object(operation, errno)
    if by_object and probes.bpf_answers(operation):
        return _refused_to_all(operation, probes.privileges())
    return by_object or _capabilities(operation, program_type, map_type)


def withheld(log: str) -> tuple[str, ...]:
    """What a verifier's log does not say: that it refuses only for want of a capability, and which."""
    helper = _NOT_FOR_THE_TYPE.search(log)
    if not _LEAKS.search(log) and not (helper and (helper[1] or helper[2]) in probes.PERFMON_HELPERS):
        return ()
    if not probes.privileges().lacks(("CAP_PERFMON",)):
        return ()
    return (
        "the process lacks CAP_PERFMON, for want of which the verifier refuses",
        "run as root, or grant CAP_PERFMON",
    )


def _perf_event() -> tuple[str, ...]:
    """What an event of a processor takes (kernel/events/core.c, perf_allow_cpu)."""
    process, paranoid = probes.privileges(), _PARANOID.read_text().strip()
    if int(paranoid) > _MOST_PARANOID and process.lacks(("CAP_SYS_ADMIN",)):
        # A patch of Debian and Ubuntu, for which CAP_PERFMON is not enough.
        reason = f"kernel.perf_event_paranoid is {paranoid}, for which this kernel wants CAP_SYS_ADMIN"
        return (reason, f"run as root, or set kernel.perf_event_paranoid to {_MOST_PARANOID}")
    first, *others = _capabilities("perf_event_open", "", "")
    if process.lacks(("CAP_PERFMON",)):
        first += f", and kernel.perf_event_paranoid is {paranoid}, more than 0"
    return first, *others


def _needed(operation: str, program_type: str, map_type: str) -> tuple[str, ...]:
    """The capabilities that a command takes (kernel/bpf/syscall.c)."""
    if operation in _ADMIN_COMMANDS:
        return ("CAP_SYS_ADMIN",)
    if operation == "perf_event_open":
        return ("CAP_PERFMON",)
    if operation == "prog_query":
        return ("CAP_NET_ADMIN",)
    if operation in _ATTACHING:
        # Programs of other types took theirs when they were loaded.
        return ("CAP_NET_ADMIN",) if program_type == "cgroup_skb" else ()
    return probes.map_capabilities(map_type) if map_type else probes.program_capabilities(program_type)


def _capabilities(operation: str, program_type: str, map_type: str) -> tuple[str, ...]:
    process = probes.privileges()
    lacking = process.lacks(_needed(operation, program_type, map_type))
    if not lacking:
        return _otherwise(operation, program_type, map_type, process)
    named = " and ".join(lacking)
    if not process.initial_user_namespace:
        return (
            f"{named} must be held in the initial user namespace: those of another user namespace do not count",
            "run outside the user namespace with these capabilities, or set KBPF_BACKEND=emulator",
        )
    reason = f"the process lacks {named}"
    disabled = process.unprivileged_bpf_disabled
    if disabled and operation in _MAKING and probes.open_to_all(program_type=program_type, map_type=map_type):
        reason += f", and kernel.unprivileged_bpf_disabled is {disabled}"
    return reason, f"run as root, grant {named}, or set KBPF_BACKEND=emulator"


def _otherwise(operation: str, program_type: str, map_type: str, process: probes.Privileges) -> tuple[str, ...]:
    """Why it is refused to a process that has the capabilities."""
    if operation in _MAKING:
        if probes.bpf_answers(operation):
            return _refused_to_all(operation, process)
        if operation == "map_create" and not process.effective.issuperset(probes.map_capabilities(map_type)[1:]):
            return (
                "before Linux 6.9 maps of this type take CAP_NET_ADMIN itself: CAP_SYS_ADMIN does not include it",
                "run as root, or grant CAP_NET_ADMIN",
            )
        if operation != "btf_load" and probes.charges_memlock():
            soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
            if soft != resource.RLIM_INFINITY:
                return (
                    f"this kernel charges BPF's memory to RLIMIT_MEMLOCK, which is {soft} bytes",
                    "raise it (ulimit -l unlimited), or use Linux 5.11 or later",
                )
    if operation in _ATTACHING and program_type in _CGROUP_PROGRAMS:
        return (
            "a program in this control group or in one above it was attached to let no others in beside it",
            "detach it, or attach it with BPF_F_ALLOW_MULTI",
        )
    if operation in _TRACING or operation in _MAKING:
        return _security_module(process)
    return _refused_to_all(operation, process)


def _refused_to_all(operation: str, process: probes.Privileges) -> tuple[str, ...]:
    """Neither capabilities nor lockdown decide over the command."""
    who = "a seccomp filter" if process.seccomp else "a security module"
    return (f"{who} refuses {operation} to this process", _LET_THROUGH)


def _security_module(process: probes.Privileges) -> tuple[str, ...]:
    if process.lockdown not in (None, "none"):
        return (
            f"the process has the capabilities, but the kernel is locked down ({process.lockdown})",
            "boot without lockdown (Secure Boot turns it on), or set KBPF_BACKEND=emulator",
        )
    reason = "the process has the capabilities: lockdown or another security module of the kernel refuses"
    if process.lockdown is None:
        return (
            reason,
            "whether the kernel is locked down cannot be read until securityfs is mounted: "
            "mount -t securityfs none /sys/kernel/security",
        )
    return (reason,)


def _blocked(number: int) -> tuple[str, ...]:
    process = probes.privileges()
    if number == errnos.ENOSYS:
        # Only kernels with bpf(2) have the sysctl.
        if process.seccomp and process.unprivileged_bpf_disabled is not None:
            return ("a seccomp filter hides bpf(2) from this process: the kernel has it", _LET_THROUGH)
        return ("this kernel has no bpf(2)" + (", or seccomp hides it" if process.seccomp else ""), _EMULATE)
    who = "a seccomp filter" if process.seccomp else "a security module"
    return (f"{who} refuses every bpf(2) of this process", _LET_THROUGH)


def _pin(operation: str, errno: int, path: str) -> tuple[str, ...]:
    if operation == "obj_get" and errno == errnos.EPERM:
        # A mode that lets nobody in is EACCES.
        return _refused_to_all(operation, probes.privileges())
    if operation == "obj_get" or errno == errnos.EACCES:
        try:
            found = Path(path).stat()
        except PermissionError:
            return ("a folder above the pin may not be entered by this process",)
        except OSError:
            found = None
        if found is None or not path:
            return ("the file system's permissions: pins are made with mode 0600, for their owner",)
        mode = stat.S_IMODE(found.st_mode)
        if not stat.S_ISREG(found.st_mode) or not _on_bpffs(found):
            return ("it is no pin: those are files on a BPF file system",)
        return (
            f"the pin does not let this process in: mode {mode:04o} of user {found.st_uid}, it is user {os.geteuid()}",
            "chmod 0666 it, or 0644 for opening it read-only (BPF_F_RDONLY)",
        )
    mounted = next(iter(bpffs()), None)
    reason = "pins are made only on a BPF file system, under names without a dot"
    return (reason, f"one is mounted at {mounted}" if mounted else "mount one: mount -t bpf bpf /sys/fs/bpf")


def _on_bpffs(file: os.stat_result) -> bool:
    with suppress(OSError):
        return any(Path(place).stat().st_dev == file.st_dev for place in bpffs())
    return True  # One of them may not be looked at.


def _socket_option(operation: str, errno: int, socket: SocketLike | None) -> tuple[str, ...]:
    if operation != "SO_ATTACH_FILTER" or errno != errnos.EPERM:
        return refused_by_object(operation, errno)
    tcp = _capability_in_namespace("CAP_NET_ADMIN", "a classic filter on a TCP socket")
    if socket is not None:
        return (LOCKED,) if _is_locked(socket) else tcp
    if "CAP_NET_ADMIN" in probes.privileges().effective:
        return (LOCKED,)
    return *tcp, "on other sockets: " + LOCKED


def _is_locked(socket: SocketLike) -> bool:
    try:
        return bool(socket_option(socket.fileno(), uapi.SO_LOCK_FILTER))
    except OSError:
        return False


def _capability_in_namespace(capability: str, what: str) -> tuple[str, ...]:
    """Network capabilities count in the user namespace that owns the network namespace."""
    if capability in probes.privileges().effective:
        return (f"{what} takes {capability} in the user namespace that owns the socket's network namespace",)
    return (
        f"{what} takes {capability}, which the process lacks",
        f"run as root, grant {capability}, or work in a network namespace of your own (unshare -Urn)",
    )
