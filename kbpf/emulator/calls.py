"""What the kernel checks of a program's functions: what BTF says of them, how deep they call, how much stack they take.

The counterpart of check_btf_func, check_abnormal_return and check_max_stack_depth in kernel/bpf/verifier.c. How much
stack a function takes is the verifier's to know, since it follows values; here it is what can be read off the
instructions: accesses through the frame pointer and through copies of it in straight code.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from kbpf.emulator.checks import invalid, is_call, is_function_address, jump_target
from kbpf.emulator.interpreter import TAIL_CALL_HELPER
from kbpf.errors import ObjectError
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.specs import ProgramSpec
from kbpf.uapi.enums import HELPERS

_INFO = struct.Struct("=II")
#: The JIT compilers round a frame up to this.
_FRAME_STEP = 16
#: What the callers of a function with tail calls may take: each tail call can take the other half again.
_STACK_BEFORE_TAIL_CALLS = 256
_MOV, _ADD = ebpf.ALU64 | ebpf.MOV | ebpf.X, ebpf.ALU64 | ebpf.ADD | ebpf.K
_SET_CALLBACK = HELPERS["timer_set_callback"]
_HELPER_OR_FUNCTION = ebpf.JMP | ebpf.CALL


@dataclass(slots=True)
class Function:
    """One function of a program, from `start` to `end`."""

    start: int
    end: int
    callees: list[int]
    #: What it hands to timers, which runs on a stack of its own.
    later: list[int]
    tail_calls: bool
    loads_packet: bool
    stack: int


def check(spec: ProgramSpec) -> None:
    """Raise `LoadRefused` where the kernel would. The program has passed `checks.check`."""
    instructions = spec.instructions
    called = {pc + 1 + i.imm for pc, i in enumerate(instructions) if is_call(i) or is_function_address(i)}
    starts = sorted({0, *called})
    if not called:
        return
    functions = {
        start: _function(instructions, start, end)
        for start, end in zip(starts, [*starts[1:], len(instructions)], strict=True)
    }
    described = _described(spec, starts) if spec.btf and spec.func_info else None
    for number, function in enumerate(functions.values()):
        if not number:
            continue
        returns_int = described is not None and described[number][1]
        for has, what in ((function.loads_packet, "LD_ABS"), (function.tail_calls, "tail_call")):
            if has and described is None:
                raise invalid(f"{what} is not allowed in subprogs without BTF")
            if has and not returns_int:
                raise invalid(f"{what} is only allowed in functions that return 'int'.")
    for pc, instruction in enumerate(instructions):
        if is_function_address(instruction):
            if described is None:
                raise invalid("missing btf func_info")
            if not described[starts.index(pc + 1 + instruction.imm)][0]:
                raise invalid("callback function not static")
    _check_stack(functions)


def _described(spec: ProgramSpec, starts: Sequence[int]) -> list[tuple[bool, bool]]:
    """Whether each function is static, and whether it returns an integer."""
    from kbpf.elf import btf

    records = list(_INFO.iter_unpack(spec.func_info))
    try:
        types = btf.Btf(spec.btf)
    except ObjectError:
        raise invalid("the program's BTF does not parse") from None
    if records[0][0]:
        raise invalid(f"nonzero insn_off {records[0][0]} for the first func info record")
    found = []
    for _, id in records:
        try:
            function = types[id]
            if function.kind != btf.FUNC:
                raise ObjectError("no function")
            result = types.strip(types[function.word].word)
        except ObjectError:
            raise invalid(f"invalid type id {id} in func info") from None
        whole = result.kind in (btf.INT, btf.ENUM, btf.ENUM64) and result.word <= 8
        found.append((function.data[0] == 0, whole))
    if len(records) != len(starts):
        raise invalid("number of funcs in func_info doesn't match number of subprogs")
    if [offset for offset, _ in records] != list(starts):
        raise invalid("func_info BTF section doesn't match subprog layout in BPF program")
    return found


def _function(instructions: Sequence[Instruction], start: int, end: int) -> Function:
    body = [(pc, instructions[pc]) for pc in range(start, end)]
    later = {pc for pc, i in body if is_function_address(i) and _runs_later(instructions, pc)}
    return Function(
        start,
        end,
        [pc + 1 + i.imm for pc, i in body if is_call(i) or (is_function_address(i) and pc not in later)],
        [pc + 1 + instructions[pc].imm for pc in later],
        any(i.opcode == _HELPER_OR_FUNCTION and not i.src and i.imm == TAIL_CALL_HELPER for _, i in body),
        any(i.opcode & 7 == ebpf.LD and i.opcode & 0xE0 in (ebpf.ABS, ebpf.IND) for _, i in body),
        _stack_of(body),
    )


def _runs_later(instructions: Sequence[Instruction], pc: int) -> bool:
    """Whether the function address that is loaded is seen to be the callback of bpf_timer_set_callback."""
    for at in range(pc + 2, len(instructions)):
        opcode, _, src, _, imm = instructions[at]
        if opcode & 7 in (ebpf.JMP, ebpf.JMP32):
            return opcode == _HELPER_OR_FUNCTION and not src and imm == _SET_CALLBACK
        if is_function_address(instructions[at]):
            break
    return False


def _stack_of(body: Sequence[tuple[int, Instruction]]) -> int:
    """Bytes of stack that a function is seen to use."""
    targets = {jump_target(pc, instruction) for pc, instruction in body}
    # Registers that hold the frame pointer plus a constant.
    at: dict[int, int] = {ebpf.FP: 0}
    lowest = 0
    for pc, (opcode, dst, src, off, imm) in body:
        if pc in targets:
            at = {ebpf.FP: 0}
        kind = opcode & 7
        if kind in (ebpf.ST, ebpf.STX, ebpf.LDX):
            base = src if kind == ebpf.LDX else dst
            if base in at:
                lowest = min(lowest, at[base] + off)
            if kind == ebpf.LDX:
                at.pop(dst, None)
        elif opcode == _HELPER_OR_FUNCTION:
            lowest = min([lowest, *(at[register] for register in range(1, 6) if register in at)])
            for register in range(6):
                at.pop(register, None)
        elif opcode == _MOV and not off and src in at:
            at[dst] = at[src]
        elif opcode == _ADD and dst in at:
            at[dst] += imm
        elif kind in (ebpf.ALU, ebpf.ALU64, ebpf.LD):
            at.pop(dst, None)
    return -lowest


def _check_stack(functions: dict[int, Function]) -> None:
    """Follow all chains of calls, a function's callees in order, as deep as they go."""
    later = {start for function in functions.values() for start in function.later}
    for start in (0, *sorted(later)):
        _check_chains(functions, start)


def _check_chains(functions: dict[int, Function], start: int) -> None:
    seen = set()
    todo = [(start, 0, 0)]
    while todo:
        start, before, frame = todo.pop()
        if (start, before, frame) in seen:
            continue
        seen.add((start, before, frame))
        if frame == ebpf.MAX_CALL_FRAMES:
            raise invalid(f"the call stack of {frame + 1} frames is too deep", errno.E2BIG)
        function = functions[start]
        if start and function.tail_calls and before >= _STACK_BEFORE_TAIL_CALLS:
            raise invalid(
                f"tail_calls are not allowed when call stack of previous frames is {before} bytes. Too large",
                errno.EACCES,
            )
        depth = before + -(-function.stack // _FRAME_STEP) * _FRAME_STEP
        if depth > ebpf.STACK_SIZE:
            raise invalid(f"combined stack size of {frame + 1} calls is {depth}. Too large", errno.EACCES)
        todo += [(callee, depth, frame + 1) for callee in reversed(function.callees)]
