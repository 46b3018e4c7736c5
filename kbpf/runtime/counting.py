"""Count what expressions match on an interface: one socket filter made of them all, and one map of counters.

Each expression is compiled to a classic filter for the socket, and each classic filter becomes one stretch of an eBPF
program (Linux 4.18) that ends by counting or not; no C compiler is involved. The program keeps no packet: it
returns 0, so nothing is queued or copied. Needs CAP_NET_RAW for the socket, and CAP_BPF to load it.

The trap: an eBPF LD_ABS outside the packet ends the whole program, and here only one of several expressions may
fail. So lengths are compared before every load, and loads relative to a header, which cannot be checked that
way, are made with bpf_skb_load_bytes_relative(), which says when it could not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

from kbpf.errors import FilterError
from kbpf.isa import cbpf, ebpf, translate
from kbpf.isa.ebpf import Instruction
from kbpf.pcapfile import Record
from kbpf.runtime.attach import attach, backend_of
from kbpf.runtime.filter import Filter, compile
from kbpf.runtime.program import load_program
from kbpf.specs import FILE_LAYOUTS, MapSpec, ProgramSpec
from kbpf.types import Array, Int, Member, Struct
from kbpf.uapi.constants import PACKET_OUTGOING
from kbpf.uapi.enums import HELPERS
from kbpf.uapi.structs import STRUCTS

_U64 = Int(name="__u64", size=8)
_COUNT = Struct(
    name="Count", size=16, members=(Member(name="packets", type=_U64), Member(name="bytes", type=_U64, bit_offset=64))
)

# A per-CPU value has 32 KiB at the most (PCPU_MIN_UNIT_SIZE).
_MOST = 32768 // _COUNT.size
# LOOPBACK_IFINDEX (include/net/net_namespace.h): loopback is interface 1 in every network namespace.
_LOOPBACK = 1
# BPF_HDR_START_MAC and _NET of enum bpf_hdr_start_off (linux/bpf.h).
_HEADERS = ((cbpf.NET_OFF, 1), (cbpf.LL_OFF, 0))
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
_CALLS = {"cpu": "get_smp_processor_id", "random": "get_prandom_u32"}

# Registers, as kbpf.isa.translate has them: R0 is A, R2 a temporary, R6 the context, R7 X. R8 and R9 are ours.
_RESULT, _TMP, _CTX, _COUNTERS, _LENGTH = 0, 2, 6, 8, 9
# Below the sixteen scratch words of a classic filter.
_BUFFER = -4 * cbpf.MEMWORDS - 4

_SIZES = {ebpf.B: 1, ebpf.H: 2, ebpf.W: 4}

# Where a jump goes: an instruction of the translated filter, or the end of its stretch, counted or not.
_VERDICT, _NO_MATCH = -1, -2


class Count(NamedTuple):
    """How much an expression matched: packets, and their bytes on the wire with the link header."""

    packets: int
    bytes: int


class Counter:
    """Counts the packets of a packet socket by named expressions; a context manager that ends the counting.

    Takes the socket's one filter slot, and the socket receives nothing from then on. Packets that leave through
    loopback are not counted, as they come in there again. Raises `FilterError` for an expression, and
    what `kbpf.load_program` and `kbpf.attach` raise.
    """

    def __init__(self, socket: Any, expressions: Mapping[str, str], backend: str | None = None) -> None:
        self.names = tuple(expressions)
        filters = [compile(expression, socket=socket) for expression in expressions.values()]
        carrier = backend_of(socket, backend).name
        self.program = load_program(counting_program(filters), backend=carrier)
        try:
            self._link = attach(socket, self.program, backend=carrier)
        except BaseException:
            self.program.close()
            raise

    @property
    def backend(self) -> str:
        """``"kernel"`` or ``"emulator"``."""
        return self.program.backend

    def counts(self) -> dict[str, Count]:
        """What each expression has matched since the start."""
        totals = self.program.maps[0][0].sum()
        return {name: Count(*total) for name, total in zip(self.names, totals, strict=True)}

    def close(self) -> None:
        """Stop counting: detach from the socket, which stays open, and close the program."""
        with self.program, self._link:
            pass

    def __enter__(self) -> Counter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class CaptureCounter:
    """Counts the records of a capture by named expressions, in user space; needs no privilege."""

    def __init__(self, expressions: Mapping[str, str]) -> None:
        self._expressions = dict(expressions)
        self._filters: dict[int, dict[str, Filter]] = {}
        self._counts = dict.fromkeys(expressions, Count(0, 0))

    def add(self, record: Record) -> None:
        """Count one packet. Raises `FilterError` for an expression or a link type that cannot be filtered."""
        # A pcapng file may hold interfaces of several link types.
        if record.dlt not in self._filters:
            link = _link_name(record.dlt)
            self._filters[record.dlt] = {name: compile(text, link=link) for name, text in self._expressions.items()}
        for name, filter in self._filters[record.dlt].items():
            if filter.run(record.data, record.wirelen):
                before = self._counts[name]
                self._counts[name] = Count(before.packets + 1, before.bytes + record.wirelen)

    def counts(self) -> dict[str, Count]:
        """What each expression has matched so far."""
        return dict(self._counts)


def _link_name(dlt: int) -> str:
    for layout in FILE_LAYOUTS.values():
        if layout.dlt == dlt:
            return layout.name
    raise FilterError(f"packets of link type {dlt} cannot be filtered; there are {', '.join(FILE_LAYOUTS)}")


def counting_program(filters: Sequence[Filter]) -> ProgramSpec:
    """The socket filter that counts what each of `filters` matches, and returns 0.

    Its one map is a per-CPU array whose only value is an array of (packets, bytes), one for each filter. Raises
    `FilterError` for a filter that asks for what an eBPF program cannot know.
    """
    if not 1 <= len(filters) <= _MOST:
        raise FilterError(f"one program counts 1 to {_MOST} expressions, not {len(filters)}")
    values = Array(element=_COUNT, count=len(filters))
    counters = MapSpec(
        type="percpu_array", name="counters", key_size=4, value_size=values.size, max_entries=1, value_type=values
    )
    body = [_stretch(filter, index) for index, filter in enumerate(filters)]
    instructions = [*_prologue(), *(instruction for part in body for instruction in part), *_return_zero()]
    return ProgramSpec(type="socket_filter", name="kbpf_count", instructions=tuple(instructions), maps=(counters,))


def _prologue() -> list[Instruction]:
    """Leave if this is the outgoing half of loopback; else find the counters."""
    leave = _return_zero()
    return [
        Instruction(ebpf.ALU64 | ebpf.MOV | ebpf.X, _CTX, 1),
        _field(_TMP, "pkt_type"),
        Instruction(ebpf.JMP | ebpf.JNE | ebpf.K, _TMP, 0, 2 + len(leave), PACKET_OUTGOING),
        _field(_TMP, "ifindex"),
        Instruction(ebpf.JMP | ebpf.JNE | ebpf.K, _TMP, 0, len(leave), _LOOPBACK),
        *leave,
        Instruction(ebpf.ST | ebpf.MEM | ebpf.W, ebpf.FP, 0, _BUFFER, 0),
        *ebpf.ld_imm64(1, 0, ebpf.PSEUDO_MAP_IDX),
        *_address_of_buffer(2),
        _call("map_lookup_elem"),
        Instruction(ebpf.JMP | ebpf.JNE | ebpf.K, 0, 0, len(leave), 0),
        *leave,
        Instruction(ebpf.ALU64 | ebpf.MOV | ebpf.X, _COUNTERS, 0),
    ]


def _stretch(filter: Filter, index: int) -> list[Instruction]:
    """One filter, and counting if it returned anything but 0; falls out at its end either way."""
    translated = translate.to_ebpf(filter.instructions)
    starts: list[int] = []
    # The length is read again for each: what the verifier learned of it from one filter's comparisons would multiply
    # the paths that it walks through the next.
    out = [_field(_LENGTH, "len")]
    jumps: list[tuple[int, int]] = []
    for at, instruction in enumerate(translated):
        starts.append(len(out))
        for replacement, target in _expand(at, instruction):
            if target is not None:
                jumps.append((len(out), target))
            out.append(replacement)
    verdict = len(out)
    out += _count(index)
    for slot, target in jumps:
        goal = {_VERDICT: verdict, _NO_MATCH: len(out)}.get(target)
        out[slot] = out[slot]._replace(off=(starts[target] if goal is None else goal) - slot - 1)
    if len(out) > 0x7FFF:
        raise FilterError(f"a filter of {len(filter)} instructions is too long to count with")
    return out


def _expand(at: int, instruction: Instruction) -> list[tuple[Instruction, int | None]]:
    """What one translated instruction becomes here, each with the place that it jumps to."""
    opcode = instruction.opcode
    kind, mode = opcode & 7, opcode & 0xE0
    if opcode == ebpf.JMP | ebpf.EXIT:
        return [(Instruction(ebpf.JMP | ebpf.JA), _VERDICT)]
    if kind == ebpf.JMP:
        return [(instruction, at + 1 + instruction.off)]
    if kind == ebpf.LD and mode in (ebpf.ABS, ebpf.IND):
        return _load(instruction)
    if instruction == Instruction(ebpf.ALU64 | ebpf.MOV | ebpf.X, _CTX, 1):
        return []  # The prologue saved the context.
    if opcode == ebpf.ALU | ebpf.XOR | ebpf.X and instruction.dst == instruction.src:
        # How A and X start at 0; the verifier would have them written before.
        return [(Instruction(ebpf.ALU64 | ebpf.MOV | ebpf.K, instruction.dst, 0, 0, 0), None)]
    return [(instruction, None)]


def _load(instruction: Instruction) -> list[tuple[Instruction, int | None]]:
    """A load from the packet that cannot end the program."""
    opcode, size = instruction.opcode, _SIZES[instruction.opcode & 0x18]
    k, indirect = instruction.imm & 0xFFFFFFFF, opcode & 0xE0 == ebpf.IND
    if k >= cbpf.AD_OFF and not indirect:
        return [(step, None) for step in _ancillary(k - cbpf.AD_OFF)]
    for base, header in _HEADERS:
        if base <= k < cbpf.AD_OFF:
            return _relative_load(instruction, size, k - base, header)
    if not indirect:
        end = min(k + size, 0x7FFFFFFF)  # as an immediate; no packet is that long
        return [(Instruction(ebpf.JMP | ebpf.JLT | ebpf.K, _LENGTH, 0, 0, end), _NO_MATCH), (instruction, None)]
    return [
        (Instruction(ebpf.ALU | ebpf.MOV | ebpf.X, _TMP, instruction.src), None),
        (Instruction(ebpf.ALU | ebpf.ADD | ebpf.K, _TMP, 0, 0, instruction.imm), None),
        (Instruction(ebpf.ALU64 | ebpf.ADD | ebpf.K, _TMP, 0, 0, size), None),
        (Instruction(ebpf.JMP | ebpf.JGT | ebpf.X, _TMP, _LENGTH), _NO_MATCH),
        (instruction, None),
    ]


def _relative_load(
    instruction: Instruction, size: int, offset: int, header: int
) -> list[tuple[Instruction, int | None]]:
    steps: list[tuple[Instruction, int | None]] = [
        (Instruction(ebpf.ALU | ebpf.MOV | ebpf.K, 2, 0, 0, offset), None),
        *([] if instruction.opcode & 0xE0 == ebpf.ABS else [(_add(2, instruction.src), None)]),
        *((step, None) for step in _address_of_buffer(3)),
        (Instruction(ebpf.ALU | ebpf.MOV | ebpf.K, 4, 0, 0, size), None),
        (Instruction(ebpf.ALU | ebpf.MOV | ebpf.K, 5, 0, 0, header), None),
        (Instruction(ebpf.ALU64 | ebpf.MOV | ebpf.X, 1, _CTX), None),
        (_call("skb_load_bytes_relative"), None),
        (Instruction(ebpf.JMP | ebpf.JNE | ebpf.K, _RESULT, 0, 0, 0), _NO_MATCH),
        (Instruction(ebpf.LDX | ebpf.MEM | instruction.opcode & 0x18, _RESULT, ebpf.FP, _BUFFER), None),
    ]
    if size > 1:
        steps.append((_from_network_order(_RESULT, size), None))
    return steps


def _ancillary(offset: int) -> list[Instruction]:
    name = cbpf.ANCILLARY[offset].name
    if name in _CALLS:
        return [_call(_CALLS[name])]
    if name not in _FIELDS:
        raise FilterError(f"a program that counts cannot know the {name} of a packet")
    field, network_order = _FIELDS[name]
    return [_field(_RESULT, field), *([_from_network_order(_RESULT, 2)] if network_order else [])]


def _count(index: int) -> list[Instruction]:
    """Add one packet and its bytes; the lower half of R0 is the filter's verdict."""
    at = index * _COUNT.size
    return [
        Instruction(ebpf.JMP32 | ebpf.JEQ | ebpf.K, _RESULT, 0, 3, 0),
        Instruction(ebpf.ALU64 | ebpf.MOV | ebpf.K, _TMP, 0, 0, 1),
        Instruction(ebpf.STX | ebpf.ATOMIC | ebpf.DW, _COUNTERS, _TMP, at, ebpf.ADD),
        Instruction(ebpf.STX | ebpf.ATOMIC | ebpf.DW, _COUNTERS, _LENGTH, at + 8, ebpf.ADD),
    ]


def _return_zero() -> list[Instruction]:
    return [Instruction(ebpf.ALU64 | ebpf.MOV | ebpf.K, 0, 0, 0, 0), Instruction(ebpf.JMP | ebpf.EXIT)]


def _field(register: int, name: str) -> Instruction:
    return Instruction(ebpf.LDX | ebpf.MEM | ebpf.W, register, _CTX, STRUCTS["__sk_buff"].fields[name].offset)


def _address_of_buffer(register: int) -> list[Instruction]:
    return [
        Instruction(ebpf.ALU64 | ebpf.MOV | ebpf.X, register, ebpf.FP),
        Instruction(ebpf.ALU64 | ebpf.ADD | ebpf.K, register, 0, 0, _BUFFER),
    ]


def _add(register: int, source: int) -> Instruction:
    return Instruction(ebpf.ALU | ebpf.ADD | ebpf.X, register, source)


def _from_network_order(register: int, size: int) -> Instruction:
    return Instruction(ebpf.ALU | ebpf.END | ebpf.X, register, 0, 0, 8 * size)


def _call(helper: str) -> Instruction:
    return Instruction(ebpf.JMP | ebpf.CALL, 0, 0, 0, HELPERS[helper])
