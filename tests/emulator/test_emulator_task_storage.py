"""Values of tasks and control groups in the hands of programs, against the kernel."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from mapcode import (
    Code,
    attempt,
    call,
    copy,
    described_value,
    get,
    made,
    main,
    mov,
    put,
    run,
    stack,
    the_map,
    unless_null,
)
from sides import Side
from test_emulator_maps_storage import CGROUPS

from kbpf.elf import btf
from kbpf.emulator import Cgroup, current_task
from kbpf.emulator.ksyms import kernel_types
from kbpf.emulator.memory import Region
from kbpf.errors import EmulationFault
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction, ld_imm64
from kbpf.specs import MapSpec
from kbpf.uapi import constants as uapi

pytestmark = pytest.mark.requires("kernel")

I = Instruction  # noqa: E741
KINDS = ("task", "cgrp")
CREATE = uapi.BPF_LOCAL_STORAGE_GET_F_CREATE


def offset(structure: str, member: str) -> int:
    """Where the running kernel has a member, in bytes."""
    types = kernel_types()
    record = types.find(structure, btf.STRUCT) if types is not None else None
    assert record is not None
    return next(item.bit_offset // 8 for item in record.items if item.name == member)


class Owners(NamedTuple):
    """How a program comes to what a value is of, and a descriptor of that."""

    code: Code
    fd: int


@pytest.fixture
def owners() -> Iterator[dict[str, Owners]]:
    """This task, and its control group: the emulator's task has a group where the kernel's BTF says."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = next((line[3:] for line in lines if line.startswith("0::")), None)
    if own is None or not CGROUPS:
        pytest.skip("no cgroup2")
    task = [*call("get_current_task_btf")]
    group_fd = os.open(CGROUPS[0] / own.lstrip("/"), os.O_RDONLY)
    group = Cgroup(id=os.fstat(group_fd).st_ino)
    sets, default = offset("task_struct", "cgroups"), offset("css_set", "dfl_cgrp")
    set_of_groups = Region(bytearray(default + 8), writable=False)
    set_of_groups.buffer[default:] = struct.pack("=Q", group.address)  # type: ignore[index]
    memory = current_task().memory
    memory[sets : sets + 8] = struct.pack("=Q", set_of_groups.address)
    fds = [os.pidfd_open(os.getpid()), group_fd]
    yield {
        "task": Owners(task, fds[0]),
        "cgrp": Owners([*task, *get(0, 0, sets), *get(0, 0, default)], fds[1]),
    }
    memory[sets : sets + 8] = bytes(8)
    for fd in fds:
        os.close(fd)


def storage(kind: str) -> MapSpec:
    return MapSpec(
        type=f"{kind}_storage", key_size=4, value_size=8, flags=uapi.BPF_F_NO_PREALLOC, **described_value("u64")
    )


def getting(kind: str, owner: Code, flags: int, value: bool) -> Code:
    """R0 is the value plus 100, which it then is; or 0 if there is none."""
    add = [*get(1, 0), I(ebpf.ALU64 | ebpf.ADD, 1, 0, 0, 100), I(ebpf.STX | ebpf.MEM | ebpf.DW, 0, 1), *copy(0, 1)]
    first = [*stack(3, -8)] if value else mov(3, 0)
    arguments = [*copy(2, 0), *the_map(1), *first, *ld_imm64(4, flags)]
    return main(put(-8, 5), owner, arguments, call(f"{kind}_storage_get"), unless_null(0, add))


def deleting(kind: str, owner: Code) -> Code:
    return main(owner, copy(2, 0), the_map(1), call(f"{kind}_storage_delete"))


@pytest.mark.parametrize("kind", KINDS)
def test_values_of_what_a_program_holds(kernel: Side, emulator: Side, owners: dict[str, Owners], kind: str) -> None:
    """In the hands of programs and of user space."""
    owner = owners[kind]
    key = struct.pack("=i", owner.fd)
    results = []
    for side in (kernel, emulator):
        with made(side, storage(kind)) as maps:

            def program(flags: int, value: bool = False) -> int:
                return run(side, getting(kind, owner.code, flags, value), maps, type="sched_cls")  # noqa: B023

            def delete() -> int:
                return run(side, deleting(kind, owner.code), maps, type="sched_cls")  # noqa: B023

            def user(command: str, *arguments: object) -> object:
                return attempt(lambda: getattr(side.backend, command)(maps[0], key, *arguments))  # noqa: B023

            results.append(
                [
                    program(0),
                    delete(),
                    program(CREATE),
                    program(0),
                    program(CREATE, True),
                    user("map_lookup", 8),
                    delete(),
                    delete(),
                    user("map_lookup", 8),
                    program(CREATE, True),
                    *(program(flags) for flags in (2, 3, 1 << 5 | 1, 1 << 63)),
                    user("map_update", struct.pack("=Q", 1000), 0),
                    program(0, True),
                    user("map_lookup", 8),
                    user("map_delete"),
                    program(0),
                ]
            )
    assert results[1] == results[0]
    assert results[0][2] == 100


def test_no_task_has_no_value(kernel: Side, emulator: Side) -> None:
    for program in (getting("task", mov(0, 0), CREATE, False),):
        results = []
        for side in (kernel, emulator):
            with made(side, storage("task")) as maps:
                results.append(run(side, program, maps, type="sched_cls"))
        assert results[1] == results[0] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_a_program_was_given_has_values(emulator: Side, owners: dict[str, Owners], kind: str) -> None:
    other = owners["cgrp" if kind == "task" else "task"].code
    for owner in (other, [*copy(0, 10)], mov(0, 16), [*owners[kind].code, I(ebpf.ALU64 | ebpf.ADD, 0, 0, 0, 8)]):
        for program in (getting(kind, owner, CREATE, False), deleting(kind, owner)):
            with made(emulator, storage(kind)) as maps, pytest.raises(EmulationFault):
                run(emulator, program, maps, type="sched_cls")
    array = MapSpec(type="array", key_size=4, value_size=8, max_entries=1)
    with made(emulator, array) as maps, pytest.raises(EmulationFault):
        run(emulator, getting(kind, owners[kind].code, CREATE, False), maps, type="sched_cls")
