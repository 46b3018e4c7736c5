"""The flow graph as classic BPF: registers, scratch words, block order and jumps.

Each node becomes the instructions that bring its value into A, and a jump. What A, X and M[] hold is
followed along every edge: an edge on which the value is there already enters the block behind the loads.
"""

from __future__ import annotations

from typing import NamedTuple

from kbpf.errors import FilterError
from kbpf.filter.chains import walk
from kbpf.filter.graph import Node, Successor, in_order
from kbpf.filter.layout import Block, lay_out
from kbpf.filter.values import COMMUTATIVE, M32, Chain, Pool, Value
from kbpf.isa import cbpf
from kbpf.isa.cbpf import Instruction, jump, stmt

_SIZES = {1: cbpf.B, 2: cbpf.H, 4: cbpf.W}
_ALU = {
    "add": cbpf.ADD,
    "sub": cbpf.SUB,
    "mul": cbpf.MUL,
    "div": cbpf.DIV,
    "mod": cbpf.MOD,
    "and": cbpf.AND,
    "or": cbpf.OR,
    "xor": cbpf.XOR,
    "lsh": cbpf.LSH,
    "rsh": cbpf.RSH,
}
_JUMPS = {"eq": cbpf.JEQ, "gt": cbpf.JGT, "ge": cbpf.JGE}
# From how many instructions on a value that is wanted again is kept in a scratch word.
_WORTH_KEEPING = 3


class _State(NamedTuple):
    """What the registers hold: values, or None where that is unknown or differs."""

    a: Value | None = None
    x: Value | None = None
    kept: frozenset[Value] = frozenset()


def _meet(states: list[_State]) -> _State:
    first = states[0]
    a = first.a if all(s.a is first.a for s in states) else None
    x = first.x if all(s.x is first.x for s in states) else None
    return _State(a, x, frozenset.intersection(*(s.kept for s in states)))


class _Step(NamedTuple):
    """An instruction with the state before it, and what it reads of that."""

    before: _State
    instruction: Instruction
    reads_a: bool
    reads_x: bool
    reads_kept: Value | None
    after: _State
    stored: Value | None = None
    #: Goes with the one before: nothing may enter between.
    joined: bool = False


def emit(root: Successor, pool: Pool, accept: int, *, masks_as_sets: bool = True) -> tuple[Instruction, ...]:
    """The program that returns `accept` where the graph accepts, else 0.

    `masks_as_sets` lets single-bit comparisons become ``jset`` beyond those with zero.
    Raises `FilterError` where 16 scratch words do not do.
    """
    if isinstance(root, bool):
        return (stmt(cbpf.RET | cbpf.K, accept if root else 0),)
    return _Emitter(root, pool, accept, masks_as_sets).program()


class _Emitter:
    def __init__(self, root: Node, pool: Pool, accept: int, masks_as_sets: bool) -> None:
        self.root = root
        self.pool = pool
        self.accept = accept
        self.masks_as_sets = masks_as_sets
        self.order = in_order(root)
        self.uses = _uses(self.order)
        self.slots: dict[Value, int] = {}
        self.busy = 0

    def program(self) -> tuple[Instruction, ...]:
        incoming: dict[Node, list[tuple[Node, bool, _State]]] = {node: [] for node in self.order}
        blocks: dict[Node, Block] = {}
        for node in self.order:
            block, state = self._block(node, incoming[node])
            blocks[node] = block
            for outcome, successor in ((True, node.yes), (False, node.no)):
                if isinstance(successor, Node):
                    incoming[successor].append((node, outcome, state))
        return lay_out(self.order, blocks, self.accept)

    def _block(self, node: Node, edges: list[tuple[Node, bool, _State]]) -> tuple[Block, _State]:
        wanted, jump_code, swapped = self._comparison(node)
        ready = {(edge[0], edge[1]) for edge in edges if edge[2].a is wanted and node.test.other is None}
        others = [edge for edge in edges if (edge[0], edge[1]) not in ready]
        steps: list[_Step] = []
        entries: dict[tuple[Node, bool], int] = {}
        if node is self.root or others:
            state = _meet([state for _, _, state in others]) if others and node is not self.root else _State()
            steps = self._steps(node, wanted, state)
        ends = [steps[-1].after] if steps else []
        for source, outcome, state in edges:
            entry = len(steps) if (source, outcome) in ready else _entry(steps, state, node.test.other is not None)
            entries[(source, outcome)] = entry
            if entry or not steps:
                ends.append(_through(steps[entry:], state, self.slots))
        end = _meet(ends) if ends else _State()
        instructions = [step.instruction for step in steps]
        if node.yes is node.no:
            return Block(instructions, entries, None, (True, True)), end
        return Block(instructions, entries, jump_code, (not swapped, swapped)), end

    def _comparison(self, node: Node) -> tuple[Value, Instruction, bool]:
        """What must be in A, the jump, and whether its outcomes are the other way round."""
        test = node.test
        if node.yes is node.no and test.other is None:
            # Only the loads matter.
            return test.value, jump(cbpf.JMP | cbpf.JEQ | cbpf.K, 0, 0, 0), False
        if test.other is not None:
            return test.value, jump(cbpf.JMP | _JUMPS[test.relation] | cbpf.X, 0, 0, 0), False
        if test.mask == M32:
            return test.value, jump(cbpf.JMP | _JUMPS[test.relation] | cbpf.K, test.k, 0, 0), False
        if test.relation == "eq":
            single = test.mask & (test.mask - 1) == 0
            if test.k == 0 or (self.masks_as_sets and single and test.k == test.mask):
                return test.value, jump(cbpf.JMP | cbpf.JSET | cbpf.K, test.mask, 0, 0), test.k == 0
        masked = self.pool.op("and", test.value, self.pool.const(test.mask))
        return masked, jump(cbpf.JMP | _JUMPS[test.relation] | cbpf.K, test.k, 0, 0), False

    # Values into registers

    def _steps(self, node: Node, wanted: Value, state: _State) -> list[_Step]:
        code = _Code(state)
        self.busy = 0
        if node.test.other is not None:
            self._both(code, wanted, node.test.other)
        else:
            self._into_a(code, wanted)
        return code.steps

    def _into_a(self, code: _Code, value: Value) -> None:
        # From the value down one side of each operator to what is at hand or a leaf, then back up. Where both sides
        # need work the other one waits in X or in a scratch word.
        pending: list[tuple[Value, Value | None]] = []
        while code.state.a is not value and value not in code.state.kept and value.left is not None:
            left, right = value.left, value.right
            following, other = left, right
            if value.kind == "load":
                if self._cheap_x(code, left):
                    break
            elif right is not None and right.kind != "const" and not self._cheap_x(code, right):
                if value.kind in COMMUTATIVE and self._cheap_x(code, left):
                    following, other = right, left
                elif not left.uses_x:
                    self._into_x(code, right)
            pending.append((value, other))
            value = following
        self._leaf(code, value)
        for value, other in reversed(pending):
            self._apply(code, value, other)
            self._keep(code, value)

    def _leaf(self, code: _Code, value: Value) -> None:
        if code.state.a is value:
            return
        if value in code.state.kept:
            code.add(stmt(cbpf.LD | cbpf.MEM, self.slots[value]), a=value, reads_kept=value)
        elif value.kind == "const":
            code.add(stmt(cbpf.LD | cbpf.IMM, value.k), a=value)
        elif value.kind == "len":
            code.add(stmt(cbpf.LD | cbpf.LEN), a=value)
        elif value.left is None:
            code.add(stmt(cbpf.LD | _SIZES[value.size] | cbpf.ABS, value.k), a=value)
        else:
            self._into_x(code, value.left)
            code.add(stmt(cbpf.LD | _SIZES[value.size] | cbpf.IND, value.k), a=value, reads_x=True)
            self._keep(code, value)

    def _apply(self, code: _Code, value: Value, other: Value | None) -> None:
        """The instructions for `value` when A holds one side of it and `other` is the other."""
        right = other
        if value.kind == "load":
            code.add(stmt(cbpf.MISC | cbpf.TAX), x=value.left, reads_a=True)
            code.add(stmt(cbpf.LD | _SIZES[value.size] | cbpf.IND, value.k), a=value, reads_x=True)
            return
        if isinstance(value, Chain):
            self._walk(code, value)
            return
        if value.kind == "neg":
            code.add(stmt(cbpf.ALU | cbpf.NEG), a=value, reads_a=True)
            return
        assert right is not None
        operation = cbpf.ALU | _ALU[value.kind]
        if right.kind == "const":
            code.add(stmt(operation | cbpf.K, right.k), a=value, reads_a=True)
            return
        if self._cheap_x(code, right):
            self._into_x(code, right)
        else:
            left = value.left if right is value.right else value.right
            slot = self._scratch()
            code.add(stmt(cbpf.ST, slot), reads_a=True)
            self._into_a(code, right)
            if value.kind in COMMUTATIVE:
                code.add(stmt(cbpf.LDX | cbpf.MEM, slot), x=left, internal=True)
            else:
                code.add(stmt(cbpf.MISC | cbpf.TAX), x=right, reads_a=True)
                code.add(stmt(cbpf.LD | cbpf.MEM, slot), a=left, internal=True)
            self.busy -= 1
        code.add(stmt(operation | cbpf.X), a=value, reads_a=True, reads_x=True)

    def _walk(self, code: _Code, value: Chain) -> None:
        """The loop over extension headers, whose first one's protocol is in A."""
        assert value.right is not None
        self._into_x(code, value.right)
        code.together(walk(value.k, value.number, value.options, self._scratch()), value)
        self.busy -= 1

    def _keep(self, code: _Code, value: Value) -> None:
        """Store a costly value that is wanted again."""
        if self.uses.get(value, 0) > 1 and value not in code.state.kept and _cost(value) >= _WORTH_KEEPING:
            slot = self.slots.get(value)
            if slot is None:
                # Taken in turn: what is overwritten is computed again where it is wanted.
                slot = self.slots[value] = len(self.slots) % (cbpf.MEMWORDS // 2)
            code.keep(value, slot, self.slots)

    def _cheap_x(self, code: _Code, value: Value) -> bool:
        """X can be had without going through A."""
        return (
            code.state.x is value
            or value in code.state.kept
            or value.kind == "const"
            or _header_length(value) is not None
        )

    def _into_x(self, code: _Code, value: Value) -> None:
        if code.state.x is value:
            return
        if value.kind == "const":
            code.add(stmt(cbpf.LDX | cbpf.IMM, value.k), x=value)
            return
        if value in code.state.kept:
            code.add(stmt(cbpf.LDX | cbpf.MEM, self.slots[value]), x=value, reads_kept=value)
            return
        offset = _header_length(value)
        if offset is not None:
            code.add(stmt(cbpf.LDX | cbpf.MSH | cbpf.B, offset), x=value)
            return
        self._into_a(code, value)
        code.add(stmt(cbpf.MISC | cbpf.TAX), x=value, reads_a=True)

    def _both(self, code: _Code, left: Value, right: Value) -> None:
        """`left` into A and `right` into X."""
        if self._cheap_x(code, right):
            self._into_a(code, left)
            if self._cheap_x(code, right):
                self._into_x(code, right)
                return
            # It was in X, or in a scratch word, and the left side took its place.
            slot = self._scratch()
            code.add(stmt(cbpf.ST, slot), reads_a=True)
            self._into_a(code, right)
            code.add(stmt(cbpf.MISC | cbpf.TAX), x=right, reads_a=True)
            code.add(stmt(cbpf.LD | cbpf.MEM, slot), a=left, internal=True)
            self.busy -= 1
        elif not left.uses_x:
            self._into_x(code, right)
            self._into_a(code, left)
        else:
            self._into_a(code, right)
            slot = self._scratch()
            code.add(stmt(cbpf.ST, slot), reads_a=True)
            self._into_a(code, left)
            code.add(stmt(cbpf.LDX | cbpf.MEM, slot), x=right, internal=True)
            self.busy -= 1

    def _scratch(self) -> int:
        self.busy += 1
        slot = cbpf.MEMWORDS - self.busy
        if slot < cbpf.MEMWORDS // 2:
            raise FilterError("the arithmetic needs more scratch words than there are")
        return slot


class _Code:
    """Instructions being appended, and the state after them."""

    def __init__(self, state: _State) -> None:
        self.state = state
        self.steps: list[_Step] = []

    def add(
        self,
        instruction: Instruction,
        *,
        a: Value | None = None,
        x: Value | None = None,
        reads_a: bool = False,
        reads_x: bool = False,
        reads_kept: Value | None = None,
        internal: bool = False,
    ) -> None:
        before = self.state
        after = before
        if a is not None:
            after = after._replace(a=a)
        if x is not None:
            after = after._replace(x=x)
        # A read of a scratch word that this block wrote: nothing may enter between.
        reads_kept = reads_kept if not internal else _INTERNAL
        self.steps.append(_Step(before, instruction, reads_a, reads_x, reads_kept, after))
        self.state = after

    def together(self, instructions: list[Instruction], value: Value) -> None:
        """Instructions that read A and X and leave `value` in A, and nothing that is known in X."""
        before = self.state
        self.state = before._replace(a=value, x=None)
        for index, instruction in enumerate(instructions):
            self.steps.append(_Step(before, instruction, True, True, None, self.state, None, index > 0))

    def keep(self, value: Value, slot: int, slots: dict[Value, int]) -> None:
        """Store A, which is `value`, in a scratch word."""
        before = self.state
        after = before._replace(kept=_stored(before.kept, value, slots))
        self.steps.append(_Step(before, stmt(cbpf.ST, slot), True, False, None, after, value))
        self.state = after


def _stored(kept: frozenset[Value], value: Value, slots: dict[Value, int]) -> frozenset[Value]:
    slot = slots[value]
    return frozenset(other for other in kept if slots[other] != slot) | {value}


_INTERNAL = Value("internal")


def _entry(steps: list[_Step], state: _State, jump_reads_x: bool) -> int:
    """The last instruction at which an edge with `state` may come in."""
    entry = 0
    needs_a, needs_x = True, jump_reads_x
    # Scratch words that are written within the block itself.
    scratch: set[int] = set()
    needs_kept: set[Value | None] = set()
    for index in range(len(steps) - 1, -1, -1):
        step = steps[index]
        if step.instruction.code == cbpf.ST:
            scratch.discard(step.instruction.k)
        if step.after.a is not step.before.a:
            needs_a = False
        if step.after.x is not step.before.x:
            needs_x = False
        needs_kept.discard(step.stored)
        needs_a = needs_a or step.reads_a
        needs_x = needs_x or step.reads_x
        if step.reads_kept is _INTERNAL:
            scratch.add(step.instruction.k)
        elif step.reads_kept is not None:
            needs_kept.add(step.reads_kept)
        if (
            not scratch
            and not step.joined
            and (not needs_a or (step.before.a is not None and state.a is step.before.a))
            and (not needs_x or (step.before.x is not None and state.x is step.before.x))
            and needs_kept <= state.kept
            and index
        ):
            entry = index
            break
    return entry


def _through(steps: list[_Step], state: _State, slots: dict[Value, int]) -> _State:
    """The state after `steps` on an edge that came with `state`."""
    for step in steps:
        if step.after.a is not step.before.a or step.instruction.code & 7 in (cbpf.LD, cbpf.ALU):
            state = state._replace(a=step.after.a)
        if step.after.x is not step.before.x or step.instruction.code & 7 == cbpf.LDX:
            state = state._replace(x=step.after.x)
        if step.stored is not None:
            state = state._replace(kept=_stored(state.kept, step.stored, slots))
    return state


def _header_length(value: Value) -> int | None:
    """The k of ``4*([k]&0xf)`` where that is what `value` computes."""
    shifted = value.left
    if value.kind != "lsh" or value.right is None or value.right.k != 2 or value.right.kind != "const":
        return None
    assert shifted is not None
    if shifted.kind != "and" or shifted.right is None or shifted.right.k != 0xF or shifted.right.kind != "const":
        return None
    byte = shifted.left
    if byte is None or byte.kind != "load" or byte.left is not None or byte.size != 1:
        return None
    return byte.k


def _cost(value: Value) -> int:
    """About how many instructions it takes to compute a value, up to what is worth keeping."""
    cost = 0
    stack = [value]
    while stack and cost < _WORTH_KEEPING:
        value = stack.pop()
        cost += 1
        if _header_length(value) is not None:
            continue
        if value.left is not None:
            stack.append(value.left)
        if value.right is not None and value.right.kind != "const":
            stack.append(value.right)
    return cost


def _uses(order: list[Node]) -> dict[Value, int]:
    """How many nodes and values use each value."""
    uses: dict[Value, int] = {}
    stack: list[Value] = []
    for node in order:
        stack.append(node.test.value)
        if node.test.other is not None:
            stack.append(node.test.other)
    while stack:
        value = stack.pop()
        uses[value] = uses.get(value, 0) + 1
        if uses[value] == 1:
            if value.left is not None:
                stack.append(value.left)
            if value.right is not None:
                stack.append(value.right)
    return uses
