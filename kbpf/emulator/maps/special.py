"""Fields of map values that are the kernel's own, by what BTF says of the value (kernel/bpf/btf.c).

Programs reach them through helpers only. User space reads zeroes, and what it writes there is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from kbpf.errors import ObjectError
from kbpf.specs import MapSpec
from kbpf.types import Array, Struct, Type
from kbpf.uapi import constants as uapi

#: Types of maps that may have each.
_LOCK_TYPES = frozenset(
    {"hash", "array", "cgroup_storage", "sk_storage", "inode_storage", "task_storage", "cgrp_storage"}
)
_TIMER_TYPES = frozenset({"hash", "lru_hash", "array"})
_REFERENCE_TYPES = (_LOCK_TYPES - {"cgroup_storage"}) | {
    "lru_hash", "percpu_hash", "lru_percpu_hash", "percpu_array"
}  # fmt: skip


class _Kind(NamedTuple):
    """Where such a field may be; its size and alignment in bytes."""

    maps: frozenset[str]
    size: int
    alignment: int


_TYPES = {
    "bpf_spin_lock": _Kind(_LOCK_TYPES, 4, 4),
    "bpf_res_spin_lock": _Kind(_LOCK_TYPES, 4, 4),
    "bpf_timer": _Kind(_TIMER_TYPES, 16, 8),
    "bpf_wq": _Kind(_TIMER_TYPES, 16, 8),
    "bpf_task_work": _Kind(_TIMER_TYPES, 8, 8),
    "bpf_refcount": _Kind(_REFERENCE_TYPES, 4, 4),
}


class Special(NamedTuple):
    """One such field: the name of its struct, and where it lies in the value."""

    name: str
    offset: int
    size: int


def described_value(spec: MapSpec) -> Type | None:
    """What BTF says the value is; None where it says nothing, or not what the map's sizes say."""
    if not (spec.btf and spec.btf_value_type_id and spec.btf_key_type_id):
        return None
    # Few maps have BTF, and parsing it takes a package that others do without.
    from kbpf.elf.btf import Btf

    try:
        types = Btf(spec.btf)
        key, value = types.resolve(spec.btf_key_type_id), types.resolve(spec.btf_value_type_id)
    except ObjectError:
        return None
    return value if (key.size, value.size) == (spec.key_size, spec.value_size) else None


def special_fields(spec: MapSpec) -> tuple[Special, ...]:
    """The value's special fields. Where Linux would not take the BTF, the map is made without: there are none."""
    value = described_value(spec)
    if value is None or spec.flags & (uapi.BPF_F_RDONLY_PROG | uapi.BPF_F_WRONLY_PROG):
        return ()
    found = tuple(_fields(value, 0))
    names = [field.name for field in found]
    allowed = all(_may_be(field, spec.type) for field in found)
    return found if allowed and len(names) == len(set(names)) else ()


def _may_be(field: Special, map_type: str) -> bool:
    kind = _TYPES[field.name]
    return map_type in kind.maps and field.size == kind.size and not field.offset % kind.alignment


def _fields(type: Type, at: int) -> Iterator[Special]:
    if isinstance(type, Struct):
        for member in type.members:
            offset = at + member.bit_offset // 8
            inner = member.type
            if isinstance(inner, Struct) and inner.name in _TYPES:
                yield Special(inner.name, offset, inner.size)
            else:
                yield from _fields(inner, offset)
    elif isinstance(type, Array):
        for index in range(type.count):
            yield from _fields(type.element, at + index * type.element.size)
