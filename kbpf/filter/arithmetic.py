"""Arithmetic and relations, and the bytes of protocols in them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kbpf.errors import FilterError
from kbpf.filter import syntax
from kbpf.filter.links import IP, IP6
from kbpf.filter.values import Condition, Relation, Value, every, negated

if TYPE_CHECKING:
    from kbpf.filter.lower import Lowering

_OPERATORS = {
    "+": "add",
    "-": "sub",
    "*": "mul",
    "/": "div",
    "%": "mod",
    "&": "and",
    "|": "or",
    "^": "xor",
    "<<": "lsh",
    ">>": "rsh",
}
# The relation a classic jump has, and whether its outcome is the opposite.
_RELATIONS: dict[str, tuple[Relation, bool]] = {
    "=": ("eq", False),
    "!=": ("eq", True),
    ">": ("gt", False),
    "<=": ("gt", True),
    ">=": ("ge", False),
    "<": ("ge", True),
}
_NETWORK = frozenset(("ip", "ip6", "arp", "rarp", "atalk", "decnet", "sca", "lat", "moprc", "mopdl"))
_TRANSPORT = frozenset(("tcp", "udp", "sctp", "icmp", "igmp", "igrp", "pim", "vrrp", "carp"))


def reads_packet(term: syntax.Relation) -> bool:
    """Whether a relation has any protocol's bytes in it."""
    stack: list[syntax.Arithmetic | None] = [term.left, term.right]
    while stack:
        node = stack.pop()
        if isinstance(node, syntax.Accessor):
            return True
        if isinstance(node, syntax.Operation):
            stack += (node.left, node.right)
    return False


def relation(lowering: Lowering, term: syntax.Relation) -> Condition:
    """Both sides compared, where the protocols whose bytes are read are there."""
    conditions: list[Condition] = []
    left = _value(lowering, term.left, conditions)
    right = _value(lowering, term.right, conditions)
    kind, opposite = _RELATIONS[term.relation]
    compared = lowering.pool.compare(kind, left, right)
    return every(*conditions, negated(compared) if opposite else compared)


def _value(lowering: Lowering, root: syntax.Arithmetic, conditions: list[Condition]) -> Value:
    """The value of `root`; what must hold for its bytes to be there is appended to `conditions`."""
    pool = lowering.pool
    values: list[Value] = []
    # Nodes to be visited, and those whose operands are on the stack of values.
    stack: list[tuple[syntax.Arithmetic, bool]] = [(root, False)]
    while stack:
        node, ready = stack.pop()
        if isinstance(node, syntax.Constant):
            values.append(pool.const(node.value))
        elif isinstance(node, syntax.Length):
            values.append(pool.length)
        elif not ready:
            stack.append((node, True))
            if isinstance(node, syntax.Accessor):
                stack.append((node.offset, False))
            else:
                if node.right is not None:
                    stack.append((node.right, False))
                stack.append((node.left, False))
        elif isinstance(node, syntax.Accessor):
            values.append(_bytes(lowering, node, values.pop(), conditions))
        elif node.right is None:
            values.append(pool.neg(values.pop()))
        else:
            right = values.pop()
            try:
                values.append(pool.op(_OPERATORS[node.operator], values.pop(), right))
            except FilterError as error:
                raise lowering.fail(str(error), node.position) from None
    return values[0]


def _bytes(lowering: Lowering, node: syntax.Accessor, offset: Value, conditions: list[Condition]) -> Value:
    headers, pool, protocol = lowering.headers, lowering.pool, node.protocol
    if protocol == "link":
        at = headers.header
        if headers.layout.live and headers.layout.start != "link" and not headers.layout.link_header:
            raise FilterError(f"the link header cannot be read on {headers.describe()}")
    elif protocol in _NETWORK:
        conditions.append(lowering.protocol(protocol))
        at = headers.payload._replace(k=headers.payload.k + headers.network)
    elif protocol in _TRANSPORT:
        if headers.layout.live and headers.layout.start == "transport" and not headers.tunnel:
            # The header is at hand, whatever the version of IP.
            conditions.append(lowering.protocol(protocol))
        else:
            conditions.append(headers.carries(IP))
            conditions.append(lowering.protocol(protocol))
            conditions.append(lowering.first_fragment())
        at = headers.transport(4)
    elif protocol == "icmp6":
        if headers.layout.live and headers.layout.protocol is not None:
            conditions.append(lowering.protocol(protocol))
        else:
            conditions.append(headers.carries(IP6))
            conditions.append(headers.network_test(6, 1, 58))
        at = headers.transport(6)
    elif protocol == "radio":
        if headers.link != "IEEE802_11_RADIO":
            raise lowering.fail('"radio" is for captures with radio headers only', node.position)
        return pool.load(offset, 0, node.size)
    else:
        raise lowering.fail(f'the bytes of "{protocol}" cannot be indexed', node.position)
    if at.base is None:
        return pool.load(offset, at.k, node.size)
    return pool.load(pool.op("add", at.base, offset), at.k, node.size)
