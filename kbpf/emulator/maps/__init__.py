"""The emulator's maps, one file a kind. What is not here is refused by name."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from kbpf.emulator.maps.array import Array, PerCpuArray
from kbpf.emulator.maps.base import Map, refused
from kbpf.emulator.maps.hash import Hash, PerCpuHash
from kbpf.emulator.maps.lpm import LpmTrie
from kbpf.emulator.maps.lru import LruHash, PerCpuLruHash
from kbpf.emulator.maps.prog_array import ProgArray
from kbpf.emulator.maps.queue import Queue, Stack
from kbpf.specs import MapSpec
from kbpf.uapi.enums import MAP_TYPES

KINDS: dict[str, type[Map]] = {
    kind.type: kind
    for kind in (Array, PerCpuArray, Hash, PerCpuHash, LruHash, PerCpuLruHash, LpmTrie, ProgArray, Queue, Stack)
}


def create(spec: MapSpec, programs: Callable[[int], Any]) -> Map:
    """BPF_MAP_CREATE. A type that Linux has and the emulator has not is EOPNOTSUPP."""
    kind = KINDS.get(spec.type)
    if kind is not None:
        return kind(spec, programs)
    if spec.type in MAP_TYPES and spec.type != "unspec":
        raise OSError(errno.EOPNOTSUPP, f"the emulator has no maps of type {spec.type} yet")
    raise refused(errno.EINVAL)
