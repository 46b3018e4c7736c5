"""Classic BPF to eBPF, as Linux does it inside (`bpf_convert_filter`, net/core/filter.c).

The registers are the kernel's: A is R0, X is R7, the context stays in R6. What eBPF as
user space may load it cannot say (network-relative loads, ancillary words that no
`__sk_buff` field holds) is kept as LD_ABS/LD_IND with the classic offset; the emulator runs these as the kernel's
converted filter does.

`to_loadable` is the translation that Linux loads: ancillary words come from the context or from helpers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kbpf.errors import FilterError
from kbpf.isa import cbpf, ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.uapi.enums import HELPERS
from kbpf.uapi.structs import STRUCTS

# The kernel's assignment (include/linux/filter.h).
REG_A, REG_X, REG_CTX, REG_TMP = 0, 7, 6, 2

# Ancillary words that a field of __sk_buff holds, and whether the field is in network byte order.
_FIELDS = {
    "protocol": ("protocol", True),
    "pkttype": ("pkt_type", False),
    "ifindex": ("ifindex", False),
    "mark": ("mark", False),
    "queue": ("queue_mapping", False),
    "rxhash": ("hash", False),
    "vlan_tag": ("vlan_tci", False),
    "vlan_tag_present": ("vlan_present", False),
    "vlan_tpid": ("vlan_proto", True),
}
# And those that a helper gives.
_CALLS = {"cpu": "get_smp_processor_id", "random": "get_prandom_u32"}

_INVERSE = {ebpf.JEQ: ebpf.JNE, ebpf.JGT: ebpf.JLE, ebpf.JGE: ebpf.JLT}


def to_ebpf(instructions: Sequence[cbpf.Instruction], *, loops: bool = False) -> tuple[Instruction, ...]:
    """Translate a checked classic filter; `loops` is `kbpf.isa.cbpf.check`'s.

    Raises `kbpf.FilterError` if the filter is invalid, or so long that a jump does not fit 16 bits.
    """
    return _translate(instructions, loops)[0]


def starts(instructions: Sequence[cbpf.Instruction], *, loops: bool = False) -> tuple[int, ...]:
    """Where in the translation each classic instruction begins."""
    return _translate(instructions, loops)[1]


def _translate(
    instructions: Sequence[cbpf.Instruction], loops: bool
) -> tuple[tuple[Instruction, ...], tuple[int, ...]]:
    cbpf.check(instructions, loops=loops)
    start = [
        Instruction(ebpf.ALU | ebpf.XOR | ebpf.X, REG_A, REG_A),
        Instruction(ebpf.ALU | ebpf.XOR | ebpf.X, REG_X, REG_X),
        Instruction(ebpf.ALU64 | ebpf.MOV | ebpf.X, REG_CTX, 1),
    ]
    return _assembled(instructions, start, _straight)


def to_loadable(instructions: Sequence[cbpf.Instruction]) -> tuple[Instruction, ...]:
    """Translate a classic filter to a socket filter that BPF_PROG_LOAD takes (Linux 4.17); the verdicts are the same.

    Raises `kbpf.FilterError` if the filter is invalid, or asks for the device's hardware type, a netlink attribute or
    the offset of the payload, which an eBPF program cannot know.
    """
    cbpf.check(instructions)
    # Unlike the kernel's own, a program that is loaded may not read a register before it is written.
    start = [
        Instruction(ebpf.ALU64 | ebpf.MOV | ebpf.K, REG_A),
        Instruction(ebpf.ALU64 | ebpf.MOV | ebpf.K, REG_X),
        Instruction(ebpf.ALU64 | ebpf.MOV | ebpf.X, REG_CTX, 1),
    ]
    # Nor may it have code that nothing reaches.
    return _assembled(instructions, start, _loadable, _reached(instructions))[0]


def context_field(offset: int) -> list[Instruction]:
    """Bring the ancillary word ``AD_OFF + offset`` to A (R0), with the context in R6; R1 to R5 are lost.

    Raises `FilterError` for those that neither the context nor a helper gives.
    """
    name = cbpf.ANCILLARY[offset].name
    if name in _CALLS:
        return [Instruction(ebpf.JMP | ebpf.CALL, 0, 0, 0, HELPERS[_CALLS[name]])]
    if name not in _FIELDS:
        raise FilterError(f"an eBPF program cannot know the {name} of a packet")
    field, network_order = _FIELDS[name]
    load = Instruction(ebpf.LDX | ebpf.MEM | ebpf.W, REG_A, REG_CTX, STRUCTS["__sk_buff"].fields[field].offset)
    return [load, Instruction(ebpf.ALU | ebpf.END | ebpf.X, REG_A, 0, 0, 16)] if network_order else [load]


def _loadable(instruction: cbpf.Instruction) -> list[Instruction]:
    """Like `_straight`, with the context's fields in place of ancillary words."""
    code, _, _, k = instruction
    if code & 0xE7 != cbpf.LD | cbpf.ABS or k < cbpf.AD_OFF or k == cbpf.AD_OFF + 40:
        return _straight(instruction)
    loads = context_field(k - cbpf.AD_OFF)
    if cbpf.ANCILLARY[k - cbpf.AD_OFF].name != "ifindex":
        return loads
    # No packet comes from interface 0: there is no device, and the program returns A.
    return [
        loads[0]._replace(dst=REG_TMP),
        Instruction(ebpf.JMP | ebpf.JNE | ebpf.K, REG_TMP, 0, 1),
        Instruction(ebpf.JMP | ebpf.EXIT),
        Instruction(ebpf.ALU64 | ebpf.MOV | ebpf.X, REG_A, REG_TMP),
    ]


def _reached(instructions: Sequence[cbpf.Instruction]) -> set[int]:
    """The instructions that some path leads to; jumps only go forward."""
    reached = {0}
    for pc, (code, jt, jf, k) in enumerate(instructions):
        if pc in reached and code & 7 != cbpf.RET:
            if code == cbpf.JMP | cbpf.JA:
                reached.add(pc + 1 + k)
            else:
                reached.update((pc + 1 + jt, pc + 1 + jf) if code & 7 == cbpf.JMP else (pc + 1,))
    return reached


def _assembled(
    instructions: Sequence[cbpf.Instruction],
    start: list[Instruction],
    straight: Callable[[cbpf.Instruction], list[Instruction]],
    wanted: set[int] | None = None,
) -> tuple[tuple[Instruction, ...], tuple[int, ...]]:
    """`start`, and each of the instructions, or those `wanted`, as `straight` translates it; and where each begins."""
    out = list(start)
    starts: list[int] = []
    # (slot, index of the classic instruction it goes to)
    branches: list[tuple[int, int]] = []
    for pc, instruction in enumerate(instructions):
        starts.append(len(out))
        if wanted is not None and pc not in wanted:
            continue
        if instruction.code & 7 == cbpf.JMP:
            _jump(pc, instruction, out, branches)
        else:
            out.extend(straight(instruction))
    for slot, target in branches:
        off = starts[target] - slot - 1
        if abs(off) > 0x7FFF:
            raise FilterError(f"a jump over {abs(off)} instructions does not fit eBPF's 16 bits")
        out[slot] = out[slot]._replace(off=off)
    return tuple(out), tuple(starts)


def _jump(pc: int, instruction: cbpf.Instruction, out: list[Instruction], branches: list[tuple[int, int]]) -> None:
    code, jt, jf, k = instruction
    if code == cbpf.JMP | cbpf.JA:
        branches.append((len(out), pc + 1 + cbpf.signed(k)))
        out.append(Instruction(ebpf.JMP | ebpf.JA))
        return
    op, source, src, imm = code & 0xF0, code & 0x08, 0, k
    if source == cbpf.X:
        src, imm = REG_X, 0
    elif k > 0x7FFFFFFF:
        # Immediates are sign-extended in 64-bit compares: go through a register, zero-extended.
        out.append(Instruction(ebpf.ALU | ebpf.MOV | ebpf.K, REG_TMP, 0, 0, ebpf.signed32(k)))
        source, src, imm = ebpf.X, REG_TMP, 0
    if jf and not jt and op in _INVERSE:
        branches.append((len(out), pc + 1 + jf))
        out.append(Instruction(ebpf.JMP | _INVERSE[op] | source, REG_A, src, 0, imm))
        return
    branches.append((len(out), pc + 1 + jt))
    out.append(Instruction(ebpf.JMP | op | source, REG_A, src, 0, imm))
    if jf:
        branches.append((len(out), pc + 1 + jf))
        out.append(Instruction(ebpf.JMP | ebpf.JA))


def _straight(instruction: cbpf.Instruction) -> list[Instruction]:
    """The eBPF for one classic instruction that does not branch."""
    code, _, _, k = instruction
    imm = ebpf.signed32(k)
    kind = code & 7
    if kind == cbpf.ALU:
        if code in (cbpf.ALU | cbpf.DIV | cbpf.X, cbpf.ALU | cbpf.MOD | cbpf.X):
            # Classic division by zero returns 0; eBPF's would give a value and go on.
            return [
                Instruction(ebpf.ALU | ebpf.MOV | ebpf.X, REG_X, REG_X),
                Instruction(ebpf.JMP | ebpf.JNE | ebpf.K, REG_X, 0, 2),
                Instruction(ebpf.ALU | ebpf.XOR | ebpf.X, REG_A, REG_A),
                Instruction(ebpf.JMP | ebpf.EXIT),
                Instruction(code, REG_A, REG_X),
            ]
        if code == cbpf.ALU | cbpf.NEG:
            return [Instruction(ebpf.ALU | ebpf.NEG, REG_A)]
        if code & 0x08:
            return [Instruction(code, REG_A, REG_X)]
        return [Instruction(code, REG_A, 0, 0, imm)]
    if kind == cbpf.RET:
        if code == cbpf.RET | cbpf.K:
            return [Instruction(ebpf.ALU | ebpf.MOV | ebpf.K, REG_A, 0, 0, imm), Instruction(ebpf.JMP | ebpf.EXIT)]
        return [Instruction(ebpf.JMP | ebpf.EXIT)]
    if kind in (cbpf.ST, cbpf.STX):
        source = REG_A if kind == cbpf.ST else REG_X
        return [Instruction(ebpf.STX | ebpf.MEM | ebpf.W, ebpf.FP, source, -4 * k - 4)]
    if kind == cbpf.MISC:
        dst, src = (REG_X, REG_A) if code == cbpf.MISC | cbpf.TAX else (REG_A, REG_X)
        return [Instruction(ebpf.ALU64 | ebpf.MOV | ebpf.X, dst, src)]
    return _load(instruction)


def _load(instruction: cbpf.Instruction) -> list[Instruction]:
    code, _, _, k = instruction
    imm = ebpf.signed32(k)
    target = REG_A if code & 7 == cbpf.LD else REG_X
    mode = code & 0xE0
    if mode == cbpf.IMM:
        return [Instruction(ebpf.ALU | ebpf.MOV | ebpf.K, target, 0, 0, imm)]
    if mode == cbpf.MEM:
        return [Instruction(ebpf.LDX | ebpf.MEM | ebpf.W, target, ebpf.FP, -4 * k - 4)]
    if mode == cbpf.LEN:
        return [Instruction(ebpf.LDX | ebpf.MEM | ebpf.W, target, REG_CTX, 0)]
    if mode == cbpf.MSH:
        # There are no ancillary words here; as far off as they are, nothing is found either.
        imm = ebpf.signed32(min(k, cbpf.AD_OFF - 1))
        return [
            Instruction(ebpf.ALU64 | ebpf.MOV | ebpf.X, REG_X, REG_A),
            Instruction(ebpf.LD | ebpf.ABS | ebpf.B, 0, 0, 0, imm),
            Instruction(ebpf.ALU | ebpf.AND | ebpf.K, REG_A, 0, 0, 0xF),
            Instruction(ebpf.ALU | ebpf.LSH | ebpf.K, REG_A, 0, 0, 2),
            Instruction(ebpf.ALU64 | ebpf.MOV | ebpf.X, REG_TMP, REG_X),
            Instruction(ebpf.ALU64 | ebpf.MOV | ebpf.X, REG_X, REG_A),
            Instruction(ebpf.ALU64 | ebpf.MOV | ebpf.X, REG_A, REG_TMP),
        ]
    if mode == cbpf.IND:
        return [Instruction(code, 0, REG_X, 0, imm)]
    if k == cbpf.AD_OFF + 40:
        return [Instruction(ebpf.ALU | ebpf.XOR | ebpf.X, REG_A, REG_X)]
    return [Instruction(code, 0, 0, 0, imm)]
