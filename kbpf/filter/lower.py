"""The typed tree to conditions over packet words: what each primitive means where the packet starts.

The tree is read from left to right, because some primitives move the headers for all that follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from kbpf.errors import FilterError, FilterSyntaxError
from kbpf.filter import arithmetic, chains, hosts, sets, specials, syntax, tunnels, wireless
from kbpf.filter.links import IP, IP6, SAP_ISO, Headers
from kbpf.filter.names import ETHERTYPES, LLC_SAPS, Names
from kbpf.filter.values import Condition, Pool, every, negated, some
from kbpf.specs import Layout

Order = Literal["traffic", "libpcap"]

#: A member of a set: an interval, or an address and its mask.
Member = tuple[int, int]

TCP, UDP, SCTP = 6, 17, 132
_PORT_PROTOCOLS = {"tcp": TCP, "udp": UDP, "sctp": SCTP}
#: IP protocols by pcap-filter(7)'s abbreviations, and the versions they are looked for in.
IP_PROTOCOLS: dict[str, tuple[int, tuple[int, ...]]] = {
    "tcp": (TCP, (4, 6)),
    "udp": (UDP, (4, 6)),
    "sctp": (SCTP, (4, 6)),
    "pim": (103, (4, 6)),
    "ah": (51, (4, 6)),
    "esp": (50, (4, 6)),
    "icmp": (1, (4,)),
    "igmp": (2, (4,)),
    "igrp": (9, (4,)),
    "vrrp": (112, (4,)),
    "carp": (112, (4,)),
    "icmp6": (58, (6,)),
}
_LINK_PROTOCOLS = {
    **{name: ETHERTYPES[name] for name in ("ip", "ip6", "arp", "rarp", "atalk", "aarp", "decnet", "lat", "sca")},
    **{name: ETHERTYPES[name] for name in ("moprc", "mopdl")},
    **LLC_SAPS,
}
_OSI = {"esis": 0x82, "isis": 0x83, "clnp": 0x81}
# IS-IS PDU types of each kind.
_ISIS = {
    "l1": (26, 24, 18, 17, 15),
    "l2": (27, 25, 20, 17, 16),
    "iih": (17, 16, 15),
    "lsp": (20, 18),
    "snp": (27, 26, 25, 24),
    "csnp": (25, 24),
    "psnp": (27, 26),
}
_IPV6_FRAGMENT = 44


class Lowering:
    """One expression being given its meaning."""

    def __init__(
        self, expression: str, layout: Layout, pool: Pool, names: Names, order: Order, netmask: int | None
    ) -> None:
        self.expression = expression
        self.layout = layout
        self.pool = pool
        self.names = names
        self.order = order
        self.netmask = netmask
        self.headers = Headers(pool, layout)
        #: The primitive at hand rejects the packet where it is true, or the bytes that it asks for have been read:
        #: either way nobody can tell whether it read them in another order.
        self.rejects = False
        self.settled = False

    def condition(self, tree: syntax.Expression) -> Condition:
        """The condition that `tree` states. Raises `FilterError` and `FilterSyntaxError`."""
        # Conjunctions and disjunctions being lowered: their parts, what is done already, and the outcomes that reject.
        stack: list[tuple[syntax.Every | syntax.Some | syntax.Not, list[Condition], frozenset[bool]]] = []
        current: syntax.Expression = tree
        rejects = frozenset((False,))
        while True:
            if isinstance(current, (syntax.Every, syntax.Some)):
                current = self._grouped(current)
            if isinstance(current, (syntax.Every, syntax.Some, syntax.Not)):
                stack.append((current, [], rejects))
                rejects = _part_rejects(current, 0, rejects)
                current = current.term if isinstance(current, syntax.Not) else current.terms[0]
                continue
            self.rejects = True in rejects
            result = self.primitive(current)
            while stack:
                node, done, rejects = stack[-1]
                if isinstance(node, syntax.Not):
                    result = negated(result)
                else:
                    done.append(result)
                    if len(done) < len(node.terms):
                        rejects = _part_rejects(node, len(done), rejects)
                        current = node.terms[len(done)]
                        break
                    result = every(*done) if isinstance(node, syntax.Every) else some(*done)
                stack.pop()
            else:
                return result

    def fail(self, message: str, position: int) -> FilterSyntaxError:
        return FilterSyntaxError(message, self.expression, position)

    def _grouped(self, node: syntax.Every | syntax.Some) -> syntax.Expression:
        """Alternatives (or negated conjuncts) that ask the same of different operands, as one.

        They stand side by side, or one of them was asked before all that stands between: then the bytes that decide
        about the others have been read, and it cannot be told when these are asked.
        """
        opposite = isinstance(node, syntax.Every)
        terms: list[syntax.Expression] = []
        asked: set[tuple[object, ...]] = set()
        runs: dict[tuple[object, ...], tuple[list[syntax.Match], bool]] = {}

        def close() -> None:
            for run, settled in runs.values():
                group: syntax.Expression = syntax.Group(tuple(run), settled) if settled or len(run) > 1 else run[0]
                terms.append(syntax.Not(group) if opposite else group)
            runs.clear()

        for term in node.terms:
            match = term.term if opposite and isinstance(term, syntax.Not) else term
            key = self._group_key(match) if isinstance(match, syntax.Match) else None
            # Of IPv6 addresses no more words are read than match.
            settled = key in asked and self.order == "traffic" and key[0] is not True
            if key is None or (match is term) is opposite:
                close()
                terms.append(syntax.Group((match,), True) if settled and isinstance(match, syntax.Match) else term)
                if not isinstance(match, (syntax.Match, syntax.Protocol, syntax.Relation)):
                    # Headers may have moved.
                    asked.clear()
                continue
            assert isinstance(match, syntax.Match)
            if key not in runs:
                if not settled:
                    close()
                runs[key] = [], settled
                asked.add(key)
            runs[key][0].append(match)
        close()
        if len(terms) == 1:
            return terms[0]
        return syntax.Every(tuple(terms)) if opposite else syntax.Some(tuple(terms))

    def _group_key(self, term: syntax.Match) -> tuple[object, ...] | None:
        qualifiers = term.qualifiers
        if qualifiers.direction not in ("", "or", "src", "dst"):
            return None
        if qualifiers.type in ("port", "portrange"):
            return ("port", qualifiers.direction, self._port_numbers(term)[2])
        if isinstance(term.operand, syntax.Mac):
            # 802.11 has its own places for addresses.
            return None if self.headers.link in wireless.LINKS else ("mac", qualifiers.direction, qualifiers[::2])
        if qualifiers.type in ("", "host", "net") and isinstance(
            term.operand, (syntax.Ipv4, syntax.Ipv6, syntax.Number)
        ):
            if qualifiers.protocol == "decnet":
                return None
            return (isinstance(term.operand, syntax.Ipv6), qualifiers.direction, qualifiers.protocol)
        return None

    def directed(
        self,
        direction: str,
        members: Sequence[Member],
        source: Callable[[Sequence[Member]], Condition],
        destination: Callable[[Sequence[Member]], Condition],
    ) -> Condition:
        """One of `members` in the source, the destination, or as the direction says."""
        if direction == "src":
            return source(members)
        if direction == "dst":
            return destination(members)
        if direction == "and":
            return every(source(members), destination(members))
        if self.order == "libpcap":
            return some(source(members), destination(members))
        if self.settled:
            # What was read last is compared first.
            return some(destination(members), source(members))
        if len(members) == 1 or self.rejects:
            return some(source(members), destination(members))
        # A packet may end before the destination: only the first member is looked for in the source before that.
        return some(source(members[:1]), destination(members), source(members[1:]))

    def primitive(self, term: syntax.Primitive) -> Condition:
        if not (self.layout.network or self.layout.link_header):
            self._payload_only(term)
        if isinstance(term, syntax.Relation):
            return arithmetic.relation(self, term)
        if isinstance(term, syntax.Protocol):
            if term.name in ("link", "radio"):
                raise self.fail(f'"{term.name}" alone says nothing', term.position)
            return self.protocol(term.name)
        if isinstance(term, (syntax.Match, syntax.Group)):
            self.settled = isinstance(term, syntax.Group) and term.settled
            return self.match(term.matches if isinstance(term, syntax.Group) else (term,))
        return _SPECIALS[term.name](self, term)

    def _payload_only(self, term: syntax.Primitive) -> None:
        """UNIX and netlink sockets carry messages without headers: only their length can be asked for."""
        if isinstance(term, syntax.Special) and term.name in ("less", "greater"):
            return
        if isinstance(term, syntax.Relation) and not arithmetic.reads_packet(term):
            return
        raise FilterError(f"this can be answered for network packets only, not on {self.headers.describe()}")

    # Protocols

    def versions(self, four: Condition, six: Condition, six_first: bool = True) -> Condition:
        """Either IP version: the one that traffic mostly has first, or in the order of libpcap's listings."""
        if self.order == "libpcap" and six_first:
            return some(six, four)
        return some(four, six)

    def protocol(self, name: str) -> Condition:
        """A protocol's abbreviation."""
        if name in IP_PROTOCOLS:
            number, versions = IP_PROTOCOLS[name]
            if versions == (4,):
                return self.ip_protocol(4, number)
            if versions == (6,):
                return self.ip_protocol(6, number)
            return self.versions(self.ip_protocol(4, number), self.ip_protocol(6, number), six_first=False)
        if name in _OSI:
            return self._osi(_OSI[name])
        if name in _ISIS:
            kinds = _ISIS[name]
            return some(*(self._isis(kind) for kind in kinds))
        return self.headers.carries(_LINK_PROTOCOLS[name])

    def ip_protocol(self, version: int, number: int) -> Condition:
        """IP of this version carrying protocol `number`."""
        headers = self.headers
        if self.layout.live and self.layout.protocol is not None:
            carries = number == self.layout.protocol
            return carries and headers.carries(IP if version == 4 else IP6)
        if version == 4:
            return every(headers.carries(IP), headers.network_test(9, 1, number))
        fragment = every(headers.network_test(6, 1, _IPV6_FRAGMENT), headers.network_test(40, 1, number))
        return every(headers.carries(IP6), some(headers.network_test(6, 1, number), fragment))

    def _osi(self, number: int) -> Condition:
        headers = self.headers
        word = headers.load(headers.payload, headers.network_after_llc, 1)
        return every(headers.carries(SAP_ISO), self.pool.test("eq", word, number))

    def _isis(self, kind: int) -> Condition:
        headers = self.headers
        word = headers.load(headers.payload, headers.network_after_llc + 4, 1)
        return every(self._osi(_OSI["isis"]), self.pool.test("eq", word, kind))

    # Qualified operands

    def match(self, terms: Sequence[syntax.Match]) -> Condition:
        """Qualified operands, any one of them; where there are more, they are of one kind."""
        term = terms[0]
        qualifiers = term.qualifiers
        if qualifiers.direction in wireless.DIRECTIONS and not (
            qualifiers.protocol == "link" and self.headers.link in wireless.LINKS
        ):
            raise self.fail(f'"{qualifiers.direction}" is for 802.11 addresses only', term.position)
        if qualifiers.type in ("proto", "protochain"):
            return self._proto(term)
        if qualifiers.type in ("port", "portrange"):
            return self._port(terms)
        if qualifiers.type == "gateway":
            return hosts.gateway(self, term)
        return hosts.match(self, terms)

    def _proto(self, term: syntax.Match) -> Condition:
        protocol, kind = term.qualifiers.protocol, term.qualifiers.type
        number = self._proto_number(term)
        if kind == "protochain":
            if protocol not in ("", "ip", "ip6"):
                raise self.fail(f'"protochain" does not go with "{protocol}"', term.position)
            self.limit(number, 255, "IP protocol", term)
            return chains.protochain(self, number, protocol)
        if protocol in ("", "ip", "ip6"):
            self.limit(number, 255, "IP protocol", term)
            if protocol:
                return self.ip_protocol(4 if protocol == "ip" else 6, number)
            return self.versions(self.ip_protocol(4, number), self.ip_protocol(6, number), six_first=False)
        if protocol == "link":
            self.limit(number, 65535, "link-layer protocol", term)
            return self.headers.carries(number)
        if protocol == "iso":
            self.limit(number, 255, "OSI protocol", term)
            return self._osi(number)
        if protocol == "isis":
            self.limit(number, 31, "IS-IS PDU", term)
            return self._isis(number)
        raise self.fail(f'"proto" does not go with "{protocol}"', term.position)

    def limit(self, number: int, limit: int, what: str, term: syntax.Match | syntax.Special) -> None:
        if number > limit:
            raise self.fail(f"{what} numbers end at {limit}, {number} is too large", term.position)

    def _proto_number(self, term: syntax.Match) -> int:
        operand, protocol = term.operand, term.qualifiers.protocol
        if isinstance(operand, syntax.Number):
            return operand.value
        if not isinstance(operand, syntax.Name):
            raise self.fail(f'expected a protocol number or name after "{term.qualifiers.type}"', term.position)
        number: int | None = None
        if protocol in ("", "ip", "ip6"):
            number = self.names.protocol(operand.text)
        elif protocol == "link":
            number = ETHERTYPES.get(operand.text, LLC_SAPS.get(operand.text))
        elif protocol == "iso":
            number = _OSI.get(operand.text)
        if number is None:
            raise self.fail(f'"{operand.text}" is no protocol known here', term.position)
        return number

    def _port(self, terms: Sequence[syntax.Match]) -> Condition:
        numbers = [self._port_numbers(term) for term in terms]
        ranges = [(first, last) for first, last, _ in numbers]
        protocol = numbers[0][2]

        def ports(version: int) -> Condition:
            transport = self.headers.transport(version)
            source, destination = (self.headers.load(transport, offset, 2) for offset in (0, 2))
            return self.directed(
                terms[0].qualifiers.direction,
                ranges,
                lambda members: sets.member(self.pool, source, members),
                lambda members: sets.member(self.pool, destination, members),
            )

        if protocol is not None:
            protocols: tuple[int, ...] = (protocol,)
        else:
            protocols = (TCP, UDP, SCTP) if self.order == "traffic" else (SCTP, TCP, UDP)
        return self.versions(
            every(self.headers.carries(IP), self._one_of(4, protocols), self.first_fragment(), ports(4)),
            every(self.headers.carries(IP6), self._one_of(6, protocols), ports(6)),
        )

    def _one_of(self, version: int, protocols: tuple[int, ...]) -> Condition:
        if self.layout.live and self.layout.protocol is not None:
            return self.layout.protocol in protocols
        offset = 9 if version == 4 else 6
        return some(*(self.headers.network_test(offset, 1, number) for number in protocols))

    def first_fragment(self) -> Condition:
        """An IPv4 packet that has a transport header. Sockets above IP get reassembled packets."""
        if self.layout.live and self.layout.start == "transport":
            return True
        return self.headers.network_test(6, 2, 0, 0x1FFF)

    def _port_numbers(self, term: syntax.Match) -> tuple[int, int, int | None]:
        qualifiers, operand = term.qualifiers, term.operand
        protocol: int | None = None
        if qualifiers.protocol:
            protocol = _PORT_PROTOCOLS.get(qualifiers.protocol)
            if protocol is None:
                raise self.fail(f'"{qualifiers.type}" does not go with "{qualifiers.protocol}"', term.position)
        if isinstance(operand, syntax.Number):
            if operand.value > 65535:
                raise self.fail(f"port numbers end at 65535, {operand.value} is too large", term.position)
            return operand.value, operand.value, protocol
        if not isinstance(operand, syntax.Name):
            raise self.fail(f'expected a port number or name after "{qualifiers.type}"', term.position)
        found: tuple[int, int, int | None] | None
        if qualifiers.type == "port":
            port = self.names.port(operand.text)
            found = None if port is None else (port.number, port.number, port.protocol)
        else:
            found = self.names.port_range(operand.text)
        if found is None:
            raise self.fail(f'"{operand.text}" is no port known here', term.position)
        first, last, named = min(found[:2]), max(found[:2]), found[2]
        if protocol is not None and named is not None and named != protocol:
            raise self.fail(f'"{operand.text}" is no port of {qualifiers.protocol}', term.position)
        return first, last, named if protocol is None else protocol


def _part_rejects(
    node: syntax.Every | syntax.Some | syntax.Not, index: int, rejects: frozenset[bool]
) -> frozenset[bool]:
    """The outcomes of a part that reject the packet at once, where `rejects` are those of the whole."""
    if isinstance(node, syntax.Not):
        return frozenset(not outcome for outcome in rejects)
    if index == len(node.terms) - 1:
        return rejects
    return rejects & {isinstance(node, syntax.Some)}


_SPECIALS: dict[str, Callable[[Lowering, syntax.Special], Condition]] = {
    "inbound": specials.direction,
    "outbound": specials.direction,
    "ifindex": specials.ifindex,
    "less": specials.less,
    "greater": specials.greater,
    "byte": specials.byte,
    "broadcast": specials.broadcast,
    "multicast": specials.multicast,
    "llc": specials.llc,
    "vlan": tunnels.vlan,
    "mpls": tunnels.mpls,
    "pppoed": tunnels.pppoed,
    "pppoes": tunnels.pppoes,
    "geneve": tunnels.geneve,
    "vxlan": tunnels.vxlan,
    "type": wireless.frame_type,
    "subtype": wireless.frame_type,
    "dir": wireless.frame_direction,
}
