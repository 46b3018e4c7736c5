"""What programs name by ids of the kernel's BTF: its variables (ksyms) and its types.

A program's BPF_PSEUDO_BTF_ID names a variable of each processor. There is no kernel behind the emulator: `environment`
has what stands in for the variables, by name, and which BTF the ids are of. A variable that nothing stands in for is
refused as by a kernel whose kallsyms do not have it; functions are there, but nothing can be read of them.
"""

from __future__ import annotations

import errno
import weakref
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from kbpf.emulator.checks import invalid
from kbpf.emulator.environment import environment
from kbpf.emulator.memory import Region
from kbpf.errors import ObjectError

if TYPE_CHECKING:
    # Parsing BTF takes a package that others do without.
    from kbpf.elf.btf import Btf

_RUNNING = Path("/sys/kernel/btf/vmlinux")


class Symbol:
    """A variable of the kernel, or a function. Programs hold it by the address of its handle."""

    def __init__(self, name: str, values: tuple[Region, ...]) -> None:
        self.name = name
        #: A variable's bytes for each processor.
        self.values = values
        self.handle = Region(readable=False, writable=False, owner=weakref.ref(self))


def kernel_types() -> Btf | None:
    """The kernel's BTF; None if there is none. Raises `ObjectError` if the environment's does not parse."""
    return _running() if environment.kernel_btf is None else _parsed(environment.kernel_btf)


@cache
def _running() -> Btf | None:
    from kbpf.elf.btf import Btf

    try:
        return Btf(_RUNNING.read_bytes(), str(_RUNNING))
    except OSError:
        return None


@lru_cache(maxsize=4)
def _parsed(data: bytes) -> Btf:
    from kbpf.elf.btf import Btf

    return Btf(data, "environment.kernel_btf")


def resolve(id: int, module: int) -> Symbol:
    """What an id means in a program (check_pseudo_btf_id, kernel/bpf/verifier.c). Raises `LoadRefused`."""
    from kbpf.elf import btf

    if module:
        raise invalid("invalid module BTF object FD specified.")
    types = kernel_types()
    if types is None:
        raise invalid("kernel is missing BTF, make sure CONFIG_DEBUG_INFO_BTF=y is specified in Kconfig.")
    if not 0 <= id < len(types.records):
        raise invalid(f"ldimm64 insn specifies invalid btf_id {id}.", errno.ENOENT)
    record = types[id]
    if record.kind not in (btf.VAR, btf.FUNC):
        raise invalid(f"pseudo btf_id {id} in ldimm64 isn't KIND_VAR or KIND_FUNC")
    if record.kind == btf.FUNC:
        return Symbol(record.name, ())
    given = environment.kernel_variables.get(record.name)
    if given is None:
        raise invalid(f"ldimm64 failed to find the address for kernel symbol '{record.name}'.", errno.ENOENT)
    try:
        size = types.resolve(record.word).size
    except ObjectError:
        size = None
    if len(given) != environment.cpus or any(len(value) != size for value in given):
        raise ValueError(f"kernel variable {record.name}: give {environment.cpus} values of {size} bytes")
    return Symbol(record.name, tuple(Region(value, writable=False) for value in given))


def refuse_function(id: int) -> None:
    """Refuse a call of one of the kernel's functions for programs (kfuncs) by name; do nothing where it is none."""
    from kbpf.elf import btf

    types = kernel_types()
    if types is None:
        return
    for record in types.records:
        if record.kind == btf.DECL_TAG and record.word == id and record.name == "bpf_kfunc":
            raise invalid(f"the emulator does not have the kernel function {types[id].name} yet", errno.EOPNOTSUPP)
