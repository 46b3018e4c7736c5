"""The flow graph: tests with a successor for each outcome, down to accept and reject.

Graphs are acyclic and immutable; nodes with the same test and successors are the same object, which merges equal
code by construction.
"""

from __future__ import annotations

from typing import TypeAlias

from kbpf.filter.values import M32, All, Any, Choice, Condition, Negation, Test


class Node:
    """A test. Where both successors are the same the test is a probe: only its loads matter."""

    __slots__ = ("no", "test", "yes")

    def __init__(self, test: Test, yes: Successor, no: Successor) -> None:
        self.test = test
        self.yes = yes
        self.no = no


#: A node, or the verdict.
Successor: TypeAlias = "Node | bool"


class Builder:
    """Makes nodes, so that equal ones are the same object."""

    def __init__(self) -> None:
        self._nodes: dict[tuple[Test, Successor, Successor], Node] = {}

    def node(self, test: Test, yes: Successor, no: Successor) -> Successor:
        if yes is False and no is False:
            return False
        key = (test, yes, no)
        node = self._nodes.get(key)
        if node is None:
            node = self._nodes[key] = Node(test, yes, no)
        return node

    def graph(self, condition: Condition) -> Successor:
        """The graph that accepts where `condition` is true."""
        # A frame is a conjunction or disjunction whose parts are built from the last to the first.
        stack: list[_Frame] = []
        current: Condition = condition
        yes: Successor = True
        no: Successor = False
        while True:
            while not isinstance(current, (bool, Test)):
                if isinstance(current, Negation):
                    current, yes, no = current.part, no, yes
                    continue
                frame = _Frame(current, yes, no)
                stack.append(frame)
                current = frame.parts[-1]
            result = (yes if current else no) if isinstance(current, bool) else self.node(current, yes, no)
            while stack:
                frame = stack[-1]
                frame.left -= 1
                if frame.left:
                    break
                stack.pop()
                if frame.test is not None:
                    result = self.node(frame.test, result, frame.otherwise)
            else:
                return result
            current = frame.parts[frame.left - 1]
            if frame.test is not None:
                frame.otherwise = result
                yes, no = frame.yes, frame.no
            else:
                yes, no = (result, frame.no) if frame.conjunction else (frame.yes, result)


class _Frame:
    """A condition whose parts are being built, the last first. A choice's parts are its two sides."""

    __slots__ = ("conjunction", "left", "no", "otherwise", "parts", "test", "yes")

    def __init__(self, condition: All | Any | Choice, yes: Successor, no: Successor) -> None:
        self.test = condition.test if isinstance(condition, Choice) else None
        self.parts = (condition.yes, condition.no) if isinstance(condition, Choice) else condition.parts
        self.conjunction = isinstance(condition, All)
        self.otherwise: Successor = no
        self.yes = yes
        self.no = no
        self.left = len(self.parts)


def jumps_if_not(test: Test) -> bool:
    """Whether the test is made by its opposite: no bit of a mask set, by the jump for some bit set."""
    return test.k == 0 and test.relation == "eq" and test.mask != M32


def in_order(root: Successor) -> list[Node]:
    """The nodes, each before its successors; what follows a jump that is taken stands nearer than the rest."""
    order: list[Node] = []
    if isinstance(root, bool):
        return order
    seen = {root}
    stack: list[tuple[Node, int]] = [(root, 0)]
    while stack:
        node, step = stack.pop()
        if step == 2:
            order.append(node)
            continue
        stack.append((node, step + 1))
        child = node.yes if bool(step) is not jumps_if_not(node.test) else node.no
        if isinstance(child, Node) and child not in seen:
            seen.add(child)
            stack.append((child, 0))
    order.reverse()
    return order
