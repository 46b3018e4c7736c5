"""Random classic filters that Linux accepts, by construction.

Jumps only go forward, so one pass decides what may stand where: at each instruction it is known which scratch words
are written on every path to it. Most programs end in a digest of A, X and scratch words that is cut to
`DIGEST_BITS` bits: a socket shows min(return value, length), so over a packet of `LONG` bytes a wrong bit
anywhere is likely to show.
"""

from __future__ import annotations

from random import Random

from kbpf.isa import cbpf
from kbpf.isa.cbpf import Instruction, jump

DIGEST_BITS = 11
#: The length of a packet over which every digest shows.
LONG = 1 << DIGEST_BITS

_ODD = 0x9E3779B1
_SIZES = (cbpf.W, cbpf.H, cbpf.B)
_OPERATIONS = (cbpf.ADD, cbpf.SUB, cbpf.MUL, cbpf.DIV, cbpf.MOD, cbpf.AND, cbpf.OR, cbpf.XOR, cbpf.LSH, cbpf.RSH)
_CONDITIONS = (cbpf.JEQ, cbpf.JGT, cbpf.JGE, cbpf.JSET)
_WORDS = (
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    14,
    15,
    16,
    31,
    32,
    33,
    0xFF,
    0x100,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0x80000001,
    0xFFFFFFFF,
)

#: Ancillary words whose value Linux leaves open: their loads are followed by what makes it known.
OPEN_ANCILLARY = frozenset({36, 56})


def generate(rng: Random) -> tuple[Instruction, ...]:
    """A filter that the kernel's check accepts."""
    return _Program(rng).instructions


class _Program:
    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.out: list[Instruction] = []
        # Long ones are there for long jumps.
        self.count = rng.choice((rng.randrange(1, 12), rng.randrange(4, 40), rng.randrange(10, 90)))
        if rng.random() < 0.01:
            self.count = rng.choice((300, 700, 2000, cbpf.MAXINSNS - 40))
        self.jumps = rng.choice((0.0, 0.1, 0.1, 0.25))
        self.returns = rng.choice((0.0, 0.0, 0.02))
        #: Scratch words written on every path to the next instruction, and to those that jumps go to.
        self.written = 0
        self.at_target: dict[int, int] = {}
        kinds = (
            (self.load, 20), (self.indexed, 8), (self.immediate, 8), (self.scratch, 12), (self.ancillary, 4),
            (self.header, 4), (self.length, 3), (self.arithmetic, 25), (self.transfer, 6), (self.netlink, 1),
        )  # fmt: skip
        makers, weights = [make for make, _ in kinds], [weight for _, weight in kinds]
        while len(self.out) < self.count:
            dice = rng.random()
            if dice < self.jumps:
                self.branch()
            elif dice < self.jumps + self.returns:
                self.result()
            else:
                rng.choices(makers, weights)[0]()
        self.epilogue()
        self.instructions = tuple(self.out)

    def emit(self, code: int, k: int = 0) -> None:
        """Add an instruction that does not branch; what it does not use is sometimes junk."""
        self.arrive()
        jt = jf = 0
        if self.rng.random() < 0.02:
            jt, jf = self.rng.getrandbits(8), self.rng.getrandbits(8)
        self.out.append(Instruction(code, jt, jf, k & 0xFFFFFFFF))

    def arrive(self) -> int:
        """The scratch words that are written when the next instruction runs, whichever way it was reached."""
        self.written &= self.at_target.pop(len(self.out), 0xFFFF)
        return self.written

    def word(self) -> int:
        """A number of any size, the interesting ones often."""
        rng = self.rng
        return rng.choice(_WORDS) if rng.random() < 0.5 else rng.getrandbits(rng.choice((4, 8, 16, 32)))

    def offset(self) -> int:
        """Where a load goes: mostly what a short packet has, else its edges and the special ranges."""
        rng, dice = self.rng, self.rng.random()
        if dice < 0.75:
            return rng.randrange(20)
        if dice < 0.88:
            return rng.randrange(80)
        if dice < 0.94:
            return cbpf.NET_OFF + rng.randrange(40)
        if dice < 0.97:
            return cbpf.LL_OFF + rng.randrange(40)
        if dice < 0.98:
            # Between the ranges: before the headers, and what no header and no ancillary word has.
            return rng.choice((cbpf.NET_OFF, cbpf.LL_OFF, cbpf.AD_OFF, 0x80000000)) - rng.randrange(1, 9)
        return rng.choice((LONG - 1, LONG, 0x7FFFFFFF, 0x80000000, rng.getrandbits(31)))

    def load(self) -> None:
        self.emit(cbpf.LD | self.rng.choice(_SIZES) | cbpf.ABS, self.offset())

    def indexed(self) -> None:
        """A load relative to X; mostly X was set so that the sum lands in the packet, with or without wrapping."""
        rng, k = self.rng, self.offset()
        if rng.random() < 0.7:
            x = rng.randrange(24) if rng.random() < 0.5 else rng.randrange(20) - k
            self.emit(cbpf.LDX | cbpf.IMM, x)
            k = k if x & 0x80000000 or k < 80 else rng.randrange(16)
        self.emit(cbpf.LD | rng.choice(_SIZES) | cbpf.IND, k)

    def immediate(self) -> None:
        self.emit(self.rng.choice((cbpf.LD, cbpf.LDX)) | cbpf.IMM, self.word())

    def scratch(self) -> None:
        rng = self.rng
        if not self.arrive() or rng.random() < 0.5:
            k = rng.randrange(cbpf.MEMWORDS)
            self.emit(rng.choice((cbpf.ST, cbpf.STX)), k)
            self.written |= 1 << k
        else:
            self.emit(rng.choice((cbpf.LD, cbpf.LDX)) | cbpf.MEM, self.written_word())

    def written_word(self) -> int:
        return self.rng.choice([k for k in range(cbpf.MEMWORDS) if self.written >> k & 1])

    def ancillary(self) -> None:
        rng = self.rng
        k = rng.choice([*cbpf.ANCILLARY])
        if k in (8, 28) and rng.random() < 0.7:
            # Where there is no device these end the program.
            k = 40
        self.emit(cbpf.LD | rng.choice(_SIZES) | cbpf.ABS, cbpf.AD_OFF + k)
        if k in OPEN_ANCILLARY:
            self.emit(cbpf.LD | cbpf.IMM, self.word())

    def netlink(self) -> None:
        """Look for an attribute from a place where one may start."""
        self.emit(cbpf.LD | cbpf.IMM, self.rng.choice((0, 4, 8, 4 * self.rng.randrange(20), self.word())))
        self.emit(cbpf.LDX | cbpf.IMM, self.rng.choice((self.rng.randrange(8), self.rng.randrange(8), self.word())))
        self.emit(cbpf.LD | cbpf.W | cbpf.ABS, cbpf.AD_OFF + self.rng.choice((12, 16)))

    def header(self) -> None:
        self.emit(cbpf.LDX | cbpf.B | cbpf.MSH, self.offset() % cbpf.AD_OFF)

    def length(self) -> None:
        self.emit(self.rng.choice((cbpf.LD, cbpf.LDX)) | cbpf.LEN, self.rng.choice((0, 0, self.word())))

    def arithmetic(self) -> None:
        rng = self.rng
        if rng.random() < 0.06:
            self.emit(cbpf.ALU | cbpf.NEG, rng.choice((0, self.word())))
            return
        op = rng.choice(_OPERATIONS)
        if rng.random() < 0.4:
            if op in (cbpf.DIV, cbpf.MOD) and rng.random() < 0.8:
                self.emit(cbpf.LDX | cbpf.IMM, self.word() or 1)
            self.emit(cbpf.ALU | op | cbpf.X, self.word() if rng.random() < 0.1 else 0)
            return
        k = self.word()
        if op in (cbpf.LSH, cbpf.RSH):
            k &= 31
        elif op in (cbpf.DIV, cbpf.MOD):
            k = k or 1
        self.emit(cbpf.ALU | op | cbpf.K, k)

    def transfer(self) -> None:
        self.emit(cbpf.MISC | self.rng.choice((cbpf.TAX, cbpf.TXA)))

    def branch(self) -> None:
        """A jump, near or as far as the program and the field allow."""
        rng = self.rng
        left = self.count - len(self.out) - 1
        if left > 0 and rng.random() < 0.1:
            k = rng.randrange(min(left, 8) + 1) if rng.random() < 0.7 else rng.randrange(left + 1)
            self.target(k)
            self.emit(cbpf.JMP | cbpf.JA, k)
            self.written = 0xFFFF
            return
        if rng.random() < 0.4:
            # Make a small number, so that both ways are likely.
            self.emit(cbpf.ALU | cbpf.AND | cbpf.K, rng.choice((1, 3, 7)))
            left -= 1
        if left < 0:
            return
        source = rng.choice((cbpf.K, cbpf.K, cbpf.X))
        k = rng.choice((rng.randrange(8), self.word()))
        jt, jf = (min(rng.choice((0, 0, 1, rng.randrange(8), rng.randrange(256))), left) for _ in range(2))
        self.target(jt)
        self.target(jf)
        self.out.append(jump(cbpf.JMP | rng.choice(_CONDITIONS) | source, k, jt, jf))
        self.written = 0xFFFF

    def target(self, distance: int) -> None:
        pc = len(self.out) + 1 + distance
        self.at_target[pc] = self.at_target.get(pc, 0xFFFF) & self.arrive()

    def result(self) -> None:
        if self.rng.random() < 0.5:
            self.emit(cbpf.RET | cbpf.A)
        else:
            self.emit(cbpf.RET | cbpf.K, self.rng.choice((0, self.rng.randrange(LONG), self.word())))

    def epilogue(self) -> None:
        rng = self.rng
        if rng.random() < 0.2:
            self.result()
            return
        if rng.random() < 0.6:
            self.emit(cbpf.ALU | cbpf.XOR | cbpf.X)
            self.emit(cbpf.ALU | cbpf.MUL | cbpf.K, _ODD)
        for _ in range(rng.randrange(4) if self.arrive() else 0):
            self.emit(cbpf.LDX | cbpf.MEM, self.written_word())
            self.emit(cbpf.ALU | cbpf.ADD | cbpf.X)
            self.emit(cbpf.ALU | cbpf.MUL | cbpf.K, _ODD)
        self.emit(cbpf.ALU | cbpf.RSH | cbpf.K, 32 - DIGEST_BITS)
        self.emit(cbpf.RET | cbpf.A)
