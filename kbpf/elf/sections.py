"""What an ELF section's name says of the programs in it: libbpf's conventions as a table.

A program lies in a section named as below, or below with ``/`` and what it attaches to: ``socket``, ``kprobe/do_exit``,
``cgroup/connect4``. Old samples add digits (``socket1``), which is understood. BPF's own attach points in a name
(``tracepoint/CATEGORY/NAME``) are kept as they stand.
"""

from __future__ import annotations

from typing import NamedTuple

from kbpf.errors import ObjectError
from kbpf.uapi.constants import BPF_F_SLEEPABLE, BPF_F_XDP_HAS_FRAGS


class Kind(NamedTuple):
    """What a program is: type and expected attach type under bpftool's names, and BPF_PROG_LOAD's flags."""

    type: str
    attach: str | None = None
    flags: int = 0


_CGROUP_ADDRESS = {
    f"cgroup/{call}{family}": Kind("cgroup_sock_addr", f"cgroup_{inet}_{call}")
    for call in ("bind", "connect", "getpeername", "getsockname")
    for family, inet in (("4", "inet4"), ("6", "inet6"))
}
_CGROUP_UDP = {
    f"cgroup/{call}{family}": Kind("cgroup_sock_addr", f"cgroup_udp{family}_{call}")
    for call in ("sendmsg", "recvmsg")
    for family in "46"
}
_CGROUP_UNIX = {
    f"cgroup/{call}_unix": Kind("cgroup_sock_addr", f"cgroup_unix_{call}")
    for call in ("connect", "sendmsg", "recvmsg", "getpeername", "getsockname")
}
_PROBES = {
    name: Kind("kprobe") for name in ("kprobe", "kretprobe", "uprobe", "uretprobe", "ksyscall", "kretsyscall", "usdt")
} | {name: Kind("kprobe", flags=BPF_F_SLEEPABLE) for name in ("uprobe.s", "uretprobe.s")}
_MULTI = {
    name + suffix: Kind("kprobe", attach, BPF_F_SLEEPABLE if suffix else 0)
    for name, attach, suffixes in (
        ("kprobe.multi", "trace_kprobe_multi", ("",)),
        ("kretprobe.multi", "trace_kprobe_multi", ("",)),
        ("kprobe.session", "trace_kprobe_session", ("",)),
        ("uprobe.multi", "trace_uprobe_multi", ("", ".s")),
        ("uretprobe.multi", "trace_uprobe_multi", ("", ".s")),
        ("uprobe.session", "trace_uprobe_session", ("", ".s")),
    )
    for suffix in suffixes
}
_TRACING = {
    name + suffix: Kind(type, attach, BPF_F_SLEEPABLE if suffix else 0)
    for name, type, attach, suffixes in (
        ("fentry", "tracing", "trace_fentry", ("", ".s")),
        ("fexit", "tracing", "trace_fexit", ("", ".s")),
        ("fmod_ret", "tracing", "modify_return", ("", ".s")),
        ("iter", "tracing", "trace_iter", ("", ".s")),
        ("tp_btf", "tracing", "trace_raw_tp", ("",)),
        ("lsm", "lsm", "lsm_mac", ("", ".s")),
        ("lsm_cgroup", "lsm", "lsm_cgroup", ("",)),
    )
    for suffix in suffixes
}
_XDP = {
    f"xdp{frags}{place}": Kind("xdp", attach, BPF_F_XDP_HAS_FRAGS if frags else 0)
    for place, attach in (("", "xdp"), ("/devmap", "xdp_devmap"), ("/cpumap", "xdp_cpumap"))
    for frags in ("", ".frags")
}

#: Section names, without what follows a further ``/``.
SECTIONS: dict[str, Kind] = {
    "socket": Kind("socket_filter"),
    "sk_reuseport": Kind("sk_reuseport", "sk_reuseport_select"),
    "sk_reuseport/migrate": Kind("sk_reuseport", "sk_reuseport_select_or_migrate"),
    "tc": Kind("sched_cls"),
    "classifier": Kind("sched_cls"),
    "tcx/ingress": Kind("sched_cls", "tcx_ingress"),
    "tcx/egress": Kind("sched_cls", "tcx_egress"),
    "netkit/primary": Kind("sched_cls", "netkit_primary"),
    "netkit/peer": Kind("sched_cls", "netkit_peer"),
    "action": Kind("sched_act"),
    "tracepoint": Kind("tracepoint"),
    "tp": Kind("tracepoint"),
    "raw_tracepoint": Kind("raw_tracepoint"),
    "raw_tp": Kind("raw_tracepoint"),
    "raw_tracepoint.w": Kind("raw_tracepoint_writable"),
    "raw_tp.w": Kind("raw_tracepoint_writable"),
    "perf_event": Kind("perf_event"),
    "freplace": Kind("ext"),
    "syscall": Kind("syscall", None, BPF_F_SLEEPABLE),
    "struct_ops": Kind("struct_ops"),
    "struct_ops.s": Kind("struct_ops", None, BPF_F_SLEEPABLE),
    "netfilter": Kind("netfilter", "netfilter"),
    "lwt_in": Kind("lwt_in"),
    "lwt_out": Kind("lwt_out"),
    "lwt_xmit": Kind("lwt_xmit"),
    "lwt_seg6local": Kind("lwt_seg6local"),
    "sockops": Kind("sock_ops", "cgroup_sock_ops"),
    "sk_skb": Kind("sk_skb"),
    "sk_skb/stream_parser": Kind("sk_skb", "sk_skb_stream_parser"),
    "sk_skb/stream_verdict": Kind("sk_skb", "sk_skb_stream_verdict"),
    "sk_skb/verdict": Kind("sk_skb", "sk_skb_verdict"),
    "sk_msg": Kind("sk_msg", "sk_msg_verdict"),
    "sk_lookup": Kind("sk_lookup", "sk_lookup"),
    "flow_dissector": Kind("flow_dissector", "flow_dissector"),
    "lirc_mode2": Kind("lirc_mode2", "lirc_mode2"),
    "cgroup/skb": Kind("cgroup_skb"),
    "cgroup_skb": Kind("cgroup_skb"),
    "cgroup_skb/ingress": Kind("cgroup_skb", "cgroup_inet_ingress"),
    "cgroup_skb/egress": Kind("cgroup_skb", "cgroup_inet_egress"),
    "cgroup/sock": Kind("cgroup_sock", "cgroup_inet_sock_create"),
    "cgroup/sock_create": Kind("cgroup_sock", "cgroup_inet_sock_create"),
    "cgroup/sock_release": Kind("cgroup_sock", "cgroup_inet_sock_release"),
    "cgroup/post_bind4": Kind("cgroup_sock", "cgroup_inet4_post_bind"),
    "cgroup/post_bind6": Kind("cgroup_sock", "cgroup_inet6_post_bind"),
    "cgroup/dev": Kind("cgroup_device", "cgroup_device"),
    "cgroup/sysctl": Kind("cgroup_sysctl", "cgroup_sysctl"),
    "cgroup/getsockopt": Kind("cgroup_sockopt", "cgroup_getsockopt"),
    "cgroup/setsockopt": Kind("cgroup_sockopt", "cgroup_setsockopt"),
    **_CGROUP_ADDRESS,
    **_CGROUP_UDP,
    **_CGROUP_UNIX,
    **_PROBES,
    **_MULTI,
    **_TRACING,
    **_XDP,
}


def classify(section: str) -> tuple[Kind, str]:
    """The kind of the programs in a section, and what its name says they attach to.

    Raises `ObjectError` for a name that says nothing.
    """
    parts = section.split("/")
    for count in range(len(parts), 0, -1):
        name = "/".join(parts[:count])
        kind = SECTIONS.get(name) or SECTIONS.get(name.rstrip("0123456789"))
        if kind is not None:
            return kind, "/".join(parts[count:])
    raise ObjectError(f"section {section}: the name tells no program type")
