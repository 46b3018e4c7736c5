"""A map of counters over time: what was added from one reading to the next, and how much that is a second."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from kbpf.runtime.codecs import PerCpu, total
from kbpf.runtime.maps.snapshot import Snapshot

if TYPE_CHECKING:
    from kbpf.runtime.map import Map


class Change(NamedTuple):
    """What changed between two readings of a map, by key; keys whose value is as it was are left out.

    Of structs and arrays each number has its own delta and rate, and what is no number is as it is now. Of per-CPU
    values it is the sum that changes. The delta of a key that was not there is its value; one that somebody set back,
    or that went and came again between two readings, has a delta below 0, or too small a one: that cannot be told.
    """

    #: Seconds between the two readings, by the monotonic clock.
    elapsed: float
    #: The new reading, whole.
    values: Snapshot
    #: By how much values grew.
    deltas: dict[Any, Any]
    #: The same a second.
    rates: dict[Any, Any]
    #: Keys that are gone.
    removed: tuple[Any, ...]


def watch(map: Map, interval: float, count: int | None) -> Iterator[Change]:
    """What `Map.watch` gives."""
    start = read = time.monotonic()
    before = map.snapshot()
    ticks = 0.0
    while count is None or count > 0:
        # The next time of the plan that is not over yet: a late reading does not shift those that follow.
        ticks = max((time.monotonic() - start) // interval, ticks) + 1
        time.sleep(max(start + ticks * interval - time.monotonic(), 0))
        now, values = time.monotonic(), map.snapshot()
        yield change(before, values, now - read)
        before, read = values, now
        count = None if count is None else count - 1


def change(before: Snapshot, after: Snapshot, elapsed: float) -> Change:
    """What changed from one reading to another, `elapsed` seconds later."""
    deltas = {}
    for key, value in after.items():
        old = before.get(key)
        if old != value:
            deltas[key] = _minus(_summed(value), None if old is None else _summed(old))
    rates = {key: _over(delta, elapsed) for key, delta in deltas.items()}
    removed = tuple(key for key in before if key not in after)
    return Change(elapsed, after, deltas, rates, removed)


def _summed(value: Any) -> Any:
    return total(value) if isinstance(value, PerCpu) else value


def _minus(value: Any, old: Any, *, inner: bool = False) -> Any:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value - (old or 0)
    if isinstance(value, tuple):
        olds = old if old is not None else (None,) * len(value)
        return _like(value, [_minus(one, two, inner=True) for one, two in zip(value, olds, strict=True)])
    if is_dataclass(value) and not isinstance(value, type):
        return _each(value, lambda name, one: _minus(one, None if old is None else getattr(old, name), inner=True))
    if not inner:
        raise TypeError(f"{value!r} is no number, and has none: say what values are (with_types)")
    return value


def _over(delta: Any, elapsed: float) -> Any:
    if isinstance(delta, (int, float)) and not isinstance(delta, bool):
        return delta / elapsed if elapsed else 0.0
    if isinstance(delta, tuple):
        return _like(delta, [_over(one, elapsed) for one in delta])
    if is_dataclass(delta) and not isinstance(delta, type):
        return _each(delta, lambda name, one: _over(one, elapsed))
    return delta


def _like(value: tuple[Any, ...], parts: list[Any]) -> Any:
    return value._make(parts) if hasattr(value, "_make") else tuple(parts)


def _each(value: Any, made: Any) -> Any:
    return replace(value, **{field.name: made(field.name, getattr(value, field.name)) for field in fields(value)})
