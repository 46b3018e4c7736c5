"""Classic BPF: the instruction as a tuple, its opcodes as tables, and the kernel's check.

The semantics are Linux's (net/core/filter.c, Documentation/networking/filter.rst): a load
outside the packet and a division by X == 0 end the program with 0, shift counts by X are
taken modulo 32, and loads at or above `NET_OFF` and `LL_OFF` are relative to the network
and link-layer headers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from kbpf.errors import FilterError

# Instruction classes (linux/bpf_common.h).
LD, LDX, ST, STX, ALU, JMP, RET, MISC = range(8)
# Load sizes and modes.
W, H, B = 0x00, 0x08, 0x10
IMM, ABS, IND, MEM, LEN, MSH = 0x00, 0x20, 0x40, 0x60, 0x80, 0xA0
# ALU and JMP operations.
ADD, SUB, MUL, DIV, OR, AND, LSH, RSH, NEG, MOD, XOR = (n << 4 for n in range(11))
JA, JEQ, JGT, JGE, JSET = (n << 4 for n in range(5))
# Operand sources, and what RET returns.
K, X, A = 0x00, 0x08, 0x10
TAX, TXA = 0x00, 0x80

#: Scratch memory words M[0] to M[15] (BPF_MEMWORDS).
MEMWORDS = 16
#: Longest program that Linux accepts (BPF_MAXINSNS).
MAXINSNS = 4096

# Where absolute loads stop being relative to the start of the data (linux/filter.h).
AD_OFF = 0xFFFFF000
NET_OFF = 0xFFF00000
LL_OFF = 0xFFE00000


class Ancillary(NamedTuple):
    """A word that a load at ``AD_OFF + offset`` gives instead of packet bytes."""

    name: str
    #: bpf_asm's and `bpf_dbg`'s spelling.
    asm: str
    meaning: str


#: SKF_AD_* by offset (linux/filter.h). ALU_XOR_X computes A ^= X and loads nothing.
ANCILLARY: dict[int, Ancillary] = {
    0: Ancillary("protocol", "proto", "skb->protocol in host order"),
    4: Ancillary("pkttype", "type", "PACKET_HOST 0, BROADCAST 1, MULTICAST 2, OTHERHOST 3, OUTGOING 4"),
    8: Ancillary("ifindex", "ifidx", "the device's index; no device: the program returns A"),
    12: Ancillary("nlattr", "nla", "offset of the netlink attribute of type X at or after A, or 0"),
    16: Ancillary("nlattr_nest", "nlan", "the same within the nest at A"),
    20: Ancillary("mark", "mark", "skb->mark"),
    24: Ancillary("queue", "queue", "skb->queue_mapping"),
    28: Ancillary("hatype", "hatype", "the device's ARPHRD type; no device: the program returns A"),
    32: Ancillary("rxhash", "rxhash", "skb->hash"),
    36: Ancillary("cpu", "cpu", "the processor that runs the program"),
    40: Ancillary("alu_xor_x", "xor_x", "A ^= X"),
    44: Ancillary("vlan_tag", "vlan_tci", "the TCI of the tag in the packet's metadata"),
    48: Ancillary("vlan_tag_present", "vlan_avail", "1 if the metadata has a tag"),
    52: Ancillary("pay_offset", "poff", "offset of the transport payload"),
    56: Ancillary("random", "rand", "a random word"),
    60: Ancillary("vlan_tpid", "vlan_tpid", "the tag's protocol in host order"),
}


class Instruction(NamedTuple):
    """One ``struct sock_filter``: `code` is 16 bits, `jt` and `jf` 8 each, `k` 32, all unsigned."""

    code: int
    jt: int
    jf: int
    k: int


def stmt(code: int, k: int = 0) -> Instruction:
    """An instruction that does not branch (BPF_STMT)."""
    return Instruction(code, 0, 0, k & 0xFFFFFFFF)


def jump(code: int, k: int, jt: int, jf: int) -> Instruction:
    """A conditional jump (BPF_JUMP); `jt` and `jf` count instructions after this one."""
    return Instruction(code, jt, jf, k & 0xFFFFFFFF)


#: Opcodes that `bpf_check_classic` in net/core/filter.c accepts.
VALID_CODES: frozenset[int] = frozenset(
    [LD | size | mode for size in (W, H, B) for mode in (ABS, IND)]
    + [LD | W | mode for mode in (IMM, MEM, LEN)]
    + [LDX | W | mode for mode in (IMM, MEM, LEN)]
    + [LDX | B | MSH, ST, STX, MISC | TAX, MISC | TXA, RET | K, RET | A, ALU | NEG, JMP | JA]
    + [ALU | op | src for op in (ADD, SUB, MUL, DIV, MOD, AND, OR, XOR, LSH, RSH) for src in (K, X)]
    + [JMP | op | src for op in (JEQ, JGT, JGE, JSET) for src in (K, X)]
)

_SOCK_FILTER = struct.Struct("=HBBI")


def encode(instructions: Iterable[Sequence[int]]) -> bytes:
    """The instructions as an array of ``struct sock_filter`` in native byte order.

    Raises `FilterError` where a field does not fit.
    """
    parts = []
    for pc, instruction in enumerate(instructions):
        check_fields(pc, instruction)
        parts.append(_SOCK_FILTER.pack(*instruction))
    return b"".join(parts)


def check_fields(pc: int, instruction: Sequence[int]) -> None:
    """Raise `FilterError` where a field of instruction `pc` does not fit its bits."""
    for name, bits, value in zip(("code", "jt", "jf", "k"), (16, 8, 8, 32), instruction, strict=True):
        if not 0 <= value < 1 << bits:
            raise FilterError(f"instruction {pc}: {name} {value} does not fit {bits} bits")


def decode(data: bytes) -> tuple[Instruction, ...]:
    """The opposite of `encode`; raises `FilterError` if the length is no multiple of 8 bytes."""
    if len(data) % 8:
        raise FilterError(f"{len(data)} bytes are no whole number of 8-byte instructions")
    return tuple(Instruction(*fields) for fields in _SOCK_FILTER.iter_unpack(data))


def signed(k: int) -> int:
    """A constant read as a signed number: how far ``ja`` goes, backwards where it is negative."""
    return k - (1 << 32) if k >> 31 else k


def check(instructions: Sequence[Instruction], *, loops: bool = False) -> None:
    """Make the check that Linux makes when a classic filter is attached.

    Raises `FilterError` naming the instruction. Follows `bpf_check_classic` and
    `check_load_and_stores` of net/core/filter.c. With `loops` a ``ja`` may go back within the program, as user space's
    engines let it (bpf_validate in libpcap), which makes loops; who runs such a filter must count its steps.
    """
    count = len(instructions)
    if not 1 <= count <= MAXINSNS:
        raise FilterError(f"a filter has 1 to {MAXINSNS} instructions, not {count}")
    for pc, instruction in enumerate(instructions):
        check_fields(pc, instruction)
        code, jt, jf, k = instruction
        if code not in VALID_CODES:
            raise FilterError(f"instruction {pc}: invalid opcode {code:#06x}")
        if code in (ALU | DIV | K, ALU | MOD | K) and k == 0:
            raise FilterError(f"instruction {pc}: division by zero")
        if code in (ALU | LSH | K, ALU | RSH | K) and k >= 32:
            raise FilterError(f"instruction {pc}: shift by {k}, the most is 31")
        if code in (LD | MEM, LDX | MEM, ST, STX) and k >= MEMWORDS:
            raise FilterError(f"instruction {pc}: scratch word M[{k}], the last is M[{MEMWORDS - 1}]")
        if code == JMP | JA and not pc < pc + 1 + signed(k) < count:
            if not 0 <= pc + 1 + signed(k) < count:
                raise FilterError(f"instruction {pc}: jump out of the program")
            if not loops:
                raise FilterError(
                    f"instruction {pc}: jump back to instruction {pc + 1 + signed(k)}; Linux refuses filters with loops"
                )
        if code & 7 == JMP and code != JMP | JA and max(jt, jf) + pc + 1 >= count:
            raise FilterError(f"instruction {pc}: jump out of the program")
        if code in (LD | W | ABS, LD | H | ABS, LD | B | ABS) and k >= AD_OFF and k - AD_OFF not in ANCILLARY:
            raise FilterError(f"instruction {pc}: unknown ancillary load {k:#x}")
    if instructions[-1].code not in (RET | K, RET | A):
        raise FilterError(f"instruction {count - 1}: the last instruction must return")
    _check_scratch(instructions)


def _check_scratch(instructions: Sequence[Instruction]) -> None:
    """Every read of M[] must be preceded by a write on all paths; where jumps only go forward one pass decides."""
    everything = 0xFFFF
    at_target = [everything] * len(instructions)
    back = True
    while back:
        back = False
        written = 0
        for pc, (code, jt, jf, k) in enumerate(instructions):
            written &= at_target[pc]
            if code in (ST, STX):
                written |= 1 << k
            elif code in (LD | MEM, LDX | MEM):
                if not written >> k & 1:
                    raise FilterError(f"instruction {pc}: M[{k}] may be read before it is written")
            elif code == JMP | JA:
                target = pc + 1 + signed(k)
                # What changes behind has to be looked at again.
                back = back or (target <= pc and at_target[target] & ~written != 0)
                at_target[target] &= written
                written = everything
            elif code & 7 == JMP:
                at_target[pc + 1 + jt] &= written
                at_target[pc + 1 + jf] &= written
                written = everything
