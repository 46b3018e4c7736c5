"""llvmlite's part: IR to code in memory. Imported when a program is first compiled."""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

PRELUDE = """
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)
declare i16 @llvm.bswap.i16(i16)
declare i32 @llvm.bswap.i32(i32)
declare i64 @llvm.bswap.i64(i64)
!0 = !{!"branch_weights", i32 1000, i32 1}
"""
#: How hard LLVM tries, of 0 to 3; at 0 it takes a quarter of the time.
LEVEL = 2
#: Text that is longer than this, which is of some thousand instructions, is compiled at 0.
_HUGE = 1 << 20
# A signal handler may come to this while the program that it interrupts is being compiled.
_lock = threading.RLock()


@cache
def _llvm() -> Any:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm


@cache
def _host() -> tuple[Any, str, str]:
    llvm = _llvm()
    return llvm.Target.from_default_triple(), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()


def gathers() -> bool:
    """Whether this processor loads from eight addresses at once, for those of them that a mask says."""
    return "+avx512f" in _host()[2].split(",")


class Compiled:
    """Code in memory, for as long as this is held. `vectors` lets loops take several rounds at once.

    A `large` program keeps its registers in memory between blocks, as its text does: to put them together where jumps
    meet, LLVM's passes take time that grows with the square of their number, and all that comes behind them does.
    """

    def __init__(self, text: str, vectors: bool = False, large: bool = False) -> None:
        llvm, level = _llvm(), LEVEL if len(text) < _HUGE else 0
        # LLVM's context and its passes are not for several threads at once.
        with _lock:
            module = llvm.parse_assembly(PRELUDE + text)
            target, cpu, features = _host()
            machine = target.create_target_machine(cpu=cpu, features=features, opt=level, jit=True)
            options = llvm.create_pipeline_tuning_options(speed_level=0 if large else level)
            options.loop_vectorization = vectors
            options.slp_vectorization = options.loop_unrolling = False
            builder = llvm.create_pass_builder(machine, options)
            passes = builder.getModulePassManager()
            passes.run(module, builder)
            # Its own disposal is hidden behind that of its other base class, which does nothing: 60 KB a program.
            llvm.newpassmanagers.NewPassManager._dispose(passes)
            passes.detach()
            self._engine = llvm.create_mcjit_compiler(module, machine)
            self._engine.finalize_object()

    def address(self, name: str) -> int:
        """Where a function is in memory."""
        return int(self._engine.get_function_address(name))
