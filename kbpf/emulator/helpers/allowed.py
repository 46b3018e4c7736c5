"""Which helpers the kernel lets programs of a type call (measured on Linux 6.18, as root)."""

from __future__ import annotations

from kbpf.uapi.enums import ATTACH_TYPES


def _ids(text: str) -> frozenset[int]:
    """The numbers of ``"1-3,5"``."""
    ranges = (part.partition("-") for part in text.replace(" ", "").split(","))
    return frozenset(n for first, _, last in ranges for n in range(int(first), int(last or first) + 1))


#: What all of them may call.
_BASE = _ids(
    "1-3,5-8,12,14-17,22,35,37,42,55,80,87-89,93-94,105-106,109,112-115,117-118,120,123,125,130-134,136-141,148-149,"
    "153-154,156-158,160,164-165,169-172,175-178,180-182,191,194-203,208-211"
)
_LWT = _BASE | _ids("24-26,28,33-34,39")
_SCHED = _BASE | _ids(
    "9-11,13,18-21,23-26,28-34,38-41,43,46-48,50,66,68-69,79,83-86,95-100,107-108,110,122,124,135,151-152,155,163,192,"
    "204-207"
)
#: What nothing but programs of the network call: ways from a socket to what it is.
_SKC = _ids("136-140,178,196")
#: Programs of control groups.
_CGROUP = _BASE | _ids("25,81,186-187")
_TRACING = (_BASE | _ids("4,25,27,45,67,173-174")) - _ids("160") - _SKC
#: By type, for whatever attach type.
ALLOWED: dict[str, frozenset[int]] = {
    "socket_filter": _BASE | _ids("25-26,46-47,68,122"),
    "sched_cls": _SCHED,
    "sched_act": _SCHED,
    "xdp": _BASE | _ids("23,25,28,44,51,54,65,69,84-86,99-100,110,163,188-190,204-207"),
    "cgroup_skb": (_BASE | _ids("25-26,46-47,68,79,81,83-86,95-99,107-108,122,128-129")),
    "lwt_in": _LWT | _ids("73"),
    "lwt_out": _LWT,
    "lwt_seg6local": _LWT | _ids("74-76"),
    "lwt_xmit": _LWT | _ids("9-11,13,20-21,23,29-30,38,40-41,43,73,135"),
    "flow_dissector": _BASE | _ids("26"),
    "netfilter": _BASE - _ids("136-140,160,178,196"),
    "sk_lookup": _BASE | _ids("25,86,124"),
    "cgroup_sock": (_CGROUP | _ids("46,107,122")) - _SKC,
    "cgroup_sock_addr": _CGROUP | _ids("46,49,57,64,84-86,99,107-108,122"),
    "sock_ops": _CGROUP | _ids("46,49,53,57,59,70,96,107-108,122,142-144"),
    "cgroup_device": _CGROUP - _SKC - _ids("160"),
    "cgroup_sysctl": (_CGROUP | _ids("101-104")) - _SKC,
    "cgroup_sockopt": (_CGROUP | _ids("49,57,96,107-108,122")) - _SKC - _ids("160"),
    "sk_reuseport": (_BASE | _ids("26,46,68,82")) - _SKC,
    "sk_msg": _BASE | _ids("25,60-63,71,90-91,107-108,122"),
    "sk_skb": _BASE | _ids("9,25-26,38-39,43,46-47,50,52,72,84-86,99"),
    "tracepoint": _TRACING,
    "raw_tracepoint": _TRACING,
    "raw_tracepoint_writable": _TRACING,
    "perf_event": _TRACING | _ids("56,119"),
    "kprobe": _TRACING,
    "syscall": (_BASE | _ids("4,25,27,45-46,67,107-108,111,121,147,162,166-168,173,179,188")) - _ids("160"),
}
_CONNECT = frozenset(ATTACH_TYPES[name] for name in ("cgroup_inet4_connect", "cgroup_inet6_connect"))
_SETSOCKOPT = frozenset((ATTACH_TYPES["cgroup_setsockopt"],))
#: Helpers that only programs for some attach types may call: bpf_bind, and those of one direction of socket options.
_ONLY_AT = {("cgroup_sock_addr", 64): _CONNECT, **{("cgroup_sockopt", id): _SETSOCKOPT for id in (49, 57)}}
#: Where there is no value to give the system call, programs have neither bpf_get_retval nor bpf_set_retval.
_RETVAL = _ids("186-187")
_NO_RETVAL = frozenset(
    number
    for name, number in ATTACH_TYPES.items()
    if name in ("cgroup_inet_ingress", "cgroup_inet_egress", "cgroup_sock_ops")
    or (name.startswith("cgroup_") and name.endswith(("recvmsg", "getpeername", "getsockname")))
)


def allowed(program_type: str, attach_type: int) -> frozenset[int]:
    """The helpers of programs that expect to be attached there."""
    ids = ALLOWED[program_type]
    if attach_type in _NO_RETVAL:
        ids -= _RETVAL
    return ids - {id for (type, id), at in _ONLY_AT.items() if type == program_type and attach_type not in at}


#: Perf events' programs have one of their own, for any licence.
_GET_STACKID = 27
#: What only GPL-compatible programs may call.
_GPL_ONLY = _ids("4,6,22,25,27,35,45,55-56,67,69,100,110-115,119,121,158,163,165,169-173,175-177,191,204-207")
#: What may sleep, as only sleepable programs may.
SLEEPING = _ids("148,191")


def gpl_only(program_type: str) -> frozenset[int]:
    """The helpers that of programs of this type only GPL-compatible ones may call."""
    return _GPL_ONLY - {_GET_STACKID} if program_type == "perf_event" else _GPL_ONLY
