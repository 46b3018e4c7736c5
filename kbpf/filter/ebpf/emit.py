"""The flow graph as eBPF: values into R0, and a jump for each test.

What R0 holds and which costly values are kept on the stack is followed along the edges, as the classic emitter follows
A and M[].
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

from kbpf.filter.ebpf.code import ACCEPT, REJECT, Code
from kbpf.filter.ebpf.packet import CTX, LENGTH, Access, Needs, metadata, usual_offset
from kbpf.filter.ebpf.sets import Membership
from kbpf.filter.graph import Node, Successor, in_order
from kbpf.filter.values import M32, Test, Value
from kbpf.isa import cbpf, ebpf
from kbpf.isa.ebpf import FP

_ALU = {
    "add": ebpf.ADD,
    "sub": ebpf.SUB,
    "mul": ebpf.MUL,
    "div": ebpf.DIV,
    "mod": ebpf.MOD,
    "and": ebpf.AND,
    "or": ebpf.OR,
    "xor": ebpf.XOR,
    "lsh": ebpf.LSH,
    "rsh": ebpf.RSH,
}
_JUMPS = {"eq": ebpf.JEQ, "gt": ebpf.JGT, "ge": ebpf.JGE}
_OPPOSITE = {ebpf.JEQ: ebpf.JNE, ebpf.JGT: ebpf.JLE, ebpf.JGE: ebpf.JLT}
# Operations that a value is kept for, if it is wanted again.
_WORTH_KEEPING = 3
_MOST_KEPT = 32


class _State(NamedTuple):
    """What is known where a node begins: the value in R0, those on the stack, and bytes known to be in the packet."""

    a: Value | None = None
    kept: frozenset[Value] = frozenset()
    checked: int = 0


def _meet(states: list[_State]) -> _State:
    first = states[0]
    a = first.a if all(state.a is first.a for state in states) else None
    kept = frozenset.intersection(*(state.kept for state in states))
    return _State(a, kept, min(state.checked for state in states))


def emit(
    root: Successor,
    target: str,
    access: Access,
    results: tuple[int, int],
    memberships: Mapping[Value, Membership],
) -> tuple[ebpf.Instruction, ...]:
    """The program that returns the first of `results` where the graph accepts, else the second.

    Raises `FilterError` where it does not fit the stack or eBPF's jumps.
    """
    code = Code()
    code.move(CTX, 1)
    writer = Writer(code, [root], target, access, memberships)
    writer.prologue()
    writer.write(root)
    if root is not False:
        _verdict(code, ACCEPT, results[0])
    access.epilogue(code)
    # The verifier wants no code that nothing reaches.
    if root is False or code.jumps_to(REJECT):
        _verdict(code, REJECT, results[1])
    return code.instructions()


def _verdict(code: Code, label: str, result: int) -> None:
    code.label(label)
    code.constant(0, result)
    code.exit()


class Writer:
    """Writes graphs into a program: what all of them need once, then each of them."""

    def __init__(
        self,
        code: Code,
        roots: Sequence[Successor],
        target: str,
        access: Access,
        memberships: Mapping[Value, Membership],
    ) -> None:
        self.code = code
        self.target = target
        self.access = access
        self.memberships = memberships
        self.nodes = [node for root in roots for node in in_order(root)]
        self.uses = self._uses()
        self.state = _State()
        self.slots: dict[Value, int] = {}
        self.busy = 0

    def prologue(self, length: bool = False) -> None:
        """What all graphs need, with the context in R6; `length`: the packet's length in any case."""
        needs = self._needs()
        self.access.prologue(self.code, needs._replace(length=length or needs.length))
        self._reserve()

    def write(self, root: Successor) -> None:
        """One graph: it goes on behind its end, or jumps to `ACCEPT` there, or to `REJECT`."""
        order = in_order(root)
        incoming: dict[Node, list[_State]] = {node: [] for node in order}
        for index, node in enumerate(order):
            self.state = _meet(incoming.pop(node)) if index else _State()
            self.code.label(node)
            following: Successor = order[index + 1] if index + 1 < len(order) else True
            self._node(node, following)
            for successor in {node.yes, node.no}:
                if isinstance(successor, Node):
                    incoming[successor].append(self.state)

    def _values(self, test: Test) -> tuple[Value, ...]:
        if test.other is None:
            return (test.value,)
        member = self.memberships.get(test.other)
        return (test.value, test.other) if member is None else member.words

    def _uses(self) -> dict[Value, int]:
        """How many nodes and values use each value."""
        uses: dict[Value, int] = {}
        stack = [value for node in self.nodes for value in self._values(node.test)]
        while stack:
            value = stack.pop()
            uses[value] = uses.get(value, 0) + 1
            if uses[value] == 1:
                stack += [part for part in (value.left, value.right) if part is not None]
        return uses

    def _needs(self) -> Needs:
        loads = [value for value in self.uses if value.kind == "load" and value.k < cbpf.LL_OFF]
        ends = [at + value.size for value in loads if (at := usual_offset(value)) is not None]
        variable = any(value.left is not None for value in loads)
        return Needs(max(ends, default=0), variable, any(value.kind == "len" for value in self.uses))

    def _reserve(self) -> None:
        """The stack: keys of sets, intermediate results, and values that are kept."""
        code = self.code
        tested = (self.memberships.get(node.test.other) for node in self.nodes if node.test.other is not None)
        keys = [4 * len(member.words) + (4 if member.trie else 0) for member in tested if member is not None]
        self.key = code.reserve(max(keys, default=0), 4)
        depth = 1 + max((value.right_depth for value in self.uses), default=0)
        self.temporary = code.reserve(4 * depth, 4)
        costly = [value for value, count in self.uses.items() if count > 1 and self._costly(value)]
        room = min(len(costly), _MOST_KEPT, code.left() // 4)
        base = code.reserve(4 * room, 4)
        # Taken in turn: what is overwritten is computed again where it is wanted.
        if room:
            self.slots = {value: base + 4 * (index % room) for index, value in enumerate(costly)}

    def _costly(self, value: Value) -> bool:
        if value.kind == "load" and (value.left is not None or not self.access.cheap):
            return True
        operations, part = 0, value
        while part.left is not None and operations < _WORTH_KEEPING:
            if part.kind == "load" or (part.right is not None and part.right.kind != "const"):
                return True
            operations, part = operations + 1, part.left
        return operations >= _WORTH_KEEPING - 1

    # Nodes

    def _node(self, node: Node, following: Successor) -> None:
        test, code = node.test, self.code
        member = None if test.other is None else self.memberships.get(test.other)
        if member is not None:
            self._lookup(member)
            if node.yes is not node.no:
                self._branch(ebpf.JNE, 0, 0, node.yes, node.no, following, wide=True)
        elif test.other is not None:
            self._both(test.value, test.other)
            if node.yes is not node.no:
                self._branch(_JUMPS[test.relation], 0, None, node.yes, node.no, following)
        else:
            self._into_a(test.value)
            if node.yes is not node.no:
                self._compare(test, node, following)
        if node.yes is node.no and node.yes is not following:
            code.goto(_label(node.yes))

    def _compare(self, test: Test, node: Node, following: Successor) -> None:
        """R0 with a constant; R0 stays."""
        mask, k = test.mask, test.k
        if mask == M32:
            self._branch(_JUMPS[test.relation], 0, k, node.yes, node.no, following)
        elif test.relation == "eq" and k == 0:
            self._branch(ebpf.JSET, 0, mask, node.no, node.yes, following)
        elif test.relation == "eq" and k == mask and mask & (mask - 1) == 0:
            self._branch(ebpf.JSET, 0, mask, node.yes, node.no, following)
        else:
            self.code.alu_register(ebpf.MOV, 1, 0)
            self.code.alu(ebpf.AND, 1, mask)
            self._branch(_JUMPS[test.relation], 1, k, node.yes, node.no, following)

    def _branch(
        self,
        operation: int,
        register: int,
        k: int | None,
        yes: Successor,
        no: Successor,
        following: Successor,
        wide: bool = False,
    ) -> None:
        """Compare with a constant, or with R1; what follows in the code needs no jump."""
        if yes is following and operation in _OPPOSITE:
            operation, yes, no = _OPPOSITE[operation], no, yes
        if k is None:
            self.code.jump_register(operation, register, 1, _label(yes))
        else:
            self.code.jump(operation, register, k, _label(yes), wide=wide)
        if no is not following:
            self.code.goto(_label(no))

    def _lookup(self, member: Membership) -> None:
        """R0 is 0 if the words are not in the set."""
        code = self.code
        at = self.key
        if member.trie:
            code.store_constant(4, at, 32 * len(member.words))
            at += 4
        for word in member.words:
            self._into_a(word)
            code.network_order(0, 4)
            self.state = self.state._replace(a=None)
            code.store(4, at, 0)
            at += 4
        code.map(1, member.map)
        code.address(2, self.key)
        code.call("map_lookup_elem")

    # Values

    def _both(self, left: Value, right: Value) -> None:
        """`left` into R0 and `right` into R1."""
        self._into_a(left)
        self._spill()
        self._into_a(right)
        self._unspill()
        self.state = self.state._replace(a=left)

    def _spill(self) -> None:
        self.code.store(4, self.temporary + 4 * self.busy, 0)
        self.busy += 1

    def _unspill(self) -> None:
        """R0 into R1, and what was spilled last into R0."""
        self.busy -= 1
        self.code.move(1, 0)
        self.code.load(4, 0, FP, self.temporary + 4 * self.busy)

    def _into_a(self, wanted: Value) -> None:
        # What is still to be done, last first: a value to compute, or the step that ends one.
        todo: list[tuple[str, Value]] = [("value", wanted)]
        while todo:
            step, value = todo.pop()
            if step == "value":
                todo += self._begin(value)
                continue
            if step == "spill":
                self._spill()
                continue
            self._finish(value)
            self.state = self.state._replace(a=value)
            self._keep(value)

    def _begin(self, value: Value) -> list[tuple[str, Value]]:
        state, code = self.state, self.code
        if state.a is value:
            return []
        if value in state.kept:
            code.load(4, 0, FP, self.slots[value])
            self.state = state._replace(a=value)
            return []
        if value.left is None:
            return [("finish", value)]
        if value.right is None or value.right.kind == "const":
            return [("finish", value), ("value", value.left)]
        return [("finish", value), ("value", value.right), ("spill", value), ("value", value.left)]

    def _finish(self, value: Value) -> None:
        """Its operand is in R0; where it has two that are no constants, the left one was spilled."""
        code = self.code
        if value.kind == "const":
            code.constant(0, value.k)
        elif value.kind == "len":
            code.move(0, LENGTH)
        elif value.kind == "load":
            self._load(value)
        elif value.kind == "neg":
            code.alu(ebpf.NEG, 0, 0)
        elif value.right is not None and value.right.kind == "const":
            code.alu(_ALU[value.kind], 0, value.right.k)
        else:
            self._unspill()
            if value.kind in ("div", "mod"):
                code.jump(ebpf.JEQ, 1, 0, REJECT)
            code.alu_register(_ALU[value.kind], 0, 1)

    def _load(self, value: Value) -> None:
        if value.left is not None:
            self.access.variable(self.code, value)
        elif value.k >= cbpf.AD_OFF:
            metadata(self.code, value.k, self.target)
        else:
            checked = self.access.constant(self.code, value.k, value.size, self.state.checked)
            self.state = self.state._replace(checked=checked)

    def _keep(self, value: Value) -> None:
        slot = self.slots.get(value)
        if slot is not None and value not in self.state.kept:
            self.code.store(4, slot, 0)
            kept = frozenset(other for other in self.state.kept if self.slots[other] != slot) | {value}
            self.state = self.state._replace(kept=kept)


def _label(successor: Successor) -> Hashable:
    if isinstance(successor, bool):
        return ACCEPT if successor else REJECT
    return successor
