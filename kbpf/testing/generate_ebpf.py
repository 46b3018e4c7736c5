"""Random eBPF socket filters that the verifier accepts, nearly always, and what to run them over.

A program has a main function and up to seven others, each a run of pieces (`generate_items`, `generate_calls`) with
jumps, loops and calls between them. At the end it writes what its registers and its stack hold into the first map and
mixes it into the return value, so that whatever went wrong on the way shows.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.specs import MapSpec, ProgramSpec
from kbpf.testing import generate_packets
from kbpf.testing.generate_calls import HELPER_ITEMS, MOVING, can_call
from kbpf.testing.generate_code import CONTEXT_REGISTER, Code
from kbpf.testing.generate_items import CB, ITEMS
from kbpf.testing.generate_state import SCALAR, Pointer, State
from kbpf.uapi.constants import BPF_F_NO_PREALLOC
from kbpf.uapi.structs import STRUCTS

CONDITIONS = (
    ebpf.JEQ, ebpf.JGT, ebpf.JGE, ebpf.JSET, ebpf.JNE, ebpf.JSGT, ebpf.JSGE, ebpf.JLT, ebpf.JLE, ebpf.JSLT, ebpf.JSLE,
)  # fmt: skip

#: Where a program writes what it ended with: ten registers and as many words of its stack.
_WORDS_SHOWN = 20
RESULTS = MapSpec(type="array", key_size=4, value_size=8 * _WORDS_SHOWN, max_entries=1)
#: Where a program that calls itself finds itself, at 0.
PROGRAMS = MapSpec(type="prog_array", key_size=4, value_size=4, max_entries=2)
_WINDOW = 32
#: The types of the other maps.
MAP_TYPES = ("array", "hash", "percpu_array", "percpu_hash", "lru_hash", "lru_percpu_hash")
#: So many that an LRU map has room for all keys in use: what it would evict, Linux leaves open.
_LRU_ENTRIES = 512


@dataclass(frozen=True, kw_only=True)
class EbpfCase:
    """A program, and the packets and contexts that it is run over, in turn, with its maps as they are left."""

    spec: ProgramSpec
    #: (data, context) as BPF_PROG_TEST_RUN takes them.
    runs: tuple[tuple[bytes, bytes], ...]
    #: Whether the program names its maps by descriptor rather than by index.
    by_descriptor: bool = False


@dataclass(frozen=True)
class _Signature:
    """What a function is given: the context in R1 or a number, then these."""

    context: bool
    arguments: tuple[object, ...]
    depth: int


def generate(rng: Random) -> EbpfCase:
    """A program and its runs."""
    maps = (RESULTS, *(_map(rng) for _ in range(rng.randrange(1, 4))))
    if rng.random() < 0.15:
        maps = (*maps, PROGRAMS)
    spec = ProgramSpec(instructions=tuple(_Writer(rng, maps).instructions()), maps=maps)
    runs = tuple(run(rng) for _ in range(rng.randrange(1, 4)))
    return EbpfCase(spec=spec, runs=runs, by_descriptor=rng.random() < 0.2)


def run(rng: Random) -> tuple[bytes, bytes]:
    """Data and context for one run."""
    data = generate_packets.frame(rng)
    if rng.random() < 0.4:
        return data, b""
    layout = STRUCTS["__sk_buff"]
    context = bytearray(layout.size)

    def put(name: str, value: int) -> None:
        struct.pack_into("=I", context, layout.fields[name].offset, value)

    for name in ("mark", "priority"):
        put(name, rng.choice((0, rng.getrandbits(32))))
    put("ingress_ifindex", rng.choice((0, 0, 1)))
    put("ifindex", rng.choice((0, 0, 1)))
    put("gso_segs", rng.choice((0, 0, rng.getrandbits(16))))
    put("gso_size", rng.choice((0, 0, rng.getrandbits(16))))
    struct.pack_into("=5I", context, CB, *(rng.getrandbits(32) for _ in range(5)))
    return data, bytes(context)


def _map(rng: Random) -> MapSpec:
    kind = rng.choice(("array", "hash", *MAP_TYPES))
    value_size = rng.choice((8, 16, 24, 48))
    entries = rng.choice((1, 4)) if kind == "array" else rng.choice((3, 6))
    key_size = 4 if "array" in kind else rng.choice((4, 4, 8, 12))
    flags = BPF_F_NO_PREALLOC if kind in ("hash", "percpu_hash") and rng.random() < 0.5 else 0
    contents: list[tuple[bytes, bytes]] = []
    if "percpu" not in kind:
        for number in rng.sample(range(entries), rng.randrange(entries + 1)):
            contents.append((number.to_bytes(4, "little").ljust(key_size, b"\0"), rng.randbytes(value_size)))
    return MapSpec(
        type=kind,
        key_size=key_size,
        value_size=value_size,
        max_entries=_LRU_ENTRIES if "lru" in kind else entries,
        flags=flags,
        contents=tuple(contents),
    )


class _Writer:
    """Writes a program: the functions that are called, each knowing what those after it are given."""

    def __init__(self, rng: Random, maps: Sequence[MapSpec]) -> None:
        self.rng = rng
        self.maps = maps
        dice = rng.random()
        # Tail calls do not go together with functions that have no BTF.
        count = (
            0 if dice < 0.65 or PROGRAMS in maps else rng.randrange(1, 4) if dice < 0.98 else ebpf.MAX_CALL_FRAMES - 1
        )
        self.deep = count > 3
        self.signatures = [self._signature(maps) for _ in range(count)]
        self.called: set[int] = set()
        self.calls: list[tuple[int, int]] = []
        #: Turns that loops already make in the code that is being written, since each is verified.
        self.turns = 1

    def _signature(self, maps: Sequence[MapSpec]) -> _Signature:
        rng = self.rng
        fixed = [index for index, spec in enumerate(maps) if spec.type == "array" and spec.max_entries == 1]
        kinds: list[object] = []
        for _ in range(rng.randrange(5)):
            dice = rng.random()
            if dice < 0.2:
                index = rng.choice(fixed)
                kinds.append(Pointer("value", map=index, size=maps[index].value_size))
            elif dice < 0.4:
                kinds.append(Pointer("window", size=_WINDOW))
            else:
                kinds.append(SCALAR)
        return _Signature(rng.random() < 0.6, tuple(kinds), 32 if self.deep else rng.choice((32, 48, 80)))

    def instructions(self) -> list[Instruction]:
        rng = self.rng
        out = self._function(-1, rng.choice((128, 160) if self.deep else (64, 128, 192)), rng.choice((4, 10, 20, 30)))
        starts: dict[int, int] = {}
        for index, signature in enumerate(self.signatures):
            if index in self.called:
                starts[index] = len(out)
                out += self._function(index, signature.depth, rng.randrange(2, 9), len(out))
        for pc, index in self.calls:
            out[pc] = out[pc]._replace(imm=starts[index] - pc - 1)
        return out

    def _function(self, index: int, depth: int, count: int, start: int = 0) -> list[Instruction]:
        state = State()
        main = index < 0
        code = Code(self.rng, self.maps, state, depth, main)
        self.index, self.turns = index, 1
        first_call = len(self.calls)
        if main or self.signatures[index].context:
            state.registers[1] = Pointer("context")
            code.emit(ebpf.ALU64 | ebpf.MOV | ebpf.X, CONTEXT_REGISTER, 1)
            code.set(CONTEXT_REGISTER, Pointer("context"))
            code.reserved.add(CONTEXT_REGISTER)
            code.set(1, None)
        elif not main:
            state.registers[1] = SCALAR
        if not main:
            for number, held in enumerate(self.signatures[index].arguments, 2):
                state.registers[number] = held  # type: ignore[call-overload]
        self._prologue(code)
        self._block(code, count, [])
        if code.state is not None:
            self._epilogue(code)
        self.calls[first_call:] = [(start + pc, called) for pc, called in self.calls[first_call:]]
        return code.finish()

    def _prologue(self, code: Code) -> None:
        rng = self.rng
        for register in range(ebpf.FP):
            if code.now.registers[register] is None and rng.random() < 0.6:
                code.move(register, code.long())
        for offset in range(-code.depth, 0, 8):
            if rng.random() < 0.4:
                code.emit(ebpf.ST | ebpf.MEM | ebpf.DW, ebpf.FP, 0, offset, code.word())
                code.now.store(offset, 8)
        single = [index for index, spec in enumerate(self.maps) if spec.type == "array" and spec.max_entries == 1]
        for register in (7, 8):
            if rng.random() < 0.3:
                map_index = rng.choice(single)
                code.load_value(register, map_index, rng.randrange(self.maps[map_index].value_size - 7))

    def _block(self, code: Code, count: int, outer: list[int]) -> None:
        """Pieces one after the other, with labels between them to jump to."""
        labels = [code.label() for _ in range(count + 1)]
        choices = self._choices(code)
        makers = self.rng.choices([make for make, _ in choices], [weight for _, weight in choices], k=count)
        for position, make in enumerate(makers):
            code.place(labels[position])
            code.ahead = labels[position + 1 :] + outer
            if code.state is not None:
                make(code)
        code.place(labels[-1])

    def _choices(self, code: Code) -> list[tuple[Callable[[Code], None], int]]:
        choices: list[tuple[Callable[[Code], None], int]] = [
            *ITEMS,
            (self._branch, 22),
            (self._skip, 3),
            (self._leave, 2),
        ]
        if can_call(code):
            choices += HELPER_ITEMS.values()
            if self.index + 1 < len(self.signatures):
                choices.append((self._call, 40 if self.deep else 12))
        if code.nesting < 2:
            choices.append((self._loop, 6))
        return choices

    # Control flow.

    def _branch(self, code: Code) -> None:
        rng = self.rng
        kind = rng.choice((ebpf.JMP, ebpf.JMP32))
        op = rng.choice(CONDITIONS)
        # Mostly near, so that most of the program runs.
        label = rng.choice(code.ahead[:3] if rng.random() < 0.8 else code.ahead)
        dice = rng.random()
        if dice < 0.5:
            # Small numbers, so that both ways are likely; with a sign for signed comparisons.
            register = code.small(rng.choice((1, 3, 7)))
            imm = rng.randrange(4)
            if op in (ebpf.JSGT, ebpf.JSGE, ebpf.JSLT, ebpf.JSLE) and rng.random() < 0.6:
                code.emit(ebpf.ALU64 | ebpf.SUB | ebpf.K, register, 0, 0, 2)
                imm -= 2
            code.jump(label, kind | op | ebpf.K, register, 0, imm)
        elif dice < 0.75:
            register = code.small(3) if rng.random() < 0.7 else code.scalar()
            others = [n for n in code.now.scalars() if n != register and n not in code.reserved]
            if others and rng.random() < 0.7:
                code.emit(ebpf.ALU64 | ebpf.AND | ebpf.K, others[0], 0, 0, 3)
            code.jump(label, kind | op | ebpf.X, register, others[0] if others else register)
        else:
            code.jump(label, kind | op | ebpf.K, code.scalar(), 0, code.word())

    def _skip(self, code: Code) -> None:
        code.jump(self.rng.choice(code.ahead[:3]), self.rng.choice((ebpf.JMP | ebpf.JA, ebpf.JMP32 | ebpf.JA)))
        code.state = None

    def _leave(self, code: Code) -> None:
        """Return early, on one of two ways."""
        self._branch(code)
        self._return(code)
        code.state = None

    def _return(self, code: Code) -> None:
        if code.now.registers[0] != SCALAR:
            if code.now.scalars() and self.rng.random() < 0.8:
                code.emit(ebpf.ALU64 | ebpf.MOV | ebpf.X, 0, code.scalar())
            else:
                code.move(0, code.word())
        code.emit(ebpf.JMP | ebpf.EXIT)

    def _loop(self, code: Code) -> None:
        rng = self.rng
        counters = [number for number in (7, 8, 9) if number not in code.reserved]
        turns = rng.randrange(1, 5)
        if not counters or self.turns * turns > 8:
            return
        counter = rng.choice(counters)
        kind = rng.choice((ebpf.ALU64, ebpf.ALU))
        jump = ebpf.JMP if kind == ebpf.ALU64 or rng.random() < 0.5 else ebpf.JMP32
        forms = ["down", "up", "tested"]
        if code.main and not code.nesting:
            # At a may_goto the verifier forgets what numbers are, those of an outer loop's counter too.
            forms.append("may_goto")
        form = rng.choice(forms)
        if form in ("tested", "may_goto") and rng.random() < 0.6:
            source = code.scalar()
            code.emit(kind | ebpf.MOV | ebpf.X, counter, source)
            code.emit(kind | ebpf.AND | ebpf.K, counter, 0, 0, 3)
        else:
            code.emit(kind | ebpf.MOV | ebpf.K, counter, 0, 0, 0 if form == "up" else turns)
        code.set(counter, SCALAR)
        head, out = code.label(), code.label()
        code.now.weaken()
        if form == "may_goto":
            # The verifier goes round until nothing new is learnt: what it knows of numbers must not be used inside.
            for register in code.now.scalars():
                if register != counter:
                    code.set(register, None)
            code.now.ready = 0
        code.place(head)
        begin = code.now.copy()
        if form == "tested":
            code.jump(out, jump | rng.choice((ebpf.JEQ, ebpf.JLT, ebpf.JSLE)) | ebpf.K, counter, 0, 0)
            if code.out[-1].opcode & 0xF0 == ebpf.JLT:
                code.out[-1] = code.out[-1]._replace(imm=1)
        elif form == "may_goto":
            code.jump(out, ebpf.JMP | ebpf.JCOND)
            # A count of 0 would turn until the kernel has enough of it.
            code.jump(out, jump | ebpf.JEQ | ebpf.K, counter, 0, 0)
        code.reserved.add(counter)
        code.nesting += 1
        self.turns *= turns
        ahead = code.ahead
        if rng.random() < 0.5:
            code.emit(rng.choice((ebpf.ALU, ebpf.ALU64)) | ebpf.ADD | ebpf.X, code.scalar(), counter)
        self._block(code, rng.randrange(1, 6), [out] if rng.random() < 0.2 else [])
        code.ahead = ahead
        self.turns //= turns
        code.nesting -= 1
        if code.state is not None:
            self._restore(code, begin)
            code.emit(kind | (ebpf.ADD if form == "up" else ebpf.SUB) | ebpf.K, counter, 0, 0, 1)
            if form == "up":
                code.jump_back(head, jump | rng.choice((ebpf.JLT, ebpf.JNE, ebpf.JSLT)) | ebpf.K, counter, 0, turns)
            elif form == "down":
                code.jump_back(head, jump | rng.choice((ebpf.JNE, ebpf.JGT, ebpf.JSGT)) | ebpf.K, counter, 0, 0)
            else:
                code.jump_back(head, rng.choice((ebpf.JMP, ebpf.JMP32)) | ebpf.JA)
                code.state = None
        code.reserved.discard(counter)
        code.place(out)

    def _restore(self, code: Code, begin: State) -> None:
        """What the loop's beginning relies on is there again."""
        for register in begin.scalars():
            if code.now.registers[register] != SCALAR:
                code.move(register, code.word())
        for offset in range(-code.depth, 0, 8):
            if begin.is_ready(offset, 8) and not code.now.is_ready(offset, 8):
                code.emit(ebpf.ST | ebpf.MEM | ebpf.DW, ebpf.FP, 0, offset, code.word())
                code.now.store(offset, 8)

    def _call(self, code: Code) -> None:
        rng = self.rng
        later = range(self.index + 1, len(self.signatures))
        called = later[0] if self.deep else rng.choice(later)
        if self.turns > 4:
            return
        signature = self.signatures[called]
        if signature.context and not code.now.pointers("context"):
            return
        windows: list[tuple[int, int]] = []
        for number, held in enumerate(signature.arguments, 2):
            if isinstance(held, Pointer) and held.region == "window":
                if code.depth < _WINDOW:
                    return
                windows.append((number, code.ready_slot(_WINDOW)))
        for number, held in enumerate(signature.arguments, 2):
            if held == SCALAR:
                if rng.random() < 0.5 and (saved := [n for n in code.now.scalars() if n > 5]):
                    code.emit(ebpf.ALU64 | ebpf.MOV | ebpf.X, number, rng.choice(saved))
                else:
                    code.move(number, code.long())
            elif isinstance(held, Pointer) and held.region == "value":
                code.load_value(number, held.map)
        for number, slot in windows:
            code.emit(ebpf.ALU64 | ebpf.MOV | ebpf.X, number, ebpf.FP)
            code.emit(ebpf.ALU64 | ebpf.ADD | ebpf.K, number, 0, 0, slot)
        if signature.context:
            code.emit(ebpf.ALU64 | ebpf.MOV | ebpf.X, 1, CONTEXT_REGISTER)
        else:
            code.move(1, code.long())
        self.calls.append((len(code.out), called))
        self.called.add(called)
        code.emit(ebpf.JMP | ebpf.CALL, 0, ebpf.PSEUDO_CALL)
        code.now.clobber()
        # What it did to the maps is not known here.
        code.now.drop_values({index for index, spec in enumerate(self.maps) if spec.type in MOVING})

    def _epilogue(self, code: Code) -> None:
        rng = self.rng
        held = code.now.scalars()
        if code.main:
            spare = [number for number in range(ebpf.FP) if number not in held]
            base = rng.choice(spare or range(6))
            code.load_value(base, 0)
            shown = [number for number in held if number != base]
            for number in shown:
                code.emit(ebpf.STX | ebpf.MEM | ebpf.DW, base, number, 8 * number)
            held = shown
        if not held:
            code.move(0, code.word())
        elif 0 not in held:
            code.emit(ebpf.ALU64 | ebpf.MOV | ebpf.X, 0, held[0])
        for number in held:
            code.emit(ebpf.ALU64 | ebpf.MUL | ebpf.K, 0, 0, 0, 0x9E3779B1)
            code.emit(rng.choice((ebpf.ALU, ebpf.ALU64)) | ebpf.XOR | ebpf.X, 0, number)
        code.set(0, SCALAR)
        if code.main and base:
            temporary = rng.choice([n for n in range(1, 6) if n != base])
            ready = [offset for offset in range(-code.depth, 0, 8) if code.now.is_ready(offset, 8)]
            for place, offset in enumerate(ready[:10], 10):
                code.emit(ebpf.LDX | ebpf.MEM | ebpf.DW, temporary, ebpf.FP, offset)
                code.emit(ebpf.STX | ebpf.MEM | ebpf.DW, base, temporary, 8 * place)
        if rng.random() < 0.7:
            code.emit(ebpf.ALU64 | ebpf.RSH | ebpf.K, 0, 0, 0, rng.choice((0, 16, 32)))
        code.emit(ebpf.JMP | ebpf.EXIT)
