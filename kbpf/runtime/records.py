"""Records that programs have written, as Python values: many at a time where they follow each other in one size."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from functools import cache, partial
from itertools import starmap
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, NamedTuple

from kbpf.runtime.codecs import Codec
from kbpf.runtime.formats import by_position, codec_for

#: Bytes before each record's data.
HEADER = 8


class Run(NamedTuple):
    """Records of one size, one after the other: of `stride` bytes each, `size` of them the data after a header."""

    data: bytes | memoryview
    size: int
    stride: int

    def after(self, records: int) -> Run | None:
        """Without the first ones; None where there are no more."""
        rest = self.data[records * self.stride :]
        return self._replace(data=rest) if rest else None

    def pieces(self, records: int) -> list[Run]:
        """The same in runs of so many records at most."""
        data, step = self.data, records * self.stride
        return [self._replace(data=data[at : at + step]) for at in range(0, len(data), step)]


#: Appends what a run's records are to a list; where one cannot be decoded, those before it, and raises.
Decoder = Callable[[Run, list[Any]], None]


def decoder(spec: Any) -> Decoder:
    """What decodes records of what `spec` says: see `kbpf.runtime.formats`, or a function of a record's bytes.

    A record may be longer than its type, which then says how it begins; a shorter one is a `ValueError`.
    """
    if spec is None:
        return _take_bytes
    if isinstance(spec, (FunctionType, BuiltinFunctionType, MethodType)):
        return _calling(spec)
    made = codec_for(spec)
    if made.flat is None:
        return _one_by_one(made)
    if made.make is None:
        return _flat(made.size, made.flat, iter)
    # A class is called without a function of Python's around it.
    by_class = isinstance(spec, type) and is_dataclass(spec) and by_position(spec)
    return _flat(made.size, made.flat, partial(starmap, spec) if by_class else partial(map, made.make))


def _take_bytes(run: Run, into: list[Any]) -> None:
    into.extend([data for (data,) in _slices(run.size, run.stride).iter_unpack(run.data)])


@cache
def _slices(size: int, stride: int) -> struct.Struct:
    return struct.Struct(f"={HEADER}x{size}s{stride - HEADER - size}x")


def _calling(function: Callable[[bytes], Any]) -> Decoder:
    def decode(run: Run, into: list[Any]) -> None:
        for (data,) in _slices(run.size, run.stride).iter_unpack(run.data):
            into.append(function(data))

    return decode


def _one_by_one(made: Codec) -> Decoder:
    size, decode_one = made.size, made.decode

    def decode(run: Run, into: list[Any]) -> None:
        _check(run, size)
        for at in range(HEADER, len(run.data), run.stride):
            into.append(decode_one(bytes(run.data[at : at + size])))

    return decode


def _flat(size: int, flat: struct.Struct, made_of: Callable[[Iterator[Any]], Iterator[Any]]) -> Decoder:
    # The header keeps the alignment, for formats that have one.
    order, fields = (flat.format[0], flat.format[1:]) if flat.format[0] in "@=<>!" else ("@", flat.format)

    @cache
    def with_header(stride: int) -> struct.Struct:
        return struct.Struct(f"{order}{HEADER}x{fields}{stride - HEADER - size}x")

    def decode(run: Run, into: list[Any]) -> None:
        _check(run, size)
        into.extend(made_of(with_header(run.stride).iter_unpack(run.data)))

    return decode


def _check(run: Run, size: int) -> None:
    if run.size < size:
        raise ValueError(f"a record of {run.size} bytes where the type has {size}")


def same_from(words: memoryview, at: int, stride: int, most: int) -> int:
    """How many of the records from word `at` on have the same header: 1 at least, `most` at most.

    Each tells by its size where the next one is, so only as long as they are alike are these places headers at all.
    """
    header, found = words[at], 1
    while found < most:
        more = min(3 * found, most - found)
        start = at + found * stride
        headers = words[start : start + more * stride : stride].tolist()
        if headers.count(header) != more:
            return found + next(index for index, other in enumerate(headers) if other != header)
        found += more
    return found
