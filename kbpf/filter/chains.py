"""``protochain``: a protocol anywhere in the chain of headers behind IPv4 or IPv6.

Filters for captures walk the chain in a loop, by a jump back, as libpcap's do. Linux refuses loops, so for sockets and
for eBPF the walk is unrolled to `UNROLLED` extension headers. IPv4 has no options that are headers of their own, but
authentication headers. (An authentication header behind another header is walked over by its length; libpcap's code
takes the length for the offset.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kbpf.errors import FilterError
from kbpf.filter.links import IP, IP6, At
from kbpf.filter.values import Choice, Condition, Test, Value, every, some
from kbpf.isa import cbpf
from kbpf.isa.cbpf import Instruction, jump, stmt

if TYPE_CHECKING:
    from kbpf.filter.lower import Lowering

#: Extension headers that are walked over without a loop; authentication headers behind IPv4, a third.
UNROLLED = 6
_AH = 51
# Hop-by-hop, routing and fragment headers, and destination options, in the order of their numbers.
_OPTIONS = (0, 43, 44, 60)


def protochain(lowering: Lowering, number: int, protocol: str) -> Condition:
    """``protochain N``: the chain of headers holds one of protocol `number`."""
    headers = lowering.headers
    if headers.payload.base is not None:
        raise FilterError('"protochain" cannot be asked behind headers of variable length')
    parts = []
    for name, version, ethertype, offset, options in (("ip", 4, IP, 9, ()), ("ip6", 6, IP6, 6, _OPTIONS)):
        if protocol in ("", name):
            first = headers.network_word(offset, 1)
            parts.append(every(headers.carries(ethertype), _chain(lowering, first, version, number, options)))
    return some(*parts)


def _chain(lowering: Lowering, first: Value, version: int, number: int, options: tuple[int, ...]) -> Condition:
    """The header after IP is of the protocol `first`; it, or one of those behind it, is `number`."""
    pool, at = lowering.pool, lowering.headers.transport(version)
    base = pool.const(0) if at.base is None else at.base
    if lowering.layout.live or not pool.loops:
        return _unrolled(lowering, first, at, number, options)
    found = pool.chain(first, base, at.k, number, bool(options))
    return some(
        pool.test("eq", first, number), every(_goes_on(lowering, first, options), pool.test("eq", found, number))
    )


def _goes_on(lowering: Lowering, kind: Value, options: tuple[int, ...]) -> Condition:
    """`kind` is a header that others may follow; what is none is told from those first, in few tests."""
    first, *later = (lowering.pool.test("eq", kind, option) for option in (*options, _AH))
    if not later:
        return first
    above = lowering.pool.test("ge", kind, _OPTIONS[1])
    assert isinstance(above, Test)
    return Choice(above, some(*later), first)


def _unrolled(lowering: Lowering, kind: Value, at: At, number: int, options: tuple[int, ...]) -> Condition:
    pool, headers = lowering.pool, lowering.headers
    kinds: list[Value] = []
    for _ in range(UNROLLED if options else UNROLLED // 3):
        kinds.append(kind)
        # A header's second byte says how much longer than 8 bytes it is, in units of 8; in AH, of 4.
        units = headers.load(at, 1, 1)
        shift = pool.const(2)
        if options:
            not_ah = pool.op("add", pool.op("xor", kind, pool.const(_AH)), pool.const(0x2FF))
            shift = pool.op("rsh", not_ah, pool.const(8))
        length = pool.op("lsh", units, shift)
        kind = headers.load(at, 0, 1)
        at = At(at.k + 8, length if at.base is None else pool.op("add", at.base, length))
    condition: Condition = pool.test("eq", kind, number)
    for kind in reversed(kinds):
        condition = some(pool.test("eq", kind, number), every(_goes_on(lowering, kind, options), condition))
    return condition


def walk(at: int, number: int, options: bool, slot: int) -> list[Instruction]:
    """The loop. It begins with the protocol of a header in A, one to be walked over, and where it is, less `at`, in X.

    It ends with A the first of the protocols behind that is `number` or no extension header. The scratch word `slot` is
    overwritten.
    """
    eq, ge, ja = cbpf.JMP | cbpf.JEQ, cbpf.JMP | cbpf.JGE, cbpf.JMP | cbpf.JA
    byte = cbpf.LD | cbpf.B | cbpf.IND
    length = [stmt(byte, at + 1), stmt(cbpf.ALU | cbpf.ADD, 2), stmt(cbpf.ALU | cbpf.LSH, 2)]
    if options:
        # All but AH count in units of 8 bytes.
        length = [
            jump(eq, _AH, 4, 0),
            stmt(byte, at + 1),
            stmt(cbpf.ALU | cbpf.ADD, 1),
            stmt(cbpf.ALU | cbpf.LSH, 3),
            stmt(ja, len(length)),
            *length,
        ]
    step = [
        stmt(cbpf.ALU | cbpf.ADD | cbpf.X),
        stmt(cbpf.ST, slot),
        stmt(byte, at),
        stmt(cbpf.LDX | cbpf.MEM, slot),
    ]
    # The two jumps at the end leave the loop, over the jump back.
    again = [jump(eq, number, 2, 0), jump(eq, _AH, 0, 1)]
    if options:
        again = [
            jump(eq, number, 7, 0),
            jump(ge, _OPTIONS[1], 0, 4),
            *(jump(eq, option, 4 - index, 0) for index, option in enumerate(_OPTIONS[1:])),
            jump(eq, _AH, 1, 2),
            jump(eq, _OPTIONS[0], 0, 1),
        ]
    body = [*length, *step, *again]
    return [*body, stmt(ja, -len(body) - 1)]
