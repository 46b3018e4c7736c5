"""Maps without keys: queue and stack (Linux 4.20), bloom filter (Linux 5.16). Nothing walks over their values."""

from __future__ import annotations

import errno
from typing import Any

from kbpf.runtime.maps.base import BpfMap
from kbpf.uapi.constants import BPF_ANY, BPF_EXIST


class Queue(BpfMap):
    """First in, first out. Each method is one command: nothing comes between, whoever else pushes and pops."""

    def push(self, value: Any, *, overwrite: bool = False) -> None:
        """Put a value in; with `overwrite` in the place of the oldest one where it is full (BPF_EXIST).

        Raises `MapFullError`.
        """
        try:
            flags = BPF_EXIST if overwrite else BPF_ANY
            with self._descriptor as fd:
                self._backend.map_update(fd, None, self.value_codec.encode(value), flags)
        except OSError as error:
            raise self._failure(error, "push onto", "map_update_elem") from None

    def pop(self) -> Any:
        """Take the next value. Raises `IndexError` when there is none."""
        try:
            with self._descriptor as fd:
                value = self._backend.map_lookup_and_delete(fd, None, self.value_codec.size)
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise IndexError(f"{self.label} is empty") from None
            raise self._failure(error, "pop from", "map_lookup_and_delete_elem") from None
        return self.value_codec.decode(value)

    def peek(self) -> Any:
        """The value that `pop` would take, which stays. Raises `IndexError` when there is none."""
        try:
            with self._descriptor as fd:
                value = self._backend.map_lookup(fd, None, self.value_codec.size)
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise IndexError(f"{self.label} is empty") from None
            raise self._failure(error, "peek into", "map_lookup_elem") from None
        return self.value_codec.decode(value)


class Stack(Queue):
    """Last in, first out. What `push` with `overwrite` drops is the oldest here, too."""


class BloomFilter(BpfMap):
    """A set that is never sure: ``in`` is always true of what was added, and now and then of what was not.

    Nothing is taken out again, and nobody can count or list what is in. The more is added beyond `max_entries`, the
    more often it errs.
    """

    def add(self, value: Any) -> None:
        """Put a value in."""
        try:
            with self._descriptor as fd:
                self._backend.map_update(fd, None, self.value_codec.encode(value), BPF_ANY)
        except OSError as error:
            raise self._failure(error, "add to", "map_update_elem") from None

    def __contains__(self, value: object) -> bool:
        try:
            with self._descriptor as fd:
                return self._backend.map_contains(fd, self.value_codec.encode(value))
        except OSError as error:
            raise self._failure(error, "look up a value in", "map_lookup_elem") from None

    #: There is nothing to walk over, also not by index as Python would try.
    __iter__ = None
