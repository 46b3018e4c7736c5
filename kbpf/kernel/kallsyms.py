"""Names of the kernel's functions: /proc/kallsyms, whose addresses ``kernel.kptr_restrict`` hides from some."""

from __future__ import annotations

from functools import cache
from pathlib import Path

#: What the calls in programs that the kernel shows are relative to.
_BASE = "__bpf_call_base"


def function_at(offset: int) -> str:
    """The function that a call by this offset goes to; the offset's number where that cannot be said."""
    functions = _functions()
    base = functions.get(_BASE)
    address = None if base is None else base + offset & (1 << 64) - 1
    return _names().get(address, hex(address)) if address is not None else hex(offset & (1 << 64) - 1)


@cache
def _functions() -> dict[str, int]:
    """Addresses of the functions built into the kernel; empty where they are hidden."""
    found = {}
    with Path("/proc/kallsyms").open(encoding="ascii", errors="replace") as file:
        for line in file:
            address, kind, name, *_ = line.split()
            if kind in "tT" and address.strip("0"):
                found[name] = int(address, 16)
    return found


@cache
def _names() -> dict[int, str]:
    # An address may have several names: bpftool takes the first.
    return {address: name for name, address in reversed(_functions().items())}
