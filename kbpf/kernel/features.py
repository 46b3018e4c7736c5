"""What the running kernel has, asked of it: one declaration a map type, program type and attach type.

Asked with the smallest map and with programs of two instructions, which are let go at once, or with a command that is
given nothing to work on and fails before it does anything. Versions are for people; nothing is decided by them.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

from kbpf.backend import Answer, FeatureKind
from kbpf.errors import ENOTSUPP, errno_name
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.kernel import probes, syscall
from kbpf.kernel.attrs import command
from kbpf.kernel.btf import kernel_type, loaded_btf
from kbpf.kernel.denied import explain_denied
from kbpf.kernel.tokens import command_with_token
from kbpf.uapi import constants as uapi
from kbpf.uapi.enums import ATTACH_TYPES, HELPERS, MAP_TYPES, PROG_TYPES

_PAGE = os.sysconf("SC_PAGE_SIZE")


class MapProbe(NamedTuple):
    """The smallest map of a type."""

    since: str
    key_size: int = 4
    value_size: int = 4
    max_entries: int = 1
    flags: int = 0
    #: What else the type asks for: an inner map, BTF of key and value, or the id of a kernel's struct.
    wants: Literal["", "inner", "btf", "struct"] = ""


class ProgramProbe(NamedTuple):
    """How the smallest program of a type is loaded."""

    since: str
    attach_type: str = ""
    flags: int = 0
    #: Its type attaches to a function of the kernel: given is one that is none, of which the verifier then speaks.
    target: bool = False


class AttachProbe(NamedTuple):
    """How an attach type is asked for, and with a program of which type."""

    since: str
    how: Literal["query", "attach", "load", "target", "link", "map"]
    program_type: str = ""


_NO_PREALLOC = uapi.BPF_F_NO_PREALLOC
MAPS = {
    "hash": MapProbe("3.19"),
    "array": MapProbe("3.19"),
    "prog_array": MapProbe("4.2"),
    "perf_event_array": MapProbe("4.3"),
    "percpu_hash": MapProbe("4.6"),
    "percpu_array": MapProbe("4.6"),
    "stack_trace": MapProbe("4.6", value_size=8),
    "cgroup_array": MapProbe("4.8"),
    "lru_hash": MapProbe("4.10"),
    "lru_percpu_hash": MapProbe("4.10"),
    "lpm_trie": MapProbe("4.11", key_size=8, flags=_NO_PREALLOC),
    "array_of_maps": MapProbe("4.12", wants="inner"),
    "hash_of_maps": MapProbe("4.12", wants="inner"),
    "devmap": MapProbe("4.14"),
    "sockmap": MapProbe("4.14"),
    "cpumap": MapProbe("4.15"),
    "xskmap": MapProbe("4.18"),
    "sockhash": MapProbe("4.18"),
    "cgroup_storage": MapProbe("4.19", key_size=16, max_entries=0),
    "reuseport_sockarray": MapProbe("4.19"),
    "percpu_cgroup_storage": MapProbe("4.20", key_size=16, max_entries=0),
    "queue": MapProbe("4.20", key_size=0),
    "stack": MapProbe("4.20", key_size=0),
    "sk_storage": MapProbe("5.2", max_entries=0, flags=_NO_PREALLOC, wants="btf"),
    "devmap_hash": MapProbe("5.4"),
    "struct_ops": MapProbe("5.6", value_size=256, wants="struct"),
    "ringbuf": MapProbe("5.8", key_size=0, value_size=0, max_entries=_PAGE),
    "inode_storage": MapProbe("5.10", max_entries=0, flags=_NO_PREALLOC, wants="btf"),
    "task_storage": MapProbe("5.11", max_entries=0, flags=_NO_PREALLOC, wants="btf"),
    "bloom_filter": MapProbe("5.16", key_size=0),
    "user_ringbuf": MapProbe("6.1", key_size=0, value_size=0, max_entries=_PAGE),
    "cgrp_storage": MapProbe("6.2", max_entries=0, flags=_NO_PREALLOC, wants="btf"),
    "arena": MapProbe("6.9", key_size=0, value_size=0, flags=uapi.BPF_F_MMAPABLE),
}
PROGRAMS = {
    "socket_filter": ProgramProbe("3.19"),
    "kprobe": ProgramProbe("4.1"),
    "sched_cls": ProgramProbe("4.1"),
    "sched_act": ProgramProbe("4.1"),
    "tracepoint": ProgramProbe("4.7"),
    "xdp": ProgramProbe("4.8"),
    "perf_event": ProgramProbe("4.9"),
    "cgroup_skb": ProgramProbe("4.10"),
    "cgroup_sock": ProgramProbe("4.10"),
    "lwt_in": ProgramProbe("4.10"),
    "lwt_out": ProgramProbe("4.10"),
    "lwt_xmit": ProgramProbe("4.10"),
    "sock_ops": ProgramProbe("4.13", "cgroup_sock_ops"),
    "sk_skb": ProgramProbe("4.14"),
    "cgroup_device": ProgramProbe("4.15", "cgroup_device"),
    "sk_msg": ProgramProbe("4.17"),
    "raw_tracepoint": ProgramProbe("4.17"),
    "cgroup_sock_addr": ProgramProbe("4.17", "cgroup_inet4_connect"),
    "lwt_seg6local": ProgramProbe("4.18"),
    "lirc_mode2": ProgramProbe("4.18"),
    "sk_reuseport": ProgramProbe("4.19"),
    "flow_dissector": ProgramProbe("4.20"),
    "cgroup_sysctl": ProgramProbe("5.2", "cgroup_sysctl"),
    "raw_tracepoint_writable": ProgramProbe("5.2"),
    "cgroup_sockopt": ProgramProbe("5.3", "cgroup_setsockopt"),
    "tracing": ProgramProbe("5.5", "trace_raw_tp", target=True),
    "struct_ops": ProgramProbe("5.6", target=True),
    "ext": ProgramProbe("5.6", target=True),
    "lsm": ProgramProbe("5.7", "lsm_mac", target=True),
    "sk_lookup": ProgramProbe("5.9", "sk_lookup"),
    "syscall": ProgramProbe("5.14", flags=uapi.BPF_F_SLEEPABLE),
    "netfilter": ProgramProbe("6.4", "netfilter"),
}
_QUERIED = {
    "4.15": (
        "cgroup_inet_ingress",
        "cgroup_inet_egress",
        "cgroup_inet_sock_create",
        "cgroup_sock_ops",
        "cgroup_device",
    ),
    "4.17": (*(f"cgroup_inet{family}_{what}" for family in "46" for what in ("bind", "connect", "post_bind")),),
    "4.18": ("cgroup_udp4_sendmsg", "cgroup_udp6_sendmsg", "lirc_mode2"),
    "4.20": ("flow_dissector",),
    "5.2": ("cgroup_sysctl", "cgroup_udp4_recvmsg", "cgroup_udp6_recvmsg"),
    "5.3": ("cgroup_getsockopt", "cgroup_setsockopt"),
    "5.8": tuple(f"cgroup_inet{family}_get{what}name" for family in "46" for what in ("peer", "sock")),
    "5.9": ("cgroup_inet_sock_release", "sk_lookup"),
    "6.0": ("lsm_cgroup",),
    "6.6": ("tcx_ingress", "tcx_egress"),
    "6.7": (
        *(f"cgroup_unix_{what}" for what in ("connect", "sendmsg", "recvmsg", "getpeername", "getsockname")),
        "netkit_primary",
        "netkit_peer",
    ),
}
ATTACHMENTS = {name: AttachProbe(since, "query") for since, names in _QUERIED.items() for name in names} | {
    "sk_skb_stream_parser": AttachProbe("4.14", "attach"),
    "sk_skb_stream_verdict": AttachProbe("4.14", "attach"),
    "sk_msg_verdict": AttachProbe("4.17", "attach"),
    "sk_skb_verdict": AttachProbe("5.13", "attach"),
    "trace_raw_tp": AttachProbe("5.5", "target", "tracing"),
    "trace_fentry": AttachProbe("5.5", "target", "tracing"),
    "trace_fexit": AttachProbe("5.5", "target", "tracing"),
    "modify_return": AttachProbe("5.7", "target", "tracing"),
    "trace_iter": AttachProbe("5.8", "target", "tracing"),
    "lsm_mac": AttachProbe("5.7", "target", "lsm"),
    "struct_ops": AttachProbe("5.6", "target", "struct_ops"),
    "xdp_devmap": AttachProbe("5.8", "map", "devmap"),
    "xdp_cpumap": AttachProbe("5.9", "map", "cpumap"),
    "xdp": AttachProbe("5.9", "link", "xdp"),
    "sk_reuseport_select": AttachProbe("5.14", "load", "sk_reuseport"),
    "sk_reuseport_select_or_migrate": AttachProbe("5.14", "load", "sk_reuseport"),
    "perf_event": AttachProbe("5.15", "link", "perf_event"),
    "trace_kprobe_multi": AttachProbe("5.18", "link", "kprobe"),
    "netfilter": AttachProbe("6.4", "load", "netfilter"),
    "trace_uprobe_multi": AttachProbe("6.6", "link", "kprobe"),
    "trace_kprobe_session": AttachProbe("6.10", "link", "kprobe"),
    "trace_uprobe_session": AttachProbe("6.13", "link", "kprobe"),
}
#: A link type is there where one of its attach types is, as far as that can be asked for with nothing to attach to.
LINKS = {
    "cgroup": ("5.7", "cgroup_skb", "cgroup_inet_ingress"),
    "netns": ("5.8", "flow_dissector", "flow_dissector"),
    "iter": ("5.8", "tracing", "trace_iter"),
    "xdp": ("5.9", "xdp", "xdp"),
    "perf_event": ("5.15", "perf_event", "perf_event"),
    "kprobe_multi": ("5.18", "kprobe", "trace_kprobe_multi"),
    "netfilter": ("6.4", "netfilter", "netfilter"),
    "tcx": ("6.6", "sched_cls", "tcx_ingress"),
    "uprobe_multi": ("6.6", "kprobe", "trace_uprobe_multi"),
    "netkit": ("6.7", "sched_cls", "netkit_primary"),
    "sockmap": ("6.10", "sk_msg", "sk_msg_verdict"),
}
# What a command says of a place that is not there, once it knows the kind of place.
_NO_SUCH_PLACE = (errno.EBADF, errno.ENODEV, errno.EFAULT, errno.EAFNOSUPPORT, errno.ENOENT)
# What it says where it does not know the kind.
_UNKNOWN = (errno.EINVAL, errno.EOPNOTSUPP, ENOTSUPP)
# Helpers that lockdown takes away, from which level on (kernel/trace/bpf_trace.c, kernel/bpf/helpers.c).
_LOCKED_DOWN = {
    "probe_write_user": ("integrity", "confidentiality"),
    **dict.fromkeys(
        ("probe_read", "probe_read_str", "probe_read_kernel", "probe_read_kernel_str"), ("confidentiality",)
    ),
}
_TRACING = ("kprobe", "tracepoint", "perf_event", "raw_tracepoint", "raw_tracepoint_writable")
# BTF with one type, an int; its id is 1.
_INT = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, 16, 16, 5) + struct.pack("=IIII", 1, 1 << 24, 4, 32) + b"\0int\0"


def ask(kind: FeatureKind, name: str, program_type: str = "") -> Answer:
    """Whether the kernel has it; see `kbpf.backend.Backend.feature`."""
    if kind == "map_type":
        return _map_type(name)._replace(since=MAPS[name].since) if name in MAPS else _unasked(kind, name)
    if kind == "program_type":
        return _program_type(name)._replace(since=PROGRAMS[name].since) if name in PROGRAMS else _unasked(kind, name)
    if kind == "attach_type":
        return (
            _attach_type(name)._replace(since=ATTACHMENTS[name].since) if name in ATTACHMENTS else _unasked(kind, name)
        )
    if kind == "link_type":
        if name not in LINKS:
            return _unasked(kind, name)
        since, type, attach_type = LINKS[name]
        return _link(type, attach_type)._replace(since=since)
    return _helper(program_type, name)


def _unasked(kind: str, name: str) -> Answer:
    return Answer("inconclusive", f"there is no probe for the {kind.replace('_', ' ')} {name} that costs nothing")


def _failed(error: OSError, operation: str, *, program_type: str = "", map_type: str = "") -> Answer:
    """What an errno says, where it does not say more than in general."""
    number = error.errno or 0
    if number in (errno.EPERM, errno.EACCES, errno.ENOSYS):
        asked = errno.ENOSYS if number == errno.ENOSYS else errno.EPERM
        reasons = explain_denied(operation, asked, program_type=program_type, map_type=map_type)
        if number == errno.ENOSYS and not probes.privileges().seccomp:
            return Answer("no", "this kernel has no bpf(2)")
        return Answer("not permitted", reasons[0] if reasons else errno_name(number))
    if number in _UNKNOWN:
        return Answer("no", errno_name(number))
    return Answer("inconclusive", errno_name(number))


def _map_type(name: str) -> Answer:
    try:
        with _map(name):
            return Answer("yes")
    except OSError as error:
        # The kernel looks for the struct only when it has the type.
        if MAPS[name].wants == "struct" and error.errno == ENOTSUPP:
            return Answer("yes")
        return _failed(error, "map_create", map_type=name)


@contextmanager
def _map(name: str, value_size: int | None = None) -> Iterator[int]:
    probe = MAPS[name]
    values: dict[str, int] = {
        "map_type": MAP_TYPES[name],
        "key_size": probe.key_size,
        "value_size": probe.value_size if value_size is None else value_size,
        "max_entries": probe.max_entries,
        "map_flags": probe.flags,
    }
    if probe.wants == "struct":
        values["btf_vmlinux_value_type_id"] = 1
    elif probe.wants == "inner":
        with _map("array") as inner:
            fd = command_with_token("map_create", inner_map_fd=inner, **values)
    if probe.wants == "btf":
        with loaded_btf(_INT) as btf:
            fd = command_with_token("map_create", btf_fd=btf or 0, btf_key_type_id=1, btf_value_type_id=1, **values)
    elif probe.wants != "inner":
        fd = command_with_token("map_create", **values)
    try:
        yield fd
    finally:
        os.close(fd)


def _program(name: str, code: list[Instruction], attach_type: int | None = None) -> tuple[OSError | None, str]:
    """Load a program and let it go: None or why it was refused, and what the verifier said."""
    probe = PROGRAMS[name]
    expected = ATTACH_TYPES.get(probe.attach_type, 0) if attach_type is None else attach_type
    instructions, license = syscall.Buffer(ebpf.encode(code)), syscall.Buffer(b"GPL\0")
    log = syscall.Buffer(1 << 14)
    try:
        fd = command_with_token(
            "prog_load",
            prog_type=PROG_TYPES[name],
            insns=instructions.address,
            insn_cnt=len(code),
            license=license.address,
            log_level=1,
            log_buf=log.address,
            log_size=log.size,
            # Kernels before 5.0 want their own version of programs for kprobes.
            kern_version=_version() if name == "kprobe" else 0,
            prog_flags=probe.flags,
            expected_attach_type=expected,
            attach_btf_id=1 if probe.target else 0,
        )
    except OSError as error:
        return error, log.read().split(b"\0")[0].decode(errors="replace")
    os.close(fd)
    return None, ""


def _version() -> int:
    numbers = [int("".join(filter(str.isdigit, part)) or 0) for part in os.uname().release.split("-")[0].split(".")]
    major, minor, patch = (*numbers, 0, 0, 0)[:3]
    return major << 16 | minor << 8 | min(patch, 255)


_RETURN_0 = [Instruction(ebpf.ALU64 | ebpf.MOV, 0, 0, 0, 0), Instruction(ebpf.JMP | ebpf.EXIT, 0, 0, 0, 0)]


def _program_type(name: str) -> Answer:
    error, log = _program(name, _RETURN_0)
    # A type that is not there is refused before the verifier is asked.
    if error is None or log:
        return Answer("yes")
    return _failed(error, "prog_load", program_type=name)


def loads_call(name: str) -> bool:
    """Whether a socket filter that calls a helper without arguments loads."""
    call = Instruction(ebpf.JMP | ebpf.CALL, 0, 0, 0, HELPERS[name])
    return _program("socket_filter", [call, *_RETURN_0])[0] is None


def _helper(program_type: str, name: str) -> Answer:
    number = HELPERS[name]
    if program_type not in PROGRAMS:
        return Answer("inconclusive", f"there is no probe for programs of type {program_type}")
    if PROGRAMS[program_type].target:
        return Answer("inconclusive", f"which helpers {program_type} programs have depends on what they attach to")
    call = Instruction(ebpf.JMP | ebpf.CALL, 0, 0, 0, number)
    error, log = _program(program_type, [call, *_RETURN_0])
    if error is None:
        return Answer("yes")
    if "invalid func " in log:
        return Answer("no", "the kernel does not know the helper")
    if "cannot use helper" in log or "unknown func " in log:
        return _withheld(program_type, name)
    # The verifier knows it, and misses its arguments.
    if f"call bpf_{name}#{number}" in log or f"call {name}#{number}" in log:
        return Answer("yes")
    there = _program_type(program_type)
    return there if there.answer != "yes" else Answer("inconclusive", errno_name(error.errno or 0))


def _withheld(program_type: str, name: str) -> Answer:
    """A helper that this type does not have, or not for this process: the verifier says the same of both."""
    process = probes.privileges()
    # Without CAP_BPF programs have a few helpers alone.
    needed = ["CAP_BPF"]
    if name in probes.PERFMON_HELPERS:
        needed.append("CAP_PERFMON")
    locking = _LOCKED_DOWN.get(name, ()) if program_type in _TRACING else ()
    if name == "probe_write_user" and locking:
        needed.append("CAP_SYS_ADMIN")
    lacking = process.lacks(tuple(needed))
    if lacking:
        return Answer("not permitted", f"programs of this type do not have it for processes without {lacking[0]}")
    if process.lockdown in locking:
        return Answer("not permitted", f"the kernel is locked down ({process.lockdown})")
    if locking and process.lockdown is None:
        return Answer("inconclusive", "the kernel may be locked down, which cannot be read until securityfs is mounted")
    return Answer("no", "programs of this type do not have it")


def _attach_type(name: str) -> Answer:
    probe, number = ATTACHMENTS[name], ATTACH_TYPES[name]
    if probe.how == "link":
        return _link(probe.program_type, name)
    if probe.how == "map":
        # With these came room for a program in the values of such maps.
        try:
            with _map(probe.program_type, value_size=8):
                return Answer("yes")
        except OSError as error:
            return _failed(error, "map_create", map_type=probe.program_type)
    if probe.how in ("load", "target"):
        return _expected(probe, number)
    try:
        if probe.how == "query":
            command("prog_query", target_fd=-1, attach_type=number)
        else:
            command("prog_attach", target_fd=-1, attach_bpf_fd=-1, attach_type=number)
    except OSError as error:
        return _placed(error, "prog_query" if probe.how == "query" else "prog_attach")
    return Answer("inconclusive", "a place that is not there was found")


def _expected(probe: AttachProbe, number: int) -> Answer:
    error, log = _program(probe.program_type, _RETURN_0, number)
    spoken = [line for line in log.splitlines() if not line.startswith("processed ")]
    if probe.how == "target" and (spoken or (error and error.errno == ENOTSUPP and log)):
        return Answer("yes")
    if error is not None:
        return _failed(error, "prog_load", program_type=probe.program_type)
    # Older kernels took any number here.
    wrong, _ = _program(probe.program_type, _RETURN_0, ATTACH_TYPES["cgroup_inet_egress"])
    return Answer("yes") if wrong else Answer("inconclusive", "this kernel does not look at attach types here")


def _placed(error: OSError, operation: str, program_type: str = "") -> Answer:
    if error.errno in _NO_SUCH_PLACE:
        return Answer("yes")
    return _failed(error, operation, program_type=program_type)


def _link(program_type: str, attach_type: str) -> Answer:
    """Make a link to a place that is not there; an iterator, which does nothing until it is read, is let go again."""
    probe, number = PROGRAMS[program_type], ATTACH_TYPES[attach_type]
    instructions, license = syscall.Buffer(ebpf.encode(_RETURN_0)), syscall.Buffer(b"GPL\0")
    iterates = attach_type == "trace_iter"
    try:
        program = command_with_token(
            "prog_load",
            attach_btf_id=kernel_type("bpf_iter_bpf_map", "func") if iterates else 0,
            prog_type=PROG_TYPES[program_type],
            insns=instructions.address,
            insn_cnt=len(_RETURN_0),
            license=license.address,
            kern_version=_version(),
            expected_attach_type=ATTACH_TYPES[probe.attach_type] if probe.attach_type and not iterates else number,
        )
    except OSError as error:
        return _failed(error, "prog_load", program_type=program_type)
    nowhere: dict[str, int] = {} if iterates else {"target_fd": -1}
    if attach_type.startswith("trace_kprobe"):
        nowhere = {"kprobe_multi.cnt": 1, "kprobe_multi.addrs": 8}
    elif attach_type.startswith("trace_uprobe"):
        nowhere = {"uprobe_multi.cnt": 1, "uprobe_multi.path": 8, "uprobe_multi.offsets": 8}
    elif attach_type == "xdp":
        # What is wrong of an interface is EINVAL too; but nothing puts the loopback interface's programs into hardware.
        nowhere = {"target_ifindex": 1, "flags": uapi.XDP_FLAGS_HW_MODE}
    elif attach_type == "netfilter":
        nowhere = {"netfilter.pf": 255}
    try:
        os.close(command("link_create", prog_fd=program, attach_type=number, **nowhere))
    except OSError as error:
        if attach_type == "xdp" and error.errno in (errno.EOPNOTSUPP, errno.EEXIST, errno.EBUSY):
            return Answer("yes")
        return _placed(error, "link_create", program_type)
    finally:
        os.close(program)
    return Answer("yes") if iterates else Answer("inconclusive", "a place that is not there was found")
