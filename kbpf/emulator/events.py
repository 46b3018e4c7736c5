"""Programs that Linux runs on events of its own, and not by BPF_PROG_TEST_RUN: run over a context that a test makes.

Emulated sockets and the emulated machine run such programs where they are attached; `run_program` runs one as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

from kbpf.emulator import (
    cgroup_machine,
    cgroup_sock,
    cgroup_sockopt,
    sk_msg,
    sk_reuseport,
    sk_skb,
    sock_addr,
    sock_ops,
    tracing,
)
from kbpf.emulator.backend import emulator_backend
from kbpf.emulator.interpreter import Context
from kbpf.emulator.packet import Packet
from kbpf.emulator.program import Program
from kbpf.emulator.sock import Sock
from kbpf.emulator.tracing import Event


class EventRun(NamedTuple):
    """The 32-bit return value, and what the program may set of its context, by field, afterwards."""

    value: int
    context: dict[str, Any]


class HasDescriptor(Protocol):
    """A `kbpf.Program`."""

    def fileno(self) -> int: ...


class EventContext(Context, Protocol):
    """A context that is made of fields."""

    def result(self) -> dict[str, Any]:
        """What the program may set, by field."""
        ...


#: Takes the program, the context's fields, the socket and the packet that were given; raises `ValueError`.
Maker: TypeAlias = "Callable[[Program, Mapping[str, Any], Sock | None, Packet], EventContext]"
#: By program type.
MAKERS: dict[str, Maker] = {
    "cgroup_device": cgroup_machine.make_device,
    "cgroup_sysctl": cgroup_machine.make_sysctl,
    "cgroup_sockopt": cgroup_sockopt.make,
    "cgroup_sock": cgroup_sock.make,
    "cgroup_sock_addr": sock_addr.make,
    "sock_ops": sock_ops.make,
    "sk_reuseport": sk_reuseport.make,
    "sk_msg": sk_msg.make,
    "sk_skb": sk_skb.make,
}
#: The types that are run here.
TYPES = frozenset(MAKERS) | frozenset(tracing.ACCESS)


def run(program: Program, context: Context, packet: Packet | None = None) -> int:
    """Run over a context; returns the low 32 bits of R0. Raises `EmulationFault`."""
    packet = Packet(buffer=b"") if packet is None else packet
    return program.execute(packet, packet.data, context)


def run_event(
    program: Program,
    fields: Mapping[str, Any] | bytes | None = None,
    *,
    sock: Sock | None = None,
    packet: Packet | None = None,
    event: Event | None = None,
) -> EventRun:
    """`run_program`, of the emulator's own program; `packet` may carry more than bytes."""
    if program.type not in TYPES:
        raise ValueError(f"programs of type {program.type} run over data: see Program.run()")
    packet = Packet(buffer=b"") if packet is None else packet
    context: EventContext
    if program.type in tracing.ACCESS:
        context = tracing.make(program.type, fields or {}, event)
    elif isinstance(fields, bytes):
        raise ValueError(f"the context of a {program.type} program is given by its fields")
    else:
        context = MAKERS[program.type](program, fields or {}, sock, packet)
    value = run(program, context, packet)
    return EventRun(value, context.result())


def run_program(
    program: HasDescriptor,
    context: Mapping[str, Any] | bytes | None = None,
    *,
    sock: Sock | None = None,
    packet: bytes = b"",
    event: Event | None = None,
) -> EventRun:
    """Run an emulated program of a type that BPF_PROG_TEST_RUN refuses, over a context made of what is given.

    `context` sets fields by their uapi names, to what the program is to load there:

    * ``cgroup_sock``: ``bound_dev_if``, ``mark``, ``priority``;
    * ``cgroup_sock_addr``: ``user_family``, ``user_port``, and of ``user_ip4``, ``user_ip6``, ``msg_src_ip4`` and
      ``msg_src_ip6`` those that there are where the program expects to be attached, in network order;
    * ``sock_ops``: ``op``, ``args``, ``is_fullsock``, ``skb_hwtstamp``;
    * ``cgroup_device``: all;
    * ``cgroup_sysctl``: all, and ``name``, ``current_value`` and ``new_value``, which helpers give: text and bytes;
    * ``cgroup_sockopt``: ``level``, ``optname``, ``optlen``, ``retval``, and the bytes of ``optval``;
    * ``sk_reuseport``: ``hash``, ``bind_inany``;
    * ``sk_msg``, ``sk_skb``: none;
    * ``tracepoint``: bytes, the record with its header, whose first eight bytes programs do not see;
    * ``raw_tracepoint``: ``args``, at most twelve; also ``raw_tracepoint_writable``, where ``buffer`` is what the first
      one points to;
    * ``kprobe`` (also uprobes): registers of x86-64 by the kernel's names (``di``, ``ax``, ``ip``);
    * ``perf_event``: the same, ``sample_period`` and ``addr``.

    Tracing programs also take bytes, what is beyond them being no part of the context. `event` is what they can ask
    beside the context. For the others, all other fields are those of `sock` (by default a new socket, of TCP, or of
    UDP for sk_reuseport) and of `packet`, which begins with the TCP or UDP header.

    Gives the return value, and by field what the program may set of its context, ``selected`` being the `Sock` that an
    sk_reuseport program chose, and ``buffer`` what a writable raw tracepoint's left there. Raises `ValueError` for
    other types, fields and values that do not fit, `OSError` (EBADF) for a program that is not the emulator's, and
    `EmulationFault` for what a verifier would have refused.
    """
    return run_event(
        emulator_backend().program(program.fileno()),
        context,
        sock=sock,
        packet=Packet(buffer=bytes(packet)),
        event=event,
    )
