"""eBPF instructions as the kernel's disassembler and bpftool list them (kernel/bpf/disasm.c)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.uapi.enums import HELPERS

_CLASSES = ("ld", "ldx", "st", "stx", "alu", "jmp", "jmp32", "alu64")
_OPERATORS = ("+=", "-=", "*=", "/=", "|=", "&=", "<<=", ">>=", "neg", "%=", "^=", "=", "s>>=", "endian")
_ATOMIC = {ebpf.ADD: "add", ebpf.AND: "and", ebpf.OR: "or", ebpf.XOR: "xor"}
_TESTS = {
    ebpf.JEQ: "==",
    ebpf.JGT: ">",
    ebpf.JGE: ">=",
    ebpf.JSET: "&",
    ebpf.JNE: "!=",
    ebpf.JSGT: "s>",
    ebpf.JSGE: "s>=",
    ebpf.JLT: "<",
    ebpf.JLE: "<=",
    ebpf.JSLT: "s<",
    ebpf.JSLE: "s<=",
}
_SIZES = {ebpf.B: "u8", ebpf.H: "u16", ebpf.W: "u32", ebpf.DW: "u64"}
_NAMES = {number: f"bpf_{name}" for name, number in HELPERS.items()}

#: Gives the name of what a call's `imm` means.
Called = Callable[[int], str]


def helper_name(imm: int) -> str:
    """The helper's name, as programs are loaded with it; ``unknown`` for a number that is none."""
    return _NAMES.get(imm, "unknown")


def lines(instructions: Sequence[Instruction], called: Called = helper_name) -> Iterator[tuple[int, str]]:
    """Each instruction's index and text, such as ``(b7) r0 = 0``; the two slots of a 64-bit load are one."""
    skip = False
    for index, instruction in enumerate(instructions):
        if skip:
            skip = False
            continue
        skip = instruction.opcode == ebpf.LD_IMM64
        second = instructions[index + 1] if skip and index + 1 < len(instructions) else Instruction(0)
        yield index, f"({instruction.opcode:02x}) {_text(instruction, second, called)}"


def _text(instruction: Instruction, second: Instruction, called: Called) -> str:
    kind = instruction.opcode & 7
    if kind in (ebpf.ALU, ebpf.ALU64):
        return _arithmetic(instruction)
    if kind in (ebpf.JMP, ebpf.JMP32):
        return _jump(instruction, called)
    if kind == ebpf.LD:
        return _load(instruction, second)
    return _memory(instruction)


def _arithmetic(instruction: Instruction) -> str:
    opcode, dst, src, off, imm = instruction
    operation, wide = opcode & 0xF0, opcode & 7 == ebpf.ALU64
    letter = "r" if wide else "w"
    if operation == ebpf.END:
        order = "bswap" if wide else "be" if opcode & ebpf.X else "le"
        return f"r{dst} = {order}{imm} r{dst}"
    if operation == ebpf.NEG:
        return f"{letter}{dst} = -{letter}{dst}"
    if operation >> 4 >= len(_OPERATORS):
        return _CLASSES[opcode & 7]
    operator, extended = _OPERATORS[operation >> 4], ""
    if off and operation == ebpf.MOV:
        extended = f"(s{off})"
    elif off and operation in (ebpf.DIV, ebpf.MOD):
        operator = "s" + operator
    return f"{letter}{dst} {operator} " + (f"{extended}{letter}{src}" if opcode & ebpf.X else str(imm))


def _jump(instruction: Instruction, called: Called) -> str:
    opcode, dst, src, off, imm = instruction
    operation, long = opcode & 0xF0, opcode & 7 == ebpf.JMP
    if operation == ebpf.CALL:
        if src == ebpf.PSEUDO_CALL:
            return f"call pc{imm:+}"
        name = "kernel-function" if src == ebpf.PSEUDO_KFUNC_CALL else _NAMES.get(imm) or called(imm)
        return f"call {name}#{imm}"
    if operation == ebpf.JA:
        return f"goto pc{off:+}" if long else f"gotol pc{imm:+}"
    if operation == ebpf.JCOND and long:
        return f"may_goto pc{off:+}"
    if operation == ebpf.EXIT:
        return "exit"
    if operation not in _TESTS:
        return _CLASSES[opcode & 7]
    letter = "r" if long else "w"
    with_what = f"{letter}{src}" if opcode & ebpf.X else f"0x{imm & 0xFFFFFFFF:x}"
    return f"if {letter}{dst} {_TESTS[operation]} {with_what} goto pc{off:+}"


def _load(instruction: Instruction, second: Instruction) -> str:
    opcode, dst, src, _, imm = instruction
    mode, size = opcode & 0xE0, _SIZES[opcode & ebpf.DW]
    if mode == ebpf.ABS:
        return f"r0 = *({size} *)skb[{imm}]"
    if mode == ebpf.IND:
        return f"r0 = *({size} *)skb[r{src} + {imm}]"
    if opcode != ebpf.LD_IMM64:
        return f"BUG_ld_{opcode:02x}"
    number = imm & 0xFFFFFFFF
    meaning = {
        ebpf.PSEUDO_MAP_FD: f"map[id:{number}]",
        ebpf.PSEUDO_MAP_VALUE: f"map[id:{number}][0]+{second.imm & 0xFFFFFFFF}",
        ebpf.PSEUDO_MAP_IDX_VALUE: f"map[idx:{number}]+{second.imm & 0xFFFFFFFF}",
        ebpf.PSEUDO_FUNC: f"subprog[{imm:+}]",
    }
    return f"r{dst} = {meaning.get(src) or hex((second.imm & 0xFFFFFFFF) << 32 | number)}"


def _memory(instruction: Instruction) -> str:
    opcode, dst, src, off, imm = instruction
    kind, mode, size = opcode & 7, opcode & 0xE0, _SIZES[opcode & ebpf.DW]
    if kind == ebpf.LDX:
        if mode not in (ebpf.MEM, ebpf.MEMSX):
            return f"BUG_ldx_{opcode:02x}"
        return f"r{dst} = *({size if mode == ebpf.MEM else size.replace('u', 's')} *)(r{src} {off:+})"
    if kind == ebpf.ST:
        if mode == ebpf.MEM:
            return f"*({size} *)(r{dst} {off:+}) = {imm}"
        return "nospec" if mode == ebpf.ATOMIC else f"BUG_st_{opcode:02x}"
    if mode == ebpf.MEM:
        return f"*({size} *)(r{dst} {off:+}) = r{src}"
    if mode != ebpf.ATOMIC:
        return f"BUG_{opcode:02x}"
    wide, place = "64" if size == "u64" else "", f"({size} *)(r{dst} {off:+})"
    if imm in _ATOMIC:
        return f"lock *{place} {_OPERATORS[imm >> 4]} r{src}"
    if imm & ebpf.FETCH and imm & ~ebpf.FETCH in _ATOMIC:
        return f"r{src} = atomic{wide}_{_ATOMIC[imm & ~ebpf.FETCH]}({place}, r{src})"
    if imm == ebpf.CMPXCHG:
        return f"r0 = atomic{wide}_cmpxchg({place}, r0, r{src})"
    if imm == ebpf.XCHG:
        return f"r{src} = atomic{wide}_xchg({place}, r{src})"
    if imm == ebpf.LOAD_ACQ:
        return f"r{dst} = load_acquire(({size} *)(r{src} {off:+}))"
    if imm == ebpf.STORE_REL:
        return f"store_release({place}, r{src})"
    return f"BUG_{opcode:02x}"
