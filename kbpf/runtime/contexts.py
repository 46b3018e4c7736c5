"""Context structures of programs, to and from the values of their fields."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any


def pack_context(name: str, values: Mapping[str, Any]) -> bytes:
    """A context structure from field values; what is not given is 0.

    Raises `ValueError` for what is no field, or does not fit one.
    """
    from kbpf.uapi.structs import STRUCTS

    layout = STRUCTS[name]
    data = bytearray(layout.size)
    for name_of_field, value in values.items():
        field = layout.fields.get(name_of_field)
        if field is None:
            raise ValueError(f"struct {name} has no field {name_of_field!r}")
        parts = [value] if isinstance(value, int) else list(value)
        if len(parts) > field.count:
            raise ValueError(f"{name_of_field} of struct {name} has {field.count} elements, not {len(parts)}")
        for index, part in enumerate(parts):
            at = field.offset + index * field.size
            try:
                data[at : at + field.size] = part.to_bytes(field.size, sys.byteorder, signed=part < 0)
            except OverflowError:
                raise ValueError(f"{part} does not fit {name_of_field} of struct {name}, {field.size} bytes") from None
    return bytes(data)


def unpack_context(name: str, data: bytes) -> dict[str, Any]:
    """The fields of a context structure, arrays as tuples; a shorter one, from an older kernel, gives fewer."""
    from kbpf.uapi.structs import STRUCTS

    values: dict[str, Any] = {}
    for name_of_field, (offset, size, count, _, _) in STRUCTS[name].fields.items():
        if offset + size * count <= len(data):
            starts = range(offset, offset + size * count, size)
            parts = tuple(int.from_bytes(data[at : at + size], sys.byteorder) for at in starts)
            values[name_of_field] = parts if count > 1 else parts[0]
    return values
