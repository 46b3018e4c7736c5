"""Why no such map can be made: bpf(2) says EINVAL for all of it (kernel/bpf/syscall.c and each type's alloc_check)."""

from __future__ import annotations

from difflib import get_close_matches
from mmap import PAGESIZE

from kbpf.specs import MapSpec
from kbpf.uapi.constants import BPF_F_NO_PREALLOC
from kbpf.uapi.enums import MAP_TYPES

_RINGS = ("ringbuf", "user_ringbuf")
_KEYLESS = ("queue", "stack", "bloom_filter", "arena", *_RINGS)
_OF_MAPS = ("array_of_maps", "hash_of_maps")
_STORAGES = ("sk_storage", "inode_storage", "task_storage", "cgrp_storage")
#: Types whose keys are indices, or numbers of descriptors.
_NUMBERED = (
    "array", "percpu_array", "prog_array", "perf_event_array", "cgroup_array", "array_of_maps", "sockmap", "devmap",
    "devmap_hash", "cpumap", "xskmap", "reuseport_sockarray", *_STORAGES,
)  # fmt: skip
#: Types whose values are given as descriptors.
_DESCRIPTORS = ("prog_array", "perf_event_array", "cgroup_array", *_OF_MAPS)
_PREFIX_BYTES = range(5, 261)


def needs_template(spec: MapSpec) -> bool:
    """Whether it is a map of maps, which is made after another map."""
    return spec.type in _OF_MAPS


def reasons(spec: MapSpec) -> tuple[str, ...]:
    """What of the spec no kernel takes, and what to say instead; empty where it is something else."""
    if spec.type not in MAP_TYPES:
        near = get_close_matches(spec.type, MAP_TYPES, 1)
        return (f"there is no map type {spec.type!r}" + (f": did you mean {near[0]!r}?" if near else ""),)
    return tuple(why for why in (_keys(spec), _values(spec), _entries(spec), _others(spec)) if why)


def _keys(spec: MapSpec) -> str:
    size = spec.key_size
    if spec.type in _KEYLESS:
        return f"it has no keys: key_size must be 0 and not {size}" if size else ""
    if spec.type in _NUMBERED:
        return f"its keys have 4 bytes, not {size}" if size != 4 else ""
    if spec.type == "lpm_trie" and size not in _PREFIX_BYTES:
        return f"its keys are a u32 and 1 to 256 bytes of a prefix, and not {size} bytes"
    return "" if size else "key_size is 0: say what keys are"


def _values(spec: MapSpec) -> str:
    size = spec.value_size
    if spec.type in _RINGS:
        return f"it has no values: value_size must be 0 and not {size}" if size else ""
    if spec.type in _DESCRIPTORS:
        return f"its values have 4 bytes, not {size}" if size != 4 else ""
    return "" if size or spec.type == "arena" else "value_size is 0: say what values are"


def _entries(spec: MapSpec) -> str:
    count = spec.max_entries
    if spec.type in _RINGS:
        fits = count and count % PAGESIZE == 0 and count & count - 1 == 0
        return "" if fits else f"max_entries is its size in bytes: a power of two, and {PAGESIZE} at least"
    if spec.type.endswith("_storage"):
        return "max_entries must be 0: it grows with the objects" if count else ""
    return "" if count else "max_entries is 0"


def _others(spec: MapSpec) -> str:
    if spec.type in ("lpm_trie", *_STORAGES) and not spec.flags & BPF_F_NO_PREALLOC:
        return "it takes flags=BPF_F_NO_PREALLOC"
    if spec.type in _STORAGES and not spec.btf:
        return "it takes BTF of its keys and values: btf, btf_key_type_id and btf_value_type_id of the spec"
    return ""
