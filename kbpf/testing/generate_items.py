"""The straight pieces of generated eBPF programs: arithmetic, loads, stores, atomics, and packet loads.

Each function writes a piece at the end of a `Code`, or nothing where what it needs is not there.
"""

from __future__ import annotations

from kbpf.isa import ebpf
from kbpf.testing.generate_code import CONTEXT_REGISTER, SIZES, Code
from kbpf.testing.generate_state import SCALAR, Pointer
from kbpf.uapi.structs import STRUCTS

_BUFF = STRUCTS["__sk_buff"].fields
#: What a socket filter may read of its context, besides cb.
READABLE = (
    "len", "pkt_type", "mark", "queue_mapping", "protocol", "vlan_present", "vlan_tci", "vlan_proto", "priority",
    "ingress_ifindex", "ifindex", "tc_index", "hash", "napi_id", "gso_segs", "gso_size",
)  # fmt: skip
CB = _BUFF["cb"].offset
CB_END = CB + _BUFF["cb"].size * _BUFF["cb"].count

_BINARY = (
    ebpf.ADD,
    ebpf.SUB,
    ebpf.MUL,
    ebpf.DIV,
    ebpf.OR,
    ebpf.AND,
    ebpf.LSH,
    ebpf.RSH,
    ebpf.MOD,
    ebpf.XOR,
    ebpf.MOV,
    ebpf.ARSH,
)
ATOMIC_OPERATIONS = (
    *(op | fetch for op in (ebpf.ADD, ebpf.OR, ebpf.AND, ebpf.XOR) for fetch in (0, ebpf.FETCH)),
    ebpf.XCHG,
    ebpf.CMPXCHG,
)


def arithmetic(code: Code) -> None:
    """A few operations of two operands."""
    for _ in range(code.rng.randrange(1, 5)):
        _binary(code)


def _binary(code: Code) -> None:
    rng = code.rng
    wide = rng.random() < 0.5
    kind, op = ebpf.ALU64 if wide else ebpf.ALU, rng.choice(_BINARY)
    off = int(op in (ebpf.DIV, ebpf.MOD) and rng.random() < 0.5)
    if rng.random() < (0.8 if op == ebpf.MOV else 0.55):
        src = code.scalar()
        if op == ebpf.MOV:
            dst = code.target()
            off = rng.choice((0, 0, 8, 16, 32) if wide else (0, 0, 8, 16))
        else:
            dst = code.changeable()
        if op in (ebpf.DIV, ebpf.MOD) and dst != src and rng.random() < 0.4:
            # Division by zero, and of the least number by -1, which overflows.
            code.move(src, rng.choice((0, 0, 1, -1)))
            if rng.random() < 0.3:
                code.move(dst, -1 << (63 if wide else 31))
        code.emit(kind | op | ebpf.X, dst, src, off)
    else:
        dst, imm = code.target() if op == ebpf.MOV else code.changeable(), code.word()
        if op in (ebpf.LSH, ebpf.RSH, ebpf.ARSH):
            imm &= 63 if wide else 31
        elif op in (ebpf.DIV, ebpf.MOD):
            imm = imm or 1
        code.emit(kind | op | ebpf.K, dst, 0, off, imm)
    code.set(dst, SCALAR)


def unary(code: Code) -> None:
    rng = code.rng
    dst, dice = code.changeable(), rng.random()
    if dice < 0.4:
        code.emit(rng.choice((ebpf.ALU, ebpf.ALU64)) | ebpf.NEG, dst)
    elif dice < 0.75:
        code.emit(ebpf.ALU | ebpf.END | rng.choice((ebpf.K, ebpf.X)), dst, 0, 0, rng.choice((16, 32, 64)))
    else:
        code.emit(ebpf.ALU64 | ebpf.END, dst, 0, 0, rng.choice((16, 32, 64)))


def immediate(code: Code) -> None:
    code.move(code.target(), code.long())


def load(code: Code) -> None:
    rng = code.rng
    size = rng.choice((*SIZES,))
    signed = size != ebpf.DW and rng.random() < 0.3
    place = code.memory(SIZES[size], read=True)
    if place is None:
        return
    register, off, _ = place
    dst = code.target()
    code.emit(ebpf.LDX | (ebpf.MEMSX if signed else ebpf.MEM) | size, dst, register, off)
    code.set(dst, SCALAR)


def store(code: Code) -> None:
    rng = code.rng
    size = rng.choice((*SIZES,))
    src = code.scalar() if rng.random() < 0.6 else None
    place = code.memory(SIZES[size], read=False)
    if place is None:
        return
    register, off, pointer = place
    if src is None:
        code.emit(ebpf.ST | ebpf.MEM | size, register, 0, off, code.word())
    else:
        code.emit(ebpf.STX | ebpf.MEM | size, register, src, off)
    code.stored(pointer, off, SIZES[size])


def atomic(code: Code) -> None:
    """Read-modify-write of a word, or an ordered load or store of any size."""
    rng = code.rng
    if rng.random() < 0.25:
        size = rng.choice((*SIZES,))
        place = code.memory(SIZES[size], read=True, aligned=True)
        if place is None:
            return
        register, off, pointer = place
        if rng.random() < 0.5:
            dst = code.target()
            code.emit(ebpf.STX | ebpf.ATOMIC | size, dst, register, off, ebpf.LOAD_ACQ)
            code.set(dst, SCALAR)
        else:
            code.emit(ebpf.STX | ebpf.ATOMIC | size, register, code.scalar(), off, ebpf.STORE_REL)
            code.stored(pointer, off, SIZES[size])
        return
    size, operation = rng.choice((ebpf.W, ebpf.DW)), rng.choice(ATOMIC_OPERATIONS)
    # The source is written by operations that fetch.
    src = code.changeable()
    if operation == ebpf.CMPXCHG:
        if 0 in code.reserved:
            return
        if code.now.registers[0] != SCALAR or rng.random() < 0.3:
            code.move(0, code.word())
    place = code.memory(SIZES[size], read=True, aligned=True)
    if place is None or place[2].low != place[2].high:
        return
    register, off, pointer = place
    if operation == ebpf.CMPXCHG and rng.random() < 0.5:
        # What is there is what is expected.
        code.emit(ebpf.LDX | ebpf.MEM | size, 0, register, off)
    code.emit(ebpf.STX | ebpf.ATOMIC | size, register, src, off, operation)
    code.stored(pointer, off, SIZES[size])


def context_load(code: Code) -> None:
    rng = code.rng
    holders = code.now.pointers("context")
    if not holders:
        return
    size = rng.choice((*SIZES,))
    width = SIZES[size]
    if size == ebpf.DW or rng.random() < 0.2:
        off = rng.randrange(CB, CB_END - width + 1) // width * width
    else:
        off = _BUFF[rng.choice(READABLE)].offset + rng.randrange(0, 5 - width) // width * width
    dst = code.target()
    code.emit(ebpf.LDX | ebpf.MEM | size, dst, rng.choice(holders), off)
    code.set(dst, SCALAR)


def context_store(code: Code) -> None:
    rng = code.rng
    holders = code.now.pointers("context")
    if not holders:
        return
    size = rng.choice((*SIZES,))
    off = rng.randrange(CB, CB_END - SIZES[size] + 1) // SIZES[size] * SIZES[size]
    if rng.random() < 0.6:
        code.emit(ebpf.STX | ebpf.MEM | size, rng.choice(holders), code.scalar(), off)
    else:
        code.emit(ebpf.ST | ebpf.MEM | size, rng.choice(holders), 0, off, code.word())


def packet_load(code: Code) -> None:
    """LD_ABS or LD_IND: mostly where there is something, since else the program ends."""
    rng = code.rng
    if not code.main or any(number in code.reserved for number in range(6)):
        return
    dice = rng.random()
    if dice < 0.85:
        imm = rng.randrange(24)
    elif dice < 0.9:
        imm = rng.randrange(100)
    elif dice < 0.98:
        # From the network header, or from the link header, which lies before the data.
        imm = rng.choice((-0x100000, -0x200000)) + rng.randrange(30)
    else:
        imm = code.word()
    if rng.random() < 0.4:
        src = rng.choice(
            [number for number in range(ebpf.FP) if number != CONTEXT_REGISTER and number not in code.reserved]
        )
        code.move(src, rng.randrange(8) if imm < 100 else -rng.randrange(8))
        code.emit(ebpf.LD | ebpf.IND | rng.choice((ebpf.B, ebpf.H, ebpf.W)), 0, src, 0, imm)
    else:
        code.emit(ebpf.LD | ebpf.ABS | rng.choice((ebpf.B, ebpf.H, ebpf.W)), 0, 0, 0, imm)
    code.now.clobber()


def copy_pointer(code: Code) -> None:
    """A pointer in another register, moved by a constant."""
    rng, state = code.rng, code.now
    register = rng.choice(state.pointers("stack", "value", "window"))
    pointer = state.registers[register]
    dst = code.target()
    assert isinstance(pointer, Pointer)
    code.emit(ebpf.ALU64 | ebpf.MOV | ebpf.X, dst, register)
    bottom, top = (-code.depth, 0) if pointer.region == "stack" else (0, pointer.size)
    by = rng.randrange(bottom - pointer.low, top - pointer.high + 1)
    if pointer.region != "value":
        by = by // 8 * 8 if pointer.low + by // 8 * 8 >= bottom else 0
    if rng.random() < 0.8 and by:
        # The verifier lets nothing be subtracted from a pointer to the stack.
        subtract = pointer.region == "value" and rng.random() < 0.5
        code.emit(ebpf.ALU64 | (ebpf.SUB if subtract else ebpf.ADD) | ebpf.K, dst, 0, 0, -by if subtract else by)
        pointer = pointer._replace(low=pointer.low + by, high=pointer.high + by)
    code.set(dst, pointer)


def move_pointer(code: Code) -> None:
    """Add an unknown number within bounds to a pointer."""
    rng, state = code.rng, code.now
    held = [number for number in state.pointers("stack", "value", "window") if number not in code.reserved | {ebpf.FP}]
    if not held:
        return
    register = rng.choice(held)
    pointer = state.registers[register]
    assert isinstance(pointer, Pointer)
    top = 0 if pointer.region == "stack" else pointer.size
    mask = rng.choice((8, 16, 24, 56) if pointer.region != "value" else (1, 3, 7, 8, 15))
    if pointer.high + mask > top - 1:
        return
    index = code.small(mask)
    code.emit(ebpf.ALU64 | ebpf.ADD | ebpf.X, register, index)
    step = mask & -mask
    code.set(register, pointer._replace(high=pointer.high + mask, step=min(pointer.step, step)))


def subtract_pointers(code: Code) -> None:
    """The distance of two pointers into the stack: a number like any other."""
    rng, state = code.rng, code.now
    held = [n for n in state.pointers("stack") if n not in code.reserved | {ebpf.FP}]
    if not held:
        return
    register = rng.choice(held)
    code.emit(ebpf.ALU64 | ebpf.SUB | ebpf.X, register, rng.choice(state.pointers("stack")))
    code.set(register, SCALAR)


def spill(code: Code) -> None:
    """Keep a pointer on the stack, or take one back."""
    rng, state = code.rng, code.now
    if state.spills and rng.random() < 0.6:
        offset = rng.choice([*state.spills])
        dst = code.target()
        code.emit(ebpf.LDX | ebpf.MEM | ebpf.DW, dst, ebpf.FP, offset)
        code.set(dst, state.spills[offset])
        return
    register = rng.choice(state.pointers("stack", "value", "window", "context"))
    pointer = state.registers[register]
    assert isinstance(pointer, Pointer)
    offset = code.slot(8)
    code.emit(ebpf.STX | ebpf.MEM | ebpf.DW, ebpf.FP, register, offset)
    state.spill(offset, pointer)


#: The pieces and how often they come.
ITEMS = (
    (arithmetic, 30), (unary, 6), (immediate, 6), (load, 14), (store, 14), (atomic, 16), (context_load, 5),
    (context_store, 3), (packet_load, 6), (copy_pointer, 6), (move_pointer, 4), (subtract_pointers, 1), (spill, 5),
)  # fmt: skip
