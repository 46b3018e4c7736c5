"""How a program reaches the packet: one way for each kind of program and layout.

R6 is the context. A load leaves its word in R0, in host order; R1 to R5 are lost. A load outside the packet goes to
`REJECT`. What a way needs at the start of the program it writes in `prologue`, what happens seldom in `epilogue`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from kbpf.errors import FilterError
from kbpf.filter.ebpf.code import REJECT, WIDTHS, Code
from kbpf.filter.values import Value
from kbpf.isa import cbpf, ebpf
from kbpf.isa.ebpf import FP, Instruction, signed32
from kbpf.isa.translate import context_field
from kbpf.specs import Layout
from kbpf.uapi.structs import STRUCTS

CTX = 6
#: The packet's length, where the expression asks for it.
LENGTH = 9

# enum bpf_hdr_start_off (linux/bpf.h).
_FROM_MAC, _FROM_NETWORK = 0, 1
_ETHERNET = 14
#: A packet pointer reaches no further (MAX_PACKET_OFF of the verifier).
_MOST_OFFSET = 0xFFFF


class Needs(NamedTuple):
    """What a program loads."""

    #: Where the last load at a constant offset ends, or at the usual one.
    extent: int
    #: There are loads at variable offsets.
    variable: bool
    #: The packet's length is to be in R9.
    length: bool


class Access(Protocol):
    """What the emitter asks of a way to reach the packet."""

    #: Whether a load at a constant offset is cheaper made again than kept.
    cheap: bool

    def prologue(self, code: Code, needs: Needs) -> None: ...

    def begin(self, code: Code) -> None:
        """At the start of each graph: let the verifier forget what it learned of R7 in the last."""
        ...

    def epilogue(self, code: Code) -> None: ...

    def constant(self, code: Code, k: int, size: int, checked: int) -> int:
        """Load at an offset; `checked` bytes are known to be there before, and what is returned after."""
        ...

    def variable(self, code: Code, load: Value) -> None:
        """Load at R0, which is the variable part of the offset, plus the constant one: a 32-bit sum."""
        ...


def access(target: str, layout: Layout, otherwise: int) -> Access:
    """The way for a type of program that returns `otherwise` for packets that do not match."""
    if target != "socket_filter":
        return Direct(target)
    link = layout.start == "link" and layout.dlt == 1
    return Headers(link, may_end=otherwise == 0) if link or otherwise else Absolute()


class Absolute:
    """LD_ABS and LD_IND, which a socket filter has as classic ones do: outside the packet they end it with 0."""

    cheap = False

    def prologue(self, code: Code, needs: Needs) -> None:
        if needs.length:
            code.load(4, LENGTH, CTX, STRUCTS["__sk_buff"].fields["len"].offset)

    def begin(self, code: Code) -> None:
        pass

    def epilogue(self, code: Code) -> None:
        pass

    def constant(self, code: Code, k: int, size: int, checked: int) -> int:
        code.add(Instruction(ebpf.LD | ebpf.ABS | WIDTHS[size], 0, 0, 0, signed32(k)))
        return checked

    def variable(self, code: Code, load: Value) -> None:
        code.add(Instruction(ebpf.LD | ebpf.IND | WIDTHS[load.size], 0, 0, 0, signed32(load.k)))


class Headers:
    """The first bytes of a packet, copied to the stack by one call; the rest by LD_IND.

    The call costs as much as three LD_ABS, so where only the link header is asked for there is no copy.

    With `link`, offsets count from the link header, wherever the data starts: on a packet socket with it, under
    BPF_PROG_TEST_RUN behind it. bpf_skb_load_bytes_relative() (Linux 4.18) sees to that, but reaches only linear data;
    what it does not find is looked for from the start of the data, which is right because only packets of packet
    sockets are not linear.
    """

    cheap = True
    # Copying more than a cache line costs several times as much.
    _MOST = 64
    # How many of the frame's bytes are on the stack.
    _LIMIT = 7

    def __init__(self, link: bool, may_end: bool) -> None:
        self._link = link
        # A load that fails may end the program with 0, as LD_ABS does.
        self._may_end = may_end
        self._copies = True
        self._copied = self._at = self._buffer = self._offset = self._saved = 0
        self._late: list[Callable[[], None]] = []

    def prologue(self, code: Code, needs: Needs) -> None:
        self._buffer, self._offset, self._saved = (code.reserve(4, 4) for _ in range(3))
        if needs.length:
            self._length(code)
        self._copies = needs.variable or needs.extent > _ETHERNET or not (self._may_end and self._link)
        if self._copies:
            self._copied = min(max(needs.extent, 1), self._MOST)
            self._copy(code)
            code.store(4, self._saved, self._LIMIT)

    def begin(self, code: Code) -> None:
        if self._copies:
            code.load(4, self._LIMIT, FP, self._saved)
            code.alu(ebpf.AND, self._LIMIT, 2 * self._MOST - 1)

    def _length(self, code: Code) -> None:
        """If there is a byte behind the data, counted from the link header, the data starts behind the header."""
        code.load(4, LENGTH, CTX, STRUCTS["__sk_buff"].fields["len"].offset)
        if not self._link:
            return
        code.move(2, LENGTH)
        self._relative(code, 1, _FROM_MAC)
        code.jump(ebpf.JNE, 0, 0, "length")
        code.alu(ebpf.ADD, LENGTH, _ETHERNET)
        code.label("length")

    def _copy(self, code: Code) -> None:
        # Fields of the network header are to be aligned to 4: it starts at 14, or at 0.
        shift = 2 if self._link else 0
        size = (self._copied + shift + 7) // 8 * 8
        bottom = code.reserve(size)
        self._at = bottom + shift
        for off in range(bottom, bottom + size, 8):
            code.store_constant(8, off, 0)
        if self._link:
            self._size(code, _ETHERNET)
            code.constant(2, 0)
            code.address(3, self._at)
            code.constant(5, _FROM_MAC)
            code.move(1, CTX)
            code.call("skb_load_bytes_relative")
            code.jump(ebpf.JEQ, 0, 0, "copied")
        # Short, or not linear.
        self._size(code, 0)
        # Verifiers before Linux 6.8 do not see from "not 0" that it is at least 1.
        code.jump(ebpf.JLT, 4, 1, "copied")
        code.constant(2, 0)
        code.address(3, self._at)
        code.move(1, CTX)
        code.call("skb_load_bytes")
        code.jump(ebpf.JEQ, 0, 0, "copied")
        code.constant(self._LIMIT, 0)
        code.label("copied")

    def _size(self, code: Code, more: int) -> None:
        """How much to copy, for the helper and as the limit."""
        code.load(4, 4, CTX, STRUCTS["__sk_buff"].fields["len"].offset)
        if more:
            code.add_to(4, more)
        code.jump(ebpf.JLE, 4, self._copied, ("size", more), wide=True)
        code.constant(4, self._copied)
        code.label(("size", more))
        code.move(self._LIMIT, 4)

    def _absolute(self, code: Code, size: int) -> None:
        """Load what is at R2 in the data."""
        code.address(3, self._buffer)
        code.constant(4, size)
        code.move(1, CTX)
        code.call("skb_load_bytes")

    def _relative(self, code: Code, size: int, header: int) -> None:
        """Load what is at R2 behind the start of a header."""
        code.address(3, self._buffer)
        code.constant(4, size)
        code.constant(5, header)
        code.move(1, CTX)
        code.call("skb_load_bytes_relative")

    def _loaded(self, code: Code, size: int) -> None:
        code.load(size, 0, FP, self._buffer)
        code.network_order(0, size)

    def constant(self, code: Code, k: int, size: int, checked: int) -> int:
        end = k + size
        if not self._copies:
            # The link header is linear in any case.
            k |= cbpf.LL_OFF
        if k >= cbpf.LL_OFF:
            self._of_header(code, k, size, None)
            return checked
        if end > self._copied:
            code.constant(2, k)
            self._far(code, size)
            return checked
        if end > checked:
            code.jump(ebpf.JLT, self._LIMIT, end, REJECT)
        self._from_stack(code, self._at + k, size)
        return max(end, checked)

    def _from_stack(self, code: Code, at: int, size: int) -> None:
        """The stack is read at aligned offsets only."""
        step = next(step for step in (4, 2, 1) if step <= size and at % step == 0)
        code.load(step, 0, FP, at)
        code.network_order(0, step)
        for off in range(step, size, step):
            code.alu(ebpf.LSH, 0, 8 * step)
            code.load(step, 1, FP, at + off)
            code.network_order(1, step)
            code.alu_register(ebpf.OR, 0, 1)

    def variable(self, code: Code, load: Value) -> None:
        size, usual = load.size, usual_offset(load)
        if load.k >= cbpf.LL_OFF:
            self._of_header(code, load.k, size, load)
            return
        _offset(code, load.k)
        done = object()
        if usual is not None and usual + size <= self._copied:
            # The stack cannot be read at variable offsets without CAP_PERFMON.
            unusual = object()
            code.jump(ebpf.JNE, 2, usual, unusual)
            code.jump(ebpf.JLT, self._LIMIT, usual + size, REJECT)
            self._from_stack(code, self._at + usual, size)
            code.goto(done)
            code.label(unusual)
        self._far(code, size)
        code.label(done)

    def _of_header(self, code: Code, k: int, size: int, load: Value | None) -> None:
        """Load relative to a header, in linear data only; R0 is the variable part of an offset."""
        if self._may_end:
            kind = ebpf.ABS if load is None else ebpf.IND
            code.add(Instruction(ebpf.LD | kind | WIDTHS[size], 0, 0, 0, signed32(k)))
            return
        base, header = (cbpf.NET_OFF, _FROM_NETWORK) if k >= cbpf.NET_OFF else (cbpf.LL_OFF, _FROM_MAC)
        if load is None:
            code.constant(2, k - base)
        else:
            _offset(code, k - base)
        self._relative(code, size, header)
        code.jump(ebpf.JNE, 0, 0, REJECT)
        self._loaded(code, size)

    def _far(self, code: Code, size: int) -> None:
        """Load at R2: within the limit it cannot fail."""
        miss, back = object(), object()
        code.move(1, 2)
        code.add_to(1, size)
        code.jump_register(ebpf.JGT, 1, self._LIMIT, miss, wide=True)
        start = signed32(cbpf.LL_OFF) if self._link else 0
        code.add(Instruction(ebpf.LD | ebpf.IND | WIDTHS[size], 0, 2, 0, start))
        code.label(back)

        def late() -> None:
            found = object()
            code.label(miss)
            if self._link:
                code.store(4, self._offset, 2)
                self._relative(code, size, _FROM_MAC)
                code.jump(ebpf.JEQ, 0, 0, found)
                code.load(4, 2, FP, self._offset)
            self._absolute(code, size)
            code.jump(ebpf.JNE, 0, 0, REJECT)
            code.label(found)
            self._loaded(code, size)
            code.goto(back)

        self._late.append(late)

    def epilogue(self, code: Code) -> None:
        for late in self._late:
            late()
        self._late.clear()


class Direct:
    """Pointers into the packet: R7 to its start, R8 to its end (Linux 4.7 for sched_cls, 4.8 for xdp).

    They span only the linear part; what may be behind it is loaded by bpf_skb_load_bytes(), or bpf_xdp_load_bytes()
    (Linux 5.18). XDP has more than half a page in it.
    """

    cheap = True
    _DATA, _END = 7, 8
    _LINEAR = 2048

    def __init__(self, target: str) -> None:
        self._skb = target == "sched_cls"
        self._context = STRUCTS["__sk_buff" if self._skb else "xdp_md"].fields
        self._buffer = 0
        self._late: list[Callable[[], None]] = []

    def prologue(self, code: Code, needs: Needs) -> None:
        self._buffer = code.reserve(4, 4)
        code.load(4, self._DATA, CTX, self._context["data"].offset)
        code.load(4, self._END, CTX, self._context["data_end"].offset)
        if needs.length and self._skb:
            code.load(4, LENGTH, CTX, self._context["len"].offset)
        elif needs.length:
            code.call("xdp_get_buff_len")
            code.move(LENGTH, 0)

    def begin(self, code: Code) -> None:
        pass

    def constant(self, code: Code, k: int, size: int, checked: int) -> int:
        end = k + size
        if end > 0x7FFF:
            code.constant(2, k)
            self._at_register(code, size, end)
            return checked
        if end <= checked:
            code.load(size, 0, self._DATA, k)
            code.network_order(0, size)
            return checked
        miss, there = self._miss(code, size, k, end), object()
        code.move(1, self._DATA)
        code.add_to(1, end)
        if miss is not REJECT:
            # The verifier follows what does not jump first. That it knows less of the pointers there saves it from
            # following all the rest again for those that it knows more of.
            code.jump_register(ebpf.JLE, 1, self._END, there, wide=True)
            code.goto(miss)
            code.label(there)
        else:
            code.jump_register(ebpf.JGT, 1, self._END, miss, wide=True)
        code.load(size, 0, self._DATA, k)
        self._arrive(code, miss, size)
        # Behind a load that was made by the helper nothing is known of the pointers.
        return end if miss is REJECT else checked

    def variable(self, code: Code, load: Value) -> None:
        assert load.left is not None
        _offset(code, load.k)
        self._at_register(code, load.size, load.left.top + load.k + load.size)

    def _at_register(self, code: Code, size: int, end: int) -> None:
        miss = self._miss(code, size, None, end)
        code.jump(ebpf.JGT, 2, _MOST_OFFSET - size, miss, wide=True)
        code.move(1, self._DATA)
        code.add(Instruction(ebpf.ALU64 | ebpf.ADD | ebpf.X, 1, 2))
        code.move(3, 1)
        code.add_to(3, size)
        code.jump_register(ebpf.JGT, 3, self._END, miss, wide=True)
        code.load(size, 0, 1, 0)
        self._arrive(code, miss, size)

    def _miss(self, code: Code, size: int, k: int | None, end: int) -> object:
        """Where a load goes that is not in the linear part: at offset `k`, or at R2. It ends at `end` at the latest."""
        if not self._skb and end <= self._LINEAR:
            return REJECT
        miss = object()

        def late() -> None:
            code.label(miss)
            if k is not None:
                code.constant(2, k)
            code.address(3, self._buffer)
            code.constant(4, size)
            code.move(1, CTX)
            code.call("skb_load_bytes" if self._skb else "xdp_load_bytes")
            code.jump(ebpf.JNE, 0, 0, REJECT)
            code.load(size, 0, FP, self._buffer)
            code.goto(("back", miss))

        self._late.append(late)
        return miss

    def _arrive(self, code: Code, miss: object, size: int) -> None:
        if miss is not REJECT:
            code.label(("back", miss))
        code.network_order(0, size)

    def epilogue(self, code: Code) -> None:
        for late in self._late:
            late()
        self._late.clear()


def usual_offset(load: Value) -> int | None:
    """Where a load mostly is: the offset, or behind an IPv4 header, which mostly has 20 bytes."""
    if load.left is None:
        return load.k
    return load.k + 20 if load.left.kind == "lsh" and load.left.top == 60 else None


def _offset(code: Code, k: int) -> None:
    """R0 + `k` into R2."""
    code.alu_register(ebpf.MOV, 2, 0)
    if k:
        code.alu(ebpf.ADD, 2, k)


def metadata(code: Code, k: int, target: str) -> None:
    """An ancillary word of a classic filter into R0. Raises `FilterError` for what the context does not hold."""
    offset = k - cbpf.AD_OFF
    if offset not in cbpf.ANCILLARY or target == "xdp":
        raise FilterError(f"{'an XDP' if target == 'xdp' else 'an eBPF'} program has no metadata at {k:#x}")
    for instruction in context_field(offset):
        code.add(instruction)
    if cbpf.ANCILLARY[offset].name == "ifindex":
        code.jump(ebpf.JEQ, 0, 0, REJECT)
