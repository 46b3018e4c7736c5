"""How hard LLVM tries where many programs are compiled to be run once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

#: One in so many programs is compiled as usual, the others at the lowest level, which takes a quarter of the time.
_USUAL = 4


@contextmanager
def level_for(number: int) -> Iterator[None]:
    """Compile the program of this number."""
    from kbpf.emulator.jit import engine

    with mock.patch.object(engine, "LEVEL", engine.LEVEL if number % _USUAL == 0 else 0):
        yield
