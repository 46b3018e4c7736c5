"""pcap-filter(7) expressions to classic BPF, for captures and for live sockets.

The stages: `lexer` and `parser` make the typed tree (`syntax`); `lower` gives it its meaning on a layout, as
conditions over packet words (`values`); `graph` makes the flow graph of them; `optimize` threads it; `emit` and
`layout` write instructions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from kbpf.filter.emit import emit
from kbpf.filter.graph import Builder
from kbpf.filter.lower import Lowering
from kbpf.filter.names import names as _names
from kbpf.filter.optimize import thread
from kbpf.filter.parser import parse
from kbpf.filter.values import Condition, Pool
from kbpf.specs import FILE_LAYOUTS, FilterSpec, Layout

if TYPE_CHECKING:
    from kbpf.filter.names import Names

__all__ = ["compile_filter"]


def compile_filter(
    expression: str,
    layout: Layout = FILE_LAYOUTS["EN10MB"],
    *,
    snaplen: int = 262144,
    optimize: bool = True,
    order: Literal["traffic", "libpcap"] = "traffic",
    names: Literal["system", "system+dns", "numeric"] | Names = "system",
    netmask: int | None = None,
) -> FilterSpec:
    """Compile an expression for packets that start as `layout` says.

    The filter returns `snaplen` for packets that match and 0 for others. ``order="libpcap"`` gives the listing that
    tcpdump's users know; the default tests what traffic mostly is first. `names` says where host, service and protocol
    names are looked up; `netmask` is the interface's, as ``ip broadcast`` needs it.

    A packet that ends before a byte that is asked for is rejected, where libpcap's unoptimised code would reject it
    (``order="libpcap"``: its optimised code, which reads the words of lists in another order). Words that a mask leaves
    nothing of are not read. What can never match compiles to the single instruction ``ret #0``.

    Raises `kbpf.FilterSyntaxError` for text that does not parse, and `kbpf.FilterError` for what cannot be answered on
    this layout. The language is libpcap 1.11's. For captures ``protochain`` is a loop, as in libpcap, which Linux would
    refuse; for sockets it looks through six extension headers.
    """
    tree = parse(expression)
    pool = Pool(loops=not layout.live)
    condition: Condition = True
    if tree is not None:
        condition = Lowering(expression, layout, pool, _names(names), order, netmask).condition(tree)
    builder = Builder()
    graph = builder.graph(condition)
    if optimize:
        graph = thread(graph, builder)
    return FilterSpec(instructions=emit(graph, pool, snaplen, masks_as_sets=order == "traffic"), layout=layout)
