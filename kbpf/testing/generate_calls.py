"""Helper calls in generated eBPF programs: maps, packet bytes, and what Linux leaves open.

A helper whose result Linux leaves open (time, random) is called and its result written over.
"""

from __future__ import annotations

from collections.abc import Callable

from kbpf.isa import ebpf
from kbpf.testing.generate_code import CONTEXT_REGISTER, Code
from kbpf.testing.generate_state import SCALAR, Pointer
from kbpf.uapi.enums import HELPERS

#: Maps whose elements go away or move when they are updated: pointers to them are not used after that.
MOVING = frozenset({"hash", "lru_hash", "percpu_hash", "lru_percpu_hash"})


def call(code: Code, name: str) -> None:
    code.emit(ebpf.JMP | ebpf.CALL, 0, 0, 0, HELPERS[name])
    code.now.clobber()


def can_call(code: Code) -> bool:
    return not any(number in code.reserved for number in range(6))


def _key(code: Code, index: int) -> int:
    """A key on the stack, mostly one of the few that are in use."""
    rng, size = code.rng, code.maps[index].key_size
    slot = code.slot(size)
    for offset in range(slot, slot + size, 4):
        if offset > slot:
            code.emit(ebpf.ST | ebpf.MEM | ebpf.W, ebpf.FP, 0, offset, 0)
        elif rng.random() < 0.6:
            code.emit(
                ebpf.ST | ebpf.MEM | ebpf.W,
                ebpf.FP,
                0,
                offset,
                rng.randrange(6) if rng.random() < 0.95 else code.word(),
            )
        else:
            code.emit(ebpf.STX | ebpf.MEM | ebpf.W, ebpf.FP, code.small(7), offset)
        code.now.store(offset, 4)
    return slot


def _address(code: Code, register: int, slot: int) -> None:
    code.emit(ebpf.ALU64 | ebpf.MOV | ebpf.X, register, ebpf.FP)
    code.emit(ebpf.ALU64 | ebpf.ADD | ebpf.K, register, 0, 0, slot)
    code.set(register, Pointer("stack", slot, slot))


def _map(code: Code) -> int:
    return code.rng.choice([n for n, spec in enumerate(code.maps) if n and spec.type != "prog_array"])


def lookup(code: Code) -> None:
    """Look an element up; where there is none, go on without it or somewhere else."""
    rng, index = code.rng, _map(code)
    slot = _key(code, index)
    per_cpu = "percpu" in code.maps[index].type and rng.random() < 0.3
    _address(code, 2, slot)
    code.load_map(1, index)
    if per_cpu:
        # The processor that runs the program, which is the same for both sides, or one that is not there.
        code.emit(ebpf.ALU64 | ebpf.MOV | ebpf.K, 3, 0, 0, code.rng.choice((0, 0, 0, 1 << 20)))
    call(code, "map_lookup_percpu_elem" if per_cpu else "map_lookup_elem")
    pointer = Pointer("value", map=index, size=code.maps[index].value_size)
    keep = rng.choice([number for number in (0, 7, 8, 9) if number not in code.reserved])
    if keep:
        code.emit(ebpf.ALU64 | ebpf.MOV | ebpf.X, keep, 0)
    # The null pointer is a number on the way that it takes.
    code.set(keep, None)
    code.set(0, None)
    if code.ahead and rng.random() < 0.6:
        code.jump(rng.choice(code.ahead), ebpf.JMP | ebpf.JEQ | ebpf.K, keep)
        code.set(keep, pointer)
        return
    missing = code.label()
    code.jump(missing, ebpf.JMP | ebpf.JEQ | ebpf.K, keep)
    code.set(keep, pointer)
    code.reserved.add(keep)
    for _ in range(rng.randrange(1, 4)):
        _use_value(code, keep, pointer.size)
    code.reserved.discard(keep)
    code.place(missing)


def _use_value(code: Code, register: int, size: int) -> None:
    rng = code.rng
    off = rng.randrange(0, size - 7)
    dice = rng.random()
    dst = rng.choice([n for n in (1, 2, 3, 4, 5) if n not in code.reserved])
    if dice < 0.4:
        code.emit(ebpf.LDX | ebpf.MEM | ebpf.DW, dst, register, off)
        code.set(dst, SCALAR)
    elif dice < 0.7:
        code.emit(ebpf.STX | ebpf.MEM | ebpf.DW, register, code.scalar(), off)
    else:
        code.move(dst, code.word())
        code.emit(ebpf.STX | ebpf.ATOMIC | ebpf.DW, register, dst, off // 8 * 8, ebpf.ADD)


def update(code: Code) -> None:
    """Store an element; the error, where it does not fit the flags or the map is full, stays in R0."""
    rng, index = code.rng, _map(code)
    size = code.maps[index].value_size
    if size > code.depth:
        return
    slot = _key(code, index)
    # The value must not lie over the key.
    held = [
        n
        for n in code.now.pointers("value")
        if 6 <= n < ebpf.FP
        and (pointer := code.now.registers[n])
        and isinstance(pointer, Pointer)
        and pointer.size - pointer.high >= size
    ]
    if held and rng.random() < 0.5:
        code.emit(ebpf.ALU64 | ebpf.MOV | ebpf.X, 3, rng.choice(held))
    else:
        value = code.ready_slot(size)
        _address(code, 3, value)
        if not code.now.is_ready(slot, code.maps[index].key_size):
            return
    flags = rng.choice((0, 0, 0, 0, 1, 1, 2, 2, 3, 4, 8))
    code.emit(ebpf.ALU64 | ebpf.MOV | ebpf.K, 4, 0, 0, flags)
    _address(code, 2, slot)
    code.load_map(1, index)
    call(code, "map_update_elem")
    _changed(code, index)


def delete(code: Code) -> None:
    index = _map(code)
    _address(code, 2, _key(code, index))
    code.load_map(1, index)
    call(code, "map_delete_elem")
    _changed(code, index)


def _changed(code: Code, index: int) -> None:
    if code.maps[index].type in MOVING:
        code.now.drop_values({index})


def packet_bytes(code: Code) -> None:
    """Copy bytes of the packet to the stack; zeroes and an error where there are none."""
    rng = code.rng
    if not code.now.pointers("context"):
        return
    size = rng.choice((1, 2, 4, 8, 16, rng.randrange(1, 17)))
    slot = code.slot(size, 1)
    relative = rng.random() < 0.4
    offset = code.small(rng.choice((7, 15, 31, 63))) if rng.random() < 0.7 else code.scalar()
    if offset != 2:
        code.emit(ebpf.ALU64 | ebpf.MOV | ebpf.X, 2, offset)
    _address(code, 3, slot)
    code.emit(ebpf.ALU64 | ebpf.MOV | ebpf.K, 4, 0, 0, size)
    code.emit(ebpf.ALU64 | ebpf.MOV | ebpf.X, 1, CONTEXT_REGISTER)
    if relative:
        code.emit(ebpf.ALU64 | ebpf.MOV | ebpf.K, 5, 0, 0, rng.choice((0, 0, 1, 1, 1, 2)))
    call(code, "skb_load_bytes_relative" if relative else "skb_load_bytes")
    code.now.store(slot, size)


def _open(name: str) -> Callable[[Code], None]:
    """A helper without arguments whose result is written over."""

    def item(code: Code) -> None:
        call(code, name)
        if code.rng.random() < 0.5:
            code.move(0, code.word())
        else:
            code.emit(ebpf.ALU64 | ebpf.AND | ebpf.K, 0)

    return item


def _plain(name: str) -> Callable[[Code], None]:
    return lambda code: call(code, name)


def tail_call(code: Code) -> None:
    """Begin again, where the program array has the program; else go on. R0 is nothing then."""
    array = [index for index, spec in enumerate(code.maps) if spec.type == "prog_array"]
    if not array or not code.main:
        return
    rng = code.rng
    # The program is at 0, nothing at 1, and there is no 2.
    if rng.random() < 0.5:
        code.emit(ebpf.ALU64 | ebpf.MOV | ebpf.K, 3, 0, 0, rng.choice((0, 0, 0, 1, 2)))
    else:
        code.emit(ebpf.ALU64 | ebpf.MOV | ebpf.X, 3, code.small(3))
    code.load_map(2, array[0])
    code.emit(ebpf.ALU64 | ebpf.MOV | ebpf.X, 1, CONTEXT_REGISTER)
    call(code, "tail_call")
    code.set(0, None)


def process_name(code: Code) -> None:
    slot = code.slot(16)
    _address(code, 1, slot)
    code.emit(ebpf.ALU64 | ebpf.MOV | ebpf.K, 2, 0, 0, 16)
    call(code, "get_current_comm")
    code.now.store(slot, 16)


#: Helpers by what they are called, with how often they come. What the emulator does not have is left out of a run.
HELPER_ITEMS: dict[str, tuple[Callable[[Code], None], int]] = {
    "map_lookup_elem": (lookup, 12),
    "map_update_elem": (update, 8),
    "map_delete_elem": (delete, 4),
    "tail_call": (tail_call, 4),
    "skb_load_bytes": (packet_bytes, 5),
    "ktime_get_ns": (_open("ktime_get_ns"), 1),
    "ktime_get_boot_ns": (_open("ktime_get_boot_ns"), 1),
    "ktime_get_coarse_ns": (_open("ktime_get_coarse_ns"), 1),
    "get_prandom_u32": (_open("get_prandom_u32"), 1),
    "get_smp_processor_id": (_open("get_smp_processor_id"), 1),
    "get_numa_node_id": (_open("get_numa_node_id"), 1),
    "get_current_pid_tgid": (_plain("get_current_pid_tgid"), 1),
    "get_current_uid_gid": (_plain("get_current_uid_gid"), 1),
    "get_current_comm": (process_name, 1),
}
