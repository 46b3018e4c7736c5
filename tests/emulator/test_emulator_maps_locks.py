"""Values with a bpf_spin_lock, against the kernel: BPF_F_LOCK, and what user space sees of a lock."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from mapcode import attempt, call, copy, get, made, main, mov, put, run, stack, the_map, unless_null
from sides import Side

from kbpf.backend import LoadRefused
from kbpf.errors import EmulationFault
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.specs import MapSpec
from kbpf.testing.btf_bytes import BtfBytes
from kbpf.uapi import constants as uapi

pytestmark = pytest.mark.requires("kernel")


def locked(type: str, lock_at: int = 0, key_size: int = 4, flags: int = 0) -> MapSpec:
    """A map of {lock, u64} or {u64, lock}."""
    btf = BtfBytes()
    lock = btf.structure("bpf_spin_lock", 4, ("val", btf.int, 0))
    value = btf.structure("value", 16, *sorted((("lock", lock, lock_at), ("number", btf.u64, 8 - lock_at)), key=_at))
    return MapSpec(
        type=type,
        key_size=key_size,
        value_size=16,
        max_entries=2,
        flags=flags,
        btf=btf.bytes(),
        btf_key_type_id=btf.int,
        btf_value_type_id=value,
    )


def _at(member: tuple[str, int, int]) -> int:
    return member[2]


@pytest.mark.parametrize("type", ("array", "hash", "percpu_array", "lru_hash", "lpm_trie"))
@pytest.mark.parametrize("lock_at", (0, 8))
def test_commands_with_a_lock(kernel: Side, emulator: Side, type: str, lock_at: int) -> None:
    """Types that may not have locks are made without, and take no BPF_F_LOCK."""
    spec = locked(type, lock_at)
    if type == "lru_hash":
        spec = replace(spec, max_entries=64)
    if type == "lpm_trie":
        spec = replace(spec, key_size=8, flags=uapi.BPF_F_NO_PREALLOC)
    results = []
    for side in (kernel, emulator):
        backend = side.backend
        with made(side, spec) as (fd,):
            result: list[object] = []
            size = 16 * (backend.possible_cpus() if "percpu" in type else 1)
            for number, flags in enumerate((4, 0, 4, 5, 6, 1, 2, 7, 8)):
                for key in (bytes(spec.key_size), b"\1" + bytes(spec.key_size - 1)):
                    value = bytes([number + 1]) * size
                    result.append(attempt(lambda: backend.map_update(fd, key, value, flags)))  # noqa: B023
                    result += [attempt(lambda: backend.map_lookup(fd, key, size, f)) for f in (0, 4)]  # noqa: B023
            result += [
                attempt(lambda: backend.map_update_batch(fd, bytes(spec.key_size), b"\7" * size, 1, f))  # noqa: B023
                for f in (0, 4, 1)
            ]
            result.append(attempt(lambda: backend.map_lookup_and_delete(fd, bytes(spec.key_size), size, 4)))  # noqa: B023
        results.append(result)
    assert results[1] == results[0]


@pytest.mark.parametrize("type", ("array", "hash"))
@pytest.mark.parametrize("flags", (0, 4))
def test_programs_lock_a_value(kernel: Side, emulator: Side, type: str, flags: int) -> None:
    """Increment under the lock; then update through a helper with the pointer still in hand, and read through it."""
    update = [
        *put(-24, 9),
        *put(-16, 77),
        *the_map(1),
        *stack(2, -4),
        *stack(3, -24),
        *mov(4, flags),
        *call("map_update_elem"),
        *get(0, 6, 8),
    ]
    body = [
        *copy(6, 0),
        *copy(1, 6),
        *call("spin_lock"),
        *mov(2, 5),
        Instruction(ebpf.STX | ebpf.ATOMIC | ebpf.DW, 6, 2, 8),
        *copy(1, 6),
        *call("spin_unlock"),
        *update,
    ]
    program = main(
        [Instruction(ebpf.ST | ebpf.MEM | ebpf.W, 10, 0, -4, 0)],
        the_map(1),
        stack(2, -4),
        call("map_lookup_elem"),
        unless_null(0, body),
    )
    results = []
    for side in (kernel, emulator):
        with made(side, locked(type)) as (fd,):
            side.backend.map_update(fd, bytes(4), struct.pack("=QQ", 2**64 - 1, 1))
            results.append((run(side, program, [fd], type="sched_cls"), side.backend.map_lookup(fd, bytes(4), 16)))
    assert results[1] == results[0]


def test_a_program_holds_one_lock_and_gives_it_back(emulator: Side) -> None:
    def use(*helpers: str) -> None:
        body = [*copy(6, 0), *(i for helper in helpers for i in (*copy(1, 6), *call(helper)))]
        program = main(put(-8, 0), the_map(1), stack(2, -8), call("map_lookup_elem"), unless_null(0, body))
        with made(emulator, locked("array")) as (fd,):
            run(emulator, program, [fd], type="sched_cls")

    use("spin_lock", "spin_unlock", "spin_lock", "spin_unlock")
    for helpers in (("spin_lock", "spin_lock"), ("spin_unlock",), ("spin_lock",)):
        with pytest.raises(EmulationFault):
            use(*helpers)


def test_socket_filters_may_not_use_locks(kernel: Side, emulator: Side) -> None:
    logs = []
    for side in (kernel, emulator):
        with made(side, locked("array")) as (fd,), pytest.raises(LoadRefused) as caught:
            run(side, main(the_map(0), mov(0, 0)), [fd])
        logs.append((caught.value.errno, caught.value.log.splitlines()[0]))
    assert logs[1] == logs[0]
