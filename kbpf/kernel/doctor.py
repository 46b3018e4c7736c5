"""What this process may do with BPF, what is missing, and the remedy: the findings of ``kbpf doctor``."""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from kbpf.isa import cbpf
from kbpf.kernel import probes
from kbpf.kernel.attrs import bpffs
from kbpf.kernel.backend import kernel_backend
from kbpf.kernel.bcc import find_bcc
from kbpf.kernel.denied import explain_denied
from kbpf.kernel.headers import find_headers
from kbpf.kernel.packages import install_command


class Finding(NamedTuple):
    """One line of the report."""

    name: str
    #: ``ok``: there; ``missing``: not there, and `remedy` says what to do; ``info``: a fact that may explain others.
    state: Literal["ok", "missing", "info"]
    detail: str
    remedy: str = ""


def doctor_report() -> list[Finding]:
    """All findings. Changes nothing: what is probed is made and let go again."""
    return [finding for group in (_abilities, _circumstances, _tools) for finding in group()]


def _abilities() -> Iterator[Finding]:
    yield Finding("kernel", "info", f"Linux {os.uname().release} {os.uname().machine}")
    yield _classic("classic filter on a UDP socket", socket.SOCK_DGRAM)
    yield _classic("classic filter on a TCP socket", socket.SOCK_STREAM)
    yield _packet_socket()
    yield _ability("eBPF maps", probes.may_use_bpf(), "map_create", map_type="array")
    for program_type in ("socket_filter", "sched_cls", "xdp", "kprobe"):
        able = probes.may_use_bpf(program_type)
        yield _ability(f"eBPF programs ({program_type})", able, "prog_load", program_type=program_type)


def _circumstances() -> Iterator[Finding]:
    process = probes.privileges()
    held = ", ".join(name for name in probes.CAPABILITIES if name in process.effective)
    yield Finding("capabilities", "info", held or "none of those that BPF asks for")
    where = "the initial one" if process.initial_user_namespace else "not the initial one: bpf(2) ignores capabilities"
    yield Finding("user namespace", "info", where)
    disabled = process.unprivileged_bpf_disabled
    if disabled is not None:
        yield Finding("kernel.unprivileged_bpf_disabled", "info", str(disabled))
    if process.lockdown is None:
        yield Finding(
            "lockdown",
            "info",
            "unknown: securityfs is not mounted, or the kernel has no lockdown",
            "mount -t securityfs none /sys/kernel/security",
        )
    else:
        yield Finding("lockdown", "info", process.lockdown)
    seccomp = {0: "none", 1: "strict", 2: "a filter"}.get(process.seccomp, str(process.seccomp))
    yield Finding("seccomp", "info", seccomp + (", no_new_privs" if process.no_new_privs else ""))
    for name in ("net.core.bpf_jit_enable", "net.core.bpf_jit_harden", "net.core.bpf_jit_kallsyms"):
        value = probes.read_text("/proc/sys/" + name.replace(".", "/"))
        if value is not None:
            yield Finding(name, "info", value)
    place = next(iter(bpffs()), None)
    if place is None:
        yield Finding(
            "BPF file system", "missing", "none is mounted: nothing can be pinned", "mount -t bpf bpf /sys/fs/bpf"
        )
    else:
        yield Finding("BPF file system", "ok", place)
    types = Path("/sys/kernel/btf/vmlinux")
    if types.exists():
        yield Finding("the kernel's own types (BTF)", "ok", str(types))
    else:
        yield Finding(
            "the kernel's own types (BTF)", "missing", f"no {types}", "boot a kernel with CONFIG_DEBUG_INFO_BTF"
        )


def _tools() -> Iterator[Finding]:
    yield _tool("clang", shutil.which("clang"), "compiles programs in C")
    yield _tool("bpftool", shutil.which("bpftool"), "shows what is loaded")
    found = find_bcc()
    yield _tool("bcc", str(found) if found else None, "compiles bcc's dialect (kbpf.bcc)")
    headers = find_headers()
    place = None if headers is None else str(headers.source or f"those of {os.uname().release}")
    yield _tool("headers", place, "what bcc compiles against")


def _tool(name: str, place: str | None, purpose: str) -> Finding:
    if place:
        return Finding(name, "ok", place)
    return Finding(name, "missing", f"not installed; {purpose}", install_command(name))


def _ability(name: str, able: bool, operation: str, program_type: str = "", map_type: str = "") -> Finding:
    if able:
        return Finding(name, "ok", "allowed")
    return _refused(name, explain_denied(operation, errno.EPERM, program_type=program_type, map_type=map_type))


def _refused(name: str, reasons: tuple[str, ...]) -> Finding:
    reason, *remedies = reasons or ("refused",)
    return Finding(name, "missing", reason, "; ".join(remedies))


def _classic(name: str, type: socket.SocketKind) -> Finding:
    """Attach a filter that keeps all to a socket that is then closed."""
    with socket.socket(socket.AF_INET, type) as probe:
        try:
            kernel_backend().socket_attach_filter(probe, cbpf.encode([cbpf.stmt(cbpf.RET | cbpf.K, 0xFFFFFFFF)]))
        except OSError as error:
            return _refused(name, explain_denied("SO_ATTACH_FILTER", error.errno or 0, socket=probe))
    return Finding(name, "ok", "allowed")


def _packet_socket() -> Finding:
    try:
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0).close()
    except OSError as error:
        return _refused("packet sockets", explain_denied("socket(AF_PACKET)", error.errno or 0))
    return Finding("packet sockets", "ok", "allowed")
