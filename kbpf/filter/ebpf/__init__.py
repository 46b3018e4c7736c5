"""pcap-filter(7) expressions to eBPF: socket filters, tc classifiers and XDP programs.

The expression is understood as for a classic filter, down to the flow graph, but for long lists of addresses, which
`sets` puts into maps. `emit` writes the tests, and `packet` says how each kind of program reaches the packet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

from kbpf.errors import FilterError
from kbpf.filter.ebpf.emit import emit
from kbpf.filter.ebpf.packet import access
from kbpf.filter.ebpf.sets import MapPool
from kbpf.filter.graph import Builder
from kbpf.filter.lower import Lowering
from kbpf.filter.names import names as _names
from kbpf.filter.optimize import thread
from kbpf.filter.parser import parse
from kbpf.filter.values import Condition
from kbpf.specs import FILE_LAYOUTS, SOCKET_LAYOUTS, CollectionSpec, Layout, ProgramSpec

if TYPE_CHECKING:
    from kbpf.filter.names import Names

__all__ = ["PROGRAM", "TARGETS", "Action", "Target", "compile_ebpf", "target_layout"]

Target: TypeAlias = Literal["socket_filter", "sched_cls", "xdp"]
#: What is done with packets that match, or what is returned for those that match and for others.
Action: TypeAlias = "str | tuple[int, int] | None"

#: The name of the program in the collection.
PROGRAM = "filter"

# TC_ACT_UNSPEC goes on with the next classifier, or the default (linux/pkt_cls.h); enum xdp_action (linux/bpf.h).
_TC_UNSPEC, _TC_OK, _TC_SHOT = 0xFFFFFFFF, 0, 2
_XDP_DROP, _XDP_PASS, _XDP_TX = 1, 2, 3
#: By type of program, the actions: what they return for packets that match, and for others. The first is the default.
TARGETS: dict[str, dict[str, tuple[int, int]]] = {
    "socket_filter": {"keep": (262144, 0)},
    "sched_cls": {"drop": (_TC_SHOT, _TC_UNSPEC), "pass": (_TC_OK, _TC_SHOT)},
    "xdp": {
        "drop": (_XDP_DROP, _XDP_PASS),
        "pass": (_XDP_PASS, _XDP_DROP),
        "tx": (_XDP_TX, _XDP_PASS),
    },
}

# What a program of each type is given, by link type.
_LAYOUTS = {
    "socket_filter": {"EN10MB": SOCKET_LAYOUTS["packet_ethernet"], "RAW": SOCKET_LAYOUTS["packet_ip"]},
    "sched_cls": {"EN10MB": SOCKET_LAYOUTS["packet_ethernet"], "RAW": SOCKET_LAYOUTS["packet_ip"]},
    "xdp": {"EN10MB": FILE_LAYOUTS["EN10MB"], "RAW": FILE_LAYOUTS["RAW"]},
}


def target_layout(target: str, link: str = "EN10MB") -> Layout:
    """What lies at offset 0 for a type of program on a device; raises `FilterError` for what is not known."""
    if target not in _LAYOUTS:
        raise FilterError(f"filters are compiled for {', '.join(_LAYOUTS)}, not for {target!r}")
    if link not in _LAYOUTS[target]:
        raise FilterError(f"programs see link types {', '.join(_LAYOUTS[target])}, not {link!r}")
    return _LAYOUTS[target][link]


def compile_ebpf(
    expression: str,
    target: Target = "socket_filter",
    layout: Layout | None = None,
    action: Action = None,
    *,
    optimize: bool = True,
    names: Literal["system", "system+dns", "numeric"] | Names = "system",
    netmask: int | None = None,
) -> CollectionSpec:
    """Compile an expression to a collection of one program, `PROGRAM`, and the maps that it looks addresses up in.

    See `kbpf.compile_ebpf`. Raises `FilterSyntaxError` and `FilterError`.
    """
    layout = layout or target_layout(target)
    results = _results(target, action)
    way = access(target, layout, results[1])
    tree = parse(expression)
    pool = MapPool()
    condition: Condition = True
    if tree is not None:
        condition = Lowering(expression, layout, pool, _names(names), "traffic", netmask).condition(tree)
    builder = Builder()
    graph = builder.graph(condition)
    if optimize:
        graph = thread(graph, builder)
    instructions = emit(graph, target, way, results, pool.memberships)
    program = ProgramSpec(
        type=target, name=PROGRAM, instructions=instructions, maps=tuple(pool.maps), license="Dual MIT/GPL"
    )
    return CollectionSpec(maps={map.name: map for map in pool.maps}, programs={PROGRAM: program})


def _results(target: str, action: Action) -> tuple[int, int]:
    if isinstance(action, tuple):
        return action
    actions = TARGETS[target]
    if action is None:
        return next(iter(actions.values()))
    if action not in actions:
        raise FilterError(f"the actions of {target} are {', '.join(actions)}; {action!r} is none of them")
    return actions[action]
