"""Attach a program to a socket map (Linux 6.10), a network namespace (5.7 and 5.9) or a netfilter hook (6.4), by links.

Network namespaces are the kernel's alone. Needs CAP_NET_ADMIN, and CAP_BPF to load the program.
"""

from __future__ import annotations

import os

from kbpf.runtime.failures import doing
from kbpf.runtime.link import BpfLink, attaching
from kbpf.runtime.maps.base import BpfMap
from kbpf.runtime.program import Program
from kbpf.specs import Netfilter

#: The types that are attached to socket maps: their programs run on what arrives at the sockets in it, or is sent.
TO_MAPS = ("sk_skb", "sk_msg")
#: Those that are attached to network namespaces.
TO_NAMESPACES = ("flow_dissector", "sk_lookup")


def attach_to_map(program: Program, map: BpfMap, attach_type: str | None = None) -> BpfLink:
    """What `Program.attach` does for a socket map."""
    place = attach_type or program.attach_type or ("sk_msg_verdict" if program.type == "sk_msg" else None)
    if place is None:
        raise ValueError(f"attach {program.label}: say to which place, such as sk_skb_stream_verdict")
    if map.backend != program.backend:
        raise ValueError(f"{map.label} is the {map.backend}'s and the program is the {program.backend}'s")
    return _link(program, map.fileno(), place, f"{map.label} ({place})")


def attach_to_namespace(program: Program, path: str | os.PathLike[str]) -> BpfLink:
    """What `Program.attach` does for a network namespace."""
    backend = program._backend
    with doing(backend, f"open the network namespace {os.fspath(path)}", operation="open"):
        namespace = backend.namespace_open(os.fspath(path))
    try:
        return _link(program, namespace, program.type, f"{os.fspath(path)} ({program.type})")
    finally:
        backend.close(namespace)


def attach_to_netfilter(program: Program, hook: Netfilter) -> BpfLink:
    """What `Program.attach` does for a netfilter hook."""
    backend, where = program._backend, str(hook)
    with attaching(program, where, "netfilter"):
        fd = backend.netfilter_link(program.fileno(), hook)
    return BpfLink.of(program, where, fd)


def _link(program: Program, target: int, place: str, where: str) -> BpfLink:
    backend = program._backend
    with attaching(program, where, place):
        fd = backend.link_create(program.fileno(), target, place)
    return BpfLink.of(program, where, fd)
