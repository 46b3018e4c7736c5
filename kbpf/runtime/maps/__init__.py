"""Maps of all types, as a user holds them.

| types | class | is |
| --- | --- | --- |
| hashes, per-CPU and LRU; cgroup_storage | `Map` | a mutable mapping |
| array, percpu_array | `ArrayMap` | a mapping from each index; memory where it is BPF_F_MMAPABLE |
| lpm_trie | `LpmTrie` | a mapping from networks |
| queue, stack | `Queue`, `Stack` | `push`, `pop`, `peek` |
| bloom_filter | `BloomFilter` | `add`, ``in`` |
| prog_array | `ProgramArray` | takes programs, gives ids |
| hash_of_maps, array_of_maps | `MapOfMaps`, `ArrayOfMaps` | takes maps, gives ids |
| sockhash, sockmap, reuseport_sockarray, xskmap | `SocketMap`, `SocketArray` | takes sockets, gives cookies |
| devmap_hash, devmap, cpumap | `DeviceMap`, `DeviceArray`, `CpuMap` | where XDP programs send packets |
| perf_event_array, cgroup_array | `EventArray`, `CgroupArray` | takes events and control groups, gives nothing |
| ringbuf, user_ringbuf, arena | `BpfMap` | no elements: `events` and `writer` of ring buffers |
| sk_, inode_, task_ and cgrp_storage | `Storage` | a mapping from sockets, files, processes, control groups |
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kbpf.runtime.maps.base import BpfMap


def class_for(type: str) -> type[BpfMap]:
    """The class for a map type, by bpftool's name of it; `Map` where it needs no other."""
    from kbpf.runtime.map import Map

    return _classes().get(type, Map)


@cache
def _classes() -> dict[str, type[BpfMap]]:
    from kbpf.runtime.maps.arrays import ArrayMap
    from kbpf.runtime.maps.base import BpfMap
    from kbpf.runtime.maps.keyless import BloomFilter, Queue, Stack
    from kbpf.runtime.maps.lpm import LpmTrie
    from kbpf.runtime.maps.redirect import CpuMap, DeviceArray, DeviceMap
    from kbpf.runtime.maps.references import (
        ArrayOfMaps,
        CgroupArray,
        EventArray,
        MapOfMaps,
        ProgramArray,
        SocketArray,
        SocketMap,
        Storage,
    )

    return {
        "array": ArrayMap,
        "percpu_array": ArrayMap,
        "lpm_trie": LpmTrie,
        "queue": Queue,
        "stack": Stack,
        "bloom_filter": BloomFilter,
        "ringbuf": BpfMap,
        "user_ringbuf": BpfMap,
        "arena": BpfMap,
        "prog_array": ProgramArray,
        "array_of_maps": ArrayOfMaps,
        "hash_of_maps": MapOfMaps,
        "sockmap": SocketArray,
        "sockhash": SocketMap,
        "reuseport_sockarray": SocketArray,
        "xskmap": SocketArray,
        "devmap": DeviceArray,
        "devmap_hash": DeviceMap,
        "cpumap": CpuMap,
        "perf_event_array": EventArray,
        "cgroup_array": CgroupArray,
        "sk_storage": Storage,
        "inode_storage": Storage,
        "task_storage": Storage,
        "cgrp_storage": Storage,
    }
