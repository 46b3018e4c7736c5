"""The typed tree of an expression: what was said, not yet what it means on some link.

Nodes are named tuples, because a process that compiles one filter would spend most of its time making dataclasses.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias


class Qualifiers(NamedTuple):
    """What stands before an address, port or protocol: ``tcp dst port`` is ("tcp", "dst", "port")."""

    protocol: str = ""
    #: "", src, dst, src or dst ("or"), src and dst ("and"), addr1 to addr4, ra, ta.
    direction: str = ""
    #: "", host, net, port, portrange, proto, protochain, gateway.
    type: str = ""


class Name(NamedTuple):
    """A name, to be looked up as its qualifiers say."""

    text: str


class Number(NamedTuple):
    """A bare number."""

    value: int


class Ipv4(NamedTuple):
    """One to four numbers with dots, perhaps with a prefix length or a mask."""

    text: str
    prefix: int | None = None
    mask: str | None = None


class Ipv6(NamedTuple):
    """128 bits, perhaps with a prefix length."""

    value: int
    text: str
    prefix: int | None = None


class Mac(NamedTuple):
    """48 bits."""

    value: int


class Arcnet(NamedTuple):
    """An ARCNET address, ``$`` and one byte."""

    value: int


Operand: TypeAlias = "Name | Number | Ipv4 | Ipv6 | Mac | Arcnet"


class Match(NamedTuple):
    """Qualifiers and what they qualify: ``dst port 80``."""

    qualifiers: Qualifiers
    operand: Operand
    position: int


class Group(NamedTuple):
    """Alternatives of one kind with the same qualifiers; made when the tree is given its meaning.

    `settled`: another one of that kind was asked before and was false, so the bytes that decide have been read.
    """

    matches: tuple[Match, ...]
    settled: bool = False


class Protocol(NamedTuple):
    """A protocol's name alone: ``tcp``."""

    name: str
    position: int


class Special(NamedTuple):
    """Any other primitive: ``vlan 5``, ``less 64``, ``ip broadcast``; `arguments` are as the parser's tables say."""

    name: str
    position: int
    protocol: str = ""
    arguments: tuple[int | str, ...] = ()


class Constant(NamedTuple):
    """A number in arithmetic."""

    value: int


class Length(NamedTuple):
    """``len``."""


class Accessor(NamedTuple):
    """``tcp[offset:size]``."""

    protocol: str
    offset: Arithmetic
    size: int
    position: int


class Operation(NamedTuple):
    """An arithmetic operator; ``neg`` has no right side."""

    operator: str
    left: Arithmetic
    right: Arithmetic | None
    position: int


Arithmetic: TypeAlias = "Constant | Length | Accessor | Operation"


class Relation(NamedTuple):
    """``left relation right``; relations are =, !=, <, <=, >, >=."""

    relation: str
    left: Arithmetic
    right: Arithmetic
    position: int


class Not(NamedTuple):
    """Negation."""

    term: Expression


class Every(NamedTuple):
    """A chain of ``and``."""

    terms: tuple[Expression, ...]


class Some(NamedTuple):
    """A chain of ``or``."""

    terms: tuple[Expression, ...]


Primitive: TypeAlias = "Match | Group | Protocol | Special | Relation"
Expression: TypeAlias = "Primitive | Not | Every | Some"
