"""Tokens to the typed tree, with pcap-filter(7)'s grammar as libpcap parses it.

What to know of the language: ``and`` and ``or`` bind alike, to the left; a bare address, port or name
after them takes the qualifiers of what stood before (``port 80 or 443``), also inside parentheses; ``%`` and ``^``
have no precedence of their own and take everything to their right. The parser keeps its own
stack of frames, one a parenthesis or bracket, so that nesting is bounded by memory alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from kbpf.errors import FilterSyntaxError
from kbpf.filter import syntax
from kbpf.filter.lexer import Token, tokens
from kbpf.filter.syntax import Qualifiers

_DIRECTIONS = frozenset(["src", "dst", "addr1", "addr2", "addr3", "addr4", "ra", "ta"])
_TYPES = frozenset(["host", "net", "port", "portrange"])
_LATER_TYPES = frozenset(["proto", "protochain", "gateway"])
_HEADS = _DIRECTIONS | _TYPES | _LATER_TYPES
_WIRELESS = frozenset(["type", "subtype", "dir"])
_OPERANDS = frozenset(["name", "ipv4", "ipv6", "mac", "arcnet"])
_RELATIONS = frozenset(["=", "!=", "<", "<=", ">", ">="])
_PRECEDENCE = {"|": 1, "&": 2, "<<": 3, ">>": 3, "+": 4, "-": 4, "*": 5, "/": 5, "neg": 6}
# These two have no precedence: the parser always goes on reading.
_GREEDY = frozenset("%^")
_ARITHMETIC = frozenset(_PRECEDENCE) - {"neg"} | _GREEDY
_FOREIGN = {"pflog": "PFLOG", "atm": "ATM", "ss7": "SS7"}

#: Deepest nesting of parentheses, brackets and pending operators; libpcap's parser ends at 10,000 symbols.
MAX_DEPTH = 20_000
#: Most tokens of an expression.
MAX_TOKENS = 150_000

# What an operand may be: nothing but arithmetic, one name or number that takes the qualifiers before it, or any `id` of
# the grammar, which may be negated or parenthesised.
_NO_ID, _PLAIN_ID, _ANY_ID = range(3)


class _Id(NamedTuple):
    """What ``(a or b)`` after a qualifier comes to."""

    node: syntax.Expression


class _Bool(NamedTuple):
    node: syntax.Expression


class _Arith(NamedTuple):
    """Arithmetic; `bare` is the token of a plain number, which may also be an address or a port."""

    node: syntax.Arithmetic
    bare: Token | None = None


class _Frame:
    """A parenthesis, a bracket, or the whole expression."""

    __slots__ = (
        "accessor",
        "arithmetic",
        "chain",
        "connective",
        "head",
        "id_first",
        "ids",
        "negations",
        "opener",
        "operators",
        "qualifiers",
        "relation",
        "terms",
        "values",
    )

    def __init__(
        self, opener: Token, qualifiers: Qualifiers | None, ids: int, terms: bool, arithmetic: bool = False
    ) -> None:
        self.opener = opener
        self.arithmetic = arithmetic
        self.qualifiers = qualifiers
        self.ids = ids
        self.terms = terms
        self.id_first = False
        self.accessor: Token | None = None
        self.chain: list[syntax.Expression] = []
        self.connective = ""
        self.start()

    def start(self) -> None:
        """Before an operand of and/or."""
        self.head: Qualifiers | None = None
        self.negations = 0
        self.values: list[_Arith] = []
        self.operators: list[Token] = []
        self.relation: tuple[Token, syntax.Arithmetic] | None = None

    @property
    def arithmetic_only(self) -> bool:
        return self.arithmetic or self.relation is not None or bool(self.operators)


def parse(expression: str) -> syntax.Expression | None:
    """The tree of `expression`, None where it is empty. Raises `FilterSyntaxError`."""
    return _Parser(expression).parse()


class _Parser:
    def __init__(self, expression: str) -> None:
        self.expression = expression
        self.tokens: Iterator[Token] = tokens(expression)
        self.token = next(self.tokens)
        self.frames: list[_Frame] = []
        self.left = MAX_TOKENS

    def parse(self) -> syntax.Expression | None:
        if self.token.kind == "end":
            return None
        self.frames.append(_Frame(self.token, None, _NO_ID, True))
        while True:
            value = self._operand()
            # A closing parenthesis or bracket hands an operand to the frame around it.
            while value is not None:
                if not self._after(value):
                    break
                if self.token.kind == "end":
                    return self._finish()
                value = self._close()

    # Helpers

    def _advance(self) -> Token:
        token = self.token
        self.token = next(self.tokens)
        self.left -= 1
        if self.left < 0:
            raise FilterSyntaxError(f"more than {MAX_TOKENS} words", self.expression, token.position)
        return token

    def _fail(self, expected: str, token: Token | None = None) -> FilterSyntaxError:
        token = token or self.token
        found = "the expression ends" if token.kind == "end" else f'found "{token.text[:40]}"'
        return FilterSyntaxError(f"expected {expected}, {found}", self.expression, token.position)

    def _take(self, kind: str, expected: str) -> Token:
        if self.token.kind != kind:
            raise self._fail(expected)
        return self._advance()

    # Operands

    def _operand(self) -> _Arith | _Bool | _Id | None:
        """Read one operand of the innermost frame; None after what only opens or prefixes one."""
        frame = self.frames[-1]
        token = self.token
        kind = token.kind
        if kind == "(":
            self._advance()
            self._open(frame, token)
            return None
        if kind == "number":
            return _Arith(syntax.Constant(token.value), self._advance())
        if frame.head is not None:
            return self._after_head(frame)
        if kind == "-" and (frame.terms or frame.arithmetic_only):
            self._operator(frame, self._advance()._replace(kind="neg"))
            return None
        if kind == "len" and (frame.terms or frame.arithmetic_only):
            self._advance()
            return _Arith(syntax.Length())
        if kind == "protocol" and (frame.terms or frame.arithmetic_only):
            return self._protocol(frame)
        if frame.arithmetic_only:
            raise self._fail("a number, len, a protocol's bytes or a parenthesis")
        if kind == "not":
            self._advance()
            frame.negations += 1
            if frame.ids:
                frame.ids = _ANY_ID
            return None
        if kind in _OPERANDS and frame.ids:
            if frame.qualifiers is None:
                raise self._fail("a primitive: nothing before qualifies this")
            return _Id(self._match(frame.qualifiers).node)
        if not frame.terms:
            raise self._fail("an address, a number or a name")
        return self._primitive(frame, token)

    def _after_head(self, frame: _Frame) -> _Bool | None:
        """What follows qualifiers, other than a number or a parenthesis."""
        assert frame.head is not None
        if self.token.kind == "not":
            self._advance()
            frame.negations += 1
            return None
        if self.token.kind not in _OPERANDS:
            raise self._fail(_wanted(frame.head))
        return self._match(frame.head)

    def _open(self, frame: _Frame, token: Token) -> None:
        if frame.arithmetic_only:
            inner = _Frame(token, None, _NO_ID, False, arithmetic=True)
        elif frame.head is not None:
            inner = _Frame(token, frame.head, _PLAIN_ID, False)
        else:
            ids = _PLAIN_ID if frame.ids == _ANY_ID else _NO_ID
            inner = _Frame(token, frame.qualifiers, ids, frame.terms)
        self._push(inner)

    def _push(self, frame: _Frame) -> None:
        if len(self.frames) > MAX_DEPTH:
            raise FilterSyntaxError("nested too deeply", self.expression, frame.opener.position)
        self.frames.append(frame)

    def _protocol(self, frame: _Frame) -> _Arith | _Bool | None:
        token = self._advance()
        kind = self.token.kind
        if kind == "[":
            inner = _Frame(self._advance(), None, _NO_ID, False, arithmetic=True)
            inner.accessor = token
            self._push(inner)
            return None
        if frame.arithmetic_only:
            raise self._fail('"["')
        if kind in _HEADS:
            self._qualifiers(frame, token.text)
            return None
        if kind in ("broadcast", "multicast"):
            return self._special(self._advance().kind, token, token.text)
        if kind in _WIRELESS:
            return self._wireless(self._advance())
        frame.qualifiers = None
        return _Bool(syntax.Protocol(token.text, token.position))

    def _primitive(self, frame: _Frame, token: Token) -> _Bool | None:
        kind = token.kind
        if kind in _HEADS:
            self._qualifiers(frame, "")
            return None
        if kind in _FOREIGN:
            raise FilterSyntaxError(
                f'"{token.text}" is for {_FOREIGN[kind]} captures only', self.expression, token.position
            )
        if kind not in _SPECIALS:
            raise self._fail("a primitive")
        self._advance()
        if kind in _WIRELESS:
            return self._wireless(token)
        return self._special(kind, token, "")

    def _special(self, kind: str, token: Token, protocol: str) -> _Bool:
        arguments: list[int | str] = []
        form = _SPECIALS[kind]
        if form == "number":
            arguments.append(self._take("number", "a number").value)
        elif form == "optional":
            number = self._optional_number()
            if number is not None:
                arguments.append(number)
        elif kind == "byte":
            arguments.append(self._take("number", "a number").value)
            if self.token.kind not in ("&", "|", "<", ">", "="):
                raise self._fail("one of & | < > =")
            arguments.append(self._advance().kind)
            arguments.append(self._take("number", "a number").value)
        elif kind == "llc" and (self.token.kind == "name" or self.token.text == "rnr"):
            arguments.append(self._advance().text.lower())
        self.frames[-1].qualifiers = None
        return _Bool(syntax.Special(kind, token.position, protocol, tuple(arguments)))

    def _wireless(self, token: Token) -> _Bool:
        arguments: list[int | str] = [self._number_or_name()]
        if token.kind == "type" and self.token.kind == "subtype":
            self._advance()
            arguments.append(self._number_or_name())
        elif token.kind == "subtype" and not isinstance(arguments[0], str):
            raise FilterSyntaxError('expected a name after "subtype"', self.expression, token.position)
        self.frames[-1].qualifiers = None
        return _Bool(syntax.Special(token.kind, token.position, "", tuple(arguments)))

    def _number_or_name(self) -> int | str:
        if self.token.kind == "number":
            return self._advance().value
        return self._take("name", "a number or a name").text

    def _optional_number(self) -> int | None:
        depth = 0
        while self.token.kind == "(":
            self._advance()
            depth += 1
        if not depth and self.token.kind != "number":
            return None
        number = self._take("number", "a number").value
        for _ in range(depth):
            self._take(")", '")"')
        return number

    def _qualifiers(self, frame: _Frame, protocol: str) -> None:
        direction = kind = ""
        if self.token.kind in _DIRECTIONS:
            direction = self._advance().kind
            if direction in ("src", "dst") and self.token.kind in ("and", "or"):
                both = self._advance().kind
                self._take("dst" if direction == "src" else "src", "the other direction")
                direction = both
            if self.token.kind in _TYPES:
                kind = self._advance().kind
        else:
            kind = self._advance().kind
        frame.head = Qualifiers(protocol, direction, kind)

    def _match(self, qualifiers: Qualifiers) -> _Bool:
        token = self._advance()
        operand: syntax.Operand
        if token.kind == "name":
            operand = syntax.Name(token.text)
        elif token.kind == "mac":
            operand = syntax.Mac(token.value)
        elif token.kind == "arcnet":
            operand = syntax.Arcnet(token.value)
        elif token.kind == "ipv6":
            operand = syntax.Ipv6(token.value, token.text, self._prefix())
        else:
            prefix = self._prefix()
            mask = None
            if prefix is None and self.token.kind == "mask":
                self._advance()
                mask = self._take("ipv4", "a mask with dots").text
            operand = syntax.Ipv4(token.text, prefix, mask)
        self.frames[-1].qualifiers = qualifiers
        return _Bool(syntax.Match(qualifiers, operand, token.position))

    def _prefix(self) -> int | None:
        if self.token.kind != "/":
            return None
        self._advance()
        return self._take("number", "a prefix length").value

    # After an operand

    def _after(self, value: _Arith | _Bool | _Id) -> bool:
        """Take in an operand and what follows it; True if that closes the frame."""
        frame = self.frames[-1]
        kind = self.token.kind
        if isinstance(value, _Arith):
            frame.values.append(value)
            if kind in _ARITHMETIC and frame.head is None and (frame.terms or frame.arithmetic_only or not frame.chain):
                self._reduce(frame, kind)
                self._operator(frame, self._advance())
                return False
            if kind in _RELATIONS and frame.head is None and frame.relation is None and frame.terms:
                self._reduce(frame, "")
                frame.relation = (self._advance(), frame.values.pop().node)
                return False
            if frame.accessor is not None:
                self._reduce(frame, "")
                if kind in ("]", ":"):
                    return True
                raise self._fail('"]", ":" or an operator')
            if not self._relate(frame, kind):
                return True
        else:
            if frame.arithmetic_only:
                raise self._fail("arithmetic", frame.opener)
            self._term(frame, value.node, isinstance(value, _Id) or (frame.head is not None and not frame.terms))
        if kind in ("and", "or"):
            self._connect(frame, kind)
            return False
        if kind == "end" if len(self.frames) == 1 else kind == ")":
            return True
        raise self._fail('"and", "or"' + (" or the end" if len(self.frames) == 1 else ' or ")"'))

    def _operator(self, frame: _Frame, operator: Token) -> None:
        if len(frame.operators) > MAX_DEPTH:
            raise FilterSyntaxError("nested too deeply", self.expression, operator.position)
        frame.operators.append(operator)

    def _reduce(self, frame: _Frame, following: str) -> None:
        """Apply the operators on the stack that bind before `following`."""
        while frame.operators:
            operator = frame.operators[-1]
            if following in _GREEDY or (following and operator.kind in _GREEDY):
                return
            if following and _PRECEDENCE[following] > _PRECEDENCE.get(operator.kind, 0):
                return
            frame.operators.pop()
            right = frame.values.pop().node
            if operator.kind == "neg":
                node = syntax.Operation("neg", right, None, operator.position)
            else:
                left = frame.values.pop().node
                node = syntax.Operation(operator.kind, left, right, operator.position)
            frame.values.append(_Arith(node))

    def _relate(self, frame: _Frame, kind: str) -> bool:
        """Finish a relation, or make an address of a bare number. False if the frame is ``(arithmetic)``."""
        self._reduce(frame, "")
        value = frame.values[-1]
        if frame.relation is not None:
            token, left = frame.relation
            frame.qualifiers = None
            self._term(frame, syntax.Relation(token.kind, left, value.node, token.position), False)
            return True
        alone = kind == ")" and not frame.chain and not frame.negations and frame.head is None and len(self.frames) > 1
        if alone:
            return False
        qualifiers = frame.head or (frame.qualifiers if frame.ids else None)
        if value.bare is None or qualifiers is None:
            raise self._fail("a comparison" if frame.terms else '")"')
        frame.qualifiers = qualifiers
        match = syntax.Match(qualifiers, syntax.Number(value.bare.value), value.bare.position)
        self._term(frame, match, frame.head is None)
        return True

    def _term(self, frame: _Frame, node: syntax.Expression, is_id: bool) -> None:
        if frame.head is not None:
            frame.qualifiers = frame.head
            is_id = False
        if not frame.chain:
            frame.id_first = is_id
        frame.chain.append(syntax.Not(node) if frame.negations % 2 else node)
        frame.start()

    def _connect(self, frame: _Frame, connective: str) -> None:
        if frame.connective and connective != frame.connective:
            frame.chain = [_joined(frame)]
        frame.connective = connective
        self._advance()
        # `(a or b` with bare a is a list of operands: only operands can follow.
        frame.ids = _ANY_ID
        if frame.id_first:
            frame.terms = False

    def _close(self) -> _Arith | _Bool | _Id:
        """The closing token of the innermost frame, and what the frame is worth to the one around it."""
        frame = self.frames.pop()
        if frame.accessor is not None:
            return self._accessor(frame, frame.accessor)
        self._advance()
        outer = self.frames[-1]
        if frame.values:
            if outer.head is not None and frame.values[0].bare is None:
                raise self._fail(_wanted(outer.head), frame.opener)
            return frame.values[0]
        if frame.id_first:
            if outer.head is None and outer.ids != _ANY_ID:
                raise self._fail("a primitive", frame.opener)
            return _Id(_joined(frame))
        if outer.head is not None or not outer.terms:
            raise self._fail("an address, a number or a name", frame.opener)
        return _Bool(_joined(frame))

    def _accessor(self, frame: _Frame, protocol: Token) -> _Arith:
        size = 1
        if self.token.kind == ":":
            self._advance()
            size = self._take("number", "1, 2 or 4").value
            if size not in (1, 2, 4):
                raise FilterSyntaxError("data sizes are 1, 2 and 4", self.expression, protocol.position)
        self._take("]", '"]"')
        return _Arith(syntax.Accessor(protocol.text, frame.values[0].node, size, protocol.position))

    def _finish(self) -> syntax.Expression:
        return _joined(self.frames[0])


def _joined(frame: _Frame) -> syntax.Expression:
    if len(frame.chain) == 1:
        return frame.chain[0]
    return (syntax.Every if frame.connective == "and" else syntax.Some)(tuple(frame.chain))


def _wanted(qualifiers: Qualifiers) -> str:
    what = {
        "port": "a port number or name",
        "portrange": "a range of ports",
        "net": "a network",
        "proto": "a protocol number or name",
        "protochain": "a protocol number or name",
    }.get(qualifiers.type, "an address or a host name")
    last = qualifiers.type or qualifiers.direction
    return f'{what} after "{last}"'


# Other primitives, and what they take.
_SPECIALS = {
    **dict.fromkeys(("broadcast", "multicast", "inbound", "outbound", "pppoed", "llc", "byte"), ""),
    **dict.fromkeys(("less", "greater", "ifindex"), "number"),
    **dict.fromkeys(("vlan", "mpls", "pppoes", "geneve", "vxlan"), "optional"),
    **dict.fromkeys(_WIRELESS, ""),
}
