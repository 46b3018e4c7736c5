"""What the emulator has, from the tables that it is made of."""

from __future__ import annotations

from kbpf.backend import Answer, FeatureKind
from kbpf.emulator import cgroup_links, helpers, maps
from kbpf.emulator.helpers.allowed import ALLOWED
from kbpf.emulator.interpreter import TAIL_CALL_HELPER
from kbpf.emulator.link_commands import LINKED
from kbpf.emulator.sockmap_links import PLACES
from kbpf.uapi.enums import ATTACH_TYPES, HELPERS

# What a socket option attaches to, a map that keeps programs, `event_attach`, and `netfilter_link`.
_OTHERWISE = (
    "sk_reuseport_select",
    "sk_reuseport_select_or_migrate",
    "xdp_devmap",
    "xdp_cpumap",
    "perf_event",
    "netfilter",
)
_LINKS = ("xdp", "tcx", "cgroup", "perf_event", "raw_tracepoint", "netfilter", "sockmap")


def ask(kind: FeatureKind, name: str, program_type: str = "") -> Answer:
    """Whether the emulator has it; see `kbpf.backend.Backend.feature`."""
    if kind == "map_type":
        return _answer(name in maps.KINDS, f"the emulator has no maps of type {name}")
    if kind == "program_type":
        return _answer(name in ALLOWED, f"the emulator does not run programs of type {name}")
    if kind == "helper":
        return _helper(program_type, HELPERS[name])
    if kind == "link_type":
        return _answer(name in _LINKS, "the emulator has no such links")
    there = name in LINKED or name in PLACES or name in _OTHERWISE or ATTACH_TYPES[name] in cgroup_links.ATTACHED
    return _answer(there, f"the emulator does not attach programs to {name}")


def _answer(there: bool, otherwise: str) -> Answer:
    return Answer("yes") if there else Answer("no", otherwise)


def _helper(program_type: str, number: int) -> Answer:
    if program_type not in ALLOWED:
        return Answer("no", f"the emulator does not run programs of type {program_type}")
    if number not in ALLOWED[program_type]:
        return Answer("no", "programs of this type do not have it")
    there = number in helpers.functions(program_type) or number == TAIL_CALL_HELPER
    return _answer(there, "the emulator does not have the helper")
