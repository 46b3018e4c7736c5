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

    `entries` says at which instruction each edge (source, outcome) comes in; `outcomes` which outcome of the test the
    jump's true and false sides are.
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
    """Writes the program from its end, so that every target's place is known when a jump to it is written."""

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
        #: The program, its last instruction first.
        self.reversed: list[Instruction] = []
        #: How many instructions there are from the start of a block, or from the nearest copy of a verdict, to the end.
        self.to_end: dict[Successor, int] = {}
        #: The same for the nearest instruction that goes on to a far target.
        self.hops: dict[_Target, int] = {}

    def program(self) -> tuple[Instruction, ...]:
        used = {target.successor for sides in self.targets.values() for target in sides}
        for verdict in self._verdicts():
            if verdict in used:
                self._push(self.verdicts[verdict])
                self.to_end[verdict] = len(self.reversed)
        for node in reversed(self.order):
            self._jump(node)
            self.reversed += reversed(self.blocks[node].code)
            self.to_end[node] = len(self.reversed)
        return tuple(reversed(self.reversed))

    def _verdicts(self) -> tuple[bool, bool]:
        """As libpcap has it: last stands what the false sides of the jumps lead to from the start."""
        target: Successor = self.order[0]
        while isinstance(target, Node):
            target = self.targets[target][1].successor
        return (target, not target)

    def _push(self, instruction: Instruction) -> None:
        self.reversed.append(instruction)

    def _offset(self, target: _Target) -> int:
        """From behind what is written next; by a hop where the target is too far for a conditional jump."""
        offset = self._distance(target)
        return len(self.reversed) - self.hops[target] if offset > 255 and target in self.hops else offset

    def _distance(self, target: _Target) -> int:
        return len(self.reversed) - (self.to_end[target.successor] - target.entry)

    def _jump(self, node: Node) -> None:
        jump, sides = self.blocks[node].jump, self.targets[node]
        if jump is None:
            if self._distance(sides[0]):
                self._push(stmt(cbpf.JMP | cbpf.JA, self._distance(sides[0])))
            return
        while True:
            offsets = [self._offset(side) for side in sides]
            far = [side for side, offset in zip(sides, offsets, strict=True) if offset > 255]
            if not far:
                break
            self._hop(far[0])
        self._push(jump._replace(jt=offsets[0], jf=offsets[1]))

    def _hop(self, target: _Target) -> None:
        """An instruction that goes on to a far target; of a verdict, a copy, which what is written next can use too."""
        if isinstance(target.successor, bool):
            self._push(self.verdicts[target.successor])
            self.to_end[target.successor] = len(self.reversed)
        else:
            self._push(stmt(cbpf.JMP | cbpf.JA, self._distance(target)))
            self.hops[target] = len(self.reversed)
