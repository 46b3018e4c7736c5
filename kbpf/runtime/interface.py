"""Attach a program to a network interface: XDP (Linux 5.9) and traffic control (tcx, 6.6), by BPF links.

Needs CAP_NET_ADMIN (and CAP_BPF to load the program). XDP sees received frames before anything else does, one program
an interface. Traffic control has an ordered list of programs for each direction; what clsact has by netlink runs after
it, and is not kbpf's to see or change.
"""

from __future__ import annotations

from typing import Literal

from kbpf.backend import Attached, Backend
from kbpf.runtime.backends import select
from kbpf.runtime.failures import doing
from kbpf.runtime.link import BpfLink, InterfaceLink, attaching
from kbpf.runtime.program import Program
from kbpf.uapi import constants as uapi

Mode = Literal["generic", "native"]

_MODES = {None: 0, "generic": uapi.XDP_FLAGS_SKB_MODE, "native": uapi.XDP_FLAGS_DRV_MODE}
_TCX = ("tcx_ingress", "tcx_egress")


def attach_to_interface(
    program: Program,
    interface: str | int,
    attach_type: str | None = None,
    *,
    mode: Mode | None = None,
    before: BpfLink | Program | Literal["all"] | None = None,
    after: BpfLink | Program | Literal["all"] | None = None,
) -> InterfaceLink:
    """What `Program.attach` does for an interface."""
    backend = program._backend
    if program.type == "xdp":
        attach_type = attach_type or "xdp"
    place = attach_type or program.attach_type
    if place not in ("xdp", *_TCX):
        raise ValueError(f"attach {program.label}: say which way, tcx_ingress or tcx_egress")
    if mode not in _MODES:
        raise ValueError(f"mode: {mode!r} is none of generic, native")
    if mode is not None and place != "xdp":
        raise ValueError("only XDP programs run in one of two modes")
    if (before is not None or after is not None) and place == "xdp":
        raise ValueError("an interface has one XDP program: nothing is before or after it")
    flags, relative = _MODES[mode], 0
    for other, flag in ((before, uapi.BPF_F_BEFORE), (after, uapi.BPF_F_AFTER)):
        if other is not None:
            flags |= flag
            if not isinstance(other, str):
                relative = other.fileno()
                flags |= uapi.BPF_F_LINK if isinstance(other, BpfLink) else 0
    if before is not None and after is not None:
        raise ValueError("before and after name two places")
    where = f"{interface} ({place})"
    with attaching(program, where, place):
        index = interface if isinstance(interface, int) else backend.interface_index(interface)
        fd = backend.link_create(program.fileno(), index, place, flags, relative)
    return InterfaceLink.of(program, where, fd)


def interface_index(name: str, backend: str | None = None) -> int:
    """The index of an interface, which programs redirect to; `BpfError` (ENODEV) for an unknown one."""
    chosen: Backend = select(backend)
    with doing(chosen, f"find the interface {name}", operation="if_nametoindex"):
        return chosen.interface_index(name)


def attached_programs(interface: str | int, attach_type: str, backend: str | None = None) -> Attached:
    """The traffic control programs of an interface, in the order in which they run (BPF_PROG_QUERY, Linux 6.6).

    `attach_type` is ``"tcx_ingress"`` or ``"tcx_egress"``. Gives ids of programs and links, and the revision, a number
    that each change of the list makes larger. An interface without programs has an empty list, of revision 1.
    """
    chosen: Backend = select(backend)
    with doing(
        chosen, f"ask for the programs of {interface} ({attach_type})", operation="prog_query", attach_type=attach_type
    ):
        index = interface if isinstance(interface, int) else chosen.interface_index(interface)
        return chosen.program_query(index, attach_type)
