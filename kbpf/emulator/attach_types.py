"""What a program says when it is loaded about where it will be attached (`bpf_prog_load_check_attach`, Linux 6.18)."""

from __future__ import annotations

import errno

from kbpf.backend import LoadRefused
from kbpf.specs import ProgramSpec
from kbpf.uapi.enums import ATTACH_TYPES


def numbers(*names: str) -> frozenset[int]:
    """The attach types of these names."""
    return frozenset(ATTACH_TYPES[name] for name in names)


_SOCK_ADDR = numbers(
    *(
        f"cgroup_{family}_{what}"
        for family in ("inet4", "inet6")
        for what in ("bind", "connect", "getpeername", "getsockname")
    ),
    *(f"cgroup_{family}_{what}" for family in ("udp4", "udp6") for what in ("sendmsg", "recvmsg")),
    *(f"cgroup_unix_{what}" for what in ("connect", "sendmsg", "recvmsg", "getpeername", "getsockname")),
)
#: The attach types that programs of a type may expect; of the types that are not here, any.
EXPECTED = {
    "cgroup_skb": numbers("cgroup_inet_ingress", "cgroup_inet_egress"),
    "cgroup_sock": numbers(
        "cgroup_inet_sock_create", "cgroup_inet_sock_release", "cgroup_inet4_post_bind", "cgroup_inet6_post_bind"
    ),
    "cgroup_sock_addr": _SOCK_ADDR,
    "cgroup_sockopt": numbers("cgroup_getsockopt", "cgroup_setsockopt"),
    "sk_lookup": numbers("sk_lookup"),
    "sk_reuseport": numbers("sk_reuseport_select", "sk_reuseport_select_or_migrate"),
    "syscall": frozenset((0,)),
    "netfilter": numbers("netfilter"),
}
#: What 0 stands for, in programs from before there were other attach types (`bpf_prog_load_fixup_attach_type`).
_FROM_ZERO = {
    "cgroup_sock": ATTACH_TYPES["cgroup_inet_sock_create"],
    "sk_reuseport": ATTACH_TYPES["sk_reuseport_select"],
}


def expected(spec: ProgramSpec) -> int:
    """The attach type that a program expects; raises `LoadRefused` (EINVAL) where its type may not."""
    given = spec.expected_attach_type or 0
    number = (ATTACH_TYPES[given] if isinstance(given, str) else given) or _FROM_ZERO.get(spec.type, 0)
    if spec.type in EXPECTED and number not in EXPECTED[spec.type]:
        raise LoadRefused(errno.EINVAL, "")
    return number
