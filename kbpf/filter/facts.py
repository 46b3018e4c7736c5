"""What is known about values on a path: intervals, excluded values and bits."""

from __future__ import annotations

from typing import NamedTuple

from kbpf.filter.values import M32, Test, Value

_NONE: frozenset[int] = frozenset()


class Info(NamedTuple):
    """A value known to be within `low` and `high`, none of `excluded`, and equal to `bits` where `known` has ones."""

    low: int = 0
    high: int = M32
    excluded: frozenset[int] = _NONE
    known: int = 0
    bits: int = 0


#: Facts: by a value, a masked value, or two values compared, what is known. That it is there says it was evaluated.
Key = tuple[object, ...]
Facts = dict["Value | Key", Info]

_TRUE, _FALSE = Info(1, 1), Info(0, 0)


def subject(test: Test) -> Value | Key:
    """What a test learns about."""
    if test.other is not None:
        return (test.relation, test.value, test.other)
    return test.value if test.mask == M32 else (test.value, test.mask)


def decide(test: Test, facts: Facts) -> bool | None:
    """The outcome of a test where the facts tell."""
    key = subject(test)
    info = facts.get(key)
    if test.other is not None:
        return None if info is None else info is _TRUE
    if info is not None:
        outcome = _decide(test, info)
        if outcome is not None:
            return outcome
    if test.mask == M32:
        return _decide(test, Info(0, test.value.top)) if info is None else None
    if test.relation == "eq" and test.k & ~test.mask:
        return False
    base = facts.get(test.value)
    if base is None:
        return None
    if base.low == base.high:
        return _compare(test, base.low & test.mask)
    if base.known & test.mask == test.mask:
        return _compare(test, base.bits & test.mask)
    if test.relation == "eq":
        if (base.bits ^ test.k) & base.known & test.mask:
            return False
        # A prefix: an interval.
        span = _span(test.value, test.mask)
        if span is not None and (base.high < test.k or base.low > test.k + span):
            return False
        if span is not None and base.low >= test.k and base.high <= test.k + span:
            return True
    return None


def _compare(test: Test, value: int) -> bool:
    if test.relation == "eq":
        return value == test.k
    return value > test.k if test.relation == "gt" else value >= test.k


def _decide(test: Test, info: Info) -> bool | None:
    k = test.k
    if test.relation == "eq":
        if k < info.low or k > info.high or k in info.excluded or (k ^ info.bits) & info.known:
            return False
        return True if info.low == info.high else None
    bound = k + 1 if test.relation == "gt" else k
    if info.low >= bound:
        return True
    return False if info.high < bound else None


def _span(value: Value, mask: int) -> int | None:
    """For a mask of leading ones within the value's width, the largest number below it; else None."""
    width = (1 << value.top.bit_length()) - 1
    low = width & ~mask
    return low if low & (low + 1) == 0 else None


def learn(facts: Facts, test: Test, outcome: bool) -> Facts:
    """The facts after a test."""
    key = subject(test)
    facts = dict(facts)
    if test.other is not None:
        facts[key] = _TRUE if outcome else _FALSE
        facts.setdefault(test.value, Info(0, test.value.top))
        facts.setdefault(test.other, Info(0, test.other.top))
        return facts
    value, mask, k = test.value, test.mask, test.k
    old = facts.get(key) or Info(0, value.top & mask)
    facts[key] = _refined(old, test, outcome)
    if mask == M32:
        return facts
    base = facts.get(value) or Info(0, value.top)
    if test.relation == "eq":
        if outcome:
            base = base._replace(known=base.known | mask, bits=base.bits & ~mask | k & mask)
            span = _span(value, mask)
            if span is not None:
                base = base._replace(low=max(base.low, k), high=min(base.high, k | span))
        elif mask & (mask - 1) == 0:
            base = base._replace(known=base.known | mask, bits=base.bits & ~mask | (k & mask ^ mask))
    facts[value] = base
    return facts


def _refined(info: Info, test: Test, outcome: bool) -> Info:
    k = test.k
    low, high = info.low, info.high
    if test.relation == "eq":
        if outcome:
            return Info(k, k, _NONE, M32, k)
        if k == low:
            return info._replace(low=low + 1)
        if k == high:
            return info._replace(high=high - 1)
        return info._replace(excluded=info.excluded | {k})
    bound = k + 1 if test.relation == "gt" else k
    return info._replace(low=max(low, bound)) if outcome else info._replace(high=min(high, bound - 1))


def meet(left: Facts, right: Facts) -> Facts:
    """What holds on both paths."""
    if left is right:
        return left
    if len(right) < len(left):
        left, right = right, left
    met: Facts = {}
    for key, one in left.items():
        other = right.get(key)
        if other is None:
            continue
        if one is other or one == other:
            met[key] = one
            continue
        if isinstance(key, tuple) and len(key) == 3:
            continue
        # A value that is excluded on one path may be out of the interval on the other.
        excluded = frozenset(
            [k for k in one.excluded if k in other.excluded or not other.low <= k <= other.high]
            + [k for k in other.excluded if not one.low <= k <= one.high]
        )
        known = one.known & other.known & ~(one.bits ^ other.bits)
        met[key] = Info(min(one.low, other.low), max(one.high, other.high), excluded, known, one.bits & known)
    return met
