"""One socket filter that counts what each of several expressions matches.

The packet's headers are copied to the stack once, and each expression's graph is written as in a filter of its own, but
that it ends by counting or not. Where one cannot load what it asks for, only that one does not match.
"""

from __future__ import annotations

from collections.abc import Sequence

from kbpf.errors import FilterError
from kbpf.filter.ebpf.code import ACCEPT, REJECT, WIDTHS, Code
from kbpf.filter.ebpf.emit import Writer
from kbpf.filter.ebpf.packet import CTX, LENGTH, Headers
from kbpf.filter.ebpf.sets import MapPool
from kbpf.filter.graph import Builder, Successor
from kbpf.filter.lower import Lowering
from kbpf.filter.names import names as _names
from kbpf.filter.optimize import thread
from kbpf.filter.parser import parse
from kbpf.filter.values import Condition
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.specs import Layout, MapSpec, ProgramSpec
from kbpf.types import Array, Int, Member, Struct
from kbpf.uapi.constants import PACKET_OUTGOING
from kbpf.uapi.structs import STRUCTS

_U64 = Int(name="__u64", size=8)
_COUNT = Struct(
    name="Count", size=16, members=(Member(name="packets", type=_U64), Member(name="bytes", type=_U64, bit_offset=64))
)
# A per-CPU value has 32 KiB at the most (PCPU_MIN_UNIT_SIZE).
_MOST = 32768 // _COUNT.size
# LOOPBACK_IFINDEX (include/net/net_namespace.h): loopback is interface 1 in every network namespace.
_LOOPBACK = 1
# The counters, beside the registers of `packet`.
_COUNTERS = 8


def counting_program(expressions: Sequence[str], layout: Layout) -> ProgramSpec:
    """The socket filter that counts what each expression matches on sockets of a layout, and returns 0.

    Its first map is a per-CPU array whose only value is an array of (packets, bytes), one for each expression. Packets
    that leave through loopback are not counted. Raises `FilterSyntaxError` and `FilterError`.
    """
    if not 1 <= len(expressions) <= _MOST:
        raise FilterError(f"one program counts 1 to {_MOST} expressions, not {len(expressions)}")
    values = Array(element=_COUNT, count=len(expressions))
    counters = MapSpec(
        type="percpu_array", name="counters", key_size=4, value_size=values.size, max_entries=1, value_type=values
    )
    pool = MapPool((counters,))
    roots = [_graph(expression, layout, pool) for expression in expressions]
    instructions = _emit(roots, layout, pool)
    return ProgramSpec(type="socket_filter", name="kbpf_count", instructions=instructions, maps=tuple(pool.maps))


def _graph(expression: str, layout: Layout, pool: MapPool) -> Successor:
    tree = parse(expression)
    condition: Condition = True
    if tree is not None:
        condition = Lowering(expression, layout, pool, _names("system"), "traffic", None).condition(tree)
    builder = Builder()
    return thread(builder.graph(condition), builder)


def _emit(roots: Sequence[Successor], layout: Layout, pool: MapPool) -> tuple[Instruction, ...]:
    code = Code()
    access = Headers(layout.start == "link" and layout.dlt == 1, may_end=False)
    writer = Writer(code, roots, "socket_filter", access, pool.memberships)
    code.move(CTX, 1)
    _find_counters(code)
    writer.prologue(length=True)
    for index, root in enumerate(roots):
        code.scope = index
        access.begin(code)
        if root is not False:
            writer.write(root)
            code.label(ACCEPT)
            _count(code, index)
            code.goto(REJECT)
        access.epilogue(code)
        code.label(REJECT)
    code.constant(0, 0)
    code.exit()
    return code.instructions()


def _find_counters(code: Code) -> None:
    """Leave if this is the outgoing half of loopback; else the counters into R8."""
    fields = STRUCTS["__sk_buff"].fields
    code.load(4, 2, CTX, fields["pkt_type"].offset)
    code.jump(ebpf.JNE, 2, PACKET_OUTGOING, "counted")
    code.load(4, 2, CTX, fields["ifindex"].offset)
    code.jump(ebpf.JNE, 2, _LOOPBACK, "counted")
    code.label("leave")
    code.constant(0, 0)
    code.exit()
    code.label("counted")
    key = code.reserve(4, 4)
    code.store_constant(4, key, 0)
    code.map(1, 0)
    code.address(2, key)
    code.call("map_lookup_elem")
    code.jump(ebpf.JEQ, 0, 0, "leave", wide=True)
    code.move(_COUNTERS, 0)


def _count(code: Code, index: int) -> None:
    """One packet, and its bytes."""
    at = index * _COUNT.size
    code.constant(2, 1)
    for register, offset in ((2, at), (LENGTH, at + 8)):
        code.add(Instruction(ebpf.STX | ebpf.ATOMIC | WIDTHS[8], _COUNTERS, register, offset, ebpf.ADD))
