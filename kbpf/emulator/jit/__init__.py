"""Native code for emulated programs: eBPF to LLVM IR through llvmlite (the ``jit`` extra).

What an instruction means is said by `kbpf.emulator.semantics`; here it is said again for the compiler, and proven to be
the same by running random programs on both and on the kernel. Memory checks and the instruction budget are compiled in:
an address is looked up in a table of the run's regions, and what is not there (computed contexts, regions met for the
first time, faults) is left to the interpreter's memory, so that errors are the same, word for word.
"""

from __future__ import annotations
