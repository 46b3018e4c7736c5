"""bpf_snprintf_btf (Linux 5.10): memory in words, by a type of the kernel's BTF.

Of the kernel's memory a program's own regions are there. The types are those of `environment.kernel_btf`, or of the
running kernel.
"""

from __future__ import annotations

import errno
import struct

from kbpf.emulator.helpers.system import no_kernel_memory
from kbpf.emulator.interpreter import HelperFunction, Run
from kbpf.emulator.ksyms import kernel_types
from kbpf.emulator.maps.base import refused
from kbpf.emulator.memory import M32
from kbpf.emulator.semantics import FUEL
from kbpf.errors import EmulationFault, ObjectError

#: struct btf_ptr: address, type, flags that say nothing.
_POINTER = struct.Struct("=QII")
#: What each value shown takes of the budget: about as long as so many instructions.
_COST = 128


def snprintf_btf(run: Run, to: int, size: int, pointer: int, pointer_size: int, flags: int) -> int:
    """How long the text is, without its NUL, however much of it had room."""
    # Parsing BTF takes a package that programs without this helper do without.
    from kbpf.emulator.show import FLAGS, Show

    size, pointer_size = size & M32, pointer_size & M32
    run.check_writable(to, size)
    given = run.read(pointer, pointer_size)
    types = kernel_types()
    if flags & ~FLAGS or pointer_size != _POINTER.size or types is None:
        return -errno.EINVAL
    address, type, _ = _POINTER.unpack(given)
    if not type:
        return -errno.EINVAL
    if type >= len(types.records):
        return -errno.ENOENT

    def read(at: int, length: int) -> bytes:
        try:
            return run.read(at, length)
        except EmulationFault:
            raise refused(no_kernel_memory(at)) from None

    def charge() -> None:
        run.state[FUEL] -= _COST
        if run.state[FUEL] < 0:
            run.exhausted()

    show = Show(types, flags, read, charge)
    try:
        show.value(type, address)
    except ObjectError:
        return -errno.EINVAL
    text = show.text()
    if size and show.began:
        run.write(to, text[: size - 1] + b"\0")
    return show.status or len(text)


HELPERS: dict[str, HelperFunction] = {"snprintf_btf": snprintf_btf}
