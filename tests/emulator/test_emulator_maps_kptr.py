"""Pointers to kernel objects in map values, against the kernel: which there may be, and who sees what of them.

A program that takes a referenced pointer out of a value must release it, which takes a kernel function (kfunc): without
one no program that calls bpf_kptr_xchg is accepted.
"""

from __future__ import annotations

import os
import struct
from typing import Any

import pytest
from mapcode import EXIT, Code, attempt, call, copy, get, made, main, mov, put, run, stack, the_map, unless_null
from sides import Side
from timers import with_timer

from kbpf.backend import LoadRefused
from kbpf.elf import btf
from kbpf.emulator.ksyms import kernel_types
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.specs import MapSpec
from kbpf.testing.btf_bytes import ARRAY, PTR, BtfBytes
from kbpf.uapi import constants as uapi

pytestmark = pytest.mark.requires("kernel")

I = Instruction  # noqa: E741
SIZE, AT = 24, 8


def with_pointer(
    tag: str, to: str = "task_struct", *, type: str = "array", at: int = AT, count: int = 1, **changes: Any
) -> MapSpec:
    """A map of {u64, tagged pointer to a struct}; or an array of so many pointers."""
    types = BtfBytes()
    target = types.structure(to, 8, ("x", types.u64, 0))
    field = types.add("", PTR, 0, types.add(tag, btf.TYPE_TAG, 0, target))
    if count > 1:
        field = types.add("", ARRAY, 0, 0, struct.pack("=III", field, types.int, count))
    size = SIZE + 8 * (count - 1)
    value = types.structure("value", size, ("count", types.u64, 0), ("p", field, at))
    described = {"btf": types.bytes(), "btf_key_type_id": types.int, "btf_value_type_id": value}
    return MapSpec(**{"type": type, "key_size": 4, "value_size": size, "max_entries": 64, **described, **changes})


def is_special(side: Side, spec: MapSpec) -> Any:
    """Maps with special fields may not be frozen."""
    with made(side, spec) as (fd,):
        return attempt(lambda: side.backend.map_freeze(fd))


@pytest.mark.parametrize("tag", ("kptr_untrusted", "kptr", "percpu_kptr", "uptr", "other"))
@pytest.mark.parametrize("to", ("task_struct", "cgroup", "bpf_cpumask", "sock", "nothing_that_is_there"))
def test_which_pointers_there_are(kernel: Side, emulator: Side, tag: str, to: str) -> None:
    assert is_special(emulator, with_pointer(tag, to)) == is_special(kernel, with_pointer(tag, to))


@pytest.mark.parametrize(
    "type", ("array", "hash", "percpu_array", "percpu_hash", "lru_hash", "lru_percpu_hash", "lpm_trie")
)
@pytest.mark.parametrize("at", (8, 12, 16))
def test_where_they_may_be(kernel: Side, emulator: Side, type: str, at: int) -> None:
    flags = uapi.BPF_F_NO_PREALLOC if type == "lpm_trie" else 0
    spec = with_pointer("kptr_untrusted", type=type, at=at, flags=flags)
    results = [attempt(lambda: is_special(side, spec)) for side in (kernel, emulator)]  # noqa: B023
    assert results[1] == results[0]


@pytest.mark.parametrize("count", (2, 10, 11, 12, 40))
def test_how_many_there_may_be(kernel: Side, emulator: Side, count: int) -> None:
    spec = with_pointer("kptr_untrusted", count=count)
    assert is_special(emulator, spec) == is_special(kernel, spec)


def over_the_value(*body: Code) -> Code:
    """Over the value of key 0, which is in R8."""
    missing = [I(ebpf.JMP | ebpf.JNE, 0, 0, 2), *mov(0, 0), EXIT]
    return main(put(-8, 0), the_map(1), stack(2, -8), call("map_lookup_elem"), missing, copy(8, 0), *body)


STORE = [*call("get_current_task_btf"), I(ebpf.STX | ebpf.MEM | ebpf.DW, 8, 0, AT)]
IS_THERE = [*get(0, 8, AT), *unless_null(0, mov(0, 1))]
EXCHANGE = [*copy(1, 8), I(ebpf.ALU64 | ebpf.ADD, 1, 0, 0, AT), *mov(2, 0), *call("kptr_xchg")]
EMPTY = [I(ebpf.ST | ebpf.MEM | ebpf.DW, 8, 0, AT, 0), *mov(0, 0)]


@pytest.mark.parametrize("type", ("array", "hash", "percpu_array", "percpu_hash", "lru_hash"))
@pytest.mark.parametrize("action", ("nothing", "update", "delete", "empty", "update by a program"))
def test_a_pointer_in_a_value(kernel: Side, emulator: Side, type: str, action: str) -> None:
    """A program stores it and finds it again, until the value is written over; user space reads zeroes."""
    update = [*put(-8, 0), *(i for at in (-32, -24, -16) for i in put(at, 7)), *the_map(1), *stack(2, -8)]
    update += [*stack(3, -32), *mov(4, 0), *call("map_update_elem")]
    results = []
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {0})
    for side in (kernel, emulator):
        with made(side, with_pointer("kptr_untrusted", type=type)) as (fd,):
            size = SIZE * (side.backend.possible_cpus() if "percpu" in type else 1)
            side.backend.map_update(fd, bytes(4), bytes([5]) * size)
            result: list[Any] = [run(side, over_the_value(IS_THERE), [fd], type="sched_cls")]
            result.append(run(side, over_the_value(STORE, IS_THERE), [fd], type="sched_cls"))
            result.append(side.backend.map_lookup(fd, bytes(4), size))
            if action == "update":
                side.backend.map_update(fd, bytes(4), bytes([6]) * size)
            elif action == "delete":
                result.append(attempt(lambda: side.backend.map_delete(fd, bytes(4))))  # noqa: B023
                result.append(attempt(lambda: side.backend.map_update(fd, bytes(4), bytes([6]) * size, 1)))  # noqa: B023
            elif action == "empty":
                run(side, over_the_value(EMPTY), [fd], type="sched_cls")
            elif action != "nothing":
                result.append(run(side, main(update), [fd], type="sched_cls"))
            result.append(run(side, over_the_value(IS_THERE), [fd], type="sched_cls"))
            result.append(attempt(lambda: side.backend.map_lookup(fd, bytes(4), size)))  # noqa: B023
            results.append(result)
    os.sched_setaffinity(0, before)
    assert results[1] == results[0]


def test_a_pointer_is_good_for_loads(kernel: Side, emulator: Side) -> None:
    types = kernel_types()
    task = types.find("task_struct", btf.STRUCT) if types is not None else None
    assert task is not None
    at = next(member.bit_offset // 8 for member in task.items if member.name == "tgid")
    load = [*get(0, 8, AT), *unless_null(0, [I(ebpf.LDX | ebpf.MEM | ebpf.W, 0, 0, at)])]
    from kbpf.emulator import current_task

    current_task().memory[at : at + 4] = struct.pack("=I", os.getpid())
    results = []
    for side in (kernel, emulator):
        with made(side, with_pointer("kptr_untrusted")) as (fd,):
            results.append(run(side, over_the_value(STORE, load), [fd], type="sched_cls"))
    assert results == [os.getpid()] * 2


@pytest.mark.parametrize("to", ("task_struct", "cgroup", "struct_of_the_program"))
def test_a_referenced_pointer_is_not_there(kernel: Side, emulator: Side, to: str) -> None:
    """Nobody could have put one there."""
    results = []
    for side in (kernel, emulator):
        with made(side, with_pointer("kptr", to)) as (fd,):
            side.backend.map_update(fd, bytes(4), bytes([6]) * SIZE)
            results.append(run(side, over_the_value(IS_THERE), [fd], type="sched_cls"))
    assert results[1] == results[0]


BACK = [
    I(ebpf.JMP | ebpf.JEQ, 0, 0, 5),
    *copy(2, 0),
    *copy(1, 8),
    I(ebpf.ALU64 | ebpf.ADD, 1, 0, 0, AT),
    *call("kptr_xchg"),
]
EXCHANGES = {
    "nothing": EXCHANGE,
    "what is there, back": [*EXCHANGE, *BACK],
    "the current task": [*call("get_current_task_btf"), *copy(2, 0), *EXCHANGE[:2], *call("kptr_xchg")],
}


@pytest.mark.parametrize("tag", ("kptr", "kptr_untrusted"))
@pytest.mark.parametrize("name", EXCHANGES)
def test_without_kernel_functions_there_is_no_exchange(kernel: Side, emulator: Side, tag: str, name: str) -> None:
    with made(kernel, with_pointer(tag)) as one, made(emulator, with_pointer(tag)) as other:
        program = over_the_value(EXCHANGES[name], mov(0, 0))
        with pytest.raises(LoadRefused):
            run(kernel, program, one, type="sched_cls")
        with pytest.raises(LoadRefused, match="kptr_xchg"):
            run(emulator, program, other, type="sched_cls")


ALIKE = {
    "plain": MapSpec(type="array", key_size=4, value_size=32, max_entries=2),
    "a timer": with_timer(),
    "a timer elsewhere": with_timer(at=8),
    "untrusted pointers": with_pointer("kptr_untrusted", count=2, max_entries=2),
    "referenced pointers": with_pointer("kptr", count=2, max_entries=2),
}


@pytest.mark.parametrize("type", ("array_of_maps", "hash_of_maps"))
@pytest.mark.parametrize("template", ALIKE)
def test_maps_in_maps_have_the_same_special_fields(kernel: Side, emulator: Side, type: str, template: str) -> None:
    outer = MapSpec(type=type, key_size=4, value_size=4, max_entries=1, inner=ALIKE[template])
    for name, spec in ALIKE.items():
        results = []
        for side in (kernel, emulator):
            with made(side, outer, spec) as (maps, inner):
                value = struct.pack("=I", inner)
                results.append(attempt(lambda: side.backend.map_update(maps, bytes(4), value)))  # noqa: B023
        assert results[1] == results[0], name
        assert (results[0] is None) == (name == template)
