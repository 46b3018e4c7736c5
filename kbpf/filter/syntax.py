"""The typed tree of an expression: what was said, not yet what it means on some link."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Qualifiers:
    """What stands before an address, port or protocol: ``tcp dst port`` is ("tcp", "dst", "port")."""

    protocol: str = ""
    #: "", src, dst, src or dst ("or"), src and dst ("and"), addr1 to addr4, ra, ta.
    direction: str = ""
    #: "", host, net, port, portrange, proto, protochain, gateway.
    type: str = ""


@dataclass(frozen=True)
class Name:
    """A name, to be looked up as its qualifiers say."""

    text: str


@dataclass(frozen=True)
class Number:
    """A bare number."""

    value: int


@dataclass(frozen=True)
class Ipv4:
    """One to four numbers with dots, perhaps with a prefix length or a mask."""

    text: str
    prefix: int | None = None
    mask: str | None = None


@dataclass(frozen=True)
class Ipv6:
    """128 bits, perhaps with a prefix length."""

    value: int
    text: str
    prefix: int | None = None


@dataclass(frozen=True)
class Mac:
    """48 bits."""

    value: int


@dataclass(frozen=True)
class Arcnet:
    """An ARCNET address, ``$`` and one byte."""

    value: int


Operand: TypeAlias = "Name | Number | Ipv4 | Ipv6 | Mac | Arcnet"


@dataclass(frozen=True)
class Match:
    """Qualifiers and what they qualify: ``dst port 80``."""

    qualifiers: Qualifiers
    operand: Operand
    position: int


@dataclass(frozen=True)
class Group:
    """Alternatives of one kind with the same qualifiers; made when the tree is given its meaning."""

    matches: tuple[Match, ...]


@dataclass(frozen=True)
class Protocol:
    """A protocol's name alone: ``tcp``."""

    name: str
    position: int


@dataclass(frozen=True)
class Special:
    """Any other primitive: ``vlan 5``, ``less 64``, ``ip broadcast``; `arguments` are as the parser's tables say."""

    name: str
    position: int
    protocol: str = ""
    arguments: tuple[int | str, ...] = ()


@dataclass(frozen=True)
class Constant:
    """A number in arithmetic."""

    value: int


@dataclass(frozen=True)
class Length:
    """``len``."""


@dataclass(frozen=True, eq=False)
class Accessor:
    """``tcp[offset:size]``."""

    protocol: str
    offset: Arithmetic
    size: int
    position: int


@dataclass(frozen=True, eq=False)
class Operation:
    """An arithmetic operator; ``neg`` has no right side."""

    operator: str
    left: Arithmetic
    right: Arithmetic | None
    position: int


Arithmetic: TypeAlias = "Constant | Length | Accessor | Operation"


@dataclass(frozen=True, eq=False)
class Relation:
    """``left relation right``; relations are =, !=, <, <=, >, >=."""

    relation: str
    left: Arithmetic
    right: Arithmetic
    position: int


@dataclass(frozen=True, eq=False)
class Not:
    """Negation."""

    term: Expression


@dataclass(frozen=True, eq=False)
class Every:
    """A chain of ``and``."""

    terms: tuple[Expression, ...]


@dataclass(frozen=True, eq=False)
class Some:
    """A chain of ``or``."""

    terms: tuple[Expression, ...]


Primitive: TypeAlias = "Match | Group | Protocol | Special | Relation"
Expression: TypeAlias = "Primitive | Not | Every | Some"
