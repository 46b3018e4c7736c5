"""Values and tests: pure functions of a packet, each made once and compared by identity.

A `Value` is a 32-bit word computed from the packet; a `Test` is a comparison of a (masked) value with a constant or
another value. The only effect that evaluating one can have is that the packet is rejected: a load
outside it, or a division by zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

from kbpf.errors import FilterError
from kbpf.isa.cbpf import AD_OFF, LL_OFF

M32 = 0xFFFFFFFF
#: Deepest arithmetic to the right of an operator: each level may hold a scratch word.
MAX_RIGHT = 64

#: Operators whose sides may be exchanged.
COMMUTATIVE = frozenset(("add", "mul", "and", "or", "xor"))


class Value:
    """A word: a ``const``, ``len``, a ``load``, or an operator's result.

    A load has its variable part in `left` (None: none), `k` is the constant offset and `size` the bytes.
    """

    __slots__ = ("k", "kind", "left", "right", "right_depth", "size", "top", "uses_x")

    uses_x: bool
    right_depth: int

    def __init__(
        self, kind: str, left: Value | None = None, right: Value | None = None, k: int = 0, size: int = 0
    ) -> None:
        self.kind = kind
        self.left = left
        self.right = right
        self.k = k
        self.size = size
        #: No value is larger.
        self.top = _top(kind, left, right, k, size)
        variable_right = right is not None and right.kind != "const"
        #: Computing it needs the index register.
        self.uses_x = (kind == "load" and left is not None) or variable_right or (left is not None and left.uses_x)
        self.right_depth = max(left.right_depth if left else 0, right.right_depth + 1 if right else 0)

    def __repr__(self) -> str:
        if self.kind == "const":
            return f"{self.k:#x}"
        if self.kind == "load":
            return f"[{'' if self.left is None else f'{self.left!r} + '}{self.k:#x}:{self.size}]"
        return f"({self.kind} {self.left!r} {self.right!r})"

    @property
    def never_faults(self) -> bool:
        """A constant, the length or metadata."""
        return self.kind in ("const", "len") or (self.kind == "load" and self.left is None and self.k >= AD_OFF)


def _top(kind: str, left: Value | None, right: Value | None, k: int, size: int) -> int:
    if kind == "const":
        return k
    if kind == "load":
        # Metadata words are read whole, whatever the size of the load.
        return M32 if left is None and k >= AD_OFF else (1 << 8 * size) - 1
    if left is None or right is None:
        return M32
    if kind == "and":
        return min(left.top, right.top)
    if kind == "add":
        return min(left.top + right.top, M32)
    if kind in ("or", "xor"):
        return (1 << max(left.top, right.top).bit_length()) - 1
    if kind == "rsh" and right.kind == "const":
        return left.top >> right.k
    if kind == "lsh" and right.top < 32:
        return min(left.top << right.top, M32)
    if kind == "mul":
        return min(left.top * right.top, M32)
    if kind in ("div", "mod"):
        return left.top
    return M32


class Chain(Value):
    """A ``chain``: the protocol at the end of a walk over extension headers (`kbpf.filter.chains`).

    The first of them is of the protocol `left` and at ``right + k``; the walk ends at the header that is `number`,
    or that none can follow. Behind IPv4 only authentication headers are walked over, behind IPv6 the `options` too.
    """

    __slots__ = ("number", "options")

    def __init__(self, first: Value, base: Value, k: int, number: int, options: bool) -> None:
        super().__init__("chain", first, base, k)
        self.number = number
        self.options = options
        self.top = 0xFF
        self.uses_x = True


Relation = Literal["eq", "gt", "ge"]


class Test:
    """``value & mask`` compared, unsigned, with `k`; or `value` with the value `other`."""

    __slots__ = ("k", "mask", "other", "relation", "value")
    # Not a test case, whatever pytest thinks of the name.
    __test__ = False

    def __init__(self, relation: Relation, value: Value, mask: int, k: int, other: Value | None) -> None:
        self.relation = relation
        self.value = value
        self.mask = mask
        self.k = k
        self.other = other

    def __repr__(self) -> str:
        mask = "" if self.mask == M32 else f" & {self.mask:#x}"
        right = f"{self.k:#x}" if self.other is None else repr(self.other)
        return f"<{self.value!r}{mask} {self.relation} {right}>"


class All:
    """Every part is true; parts are evaluated in order, and no further than the first false one."""

    __slots__ = ("parts",)

    def __init__(self, parts: tuple[Condition, ...]) -> None:
        self.parts = parts


class Any:
    """Some part is true, evaluated likewise."""

    __slots__ = ("parts",)

    def __init__(self, parts: tuple[Condition, ...]) -> None:
        self.parts = parts


class Negation:
    """The opposite."""

    __slots__ = ("part",)

    def __init__(self, part: Condition) -> None:
        self.part = part


class Choice:
    """`yes` where `test` is true, else `no`."""

    __slots__ = ("no", "test", "yes")

    def __init__(self, test: Test, yes: Condition, no: Condition) -> None:
        self.test = test
        self.yes = yes
        self.no = no


Condition: TypeAlias = "Test | All | Any | Negation | Choice | bool"


def every(*parts: Condition) -> Condition:
    """The conjunction, without parts that are surely true, cut at one that is surely false."""
    kept = _kept(parts, neutral=True)
    if len(kept) < 2:
        return kept[0] if kept else True
    return False if kept[0] is False else All(tuple(kept))


def some(*parts: Condition) -> Condition:
    """The disjunction, likewise."""
    kept = _kept(parts, neutral=False)
    if len(kept) < 2:
        return kept[0] if kept else False
    return True if kept[0] is True else Any(tuple(kept))


def _kept(parts: tuple[Condition, ...], neutral: bool) -> list[Condition]:
    """The parts but for those that are `neutral`, up to one that decides."""
    kept: list[Condition] = []
    for part in parts:
        if part is neutral:
            continue
        kept.append(part)
        if isinstance(part, bool):
            break
    return kept


def negated(part: Condition) -> Condition:
    """The opposite."""
    if isinstance(part, bool):
        return not part
    return part.part if isinstance(part, Negation) else Negation(part)


class Pool:
    """Makes values and tests, folding constants, so that equal ones are the same object.

    `loops` says whether what runs the code takes loops.
    """

    def __init__(self, loops: bool = False) -> None:
        self.loops = loops
        self._values: dict[tuple[object, ...], Value] = {}
        self._tests: dict[tuple[object, ...], Test] = {}
        self.length = Value("len")

    def _value(
        self, kind: str, left: Value | None = None, right: Value | None = None, k: int = 0, size: int = 0
    ) -> Value:
        key = (kind, left, right, k, size)
        value = self._values.get(key)
        if value is None:
            value = self._values[key] = Value(kind, left, right, k, size)
            if value.right_depth > MAX_RIGHT:
                raise FilterError("the arithmetic is nested too deeply to be evaluated")
        return value

    def const(self, k: int) -> Value:
        return self._value("const", k=k & M32)

    def lookup(self, words: tuple[Value, ...], members: Sequence[tuple[int, int]]) -> Condition | None:
        """Whether an address of several words is one of many (address, mask); None where tests have to say so."""
        return None

    def chain(self, first: Value, base: Value, k: int, number: int, options: bool) -> Value:
        """The protocol that ends a walk over headers; see `Chain`."""
        key = ("chain", first, base, k, number, options)
        value = self._values.get(key)
        if value is None:
            value = self._values[key] = Chain(first, base, k, number, options)
        return value

    def load(self, base: Value | None, k: int, size: int) -> Value:
        """The big-endian word of `size` bytes at ``base + k``."""
        if base is not None and base.kind == "const":
            k += base.k
            base = None
        if base is not None and base.kind == "add" and base.right is not None and base.right.kind == "const":
            assert base.left is not None
            # Only where the sum cannot wrap is it the same to add the constant later.
            if base.left.top + base.right.k + k < LL_OFF >> 1 and k < LL_OFF >> 1:
                k += base.right.k
                base = base.left
        return self._value("load", base, None, k & M32, size)

    def op(self, kind: str, left: Value, right: Value) -> Value:
        """An operator's result. Raises `FilterError` for a constant division by zero or shift out of range."""
        if right.kind == "const":
            if kind in ("div", "mod") and right.k == 0:
                raise FilterError("division by zero" if kind == "div" else "modulus by zero")
            if left.kind == "const":
                return self.const(_fold(kind, left.k, right.k))
            if kind in ("lsh", "rsh") and right.k > 31:
                raise FilterError("shift by more than 31 bits")
            if right.k == _NEUTRAL.get(kind) or (kind == "and" and left.top & right.k == left.top == _ones(left.top)):
                return left
            if kind == "and" and left.kind == "and" and left.right is not None and left.right.kind == "const":
                assert left.left is not None
                return self.op("and", left.left, self.const(left.right.k & right.k))
        elif left.kind == "const" and kind in COMMUTATIVE:
            return self.op(kind, right, left)
        return self._value(kind, left, right)

    def neg(self, left: Value) -> Value:
        return self.const(-left.k) if left.kind == "const" else self._value("neg", left)

    def test(self, relation: Relation, value: Value, k: int, mask: int = M32) -> Condition:
        """``value & mask`` against a constant."""
        while relation == "eq" and mask == M32 and value.right is not None and value.right.kind == "const":
            # (v + c) = k is v = (k - c), and likewise.
            assert value.left is not None
            if value.kind == "add":
                k = (k - value.right.k) & M32
            elif value.kind == "sub":
                k = (k + value.right.k) & M32
            elif value.kind == "xor":
                k ^= value.right.k
            else:
                break
            value = value.left
        if value.kind == "and" and value.right is not None and value.right.kind == "const":
            assert value.left is not None
            mask &= value.right.k
            value = value.left
        if mask & _ones(value.top) == _ones(value.top):
            mask = M32
        if value.kind == "const" or not mask:
            # What a mask leaves nothing of need not be read.
            return _compare(relation, value.k & mask, k)
        key = (relation, value, mask, k)
        test = self._tests.get(key)
        if test is None:
            test = self._tests[key] = Test(relation, value, mask, k, None)
        return test

    def compare(self, relation: Relation, left: Value, right: Value) -> Condition:
        """Two values against each other."""
        if right.kind == "const":
            return self.test(relation, left, right.k)
        if left.kind == "const":
            if relation == "eq":
                return self.test("eq", right, left.k)
            return negated(self.test("ge" if relation == "gt" else "gt", right, left.k))
        key = (relation, left, right)
        test = self._tests.get(key)
        if test is None:
            test = self._tests[key] = Test(relation, left, M32, 0, right)
        return test


# Right operands that change nothing.
_NEUTRAL = {"add": 0, "sub": 0, "or": 0, "xor": 0, "lsh": 0, "rsh": 0, "mul": 1, "div": 1, "and": M32}


def _ones(k: int) -> int:
    return (1 << k.bit_length()) - 1


def _fold(kind: str, left: int, right: int) -> int:
    if kind == "add":
        return left + right
    if kind == "sub":
        return left - right
    if kind == "mul":
        return left * right
    if kind == "div":
        return left // right
    if kind == "mod":
        return left % right
    if kind == "and":
        return left & right
    if kind == "or":
        return left | right
    if kind == "xor":
        return left ^ right
    if right > 31:
        return 0
    return left << right if kind == "lsh" else left >> right


def _compare(relation: Relation, left: int, right: int) -> bool:
    if relation == "eq":
        return left == right
    return left > right if relation == "gt" else left >= right
