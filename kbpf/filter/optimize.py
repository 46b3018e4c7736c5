"""Thread edges past tests whose outcome is known on them, until nothing changes.

Facts flow down the graph and meet where paths join; each edge is then led past every test that the facts on it
decide. A test that is left with one successor goes when its loads were made before.
"""

from __future__ import annotations

from kbpf.filter.facts import Facts, decide, learn, meet, subject
from kbpf.filter.graph import Builder, Node, Successor, in_order

_ROUNDS = 8


def thread(root: Successor, builder: Builder) -> Successor:
    """The graph with redundant tests removed; no packet's verdict changes."""
    for _ in range(_ROUNDS):
        threaded = _round(root, builder)
        if threaded is root:
            break
        root = threaded
    return root


def _round(root: Successor, builder: Builder) -> Successor:
    if isinstance(root, bool):
        return root
    order = in_order(root)
    entering: dict[Node, Facts] = {root: {}}
    edges: dict[Node, tuple[Successor, Successor, bool]] = {}
    for node in order:
        facts = entering.pop(node, None)
        if facts is None:
            # Every path to it was led past it.
            continue
        evaluated = subject(node.test) in facts or node.test.value.never_faults
        targets = []
        sure = decide(node.test, facts)
        for outcome, successor in (
            (True, node.yes if sure is not False else node.no),
            (False, node.no if sure is not True else node.yes),
        ):
            after = learn(facts, node.test, outcome)
            target = _follow(successor, after)
            targets.append(target)
            if isinstance(target, Node):
                known = entering.get(target)
                entering[target] = after if known is None else meet(known, after)
        edges[node] = (targets[0], targets[1], evaluated)
    rebuilt: dict[Node, Successor] = {}
    for node in reversed(order):
        if node not in edges:
            continue
        yes, no, evaluated = edges[node]
        new_yes = rebuilt[yes] if isinstance(yes, Node) else yes
        new_no = rebuilt[no] if isinstance(no, Node) else no
        if new_yes is new_no and evaluated:
            rebuilt[node] = new_yes
        else:
            rebuilt[node] = builder.node(node.test, new_yes, new_no)
    return rebuilt[root]


def _follow(successor: Successor, facts: Facts) -> Successor:
    while isinstance(successor, Node):
        test = successor.test
        outcome = decide(test, facts)
        if outcome is None:
            break
        following = successor.yes if outcome else successor.no
        # Without the test its loads are not made: only where that cannot be seen.
        if following is not False and not (subject(test) in facts or test.value in facts):
            break
        successor = following
    return successor
