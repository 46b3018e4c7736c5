"""What a classic filter asks, in words: from its instructions, wherever they came from.

The code is followed symbolically: what A and X hold where an instruction runs is known as an expression over the
packet, and which EtherType and protocol the tests before have settled says what the header at an offset is. An offset
that several kinds of packet reach with different meanings is named by its number alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import NamedTuple

from kbpf.filter import fields
from kbpf.isa import cbpf
from kbpf.isa.cbpf import Instruction
from kbpf.specs import Layout

#: Where the network header lies, by the link types whose link header has one length.
_NETWORK = {0: 4, 1: 14, 12: 0, 113: 16, 276: 20}
#: Where the link header says what the network header is.
_TYPE = {1: 12, 113: 14, 276: 0}
_VLAN_TYPES = frozenset((0x8100, 0x88A8, 0x9100))
_NOTHING: frozenset[int] = frozenset()

_SIZES = {cbpf.W: 4, cbpf.H: 2, cbpf.B: 1}
_OPERATORS = {0x00: "+", 0x10: "-", 0x20: "*", 0x30: "/", 0x40: "|", 0x50: "&", 0x60: "<<", 0x70: ">>", 0x90: "%"}
_OPERATORS[0xA0] = "^"
_RELATIONS = {cbpf.JEQ: ("=", "!="), cbpf.JGT: (">", "<="), cbpf.JGE: (">=", "<"), cbpf.JSET: ("&", "& not")}


class Expression(NamedTuple):
    """What a register holds: a ``const``, ``load``, ``header`` (4 * (byte & 15)), ``word`` of metadata, operator or
    unknown."""

    kind: str
    k: int = 0
    size: int = 0
    left: Expression | None = None
    right: Expression | None = None
    text: str = ""


_UNKNOWN = Expression("unknown", text="?")
_ZERO = Expression("const")
#: Masks that make another field of a field.
_MASKED = {
    ("IP version and header length", 0xF0): "IP version",
    ("ip version and header length", 0xF0): "IP version",
    ("ip6 version", 0xF0): "IP version",
    ("vlan tag", 0x0FFF): "vlan id",
    ("vlan tag", 0xE000): "vlan priority",
    ("ip flags and fragment offset", 0x1FFF): "ip fragment offset",
    ("tcp data offset", 0xF0): "tcp data offset * 16",
}
_FRAGMENT_OFFSET = Expression("const", 0x1FFF)


@dataclass
class _State:
    """What is known before an instruction runs; `a` and `x` are unknown where paths differ."""

    a: Expression = _ZERO
    x: Expression = _ZERO
    scratch: dict[int, Expression] = field(default_factory=dict)
    #: What the tests have settled: the few values that a word can have here, whichever path was taken.
    settled: dict[Expression, frozenset[int]] = field(default_factory=dict)

    def copy(self) -> _State:
        return _State(self.a, self.x, dict(self.scratch), dict(self.settled))

    def merge(self, other: _State) -> None:
        self.a = self.a if self.a == other.a else _UNKNOWN
        self.x = self.x if self.x == other.x else _UNKNOWN
        self.scratch = {k: v for k, v in self.scratch.items() if other.scratch.get(k) == v}
        self.settled = {k: v | other.settled[k] for k, v in self.settled.items() if k in other.settled}


class Explanation:
    """A filter explained: `remarks`, one for each instruction, and the decisions as an indented list.

    Raises `kbpf.FilterError` for instructions that Linux would not take; filters for captures may jump back.
    """

    def __init__(self, instructions: Sequence[Instruction], layout: Layout) -> None:
        cbpf.check(instructions, loops=not layout.live)
        self.instructions = tuple(instructions)
        self.layout = layout
        #: What each instruction does, empty for one that nothing reaches.
        self.remarks: list[str] = []
        #: For each conditional jump, what holds where it is taken and where it is not.
        self.conditions: dict[int, tuple[str, str]] = {}
        self._follow()

    def decisions(self) -> str:
        """The tests as an indented list.

        A part that several places lead to is written once, and referred to by the number of its instruction.
        """
        lines: list[str] = []
        written: set[int] = set()
        # (instruction, depth, words that lead there)
        stack: list[tuple[int, int, str]] = [(0, 0, "")]
        while stack:
            pc, depth, lead = stack.pop()
            pc = self._next_decision(pc)
            indent = "  " * depth
            _, jt, jf, _ = self.instructions[pc]
            if self._ends(pc):
                lines.append(f"{indent}{lead} {self.remarks[pc]}" if lead else f"{indent}{self.remarks[pc]}")
                continue
            if pc in written:
                lines.append(f"{indent}{lead} go on at ({pc:03})" if lead else f"{indent}go on at ({pc:03})")
                continue
            written.add(pc)
            if lead:
                lines.append(f"{indent}{lead}")
                depth, indent = depth + 1, indent + "  "
            (yes, no), taken, other = (
                self.conditions[pc],
                self._next_decision(pc + 1 + jt),
                self._next_decision(pc + 1 + jf),
            )
            # A test that ends the filter on one side needs no indentation for the other.
            if self._ends(other):
                lines.append(f"{indent}({pc:03}) {yes}, else {self.remarks[other]}")
                stack.append((taken, depth, ""))
            elif self._ends(taken):
                lines.append(f"{indent}({pc:03}) {no}, else {self.remarks[taken]}")
                stack.append((other, depth, ""))
            else:
                lines.append(f"{indent}({pc:03}) {yes}?")
                stack.append((other, depth + 1, "no:"))
                stack.append((taken, depth + 1, "yes:"))
        return "\n".join(lines) + "\n"

    def _ends(self, pc: int) -> bool:
        """Nothing new follows: a return, or a jump back."""
        return self.instructions[pc].code & 7 == cbpf.RET or self._back(pc) is not None

    def _back(self, pc: int) -> int | None:
        """Where the instruction jumps back to, if it does."""
        code, _, _, k = self.instructions[pc]
        return pc + 1 + cbpf.signed(k) if code == cbpf.JMP | cbpf.JA and k >> 31 else None

    def _next_decision(self, pc: int) -> int:
        """The first conditional jump, return or jump back from here on."""
        while True:
            code, _, _, k = self.instructions[pc]
            if self._back(pc) is not None:
                return pc
            if code == cbpf.JMP | cbpf.JA:
                pc += 1 + k
            elif code & 7 in (cbpf.JMP, cbpf.RET):
                return pc
            else:
                pc += 1

    def _follow(self) -> None:
        states: list[_State | None] = [None] * len(self.instructions)
        states[0] = _State()
        heads = {self._back(pc) for pc in range(len(self.instructions))}
        for pc, instruction in enumerate(self.instructions):
            state = states[pc]
            if state is not None and pc in heads:
                # What a turn of the loop leaves behind is not known.
                state.a, state.x, state.scratch = _UNKNOWN, _UNKNOWN, {}
            if state is None:
                self.remarks.append("")
                continue
            after = state.copy()
            self.remarks.append(self._step(pc, instruction, after))
            for target, arrives in self._successors(pc, instruction, after):
                known = states[target]
                if known is None:
                    states[target] = arrives
                else:
                    known.merge(arrives)

    def _successors(self, pc: int, instruction: Instruction, state: _State) -> list[tuple[int, _State]]:
        code, jt, jf, k = instruction
        if self._ends(pc):
            return []
        if code == cbpf.JMP | cbpf.JA:
            return [(pc + 1 + k, state)]
        if code & 7 != cbpf.JMP:
            return [(pc + 1, state)]
        yes = state.copy()
        if code == cbpf.JMP | cbpf.JEQ | cbpf.K and state.a.kind in ("load", "word", "&"):
            yes.settled[state.a] = frozenset((k,))
        return [(pc + 1 + jt, yes), (pc + 1 + jf, state)]

    def _step(self, pc: int, instruction: Instruction, state: _State) -> str:
        """Carry out an instruction symbolically, and say what it does."""
        code, jt, jf, k = instruction
        kind = code & 7
        if kind == cbpf.RET:
            return _returned(state.a if code & 0x18 == cbpf.A else Expression("const", k))
        if kind == cbpf.JMP:
            if code == cbpf.JMP | cbpf.JA:
                back = self._back(pc)
                return f"go on at ({pc + 1 + k:03})" if back is None else f"go back to ({back:03})"
            right = state.x if code & cbpf.X else Expression("const", k)
            yes, no = self._condition(code & 0xF0, state.a, right, state)
            self.conditions[pc] = yes, no
            return f"{yes}: ({pc + 1 + jt:03}), else ({pc + 1 + jf:03})"
        if kind in (cbpf.ST, cbpf.STX):
            state.scratch[k] = state.a if kind == cbpf.ST else state.x
            return f"remember {self._text(state.scratch[k], state)}"
        if kind == cbpf.ALU:
            state.a = self._computed(code, k, state)
            return self._text(state.a, state)
        if kind == cbpf.MISC:
            if code == cbpf.MISC | cbpf.TAX:
                state.x = state.a
            else:
                state.a = state.x
            return ""
        loaded = self._loaded(instruction, state)
        if kind == cbpf.LD:
            state.a = loaded
        else:
            state.x = loaded
        return self._text(loaded, state)

    def _computed(self, code: int, k: int, state: _State) -> Expression:
        if code & 0xF0 == cbpf.NEG:
            return Expression("neg", left=state.a)
        right = state.x if code & cbpf.X else Expression("const", k)
        return Expression(_OPERATORS[code & 0xF0], left=state.a, right=right)

    def _loaded(self, instruction: Instruction, state: _State) -> Expression:
        code, _, _, k = instruction
        mode = code & 0xE0
        if mode == cbpf.IMM:
            return Expression("const", k)
        if mode == cbpf.LEN:
            return Expression("word", text="packet length")
        if mode == cbpf.MEM:
            return state.scratch.get(k, _UNKNOWN)
        if mode == cbpf.MSH:
            return Expression("header", k)
        if mode == cbpf.IND:
            return Expression("load", k, _SIZES[code & 0x18], left=state.x)
        word = cbpf.ANCILLARY.get(k - cbpf.AD_OFF)
        if word is None:
            return Expression("load", k, _SIZES[code & 0x18])
        if word.name == "alu_xor_x":
            return Expression("^", left=state.a, right=state.x)
        return Expression("word", k, text=word.name)

    # Words.

    def _condition(self, op: int, left: Expression, right: Expression, state: _State) -> tuple[str, str]:
        """What holds where the jump is taken, and where it is not."""
        said = self._text(left, state)
        if op == cbpf.JSET:
            if right == _FRAGMENT_OFFSET and said == "ip flags and fragment offset":
                return "a later fragment", "no later fragment"
            bits = self._bits(left, right, state)
            return f"{said} has any of {bits}", f"{said} has none of {bits}"
        yes, no = _RELATIONS[op]
        value = self._value(left, right, state)
        return f"{said} {yes} {value}", f"{said} {no} {value}"

    def _bits(self, left: Expression, right: Expression, state: _State) -> str:
        if right.kind != "const":
            return self._text(right, state)
        if self._field(left, state)[0] == "tcp flags":
            return ", ".join(name for bit, name in enumerate(fields.TCP_FLAGS) if right.k >> bit & 1)
        return f"{right.k:#x}"

    def _value(self, left: Expression, right: Expression, state: _State) -> str:
        """The right side of a comparison, in the terms of the left."""
        if right.kind != "const":
            return self._text(right, state)
        k = right.k
        if self._text(left, state) == "IP version":
            return str(k >> 4)
        name, meaning = self._field(left, state)
        while left.kind == "&" and left.left is not None:
            left = left.left
            name, meaning = self._field(left, state)
        if meaning == "ethertype" and k in fields.ETHERTYPES:
            return f"{k:#06x} ({fields.ETHERTYPES[k]})"
        if meaning == "protocol" and k in fields.PROTOCOLS:
            return f"{k} ({fields.PROTOCOLS[k]})"
        if meaning == "address":
            return str(IPv4Address(k))
        if meaning == "packet type" and k < len(fields.PACKET_TYPES):
            return f"{k} ({fields.PACKET_TYPES[k]})"
        return str(k) if "port" in name or "length" in name or k < 10 else f"{k:#x}"

    def _text(self, expression: Expression, state: _State) -> str:
        kind, k, _, left, right, text = expression
        if kind == "const":
            return f"{k}" if k < 1024 else f"{k:#x}"
        if kind in ("word", "unknown"):
            return text.replace("_", " ")
        if kind == "load":
            return self._field(expression, state)[0]
        if kind == "header":
            return "length of the IP header" if self._is_network(k) else f"4 * (byte {_place(k)} & 15)"
        assert left is not None
        if kind == "neg":
            return f"-({self._text(left, state)})"
        assert right is not None
        if kind == "&" and right.kind == "const" and left.kind == "load":
            masked = _MASKED.get((self._field(left, state)[0], right.k))
            if masked:
                return masked
        last = f"{right.k:#x}" if right.kind == "const" and kind in "&|^" else self._text(right, state)
        return f"({self._text(left, state)} {kind} {last})"

    def _field(self, expression: Expression, state: _State) -> tuple[str, str]:
        """The name of what a load reads, and what its values mean."""
        kind, k, size, left, _, text = expression
        if kind == "word":
            return text.replace("_", " "), {"pkttype": "packet type", "protocol": "ethertype"}.get(text, "")
        if kind != "load":
            return "", ""
        if left is None:
            return self._absolute(k, size, state)
        if left.kind == "header" and self._is_network(left.k):
            name, known = self._transport(state)
            at = k - left.k
            if at < 0:
                return f"{_size(size)} at {at} before the transport header", ""
            return _named(name, known, at, size), ""
        return f"{_size(size)} at {self._text(left, state)} + {_place(k)}", ""

    def _absolute(self, k: int, size: int, state: _State) -> tuple[str, str]:
        type_at, network = self._link(state)
        if k >= cbpf.NET_OFF:
            return self._network(k - cbpf.NET_OFF, size, state)
        if size == 2 and type_at is not None and (k == type_at or (self.layout.dlt == 1 and k in (12, type_at))):
            return ("ether type" if self.layout.dlt == 1 else "network protocol"), "ethertype"
        if size == 2 and type_at is not None and self.layout.dlt == 1 and 14 <= k == type_at - 2:
            return "vlan tag", ""
        if self.layout.start == "transport" and k < cbpf.LL_OFF:
            name, known = self._transport(state)
            return _named(name, known, k, size), ""
        if network is not None and network <= k < cbpf.LL_OFF:
            return self._network(k - network, size, state)
        if self.layout.dlt == 1 and (k, size) in fields.ETHERNET:
            return f"ether {fields.ETHERNET[k, size]}", ""
        return f"{_size(size)} at {_place(k)}", ""

    def _network(self, at: int, size: int, state: _State) -> tuple[str, str]:
        types = self._network_types(state)
        headers = {fields.NETWORKS[type][0]: fields.NETWORKS[type][1] for type in types if type in fields.NETWORKS}
        if len({id(known) for known in headers.values()}) != 1 or not types <= fields.NETWORKS.keys():
            if at == 0 and size == 1:
                return "IP version and header length", ""
            return f"{_size(size)} at {at} of the network header", ""
        name, known = next(iter(sorted(headers.items())))
        if name == "ip6" and at >= 40 and (at, size) not in known:
            transport, known = self._transport(state)
            return _named(transport, known, at - 40, size), ""
        meaning = ""
        if (name, at, size) in (("ip", 9, 1), ("ip6", 6, 1), ("ip6", 40, 1)):
            meaning = "protocol"
        elif size == 4 and known.get((at, size), "").endswith("address"):
            meaning = "address"
        return _named(name, known, at, size), meaning

    def _link(self, state: _State) -> tuple[int | None, int | None]:
        """Where the EtherType and the network header lie, behind the VLAN tags that were seen to be there."""
        dlt = self.layout.dlt
        if dlt is None:
            return None, 0 if self.layout.start == "network" else None
        type_at, network = _TYPE.get(dlt), _NETWORK.get(dlt)
        if dlt == 1 and network is not None:
            while state.settled.get(Expression("load", network - 2, 2), _NOTHING) & _VLAN_TYPES:
                network += 4
            type_at = network - 2
        return type_at, network

    def _network_types(self, state: _State) -> frozenset[int]:
        """The EtherTypes that the packet can have here; nothing where that is not settled."""
        for load, values in state.settled.items():
            if load.text == "protocol":
                return values
        type_at, _ = self._link(state)
        if type_at is not None:
            return state.settled.get(Expression("load", type_at, 2), _NOTHING)
        if self.layout.ip_version is not None:
            return frozenset((0x0800 if self.layout.ip_version == 4 else 0x86DD,))
        # A raw packet says what it is by its version.
        for load, values in state.settled.items():
            if load.kind == "&" and load.left is not None and load.left.k in (0, cbpf.NET_OFF) and values <= {64, 96}:
                return frozenset(0x0800 if value == 64 else 0x86DD for value in values)
        return _NOTHING

    def _transport(self, state: _State) -> tuple[str, fields.Fields]:
        """The transport header, as far as the tests have settled its protocol."""
        if self.layout.protocol is not None:
            return fields.TRANSPORTS.get(self.layout.protocol, ("transport", fields.PORTS))
        for load, values in state.settled.items():
            if len(values) == 1 and self._field(load, state)[1] == "protocol":
                return fields.TRANSPORTS.get(next(iter(values)), ("transport", fields.PORTS))
        return "transport", fields.PORTS

    def _is_network(self, k: int) -> bool:
        return k == cbpf.NET_OFF or (k < cbpf.LL_OFF and k in (_NETWORK.get(self.layout.dlt or 1), 18, 22, 0))


def _named(header: str, known: fields.Fields, at: int, size: int) -> str:
    name = known.get((at, size))
    return f"{header} {name}" if name else f"{header}[{at}:{size}]"


def _size(size: int) -> str:
    return {1: "byte", 2: "half-word", 4: "word"}[size]


def _place(k: int) -> str:
    if k >= cbpf.NET_OFF:
        return f"network header + {k - cbpf.NET_OFF}"
    return f"link header + {k - cbpf.LL_OFF}" if k >= cbpf.LL_OFF else str(k)


def _returned(value: Expression) -> str:
    if value.kind != "const":
        return "keep as many bytes as A says"
    return f"accept, keep {value.k} bytes" if value.k else "reject"


def explain(instructions: Sequence[Instruction], layout: Layout) -> Explanation:
    """Explain classic instructions for packets that start as `layout` says; `kbpf.FilterError` if they are invalid."""
    return Explanation(instructions, layout)
