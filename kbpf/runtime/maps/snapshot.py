"""A map's elements at one time, or about that, as a ``dict`` that says which."""

from __future__ import annotations

from typing import Any


class Snapshot(dict[Any, Any]):
    """What was in a map, read while others may have been changing it.

    The kernel locks one element, or one bucket of a hash, at a time. So elements are as they were at different times
    between the beginning and the end of the reading, and a value of several numbers that a program updates in place may
    be half of one update. What was added or deleted meanwhile may or may not be here.
    """

    #: Whether all elements are of one time: nobody could change the map, as it is frozen and programs may only read it.
    consistent: bool
    #: Whether what was in the map all the time is here for certain. Only where others kept deleting keys from a map
    #: that is read key by key it is not.
    complete: bool

    def __init__(self, consistent: bool, complete: bool = True) -> None:
        super().__init__()
        self.consistent = consistent
        self.complete = complete

    def __repr__(self) -> str:
        return f"Snapshot({super().__repr__()}, consistent={self.consistent}, complete={self.complete})"
