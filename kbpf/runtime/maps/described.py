"""Maps whose types were said in Python have BTF too: bpftool and others see what they hold, and open them typed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kbpf.backend import Backend
from kbpf.specs import MapSpec
from kbpf.types import Int

_HASHES = ("hash", "percpu_hash", "lru_hash", "lru_percpu_hash")
_STORAGES = ("sk_storage", "inode_storage", "task_storage", "cgrp_storage")
_BY_NUMBER = ("array", "percpu_array", *_STORAGES)
#: What the kernel wants for an index, and for the descriptor of what a storage belongs to.
_NUMBER = Int(name="int", size=4, signed=True)


def described(spec: MapSpec, key: Any, value: Any) -> MapSpec:
    """The spec with BTF for what was said, where it has none and the kernel takes it (Linux 4.18) of such a map."""
    if spec.btf or value is None or spec.type not in (*_HASHES, *_BY_NUMBER):
        return spec
    from kbpf.elf.btf_writer import btf_of
    from kbpf.runtime.formats import described

    key_type = _NUMBER if key is None and spec.type in _BY_NUMBER else described(key)
    value_type = described(value)
    if key_type is None or value_type is None or (key_type.size, value_type.size) != (spec.key_size, spec.value_size):
        return spec
    blob, (key_id, value_id) = btf_of(key_type, value_type)
    return replace(spec, btf=blob, btf_key_type_id=key_id, btf_value_type_id=value_id)


def create(chosen: Backend, typed: MapSpec, spec: MapSpec, inner: int | None) -> int:
    """Make a map with types, or without where this kernel does not take those; a storage always has them."""
    if typed is spec or spec.type in _STORAGES:
        return chosen.map_create(typed, inner)
    try:
        return chosen.map_create(typed, inner)
    except OSError:
        return chosen.map_create(spec, inner)
