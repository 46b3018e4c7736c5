"""Fields of map values that are the kernel's own, by what BTF says of the value (kernel/bpf/btf.c).

Programs reach them through helpers only, but load pointers, and store untrusted ones. User space reads zeroes, and what
it writes there is left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kbpf.emulator.ksyms import kernel_types
from kbpf.errors import ObjectError
from kbpf.specs import MapSpec
from kbpf.types import Type
from kbpf.uapi import constants as uapi

if TYPE_CHECKING:
    from kbpf.elf.btf import Btf, Record

#: Types of maps that may have each.
_LOCK_TYPES = frozenset(
    {"hash", "array", "cgroup_storage", "sk_storage", "inode_storage", "task_storage", "cgrp_storage"}
)
_TIMER_TYPES = frozenset({"hash", "lru_hash", "array"})
_REFERENCE_TYPES = (_LOCK_TYPES - {"cgroup_storage"}) | {
    "lru_hash", "percpu_hash", "lru_percpu_hash", "percpu_array"
}  # fmt: skip
#: Type tags of pointers to objects of the kernel, or of a program.
_POINTERS = ("kptr_untrusted", "kptr", "percpu_kptr")


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
    **{tag: _Kind(_REFERENCE_TYPES, 8, 8) for tag in _POINTERS},
}
#: The most that a value has of them (BTF_FIELDS_MAX).
_MOST = 11
#: Kernel structs that a referenced pointer may be to: those that have a destructor.
_WITH_DESTRUCTOR = ("task_struct", "cgroup", "bpf_cpumask", "bpf_crypto_ctx")


class Special(NamedTuple):
    """One such field: the name of its struct, or the tag of its pointer, and where it lies in the value."""

    name: str
    offset: int
    size: int

    @property
    def is_pointer(self) -> bool:
        return self.name in _POINTERS


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
    if described_value(spec) is None or spec.flags & (uapi.BPF_F_RDONLY_PROG | uapi.BPF_F_WRONLY_PROG):
        return ()
    from kbpf.elf.btf import Btf

    types = Btf(spec.btf)
    try:
        found = tuple(_fields(types, types.strip(spec.btf_value_type_id)))
    except ObjectError:
        return ()
    names = [field.name for field in found if not field.is_pointer]
    allowed = all(_may_be(field, spec.type) for field in found)
    return found if allowed and len(names) == len(set(names)) and len(found) <= _MOST else ()


def _may_be(field: Special, map_type: str) -> bool:
    kind = _TYPES[field.name]
    return map_type in kind.maps and field.size == kind.size and not field.offset % kind.alignment


def _fields(types: Btf, value: Record) -> list[Special]:
    """Of a struct, or a section of variables. As Linux, it looks through arrays, but not through typedefs."""
    from kbpf.elf import btf

    found = []
    for item in value.items if value.kind in (btf.STRUCT, btf.DATASEC) else ():
        if value.kind == btf.DATASEC:
            record, offset = types[types[item.type].word], item.offset
        else:
            record, offset = types[item.type], item.bit_offset // 8
        count = 1
        while record.kind == btf.ARRAY:
            count *= record.data[2]
            record = types[record.data[0]]
        inside, size = [], 8
        if record.kind == btf.STRUCT:
            size = record.word
            inside = [Special(record.name, 0, size)] if record.name in _TYPES else _fields(types, record)
        elif record.kind == btf.PTR and types[record.word].kind == btf.TYPE_TAG:
            inside = [Special(_tag(types, types[record.word]), 0, size)]
        if len(inside) * count > _MOST:
            raise ObjectError("too many special fields")
        found += [
            Special(name, offset + index * size + at, length)
            for index in range(count if inside else 0)
            for name, at, length in inside
        ]
    return found


def _tag(types: Btf, tag: Record) -> str:
    """What a pointer to a struct is said to be; an error where Linux has no such pointers."""
    from kbpf.elf import btf

    target = types.strip(tag.word)
    if tag.name not in _POINTERS or types[tag.word].kind == btf.TYPE_TAG or target.kind != btf.STRUCT:
        raise ObjectError("no such pointer")
    if tag.name == "kptr" and target.name not in _WITH_DESTRUCTOR:
        known = kernel_types()
        if known is not None and known.find(target.name, btf.STRUCT) is not None:
            raise ObjectError("nothing releases such an object")
    return tag.name
