"""Calls in directly written programs of helpers over text, memory and the machine.

Each function writes a piece that leaves a number in R0. What Linux leaves open is written over.
"""

from __future__ import annotations

import signal
from collections.abc import Callable

from kbpf.isa import ebpf
from kbpf.testing.generate_maps import FORMATS, PLACES, TEXTS
from kbpf.testing.generate_pieces import (
    CONTEXT,
    NUMBERS,
    Draft,
    Piece,
    call,
    copy,
    load,
    mix,
    move,
    put,
    put_bytes,
    stack,
    the_value,
)  # fmt: skip

_RESULT = -NUMBERS
_TEXT = -32
_NUMBERS = (
    b"0", b"12", b"-7", b"+5", b" 42", b"\t-1x", b"0x1F", b"0x", b"017", b"089", b"", b"-", b"zz",
    b"9223372036854775807", b"-9223372036854775808", b"18446744073709551615", b"99999999999999999999",
    b"ffffffffffffffff", b"-0", b"1 2",
)  # fmt: skip
#: What bpf_trace_printk can be given: up to three numbers.
_TRACED = tuple(text for text in FORMATS if text.count(b"%") <= 3)
#: Signals that are ignored unless somebody asks for them; none; and what are none.
_SIGNALS = (0, 0, signal.SIGURG, signal.SIGWINCH, 65, 1000)
#: Addresses of which there is nothing, in the program's memory or the kernel's or a process's.
_NOWHERE = (0, 8, 4096, 1 << 20)


def _number(helper: str) -> Callable[[Draft], Piece]:
    """bpf_strtol and bpf_strtoul."""

    def make(draft: Draft) -> Piece:
        rng = draft.rng
        text = rng.choice(_NUMBERS)
        size = rng.choice((len(text), len(text), 24, 1, 8)) or 1
        flags = rng.choice((0, 0, 0, 8, 10, 16, 2, 1 << 20))
        return [
            *put_bytes(_TEXT, text.ljust(24, b"\0")), *stack(1, _TEXT), *move(2, size), *move(3, flags),
            *stack(4, _RESULT), *call(helper), *mix(0), *load(0, ebpf.FP, _RESULT),
        ]  # fmt: skip

    return make


def _compare(draft: Draft) -> Piece:
    rng = draft.rng
    first, second = rng.choice(TEXTS), rng.choice(TEXTS)
    return [
        *put_bytes(_TEXT, first.ljust(16, b"\0")), *stack(1, _TEXT), *move(2, rng.choice((1, 2, 3, 8, 16))),
        *the_value(3, draft.map("read-only"), PLACES[second]), *call("strncmp"),
    ]  # fmt: skip


def _print(draft: Draft) -> Piece:
    rng = draft.rng
    format = rng.choice(FORMATS)
    size = 8 * sum(1 for kind in format.replace(b"%%", b"").split(b"%")[1:] if kind)
    room = rng.choice((0, 1, 5, 16, 24))
    return [
        *stack(1, _RESULT), *move(2, room), *the_value(3, draft.map("read-only"), PLACES[format]), *stack(4, -40),
        *move(5, size), *call("snprintf"), *mix(0), *load(0, ebpf.FP, _RESULT),
    ]  # fmt: skip


def _trace(draft: Draft) -> Piece:
    format = draft.rng.choice(_TRACED)
    size = draft.rng.choice((len(format) + 1,) * 4 + (max(len(format), 1), len(format) + 3))
    return [
        *put_bytes(-NUMBERS, format.ljust(64, b"\0")[:64]), *stack(1, -NUMBERS), *move(2, min(size, 64)),
        *copy(3, 7), *move(4, draft.rng.choice((0, -1, 77))), *copy(5, 7), *call("trace_printk"),
    ]  # fmt: skip


def _trace_many(draft: Draft) -> Piece:
    format = draft.rng.choice([text for text in FORMATS if len(text) < 24])
    return [
        *put_bytes(_TEXT, format.ljust(24, b"\0")), *stack(1, _TEXT), *move(2, len(format) + 1), *stack(3, -72),
        *move(4, draft.rng.choice((0, 8, 24, 40, 7))), *move(5, 0), *call("trace_vprintk"),
    ]  # fmt: skip


def _probe(helper: str) -> Callable[[Draft], Piece]:
    """Copy from the program's own memory, or from where there is nothing."""

    def make(draft: Draft) -> Piece:
        rng = draft.rng
        if "user" not in helper and rng.random() < 0.7:
            source = stack(3, rng.choice((-8, -16, -24, -32)))
        else:
            source = move(3, rng.choice(_NOWHERE))
        size = rng.choice((1, 4, 8))
        return [
            *put(_RESULT, 0), *stack(1, _RESULT), *move(2, size), *source, *call(helper), *mix(0),
            *load(0, ebpf.FP, _RESULT),
        ]  # fmt: skip

    return make


def _signal(helper: str) -> Callable[[Draft], Piece]:
    return lambda draft: [*move(1, draft.rng.choice(_SIGNALS)), *call(helper)]


def _name(draft: Draft) -> Piece:
    size = draft.rng.choice((1, 4, 8, 16, 24))
    return [*stack(1, _RESULT), *move(2, size), *call("get_current_comm"), *mix(0), *load(0, ebpf.FP, _RESULT)]


def _in_namespace(draft: Draft) -> Piece:
    """Of a PID namespace that is none."""
    size = draft.rng.choice((8, 8, 4, 16))
    return [
        *move(1, draft.rng.choice((0, 4))), *move(2, 1), *stack(3, _RESULT), *move(4, size),
        *call("get_ns_current_pid_tgid"), *mix(0), *load(0, ebpf.FP, _RESULT),
    ]  # fmt: skip


def _plain(helper: str) -> Callable[[Draft], Piece]:
    """Without arguments."""
    return lambda draft: call(helper)


def _open(helper: str, *arguments: Piece) -> Callable[[Draft], Piece]:
    """Linux leaves open, or the machine says, what comes out."""
    return lambda draft: [*(i for piece in arguments for i in piece), *call(helper), *move(0, draft.rng.getrandbits(8))]


_OF_PACKET = copy(1, CONTEXT)

#: By helper, or helper and what is particular.
SYSTEM_CALLS: dict[str, Callable[[Draft], Piece]] = {
    "strtol": _number("strtol"),
    "strtoul": _number("strtoul"),
    "strncmp": _compare,
    "snprintf": _print,
    "trace_printk": _trace,
    "trace_vprintk": _trace_many,
    **{name: _probe(name) for name in (
        "probe_read", "probe_read_str", "probe_read_kernel", "probe_read_kernel_str", "probe_read_user",
        "probe_read_user_str",
    )},
    "send_signal": _signal("send_signal"),
    "send_signal_thread": _signal("send_signal_thread"),
    "get_current_comm": _name,
    "get_ns_current_pid_tgid": _in_namespace,
    "get_current_pid_tgid": _plain("get_current_pid_tgid"),
    "get_current_uid_gid": _plain("get_current_uid_gid"),
    **{name: _open(name) for name in (
        "ktime_get_ns", "ktime_get_boot_ns", "ktime_get_coarse_ns", "ktime_get_tai_ns", "jiffies64", "get_prandom_u32",
        "get_smp_processor_id", "get_numa_node_id", "get_current_cgroup_id",
    )},
    "get_current_ancestor_cgroup_id": _open("get_current_ancestor_cgroup_id", move(1, 0)),
    **{name: _open(name, _OF_PACKET) for name in (
        "get_netns_cookie", "get_socket_cookie", "get_socket_uid", "get_cgroup_classid", "get_route_realm",
        "get_hash_recalc", "skb_cgroup_id", "skb_cgroup_classid",
    )},
    "skb_ancestor_cgroup_id": _open("skb_ancestor_cgroup_id", _OF_PACKET, move(2, 0)),
}  # fmt: skip
