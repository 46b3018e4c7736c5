"""Programs in the emulator: loaded, checked, run over packets.

Loading checks what the kernel checks first (see `checks`), resolves maps, helpers and the licence. What needs values
to be followed is not checked: such a program is loaded and may fault when it runs (`kbpf.EmulationFault`).
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import weakref
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Literal
from weakref import WeakValueDictionary

from kbpf.backend import Engine, LoadRefused, object_name
from kbpf.emulator import attach_types, calls, checks, engines, helpers, ksyms, reach
from kbpf.emulator.btf import described
from kbpf.emulator.checks import invalid
from kbpf.emulator.classic import ClassicProgram as ClassicProgram
from kbpf.emulator.context import SkBuff
from kbpf.emulator.environment import environment
from kbpf.emulator.helpers.maps import tail_target
from kbpf.emulator.interpreter import BUDGET, Code, Context, link
from kbpf.emulator.maps.array import Array
from kbpf.emulator.maps.base import Map
from kbpf.emulator.maps.cgroup import SharedCgroupStorage
from kbpf.emulator.maps.descriptors import ProgArray
from kbpf.emulator.packet import Packet
from kbpf.emulator.statistics import Runs, Switch, counted
from kbpf.info import ProgramInfo
from kbpf.isa import ebpf
from kbpf.specs import ProgramSpec
from kbpf.uapi import constants as uapi
from kbpf.uapi.enums import PROG_TYPES

if TYPE_CHECKING:
    from kbpf.emulator.jit.testrun import NativeTestRuns

#: The most maps that a program may use (MAX_USED_MAPS).
MOST_MAPS = 64
#: Types whose programs have LD_ABS and LD_IND.
LOADS_PACKET = ("socket_filter", "sched_cls", "sched_act")
_TRACING = dict.fromkeys(("kprobe", "tracepoint", "perf_event", "raw_tracepoint", "raw_tracepoint_writable"), "tracing")
#: Types of programs that may use no map with such a field, as the kernel calls them.
_WITHOUT = {
    "bpf_spin_lock": {"socket_filter": "socket filter", **_TRACING},
    "bpf_res_spin_lock": {"socket_filter": "socket filter", **_TRACING},
    "bpf_timer": _TRACING,
    "bpf_wq": _TRACING,
}
#: Types whose programs may be sleepable; all `syscall` programs are.
_MAY_SLEEP = ("kprobe", "syscall")
#: The maps that sleepable programs may use.
_FOR_SLEEPERS = (
    *("array", "percpu_array", "hash", "percpu_hash", "lru_hash", "lru_percpu_hash", "array_of_maps", "hash_of_maps"),
    *("queue", "stack", "ringbuf", "user_ringbuf", "sk_storage", "inode_storage", "task_storage", "cgrp_storage"),
)
#: What is asked of the verifier or of devices, and changes nothing here.
_FLAGS = (
    uapi.BPF_F_STRICT_ALIGNMENT
    | uapi.BPF_F_ANY_ALIGNMENT
    | uapi.BPF_F_TEST_RND_HI32
    | uapi.BPF_F_TEST_STATE_FREQ
    | uapi.BPF_F_XDP_HAS_FRAGS
    | uapi.BPF_F_XDP_DEV_BOUND_ONLY
    | uapi.BPF_F_TEST_REG_INVARIANTS
)
_BY_INDEX = (ebpf.PSEUDO_MAP_IDX, ebpf.PSEUDO_MAP_IDX_VALUE)
#: References to maps, and what they are when the kernel has found the map.
_REFERENCES = {
    ebpf.PSEUDO_MAP_FD: ebpf.PSEUDO_MAP_FD,
    ebpf.PSEUDO_MAP_IDX: ebpf.PSEUDO_MAP_FD,
    ebpf.PSEUDO_MAP_VALUE: ebpf.PSEUDO_MAP_VALUE,
    ebpf.PSEUDO_MAP_IDX_VALUE: ebpf.PSEUDO_MAP_VALUE,
}


class Program:
    """A loaded eBPF program.

    `maps` are those that the spec's indices mean; `map_of` gives the map behind a descriptor, or raises `OSError`.
    Raises `LoadRefused` with the kernel's errno, and `MissingDependencyError` if `engine` is ``"jit"`` and llvmlite is
    not installed.
    """

    def __init__(
        self,
        spec: ProgramSpec,
        maps: Sequence[Map],
        map_of: Callable[[int], Map],
        budget: int = BUDGET,
        engine: Engine = "auto",
    ) -> None:
        engines.check(engine)
        self.spec = spec
        self.type = spec.type
        self.budget = budget
        self.gpl_compatible = spec.license in helpers.GPL_COMPATIBLE
        if spec.flags & ~(_FLAGS | (uapi.BPF_F_SLEEPABLE if spec.type in _MAY_SLEEP else 0)):
            raise LoadRefused(errno.EINVAL, "")
        self.sleepable = bool(spec.flags & uapi.BPF_F_SLEEPABLE)
        checks.check_length(spec.instructions)
        #: Where it expects to be attached: a number of `kbpf.uapi.enums.ATTACH_TYPES`.
        self.attach_type = attach_types.expected(spec)
        if spec.type not in helpers.ALLOWED:
            if spec.type in PROG_TYPES and spec.type != "unspec":
                raise invalid(f"the emulator does not run programs of type {spec.type} yet", errno.EOPNOTSUPP)
            raise LoadRefused(errno.EINVAL, "")
        if spec.type == "syscall" and not self.sleepable:
            raise invalid("Syscall programs can only be sleepable")
        self.name = object_name(spec.name)
        for opcode, _, src, off, imm in spec.instructions:
            if opcode == ebpf.JMP | ebpf.CALL and src == ebpf.PSEUDO_KFUNC_CALL and not off:
                ksyms.refuse_function(imm)
        checks.check(spec.instructions, spec.type in LOADS_PACKET)
        calls.check(spec)
        #: Those that no instruction names, then the others in order of first use; the program keeps them.
        self.maps: list[Map] = []
        #: Variables and functions of the kernel that it refers to.
        self.kernel_symbols: list[ksyms.Symbol] = []
        #: The maps that instructions refer to, by index.
        self._referred: dict[int, Map] = {}
        for spare in ebpf.spare_maps(spec.instructions, len(maps)):
            self._use(maps[spare])
        constants = self._resolve(maps, map_of)
        for opcode, _, src, _, imm in spec.instructions:
            if opcode == ebpf.JMP | ebpf.CALL and not src:
                helpers.check(imm, spec.type, self.attach_type, self.gpl_compatible, self.sleepable)
        for used in self.maps:
            if isinstance(used, ProgArray):
                _claim(used, spec.type)
        self.code: Code = link(spec.instructions, constants, helpers.functions(spec.type), tail_target)
        self.code.program = weakref.ref(self)
        self.code.engine = engine
        #: Its test runs in native code, once they have been made; False where there are none.
        self.test_runs: NativeTestRuns | Literal[False] | None = None
        self.tag = _tag(spec)
        self.btf = described(spec.btf)
        self.load_time_ns = environment.clock() + environment.suspended
        self.uid = environment.uid_gid() & 0xFFFFFFFF
        self.runs = Runs()
        self.id = next(_ids)
        PROGRAMS[self.id] = self

    @property
    def info(self) -> ProgramInfo:
        return ProgramInfo(
            type=self.type,
            id=self.id,
            name=self.name,
            tag=self.tag,
            map_ids=tuple(used.id for used in self.maps),
            gpl_compatible=self.gpl_compatible,
            load_time_ns=self.load_time_ns,
            uid=self.uid,
            xlated_size=8 * len(self.spec.instructions),
            run_time_ns=self.runs.time_ns,
            run_count=self.runs.count,
            btf_id=0 if self.btf is None else self.btf.id,
        )

    def bind(self, map: Map) -> None:
        """BPF_PROG_BIND_MAP: keep a map that no instruction refers to."""
        if map not in self.maps:
            self.maps.append(map)

    def run_packet(self, packet: Packet) -> int:
        """Run over a packet; returns the low 32 bits of R0. Raises `EmulationFault`."""
        return self.execute(packet, packet.data)

    def execute(self, packet: Packet, data: bytes, context: Context | None = None) -> int:
        """Run over a packet, whose bytes from offset 0 on are `data`, with a context made for it, or an own one."""
        if not Switch.users:
            return engines.execute(self.code, self, packet, data, context=context)
        with counted(self.runs):
            return engines.execute(self.code, self, packet, data, context=context)

    @property
    def xlated(self) -> bytes:
        """The instructions as the kernel shows them (`bpf_insn_prepare_dump`): maps by id, variables and all."""
        shown = list(self.spec.instructions)
        for pc, found in self._referred.items():
            shown[pc] = shown[pc]._replace(src=_REFERENCES[shown[pc].src], imm=ebpf.signed32(found.id))
        return ebpf.encode(shown)

    @cached_property
    def context_end(self) -> int:
        """How many bytes of context the program must be given (the verifier's `max_ctx_offset`)."""
        return reach.context_end(self.spec.instructions)

    def packet(self, data: bytes, length: int) -> Packet:
        return Packet(buffer=data, length=length)

    def context(self, packet: Packet) -> SkBuff:
        return SkBuff(packet, self.type)

    def _resolve(self, maps: Sequence[Map], map_of: Callable[[int], Map]) -> dict[int, int]:
        """What 64-bit immediate loads mean, by index."""
        constants = {}
        instructions = self.spec.instructions
        for pc, (opcode, _, src, _, imm) in enumerate(instructions):
            if opcode != ebpf.LD_IMM64 or not src:
                continue
            if src == ebpf.PSEUDO_FUNC:
                constants[pc] = pc + 1 + imm
                continue
            if src == ebpf.PSEUDO_BTF_ID:
                symbol = ksyms.resolve(imm, instructions[pc + 1].imm)
                self.kernel_symbols.append(symbol)
                constants[pc] = symbol.handle.address
                continue
            offset = instructions[pc + 1].imm & 0xFFFFFFFF
            self._referred[pc] = self._map(src, imm, maps, map_of)
            constants[pc] = self._map_constant(self._referred[pc], src, offset)
        return constants

    def _map(self, src: int, imm: int, maps: Sequence[Map], map_of: Callable[[int], Map]) -> Map:
        if src in _BY_INDEX:
            if not 0 <= imm < len(maps):
                raise invalid(f"the program refers to map {imm} of {len(maps)}, counted from 0")
            found = maps[imm]
        else:
            try:
                found = map_of(imm)
            except OSError as error:
                raise invalid(f"fd {imm} is not pointing to valid bpf_map", error.errno or 0) from None
        self._use(found)
        return found

    def _use(self, found: Map) -> None:
        """Keep a map, if programs like this one may use it (`__add_used_map`)."""
        if found in self.maps:
            return
        for name, without in _WITHOUT.items():
            if self.type in without and any(field.name == name for field in found.special):
                raise invalid(f"{without[self.type]} progs cannot use {name} yet")
        if self.sleepable and found.type not in _FOR_SLEEPERS:
            raise invalid("Sleepable programs can only use array, hash, ringbuf and local storage maps")
        if isinstance(found, SharedCgroupStorage) and any(type(found) is type(other) for other in self.maps):
            raise invalid("only one cgroup storage of each type is allowed", errno.EBUSY)
        if len(self.maps) == MOST_MAPS:
            raise invalid(f"The total number of maps per program has reached the limit of {MOST_MAPS}", errno.E2BIG)
        self.maps.append(found)

    @staticmethod
    def _map_constant(found: Map, src: int, offset: int) -> int:
        if src in (ebpf.PSEUDO_MAP_FD, ebpf.PSEUDO_MAP_IDX):
            if offset:
                raise invalid("unrecognized bpf_ld_imm64 insn")
            return found.handle.address
        if not isinstance(found, Array) or found.per_cpu:
            raise invalid("no direct value access support for this map type")
        if found.max_entries != 1:
            raise invalid(f"invalid access to map value pointer, value_size={found.value_size} off={offset}", 524)
        if offset >= found.value_size:
            raise invalid(f"direct value offset of {offset} is not allowed")
        return found.value_address(offset)


def _claim(programs: ProgArray, type: str) -> None:
    try:
        programs.claim(type)
    except OSError as error:
        raise LoadRefused(error.errno or 0, "") from None


def _tag(spec: ProgramSpec) -> bytes:
    """A digest of the instructions without what differs from load to load: SHA-256 since Linux 6.18, SHA-1 before."""
    plain, after_map = [], False
    for instruction in spec.instructions:
        refers = instruction.opcode == ebpf.LD_IMM64 and instruction.src in _REFERENCES
        if refers:
            plain.append(instruction._replace(imm=0, src=_REFERENCES[instruction.src]))
        else:
            plain.append(instruction._replace(imm=0) if after_map else instruction)
        after_map = refers
    return hashlib.sha256(ebpf.encode(plain)).digest()[:8]


_ids = itertools.count(1)
#: Programs by id, while anybody holds them.
PROGRAMS: WeakValueDictionary[int, Program] = WeakValueDictionary()
