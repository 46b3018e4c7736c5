"""Kernel variables that programs name by BTF ids: what is refused as in the kernel, and what stand-ins give."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from mapcode import Code, call, main, mov, put, run, unless_null
from sides import Side

from kbpf.backend import LoadRefused
from kbpf.elf import btf
from kbpf.emulator import environment
from kbpf.errors import EmulationFault
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction, ld_imm64
from kbpf.testing.btf_bytes import FUNC, BtfBytes

VMLINUX = Path("/sys/kernel/btf/vmlinux")


@cache
def vmlinux() -> btf.Btf:
    return btf.Btf(VMLINUX.read_bytes())


def symbol(register: int, id: int, module: int = 0) -> Code:
    first, second = ld_imm64(register, 0, ebpf.PSEUDO_BTF_ID)
    return [first._replace(imm=id), second._replace(imm=module)]


def load(size: int, register: int = 0, offset: int = 0) -> Code:
    return [Instruction(ebpf.LDX | ebpf.MEM | size, 0, register, offset)]


def refusal(side: Side, program: Code) -> tuple[int, str]:
    with pytest.raises(LoadRefused) as caught:
        run(side, program, [])
    return caught.value.errno or 0, caught.value.log.splitlines()[-2 if "processed" in caught.value.log else -1]


@pytest.mark.requires("kernel")
@pytest.mark.parametrize("id", (0, 1, -1, 1 << 24, "cpu_number", "runqueues"))
@pytest.mark.parametrize("module", (0, 98765))
def test_what_is_no_variable_or_is_not_there_is_refused(
    kernel: Side, emulator: Side, id: int | str, module: int
) -> None:
    """Variables are in kallsyms only with CONFIG_KALLSYMS_ALL; without it, all are as if nothing stood in for them."""
    if isinstance(id, str):
        record = vmlinux().find(id, btf.VAR)
        if record is None or f" {id}\n" in Path("/proc/kallsyms").read_text():
            pytest.skip(f"the kernel has {id} in its symbols, or not in its BTF")
        id = record.id
    program = main(symbol(1, id, module), call("this_cpu_ptr"))
    assert refusal(emulator, program) == refusal(kernel, program)


@pytest.mark.requires("kernel")
def test_functions_are_there(kernel: Side, emulator: Side) -> None:
    """Their address is a number of which nothing can be read."""
    record = vmlinux().find("tcp_sendmsg", btf.FUNC)
    assert record is not None
    address = symbol(0, record.id)
    assert run(kernel, main(address), []) != 0 != run(emulator, main(address), [])
    assert refusal(kernel, main(symbol(1, record.id), load(ebpf.B, 1)))[0] == 13
    for misused in (load(ebpf.B, 1), call("this_cpu_ptr")):
        with pytest.raises(EmulationFault):
            run(emulator, main(symbol(1, record.id), misused), [])


def test_functions_for_programs_are_refused_by_name(emulator: Side) -> None:
    record = vmlinux().find("bpf_task_release", btf.FUNC)
    assert record is not None
    called = [Instruction(ebpf.JMP | ebpf.CALL, 0, ebpf.PSEUDO_KFUNC_CALL, 0, record.id)]
    assert refusal(emulator, main(called)) == (
        95,
        "the emulator does not have the kernel function bpf_task_release yet",
    )


@pytest.mark.requires("kernel")
@pytest.mark.parametrize("name", ("tcp_sendmsg", "task_struct"))
def test_what_is_no_function_for_programs_is_not_called(kernel: Side, emulator: Side, name: str) -> None:
    record = vmlinux().find(name, btf.FUNC) or vmlinux().find(name, btf.STRUCT)
    assert record is not None
    called = [Instruction(ebpf.JMP | ebpf.CALL, 0, ebpf.PSEUDO_KFUNC_CALL, 0, record.id)]
    for side in (kernel, emulator):
        assert refusal(side, main(called))[0] in (13, 22)


@pytest.fixture
def variable() -> Iterator[int]:
    """An int called `number` that stands for 100 on the first processor and 101 on the next."""
    types = BtfBytes()
    types.function("somewhere")
    id = types.add("number", btf.VAR, 0, types.int, bytes(4))
    assert types.add("", FUNC, 0, 1) == id + 1
    environment.kernel_btf = types.bytes()
    environment.kernel_variables["number"] = [bytearray((100 + cpu, 0, 0, 0)) for cpu in range(environment.cpus)]
    yield id
    environment.kernel_btf = None
    environment.kernel_variables.clear()


def test_each_processor_has_its_own(emulator: Side, variable: int) -> None:
    def value(*body: Code) -> int:
        return run(emulator, main(symbol(1, variable), *body, unless_null(0, load(ebpf.W))), [])

    assert value(call("this_cpu_ptr")) == 100
    assert [value(mov(2, cpu), call("per_cpu_ptr")) for cpu in (0, environment.cpus - 1)] == [
        100,
        100 + environment.cpus - 1,
    ]
    # No such processor: NULL.
    assert [value(mov(2, cpu), call("per_cpu_ptr")) for cpu in (environment.cpus, -1)] == [0, 0]
    environment.kernel_variables["number"][0][0] = 7  # type: ignore[index]
    assert value(call("this_cpu_ptr")) == 7


def test_programs_only_read_it_and_no_more_of_it(emulator: Side, variable: int) -> None:
    for body in (
        load(ebpf.W, 1),
        [*call("this_cpu_ptr"), *put(0, 1, 0)],
        [*call("this_cpu_ptr"), *load(ebpf.DW)],
        [*mov(1, 16), *call("this_cpu_ptr")],
    ):
        with pytest.raises(EmulationFault):
            run(emulator, main(symbol(1, variable), body), [])


def test_stand_ins_have_the_variables_size(emulator: Side, variable: int) -> None:
    for values in ([bytes(4)] * (environment.cpus + 1), [bytes(8)] * environment.cpus):
        environment.kernel_variables["number"] = values
        with pytest.raises(ValueError, match="values of 4 bytes"):
            run(emulator, main(symbol(1, variable)), [])
