"""Layouts as data types of numpy, which is imported when somebody asks for one."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kbpf.errors import MissingDependencyError
from kbpf.runtime.formats import type_for
from kbpf.runtime.records import HEADER, Run
from kbpf.types import Array, Float, Int, Struct, Type

if TYPE_CHECKING:
    import numpy

_SCALARS = {"c": "S1", "?": "?", "f": "f4", "d": "f8"}
_FIELD = re.compile(r"(\d*)([xcbB?hHiIlLqQfds])")


def import_numpy() -> Any:
    """numpy, or `MissingDependencyError`."""
    try:
        import numpy
    except ImportError:
        raise MissingDependencyError("numpy is not installed: pip install numpy") from None
    return numpy


def join(runs: Sequence[Run], layout: numpy.dtype[Any]) -> numpy.ndarray[Any, Any]:
    """The records of all runs as one array of its own memory."""
    np = import_numpy()
    parts = [np.empty(0, layout)]
    for run in runs:
        whole = np.dtype({"names": ["record"], "formats": [layout], "offsets": [HEADER], "itemsize": run.stride})
        parts.append(np.frombuffer(run.data, whole)["record"])
    joined: numpy.ndarray[Any, Any] = np.concatenate(parts)
    return joined


def dtype_for(spec: Any) -> Any:
    """The data type of what `kbpf.runtime.formats` takes; of formats of `struct` the fields are ``f0``, ``f1``, ...

    Raises `TypeError` for what has no fixed layout that numpy knows: bit fields, functions.
    """
    np = import_numpy()
    if isinstance(spec, np.dtype):
        return spec
    if isinstance(spec, (str, struct.Struct)):
        return _of_format(np, spec if isinstance(spec, str) else spec.format)
    return np.dtype(_of_type(type_for(spec)))


def _of_type(type: Type) -> Any:
    if isinstance(type, Struct):
        if type.union or any(member.bit_size or member.bit_offset % 8 for member in type.members):
            return f"V{type.size}"
        return {
            "names": [member.name or f"f{index}" for index, member in enumerate(type.members)],
            "formats": [_of_type(member.type) for member in type.members],
            "offsets": [member.bit_offset // 8 for member in type.members],
            "itemsize": type.size,
        }
    if isinstance(type, Array):
        # Arrays of characters are text, as a rule, and their end is where the first 0 is.
        if isinstance(type.element, Int) and type.element.char:
            return f"S{type.size}"
        return (_of_type(type.element), (type.count,))
    if isinstance(type, Float):
        return f"f{type.size}"
    if isinstance(type, Int) and type.boolean:
        return "?"
    return f"{'i' if getattr(type, 'signed', False) else 'u'}{type.size}" if type.size <= 8 else f"V{type.size}"


def _of_format(np: Any, text: str) -> Any:
    """Each letter is a field of its own, as `struct` has it; the number before ``s`` is the length of one."""
    order = text[0] if text[:1] in tuple("@=<>!") else "@"
    letters = text.lstrip("@=<>!").replace(" ", "")
    if not re.fullmatch(f"({_FIELD.pattern})+", letters):
        raise TypeError(f"{text!r} has letters that numpy has no type for")
    formats, offsets, done = [], [], order
    for count, letter in _FIELD.findall(letters):
        times = 1 if letter in "sx" else int(count or 1)
        for _ in range(times):
            one = f"{count}{letter}" if letter in "sx" else letter
            # Where it lies, with what comes before it to align it.
            done += one
            size = struct.calcsize(f"{order if order != '@' else '='}{one}" if letter not in "lL" else order + one)
            if letter != "x":
                formats.append(np.dtype(_scalar(letter, size)).newbyteorder({"!": ">", "@": "="}.get(order, order)))
                offsets.append(struct.calcsize(done) - size)
    names = [f"f{index}" for index in range(len(formats))]
    return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": struct.calcsize(text)})


def _scalar(letter: str, size: int) -> str:
    if letter == "s":
        return f"S{size}"
    return _SCALARS.get(letter) or f"{'i' if letter.islower() else 'u'}{size}"
