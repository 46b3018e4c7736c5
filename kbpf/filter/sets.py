"""Membership of a word in a set of addresses, networks or ports: a chain of tests, or a balanced tree of them."""

from __future__ import annotations

from collections.abc import Sequence

from kbpf.filter.values import M32, Choice, Condition, Pool, Test, Value, every, negated, some

#: Up to this many members are tested one after the other; it is also the most that a leaf of the tree holds.
CHAIN = 8


def member(pool: Pool, word: Value, members: Sequence[tuple[int, int]]) -> Condition:
    """Whether `word` is in one of the closed intervals."""
    if len(members) <= CHAIN:
        return some(*(within(pool, word, low, high) for low, high in members))
    return _tree(pool, word, _united(members))


def masked(pool: Pool, word: Value, members: Sequence[tuple[int, int]], ranges: bool = True) -> Condition:
    """Whether `word` under one of the masks is the address that goes with it; members are (address, mask).

    With `ranges` a network alone is looked for by its first and last address.
    """
    found = pool.lookup((word,), members)
    if found is not None:
        return found
    if ranges and len(members) == 1:
        return _network(pool, word, *members[0])
    if len(members) <= CHAIN or not all(_is_prefix(mask) for _, mask in members):
        return some(*(pool.test("eq", word, address, mask) for address, mask in members))
    masks = {mask for _, mask in members}
    if len(masks) == 1:
        return _tree(pool, pool.op("and", word, pool.const(masks.pop())), _points(members))
    return _tree(pool, word, _united([(address, address | ~mask & M32) for address, mask in members]))


def _network(pool: Pool, word: Value, address: int, mask: int) -> Condition:
    """Two comparisons do what a mask and a comparison do, and mostly the first one is enough."""
    if mask in (0, M32) or not _is_prefix(mask):
        return pool.test("eq", word, address, mask)
    last = address | ~mask & M32
    above, below = pool.test("ge", word, address), negated(pool.test("gt", word, last))
    if address == 0 or last == M32:
        return above if address else below
    return every(above, below) if address > M32 - last else every(below, above)


def several(
    pool: Pool, words: Sequence[Value], members: Sequence[Sequence[tuple[int, int]]], ranges: bool = True
) -> Condition:
    """Whether an address of several words is one of many; a member has an (address, mask) for each word, in order.

    A word is read where those before it are a member's.
    """
    if not words or len(members) <= CHAIN or not ranges:
        return some(
            *(
                every(*(masked(pool, word, [part], ranges) for word, part in zip(words, member, strict=True)))
                for member in members
            )
        )
    # Networks that end within the first word; for the others, what can follow it.
    short: list[Condition] = []
    following: dict[int, list[Sequence[tuple[int, int]]]] = {}
    for member in members:
        address, mask = member[0]
        if mask == M32:
            following.setdefault(address, []).append(member[1:])
        else:
            short.append(masked(pool, words[0], [member[0]]))
    branches = [(address, several(pool, words[1:], rest)) for address, rest in sorted(following.items())]
    return some(*short, _branches(pool, words[0], branches))


def _branches(pool: Pool, word: Value, branches: list[tuple[int, Condition]]) -> Condition:
    """The condition that goes with the value of `word`."""
    if len(branches) <= CHAIN:
        return some(*(every(pool.test("eq", word, k), condition) for k, condition in branches))
    middle = len(branches) // 2
    test = pool.test("gt", word, branches[middle - 1][0])
    assert isinstance(test, Test)
    return Choice(test, _branches(pool, word, branches[middle:]), _branches(pool, word, branches[:middle]))


def within(pool: Pool, word: Value, low: int, high: int) -> Condition:
    """``low <= word <= high``."""
    if low == high:
        return pool.test("eq", word, low)
    return every(pool.test("ge", word, low), negated(pool.test("gt", word, high)))


def _is_prefix(mask: int) -> bool:
    rest = ~mask & M32
    return rest & (rest + 1) == 0


def _united(members: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same set as few intervals in order."""
    united: list[tuple[int, int]] = []
    for low, high in sorted(members):
        if united and low <= united[-1][1] + 1:
            united[-1] = (united[-1][0], max(high, united[-1][1]))
        else:
            united.append((low, high))
    return united


def _points(members: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(address, address) for address in sorted({address for address, _ in members})]


def _tree(pool: Pool, word: Value, members: list[tuple[int, int]]) -> Condition:
    if len(members) <= CHAIN:
        return some(*(within(pool, word, low, high) for low, high in members))
    middle = len(members) // 2
    test = pool.test("gt", word, members[middle - 1][1])
    assert isinstance(test, Test)
    return Choice(test, _tree(pool, word, members[middle:]), _tree(pool, word, members[:middle]))
