"""bpf_per_cpu_ptr and bpf_this_cpu_ptr (Linux 5.10): a kernel variable of one processor, which programs only read."""

from __future__ import annotations

from kbpf.emulator.environment import environment
from kbpf.emulator.interpreter import HelperFunction, Run
from kbpf.emulator.ksyms import Symbol
from kbpf.emulator.memory import M32
from kbpf.errors import EmulationFault


def per_cpu_ptr(run: Run, variable: int, cpu: int, *_: int) -> int:
    """NULL if there is no such processor."""
    symbol = run.owner(variable)
    if not isinstance(symbol, Symbol) or not symbol.values:
        raise EmulationFault("this is no per-CPU variable", address=variable)
    cpu &= M32
    return symbol.values[cpu].address if cpu < len(symbol.values) else 0


def this_cpu_ptr(run: Run, variable: int, *_: int) -> int:
    return per_cpu_ptr(run, variable, environment.cpu)


HELPERS: dict[str, HelperFunction] = {"per_cpu_ptr": per_cpu_ptr, "this_cpu_ptr": this_cpu_ptr}
