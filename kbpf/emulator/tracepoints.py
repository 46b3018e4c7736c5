"""Records of tracepoints: the format as tracefs shows it, and a record from field values.

A test gives formats in `environment.tracepoints`; where it gives none, tracefs is asked, if it is mounted.
"""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from kbpf.emulator.environment import environment
from kbpf.emulator.ksyms import kernel_types
from kbpf.emulator.maps.base import refused
from kbpf.emulator.memory import M32
from kbpf.specs import RawTracepoint, Tracepoint

_FIELD = re.compile(r"\tfield:(?P<type>[^;]*?)\s*(?P<name>\w+)(?P<array>\[[^\]]*\])?;"
                    r"\toffset:(?P<offset>\d+);\tsize:(?P<size>\d+);\tsigned:[01];")  # fmt: skip
_ID = re.compile(r"^ID: (\d+)$", re.MULTILINE)
_TRACEFS = (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing"))


class Field(NamedTuple):
    """`count` elements of an array, 1 for what is none; of a `dynamic` one the record has the place and the length."""

    offset: int
    size: int
    count: int = 1  # type: ignore[assignment]  # a field of that name, not tuple.count
    dynamic: bool = False


@dataclass(frozen=True)
class Format:
    """A tracepoint's number and fields; `size` is without what is dynamic."""

    id: int
    fields: Mapping[str, Field]

    @property
    def size(self) -> int:
        return max(field.offset + field.size for field in self.fields.values())

    def pack(self, values: Mapping[str, Any]) -> bytes:
        """A record; what is not given is 0. Raises `ValueError` for what is no field or does not fit.

        Arrays are bytes, text, or numbers.
        """
        record = bytearray(self.size)
        common = {"common_type": self.id, "common_pid": environment.pid_tgid() & M32}
        for name, value in {**{n: v for n, v in common.items() if n in self.fields}, **values}.items():
            field = self.fields.get(name)
            if field is None:
                raise ValueError(f"the tracepoint has no field {name!r}")
            if field.dynamic:
                data = _array(name, value, 1)
                # __data_loc: where in the record, and how long.
                value = len(record) | len(data) << 16
                record += data
            if isinstance(value, int):
                data = _number(name, value, field.size)
            else:
                data = _array(name, value, field.size // field.count)
            if len(data) > field.size:
                raise ValueError(f"{name} has {field.size} bytes, not {len(data)}")
            record[field.offset : field.offset + len(data)] = data
        return bytes(record)


def _number(name: str, value: int, size: int) -> bytes:
    try:
        return value.to_bytes(size, sys.byteorder, signed=value < 0)
    except OverflowError:
        raise ValueError(f"{value} does not fit {name}, {size} bytes") from None


def _array(name: str, value: Any, size: int) -> bytes:
    if isinstance(value, str):
        return value.encode() + b"\0"
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    return b"".join(_number(name, element, size) for element in value)


@lru_cache(maxsize=64)
def parse(text: str) -> Format:
    """A format as tracefs shows it; `ValueError` for other text."""
    id = _ID.search(text)
    fields = {}
    for match in _FIELD.finditer(text):
        size = int(match["size"])
        array = (match["array"] or "").strip("[]")
        count = int(array) if array.isdigit() and int(array) and size % int(array) == 0 else 1
        dynamic = match["type"].startswith("__data_loc")
        fields[match["name"]] = Field(int(match["offset"]), size, count, dynamic)
    if id is None or not fields:
        raise ValueError("this is no format of a tracepoint")
    return Format(int(id[1]), fields)


def format_of(tracepoint: Tracepoint) -> Format:
    """ENOENT where neither the environment nor tracefs has such a tracepoint."""
    given = environment.tracepoints.get(tracepoint)
    if given is not None:
        return parse(given)
    for root in _TRACEFS:
        try:
            return parse((root / "events" / tracepoint.system / tracepoint.name / "format").read_text())
        except OSError:
            continue
    raise refused(errno.ENOENT)


def argument_count(tracepoint: RawTracepoint) -> int:
    """How many arguments a raw tracepoint has, by the environment or the kernel's BTF; ENOENT."""
    given = environment.raw_tracepoints.get(tracepoint.name)
    if given is None:
        given = _argument_count(tracepoint.name)
    if given is None:
        raise refused(errno.ENOENT)
    return given


def _argument_count(name: str) -> int | None:
    from kbpf.elf import btf

    types = kernel_types()
    found = None if types is None else types.find(f"btf_trace_{name}", btf.TYPEDEF)
    if types is None or found is None:
        return None
    # A pointer to a function, whose first argument is not the tracepoint's.
    return len(types.pointee(found.word).items) - 1
