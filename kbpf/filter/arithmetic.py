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
# What an operator's right side may begin with.
_DIVISORS = (range(1, 1 << 32), "division by zero")
_SHIFTS = (range(32), "shift by more than 31 bits")
_LIMITED = {"/": _DIVISORS, "%": _DIVISORS, "<<": _SHIFTS, ">>": _SHIFTS}
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
    left, left_there = _value(lowering, term.left)
    right, right_there = _value(lowering, term.right)
    kind, opposite = _RELATIONS[term.relation]
    compared = lowering.pool.compare(kind, left, right)
    return every(left_there, right_there, negated(compared) if opposite else compared)


def _value(lowering: Lowering, root: syntax.Arithmetic) -> tuple[Value, Condition]:
    """The value of `root`, and the condition that the protocols whose bytes it begins with are there.

    Of an operator's right side no protocol is tested: ``1 + tcp[0] = 5`` reads those bytes of any packet, as it
    does in libpcap. (The manual promises the test for every index.)
    """
    pool = lowering.pool
    values: list[tuple[Value, Condition]] = []
    # Nodes to be visited, and those whose operands are on the stack of values.
    stack: list[tuple[syntax.Arithmetic, bool]] = [(root, False)]
    while stack:
        node, ready = stack.pop()
        if isinstance(node, syntax.Constant):
            values.append((pool.const(node.value), True))
        elif isinstance(node, syntax.Length):
            values.append((pool.length, True))
        elif not ready:
            stack.append((node, True))
            if isinstance(node, syntax.Accessor):
                stack.append((node.offset, False))
            else:
                if node.right is not None:
                    stack.append((node.right, False))
                stack.append((node.left, False))
        elif isinstance(node, syntax.Accessor):
            offset, there = values.pop()
            values.append(_bytes(lowering, node, offset, there))
        elif node.right is None:
            value, there = values.pop()
            values.append((pool.neg(value), there))
        else:
            right, _ = values.pop()
            left, there = values.pop()
            try:
                values.append((pool.op(_OPERATORS[node.operator], left, right), there))
            except FilterError as error:
                raise lowering.fail(str(error), node.position) from None
            _check_right(lowering, node, node.right)
    return values[0]


def _check_right(lowering: Lowering, node: syntax.Operation, right: syntax.Arithmetic) -> None:
    """Refuse a right side as libpcap does: by the number that it begins with, even where that is an index."""
    if node.operator not in _LIMITED:
        return
    first = right
    while isinstance(first, (syntax.Operation, syntax.Accessor)):
        first = first.left if isinstance(first, syntax.Operation) else first.offset
    fits, what = _LIMITED[node.operator]
    if isinstance(first, syntax.Constant) and first.value not in fits:
        index = "" if first is right else f' (what follows "{node.operator}" cannot begin with {first.value})'
        raise lowering.fail(what + index, node.position)


def _bytes(
    lowering: Lowering, node: syntax.Accessor, offset: Value, offset_there: Condition
) -> tuple[Value, Condition]:
    headers, pool, protocol = lowering.headers, lowering.pool, node.protocol
    conditions = [offset_there]
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
            # The index's own protocols are asked for in between, as libpcap does: a packet may end before them.
            conditions.insert(0, headers.carries(IP))
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
        return pool.load(offset, 0, node.size), offset_there
    else:
        raise lowering.fail(f'the bytes of "{protocol}" cannot be indexed', node.position)
    start = offset if at.base is None else pool.op("add", at.base, offset)
    return pool.load(start, at.k, node.size), every(*conditions)
