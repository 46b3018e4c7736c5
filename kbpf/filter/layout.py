"""Blocks of classic instructions in a row: equal ends merged, jumps resolved, long ones through a hop.

A conditional jump reaches 255 instructions; one that goes farther gets an instruction of its own behind the jump.
"""

from __future__ import annotations

from typing import NamedTuple

from kbpf.filter.graph import Node, Successor
from kbpf.isa import cbpf
from kbpf.isa.cbpf import Instruction, stmt


class Block(NamedTuple):
    """A node's code; without a jump both its edges go to one place.

    `entries` says at which instruction each edge (source, outcome) comes in; `outcomes` which outcome of the test the jump's
    true and false sides are.
    """

    code: list[Instruction]
    entries: dict[tuple[Node, bool], int]
    jump: Instruction | None
    outcomes: tuple[bool, bool]


class _Target(NamedTuple):
    """Instruction `entry` of a node's block, or a verdict."""

    successor: Successor
    entry: int


def lay_out(order: list[Node], blocks: dict[Node, Block], accept: int) -> tuple[Instruction, ...]:
    """The program of the blocks in this order, with the verdicts at its end."""
    targets = _merged(order, blocks)
    order = [node for node in order if node in targets]
    return _Layout(order, blocks, targets, accept).program()


def _merged(order: list[Node], blocks: dict[Node, Block]) -> dict[Node, tuple[_Target, _Target]]:
    """Where the jumps of the blocks go that remain when each block that is the end of a later one is dropped."""
    targets: dict[Node, tuple[_Target, _Target]] = {}
    # Blocks that were dropped: the later one, and how far into it they begin.
    moved: dict[Node, _Target] = {}
    by_end: dict[tuple[object, ...], list[Node]] = {}
    for node in reversed(order):
        block = blocks[node]
        sides = []
        for outcome in block.outcomes:
            successor = node.yes if outcome else node.no
            entry = blocks[successor].entries[(node, outcome)] if isinstance(successor, Node) else 0
            place = moved.get(successor) if isinstance(successor, Node) else None
            sides.append(_Target(successor, entry) if place is None else _Target(place.successor, place.entry + entry))
        end = (block.jump, sides[0], sides[1])
        length = len(block.code)
        for later in by_end.get(end, ()):
            code = blocks[later].code
            if len(code) >= length and (not length or code[-length:] == block.code):
                moved[node] = _Target(later, len(code) - length)
                break
        else:
            targets[node] = (sides[0], sides[1])
            if block.jump is not None:
                by_end.setdefault(end, []).append(node)
    return targets


class _Layout:
    def __init__(
        self,
        order: list[Node],
        blocks: dict[Node, Block],
        targets: dict[Node, tuple[_Target, _Target]],
        accept: int,
    ) -> None:
        self.order = order
        self.blocks = blocks
        self.targets = targets
        self.verdicts = {True: stmt(cbpf.RET | cbpf.K, accept), False: stmt(cbpf.RET | cbpf.K, 0)}
        used = {target.successor for sides in targets.values() for target in sides}
        self.tail = [verdict for verdict in self._verdict_order() if verdict in used]
        #: Which sides of a node's jump go through a hop.
        self.far: dict[Node, list[int]] = {node: [] for node in order}
        self.starts: dict[Successor, int] = {}

    def _verdict_order(self) -> tuple[bool, bool]:
        """As libpcap has it: last stands what the false sides of the jumps lead to from the start."""
        target: Successor = self.order[0]
        while isinstance(target, Node):
            target = self.targets[target][1].successor
        return (not target, target)

    def program(self) -> tuple[Instruction, ...]:
        self._place()
        while self._find_far():
            self._place()
        out: list[Instruction] = []
        for index, node in enumerate(self.order):
            out += self.blocks[node].code
            self._jump(index, node, out)
        out += [self.verdicts[verdict] for verdict in self.tail]
        return tuple(out)

    def _place(self) -> None:
        pc = 0
        for index, node in enumerate(self.order):
            self.starts[node] = pc
            block = self.blocks[node]
            jumps = block.jump is not None or not self._falls_through(index, node)
            pc += len(block.code) + jumps + len(self.far[node])
        for verdict in self.tail:
            self.starts[verdict] = pc
            pc += 1

    def _falls_through(self, index: int, node: Node) -> bool:
        following = self.order[index + 1] if index + 1 < len(self.order) else self.tail[0]
        return self.targets[node][0] == (following, 0)

    def _at(self, target: _Target) -> int:
        return self.starts[target.successor] + target.entry

    def _find_far(self) -> bool:
        grown = False
        for node in self.order:
            block = self.blocks[node]
            if block.jump is None:
                continue
            at = self.starts[node] + len(block.code) + 1
            for side, target in enumerate(self.targets[node]):
                if side not in self.far[node] and self._at(target) - at > 255:
                    self.far[node].append(side)
                    grown = True
        return grown

    def _jump(self, index: int, node: Node, out: list[Instruction]) -> None:
        block, sides, far = self.blocks[node], self.targets[node], self.far[node]
        at = len(out) + 1
        if block.jump is None:
            if not self._falls_through(index, node):
                out.append(stmt(cbpf.JMP | cbpf.JA, self._at(sides[0]) - at))
            return
        offsets = [far.index(side) if side in far else self._at(target) - at for side, target in enumerate(sides)]
        out.append(block.jump._replace(jt=offsets[0], jf=offsets[1]))
        for side in far:
            target = sides[side]
            if isinstance(target.successor, bool):
                out.append(self.verdicts[target.successor])
            else:
                out.append(stmt(cbpf.JMP | cbpf.JA, self._at(target) - len(out) - 1))
