"""What generated programs really ran: instructions, ways of branches, memory, helpers, maps, with counts.

Counted in the emulator, whose runs agree with the kernel's, by watching each step that is taken. What a run of the
fuzzer claims to cover is listed by `required_classic`, `required_ebpf` and `required_direct`, from the same tables as
the instruction sets, and from the emulator's own tables of helpers and maps; what is missing of that in the end is an
error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kbpf.emulator import maps
from kbpf.emulator.classic import ClassicProgram
from kbpf.emulator.helpers.allowed import allowed
from kbpf.emulator.interpreter import SWITCHED, TAIL_CALL_HELPER
from kbpf.emulator.memory import CONTEXT, FLOW_KEYS, PACKET, STACK
from kbpf.emulator.packet import Packet
from kbpf.emulator.program import Program
from kbpf.isa import cbpf, ebpf
from kbpf.specs import ProgramSpec
from kbpf.testing import compared_elsewhere, generate_direct, generate_wild
from kbpf.testing.generate_calls import HELPER_ITEMS
from kbpf.testing.generate_ebpf import MAP_TYPES
from kbpf.testing.generate_items import ATOMIC_OPERATIONS
from kbpf.uapi.enums import HELPERS

_ARITHMETIC = ("add", "sub", "mul", "div", "or", "and", "lsh", "rsh", "neg", "mod", "xor", "mov", "arsh", "end")
_JUMPS = (
    "ja",
    "jeq",
    "jgt",
    "jge",
    "jset",
    "jne",
    "jsgt",
    "jsge",
    "call",
    "exit",
    "jlt",
    "jle",
    "jslt",
    "jsle",
    "may_goto",
)
_SIZES = {ebpf.W: "w", ebpf.H: "h", ebpf.B: "b", ebpf.DW: "dw"}
_MAP_REFERENCES = {
    0: "number",
    ebpf.PSEUDO_MAP_FD: "map by descriptor",
    ebpf.PSEUDO_MAP_VALUE: "value by descriptor",
    ebpf.PSEUDO_MAP_IDX: "map by index",
    ebpf.PSEUDO_MAP_IDX_VALUE: "value by index",
    ebpf.PSEUDO_FUNC: "function",
}
_ATOMICS = {
    **{
        op | fetch: name + (" fetch" if fetch else "")
        for op, name in ((ebpf.ADD, "add"), (ebpf.OR, "or"), (ebpf.AND, "and"), (ebpf.XOR, "xor"))
        for fetch in (0, ebpf.FETCH)
    },
    ebpf.XCHG: "xchg",
    ebpf.CMPXCHG: "cmpxchg",
    ebpf.LOAD_ACQ: "load_acquire",
    ebpf.STORE_REL: "store_release",
}
_HELPER_NAMES = {number: name for name, number in HELPERS.items()}


_REGIONS = {STACK: "stack", CONTEXT: "context", PACKET: "packet", FLOW_KEYS: "flow keys"}


class Watch:
    """The steps that an eBPF program takes from now on.

    `ways` counts (index, index of the next), `regions` what loads and stores reach: (index, region's name).
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        program.code.engine = "interpreter"
        code, instructions = program.code, program.spec.instructions
        self.ways: Counter[tuple[int, int]] = Counter()
        self.regions: Counter[tuple[int, str]] = Counter()
        code.steps = [
            self._watched(pc, step, instructions[pc] if pc < len(instructions) else None)
            for pc, step in enumerate(code.steps)
        ]

    def _watched(
        self, pc: int, step: Callable[[Any], int], instruction: ebpf.Instruction | None
    ) -> Callable[[Any], int]:
        ways, regions = self.ways, self.regions
        base = None if instruction is None else _base(instruction)
        if base is None:

            def plain(r: Any) -> int:
                next = step(r)
                ways[pc, next] += 1
                return next

            return plain
        off = instruction.off if instruction else 0

        def memory(r: Any) -> int:
            regions[pc, _REGIONS.get(r[base] + off >> 32, "value")] += 1
            next = step(r)
            ways[pc, next] += 1
            return next

        return memory


def _base(instruction: ebpf.Instruction) -> int | None:
    """The register that an access to memory goes through."""
    kind = instruction.opcode & 7
    if kind == ebpf.LDX or (
        kind == ebpf.STX and instruction.opcode & 0xE0 == ebpf.ATOMIC and instruction.imm == ebpf.LOAD_ACQ
    ):
        return instruction.src
    return instruction.dst if kind in (ebpf.ST, ebpf.STX) else None


# eBPF.


def count_ebpf(counts: Counter[str], watch: Watch) -> None:
    """Add what one program ran."""
    spec = watch.program.spec
    for (pc, next), times in watch.ways.items():
        if pc < len(spec.instructions):
            for name in _ebpf_names(spec, pc, next):
                counts[name] += times
    for (pc, region), times in watch.regions.items():
        counts[f"{_memory_name(spec.instructions[pc])} {region}"] += times


def count_direct(counts: Counter[str], watch: Watch) -> None:
    """Add what one program ran, with its type where it calls a helper."""
    found: Counter[str] = Counter()
    count_ebpf(found, watch)
    for name, times in found.items():
        counts[f"{watch.program.type} {name}" if name.startswith("call ") else name] += times


def count_wild(counts: Counter[str], watch: Watch, fault: int | None) -> None:
    """Add what one program ran, with the instruction where it went wrong: opcodes, and helpers by type.

    Raises `AssertionError` if it ran longer than its budget is.
    """
    instructions = watch.program.spec.instructions
    if watch.ways.total() > watch.program.budget + len(watch.program.code.steps):
        raise AssertionError("the program ran on after its budget was used up")
    ran = [(pc, times) for (pc, _), times in watch.ways.items()] + ([] if fault is None else [(fault, 1)])
    for pc, times in ran:
        if pc < len(instructions):
            opcode, _, src, _, imm = instructions[pc]
            counts[f"opcode {opcode:#04x}"] += times
            if opcode == ebpf.JMP | ebpf.CALL and not src:
                counts[f"{watch.program.type} call {_HELPER_NAMES[imm]}"] += times


def required_wild() -> set[str]:
    """What a full run must have run: each opcode, each helper by each type that has it, and all ways to end."""
    need = {f"opcode {code:#04x}" for code in (*generate_wild.OPCODES, ebpf.JMP | ebpf.CALL, ebpf.JMP | ebpf.EXIT)}
    need |= {f"opcode {ebpf.STX | ebpf.ATOMIC | size:#04x}" for size in _SIZES}
    need |= {f"ended in {way}" for way in ("value", "fault", "errno")}
    for type, attach_types in generate_wild.ATTACH_TYPES_OF.items():
        ids = frozenset[int]().union(*(allowed(type, attach_type) for attach_type in attach_types))
        need |= {f"{type} call {name}" for name in generate_direct.reachable(type) if HELPERS[name] in ids}
    return need


def _ebpf_names(spec: ProgramSpec, pc: int, next: int) -> Iterator[str]:
    instruction = spec.instructions[pc]
    opcode, _, src, off, imm = instruction
    kind = opcode & 7
    if kind in (ebpf.ALU, ebpf.ALU64):
        yield _arithmetic_name(opcode, off, imm)
    elif kind in (ebpf.JMP, ebpf.JMP32):
        name = _jump_name(instruction)
        if opcode & 0xF0 in (ebpf.JA, ebpf.CALL, ebpf.EXIT):
            yield name
            if not src and opcode == ebpf.JMP | ebpf.CALL and imm == TAIL_CALL_HELPER:
                yield "tail call taken" if next == SWITCHED else "tail call not taken"
        elif off:
            yield f"{name} {'taken' if next != pc + 1 else 'not taken'}"
    elif opcode == ebpf.LD_IMM64:
        yield f"ld_imm64 {_MAP_REFERENCES[src]}"
        if src in (ebpf.PSEUDO_MAP_IDX, ebpf.PSEUDO_MAP_IDX_VALUE):
            yield f"map {spec.maps[imm].type}"
    elif kind == ebpf.LD:
        yield f"{_packet_name(opcode, imm)} {'found' if next == pc + 1 else 'missing'}"


def _arithmetic_name(opcode: int, off: int, imm: int) -> str:
    wide, op = opcode & 7 == ebpf.ALU64, opcode & 0xF0
    name = _ARITHMETIC[op >> 4]
    if op == ebpf.END:
        return f"{'bswap' if wide else 'be' if opcode & ebpf.X else 'le'}{imm}"
    if op == ebpf.MOV and off:
        name = f"movsx{off}"
    elif off:
        name = "s" + name
    source = "" if op == ebpf.NEG else " x" if opcode & ebpf.X else " k"
    return f"alu{64 if wide else 32} {name}{source}"


def _jump_name(instruction: ebpf.Instruction) -> str:
    opcode, _, src, _, imm = instruction
    op = opcode & 0xF0
    if op == ebpf.CALL:
        return "call function" if src == ebpf.PSEUDO_CALL else f"call {_HELPER_NAMES[imm]}"
    if opcode == ebpf.JMP32 | ebpf.JA:
        return "gotol"
    if op in (ebpf.JA, ebpf.EXIT, ebpf.JCOND):
        return _JUMPS[op >> 4]
    return f"jmp{64 if opcode & 7 == ebpf.JMP else 32} {_JUMPS[op >> 4]} {'x' if opcode & ebpf.X else 'k'}"


def _packet_name(opcode: int, imm: int) -> str:
    mode = "ind" if opcode & 0xE0 == ebpf.IND else "abs"
    where = ""
    if imm & 0xFFFFFFFF >= cbpf.NET_OFF:
        where = " network"
    elif imm & 0xFFFFFFFF >= cbpf.LL_OFF:
        where = " link"
    return f"ld {mode} {_SIZES[opcode & 0x18]}{where}"


def _memory_name(instruction: ebpf.Instruction) -> str:
    opcode, _, _, _, imm = instruction
    kind, size = opcode & 7, _SIZES[opcode & 0x18]
    if kind == ebpf.LDX:
        return f"{'ldsx' if opcode & 0xE0 == ebpf.MEMSX else 'ldx'} {size}"
    if opcode & 0xE0 == ebpf.ATOMIC:
        return f"atomic {_ATOMICS[imm]} {size}"
    return f"{'st' if kind == ebpf.ST else 'stx'} {size}"


def required_direct() -> set[str]:
    """What a full run must have run: each helper by each type that may call it, each type of map."""
    need = {f"{type} call {name}" for type in generate_direct.TYPES for name in generate_direct.generated(type)}
    need |= {f"map {type}" for type in maps.KINDS if type not in compared_elsewhere.MAPS}
    need |= {"tail call taken", "tail call not taken"}
    for size in ("b", "h", "w", "dw"):
        need |= {f"{name} {size} {where}" for name in ("ldx", "stx") for where in ("packet", "flow keys")}
        need.add(f"st {size} packet")
        if size != "dw":
            need.add(f"ldsx {size} packet")
    return need


def required_ebpf() -> set[str]:
    """What a full run must have run."""
    need = set()
    for wide, bits in ((True, 64), (False, 32)):
        for source in ("k", "x"):
            need |= {
                f"alu{bits} {name} {source}" for name in (*_ARITHMETIC, "sdiv", "smod") if name not in ("neg", "end")
            }
            for name in _JUMPS:
                if name not in ("ja", "call", "exit", "may_goto"):
                    need |= {f"jmp{bits} {name} {source} {way}" for way in ("taken", "not taken")}
        need |= {f"alu{bits} neg"} | {f"alu{bits} movsx{size} x" for size in ((8, 16, 32) if wide else (8, 16))}
    need |= {f"{name}{size}" for name in ("le", "be", "bswap") for size in (16, 32, 64)}
    need |= {"ja", "gotol", "exit", "call function", "may_goto not taken"}
    need |= {f"call {name}" for name in HELPER_ITEMS}
    need |= {f"ld_imm64 {name}" for src, name in _MAP_REFERENCES.items() if src != ebpf.PSEUDO_FUNC}
    need |= {"tail call taken", "tail call not taken"}
    for mode in ("abs", "ind"):
        for size in ("w", "h", "b"):
            need |= {f"ld {mode} {size} {way}" for way in ("found", "missing")}
            need |= {f"ld {mode} {size} {where} found" for where in ("network", "link")}
    sizes = ("b", "h", "w", "dw")
    for size in sizes:
        need |= {f"{name} {size} {where}" for name in ("ldx", "st", "stx") for where in ("stack", "value", "context")}
        need |= {
            f"atomic {name} {size} {where}"
            for name in ("load_acquire", "store_release")
            for where in ("stack", "value")
        }
        if size != "dw":
            need |= {f"ldsx {size} {where}" for where in ("stack", "value")}
    need |= {
        f"atomic {_ATOMICS[op]} {size} {where}"
        for op in ATOMIC_OPERATIONS
        for size in ("w", "dw")
        for where in ("stack", "value")
    }
    return need | {f"map {name}" for name in (*MAP_TYPES, "prog_array")}


# Classic BPF.

_CLASSIC_KINDS = ("ld", "ldx", "st", "stx", "alu", "jmp", "ret", "misc")
_CLASSIC_ARITHMETIC = ("add", "sub", "mul", "div", "or", "and", "lsh", "rsh", "neg", "mod", "xor")
_CLASSIC_MODES = ("imm", "abs", "ind", "mem", "len", "msh")


class WatchedFilter(ClassicProgram):
    """A classic filter that adds what its runs do to `counts`."""

    def __init__(self, instructions: Sequence[cbpf.Instruction], counts: Counter[str]) -> None:
        super().__init__(instructions)
        self._program = instructions
        self._counts = counts

    def run_packet(self, packet: Packet) -> int:
        value, path = self.path(packet)
        for pc, following in zip(path, (*path[1:], None), strict=True):
            code, jt, jf, k = self._program[pc]
            name = classic_name(code, k)
            if code & 7 != cbpf.JMP or code == cbpf.JMP | cbpf.JA:
                self._counts[name] += 1
            elif jt != jf:
                self._counts[f"{name} {'true' if following == pc + 1 + jt else 'false'}"] += 1
        return value


def classic_name(code: int, k: int) -> str:
    kind = code & 7
    if kind == cbpf.ALU:
        op = _CLASSIC_ARITHMETIC[code >> 4 & 15]
        return op if op == "neg" else f"{op} {'x' if code & cbpf.X else 'k'}"
    if kind == cbpf.JMP:
        return "ja" if code == cbpf.JMP | cbpf.JA else f"{_JUMPS[code >> 4 & 15]} {'x' if code & cbpf.X else 'k'}"
    if kind == cbpf.RET:
        return "ret a" if code == cbpf.RET | cbpf.A else "ret k"
    if kind == cbpf.MISC:
        return "txa" if code & cbpf.TXA else "tax"
    name = _CLASSIC_KINDS[kind]
    if kind in (cbpf.ST, cbpf.STX):
        return name
    mode = code & 0xE0
    size = "" if mode in (cbpf.MEM, cbpf.IMM, cbpf.LEN) else f" {_SIZES[code & 0x18]}"
    where = ""
    if mode in (cbpf.ABS, cbpf.MSH, cbpf.IND):
        if mode == cbpf.ABS and k >= cbpf.AD_OFF:
            # They all load a word, whatever the size says.
            known = cbpf.ANCILLARY.get(k - cbpf.AD_OFF)
            return f"ancillary {known.name}" if known else "ancillary"
        where = " network" if k >= cbpf.NET_OFF else " link" if k >= cbpf.LL_OFF else ""
    return f"{name} {_CLASSIC_MODES[mode >> 5]}{size}{where}"


def required_classic() -> set[str]:
    """What a full run must have run."""
    need = set()
    for code in cbpf.VALID_CODES:
        name = classic_name(code, 0)
        conditional = code & 7 == cbpf.JMP and code != cbpf.JMP | cbpf.JA
        need |= {f"{name} true", f"{name} false"} if conditional else {name}
    need |= {f"ancillary {word.name}" for word in cbpf.ANCILLARY.values()}
    for offset in (cbpf.NET_OFF, cbpf.LL_OFF):
        need |= {
            classic_name(cbpf.LD | size | mode, offset)
            for size in (cbpf.W, cbpf.H, cbpf.B)
            for mode in (cbpf.ABS, cbpf.IND)
        }
        need.add(classic_name(cbpf.LDX | cbpf.B | cbpf.MSH, offset))
    return need
