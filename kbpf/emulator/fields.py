"""Fields of contexts and of structures that programs see computed: what part of one is, and how tests give them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from kbpf.uapi.structs import STRUCTS


def narrow(value: int, offset: int, size: int, kept: int = 4) -> int:
    """What a load of `size` bytes at `offset` gives of a field of four, of which the kernel keeps `kept` bytes.

    It shifts and masks what it keeps wider than the load, and gives what it keeps narrower as it is.
    """
    return value if size >= kept else value >> 8 * (offset & 3) & (1 << 8 * size) - 1


def given(struct: str, fields: Mapping[str, Any], settable: Collection[str]) -> Iterator[tuple[str, int, int]]:
    """Fields of a context that a test gives by name: the name, the index where it is an array, and each value.

    Raises `ValueError` for a field that is not there or not `settable`, and for a value that does not fit.
    """
    layout = STRUCTS[struct].fields
    for name, value in fields.items():
        if name not in settable:
            known = ", ".join(settable) or "none"
            raise ValueError(f"{name!r} is no field of struct {struct} that can be given here: {known}")
        parts = [value] if isinstance(value, int) else list(value)
        if len(parts) > layout[name].count:
            raise ValueError(f"{name} of struct {struct} has {layout[name].count} elements, not {len(parts)}")
        for index, part in enumerate(parts):
            if not 0 <= part < 1 << 8 * layout[name].size:
                raise ValueError(f"{part} does not fit {name} of struct {struct}, {layout[name].size} bytes")
            yield name, index, part
