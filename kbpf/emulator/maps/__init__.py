"""The emulator's maps, one file a kind. What is not here is refused by name."""

from __future__ import annotations

import errno

from kbpf.emulator.maps.array import Array, PerCpuArray
from kbpf.emulator.maps.base import Descriptors, Map, refused
from kbpf.emulator.maps.bloom import BloomFilter
from kbpf.emulator.maps.cgroup import CgroupArray, PerCpuCgroupStorage, SharedCgroupStorage
from kbpf.emulator.maps.descriptors import ProgArray
from kbpf.emulator.maps.hash import Hash, PerCpuHash
from kbpf.emulator.maps.local_storage import CgroupStorage, InodeStorage, SocketStorage, TaskStorage
from kbpf.emulator.maps.lpm import LpmTrie
from kbpf.emulator.maps.lru import LruHash, PerCpuLruHash
from kbpf.emulator.maps.of_maps import ArrayOfMaps, HashOfMaps
from kbpf.emulator.maps.perf import PerfEventArray
from kbpf.emulator.maps.queue import Queue, Stack
from kbpf.emulator.maps.redirect import CpuMap, DevMap, DevMapHash, XskMap
from kbpf.emulator.maps.ringbuf import RingBuffer, UserRingBuffer
from kbpf.emulator.maps.sockets import ReuseportSockArray, SockHash, SockMap
from kbpf.emulator.maps.stack_trace import StackTrace
from kbpf.specs import MapSpec
from kbpf.uapi.enums import MAP_TYPES

KINDS: dict[str, type[Map]] = {
    kind.type: kind
    for kind in (
        Array,
        ArrayOfMaps,
        BloomFilter,
        CgroupArray,
        CgroupStorage,
        CpuMap,
        DevMap,
        DevMapHash,
        Hash,
        HashOfMaps,
        InodeStorage,
        LpmTrie,
        LruHash,
        PerCpuArray,
        PerCpuCgroupStorage,
        PerCpuHash,
        PerCpuLruHash,
        PerfEventArray,
        ProgArray,
        Queue,
        ReuseportSockArray,
        RingBuffer,
        SockHash,
        SockMap,
        SharedCgroupStorage,
        SocketStorage,
        Stack,
        StackTrace,
        TaskStorage,
        UserRingBuffer,
        XskMap,
    )
}


def create(spec: MapSpec, descriptors: Descriptors, inner: int | None = None) -> Map:
    """BPF_MAP_CREATE. A type that Linux has and the emulator has not is EOPNOTSUPP."""
    kind = KINDS.get(spec.type)
    if kind is not None:
        return kind(spec, descriptors, inner)
    if spec.type in MAP_TYPES and spec.type != "unspec":
        raise OSError(errno.EOPNOTSUPP, f"the emulator has no maps of type {spec.type} yet")
    raise refused(errno.EINVAL)
