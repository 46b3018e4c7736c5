"""Hosts, networks and gateways: IPv4, IPv6, ARP, DECnet and Ethernet addresses."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from kbpf.errors import FilterError
from kbpf.filter import sets, syntax, wireless
from kbpf.filter.links import ARP, DECNET, IP, IP6, RARP
from kbpf.filter.syntax import Qualifiers
from kbpf.filter.values import M32, Condition, every, negated, some

if TYPE_CHECKING:
    from kbpf.filter.lower import Lowering, Member

# EtherType, and where the source and the destination address are.
_IPV4 = {"ip": (IP, 12, 16), "arp": (ARP, 14, 24), "rarp": (RARP, 14, 24)}


def match(lowering: Lowering, terms: Sequence[syntax.Match]) -> Condition:
    """``host``, ``net``, or a direction alone, of whatever kind the operand is; several are all IPv4 or all IPv6."""
    term = terms[0]
    operand, qualifiers = term.operand, term.qualifiers
    if isinstance(operand, syntax.Mac):
        if qualifiers.protocol != "link" or qualifiers.type == "net":
            raise lowering.fail('an Ethernet address needs "ether host", "ether src" or "ether dst"', term.position)
        addresses = [each.operand.value for each in terms if isinstance(each.operand, syntax.Mac)]
        return mac(lowering, addresses, qualifiers, "an Ethernet address")
    if isinstance(operand, syntax.Arcnet):
        raise lowering.fail("ARCNET addresses are for ARCNET captures only", term.position)
    if isinstance(operand, syntax.Ipv6):
        return ipv6(lowering, [_ipv6_operand(lowering, each) for each in terms], qualifiers)
    if isinstance(operand, syntax.Name):
        return _named(lowering, term, operand.text)
    if qualifiers.protocol == "decnet":
        return _decnet(lowering, term)
    members = [_ipv4_operand(lowering, each) for each in terms]
    return ipv4(lowering, members, qualifiers, term.position)


def _direction(qualifiers: Qualifiers, source: Condition, destination: Condition) -> Condition:
    if qualifiers.direction == "src":
        return source
    if qualifiers.direction == "dst":
        return destination
    return every(source, destination) if qualifiers.direction == "and" else some(source, destination)


def _ipv4_operand(lowering: Lowering, term: syntax.Match) -> tuple[int, int]:
    operand = term.operand
    is_net = term.qualifiers.type == "net"
    if isinstance(operand, syntax.Number):
        address, mask = operand.value, M32
        if is_net:
            # A short network number stands at the left.
            while address and not address & 0xFF000000:
                address, mask = address << 8, mask << 8 & M32
        return address, mask
    assert isinstance(operand, syntax.Ipv4)
    address, length = _dotted(lowering, operand.text, term)
    if operand.prefix is None and operand.mask is None:
        return address, M32 << 32 - length & M32
    if not is_net:
        raise lowering.fail('a prefix length or mask needs "net"', term.position)
    if operand.mask is not None:
        mask = _dotted(lowering, operand.mask, term)[0]
    else:
        assert operand.prefix is not None
        if operand.prefix > 32:
            raise lowering.fail("IPv4 prefixes have at most 32 bits", term.position)
        mask = M32 << 32 - operand.prefix & M32
    if address & ~mask:
        raise lowering.fail(f"{operand.text} has bits set outside the network", term.position)
    return address, mask


def _dotted(lowering: Lowering, text: str, term: syntax.Match) -> tuple[int, int]:
    """The address of one to four decimal numbers with dots, from the left, and its bits."""
    parts = text.split(".")
    if not all(part.isdecimal() and len(part) < 8 and int(part) < 256 for part in parts):
        raise lowering.fail(f"{text} is no IPv4 address", term.position)
    octets = bytes(int(part) for part in parts)
    return int.from_bytes(octets.ljust(4, b"\0"), "big"), 8 * len(parts)


def ipv4(lowering: Lowering, members: list[Member], qualifiers: Qualifiers, position: int) -> Condition:
    """IPv4 addresses and networks, as (address, mask), in IPv4, ARP or RARP packets, or all of them."""
    if qualifiers.protocol:
        if qualifiers.protocol not in _IPV4:
            raise lowering.fail(f'"{qualifiers.protocol}" does not go with an IPv4 address', position)
        kinds = [qualifiers.protocol]
    else:
        # Behind an MPLS label there is only IP.
        kinds = ["ip"] if lowering.headers.labels else ["ip", "arp", "rarp"]
    headers, pool = lowering.headers, lowering.pool
    parts = []
    for kind in kinds:
        ethertype, *offsets = _IPV4[kind]
        source, destination = (
            partial(sets.masked, pool, headers.network_word(offset, 4), ranges=lowering.order == "traffic")
            for offset in offsets
        )
        carried = headers.carries(ethertype)
        if carried is not False:
            parts.append(every(carried, lowering.directed(qualifiers.direction, members, source, destination)))
    return some(*parts)


def _ipv6_operand(lowering: Lowering, term: syntax.Match) -> Member:
    operand = term.operand
    assert isinstance(operand, syntax.Ipv6)
    if term.qualifiers.protocol not in ("", "ip6"):
        raise lowering.fail(f'"{term.qualifiers.protocol}" does not go with an IPv6 address', term.position)
    prefix = 128 if operand.prefix is None else operand.prefix
    if prefix > 128:
        raise lowering.fail("IPv6 prefixes have at most 128 bits", term.position)
    if prefix != 128 and term.qualifiers.type != "net":
        raise lowering.fail('a prefix length needs "net"', term.position)
    mask = (1 << 128) - (1 << 128 - prefix)
    if operand.value & ~mask:
        raise lowering.fail(f"{operand.text} has bits set outside the network", term.position)
    return operand.value, mask


def ipv6(lowering: Lowering, members: list[Member], qualifiers: Qualifiers) -> Condition:
    """IPv6 addresses and networks."""
    headers = lowering.headers
    carried = headers.carries(IP6)
    if carried is False:
        return False
    source, destination = (partial(_ipv6_at, lowering, offset) for offset in (8, 24))
    if len(members) > 1 and qualifiers.direction in ("", "or") and not lowering.rejects:
        # A packet may end within the destination: how much of it is read depends on the member.
        first, rest = members[:1], members[1:]
        return every(carried, some(source(first), destination(first), source(rest), destination(rest)))
    return every(carried, lowering.directed(qualifiers.direction, members, source, destination))


def _ipv6_at(lowering: Lowering, offset: int, members: Sequence[Member]) -> Condition:
    words = tuple(lowering.headers.network_word(offset + 4 * index, 4) for index in range(4))
    found = lowering.pool.lookup(words, members)
    if found is not None:
        return found
    parts = [[(address >> shift & M32, mask >> shift & M32) for shift in (96, 64, 32, 0)] for address, mask in members]
    return sets.several(lowering.pool, words, parts, lowering.order == "traffic")


def mac(lowering: Lowering, addresses: list[int], qualifiers: Qualifiers, what: str) -> Condition:
    """Ethernet addresses in the link header."""
    headers = lowering.headers
    if headers.link in wireless.LINKS and not headers.tunnel:
        return some(*(wireless.host(headers, each.to_bytes(6, "big"), qualifiers.direction) for each in addresses))
    is_ethernet = headers.ethernet(what)
    members = [(address, (1 << 48) - 1) for address in addresses]
    source, destination = (partial(_mac_at, lowering, offset) for offset in (6, 0))
    return every(is_ethernet, lowering.directed(qualifiers.direction, members, source, destination))


def _mac_at(lowering: Lowering, offset: int, members: Sequence[Member]) -> Condition:
    """The last four bytes tell most of them apart, and are compared first, as libpcap does."""
    headers = lowering.headers
    words = [headers.load(headers.header, offset + 2, 4), headers.load(headers.header, offset, 2)]
    parts = [[(address & M32, M32), (address >> 32, M32)] for address, _ in members]
    return sets.several(lowering.pool, words, parts, lowering.order == "traffic")


def _named(lowering: Lowering, term: syntax.Match, name: str) -> Condition:
    qualifiers = term.qualifiers
    if qualifiers.type == "net":
        network = lowering.names.network(name)
        if not network:
            raise lowering.fail(f'"{name}" is no network known here', term.position)
        mask = M32
        while not network & 0xFF000000:
            network, mask = network << 8, mask << 8 & M32
        return ipv4(lowering, [(network, mask)], qualifiers, term.position)
    if qualifiers.protocol == "link":
        address = lowering.names.ethernet(name)
        if address is None:
            raise lowering.fail(f'"{name}" is no Ethernet host known here', term.position)
        return mac(lowering, [address], qualifiers, f'"{name}"')
    if qualifiers.protocol == "decnet":
        raise lowering.fail("DECnet hosts have no names here, only addresses", term.position)
    parts = []
    for version, number in lowering.names.host(name):
        if version == 4 and qualifiers.protocol != "ip6":
            parts.append(ipv4(lowering, [(number, M32)], qualifiers, term.position))
        elif version == 6 and qualifiers.protocol in ("", "ip6"):
            parts.append(ipv6(lowering, [(number, (1 << 128) - 1)], qualifiers))
    if not parts:
        raise lowering.fail(f'"{name}" is no host known here', term.position)
    return some(*parts)


def gateway(lowering: Lowering, term: syntax.Match) -> Condition:
    """Packets to or from a host's Ethernet address that are not to or from its IP address."""
    if not isinstance(term.operand, syntax.Name):
        raise lowering.fail('expected a host name after "gateway"', term.position)
    if term.qualifiers.protocol not in ("", "ip", "arp", "rarp") or lowering.headers.labels or lowering.headers.tunnel:
        raise FilterError('"gateway" cannot be asked here')
    name = term.operand.text
    address = lowering.names.ethernet(name)
    addresses = [number for version, number in lowering.names.host(name) if version == 4]
    if address is None or not addresses:
        raise lowering.fail(f'"{name}" is no host with an Ethernet and an IPv4 address known here', term.position)
    own = ipv4(
        lowering,
        [(number, M32) for number in addresses],
        Qualifiers(term.qualifiers.protocol, "or", "host"),
        term.position,
    )
    return every(mac(lowering, [address], Qualifiers("link", "", ""), '"gateway"'), negated(own))


def _decnet(lowering: Lowering, term: syntax.Match) -> Condition:
    """DECnet data packets, with long or short headers and up to one byte of padding before them."""
    operand, headers = term.operand, lowering.headers
    if isinstance(operand, syntax.Number):
        area, node = operand.value >> 10, operand.value & 1023
    else:
        parts = operand.text.split(".") if isinstance(operand, syntax.Ipv4) and operand.prefix is None else []
        if len(parts) != 2 or not all(part.isdecimal() and len(part) < 8 for part in parts):
            raise lowering.fail("DECnet addresses have the form area.node", term.position)
        area, node = map(int, parts)
    if area > 63 or node > 1023:
        raise lowering.fail("DECnet areas end at 63 and nodes at 1023", term.position)
    if term.qualifiers.type == "net":
        raise lowering.fail('"net" does not go with a DECnet address', term.position)
    # Little-endian on the wire.
    address = int.from_bytes((area << 10 | node).to_bytes(2, "little"), "big")

    def at(long: int, short: int) -> Condition:
        forms = []
        for offset, flags in ((short, 0x02), (long, 0x06)):
            if offset == 1 and lowering.order == "traffic":
                # The address stands next to the flags.
                forms.append(headers.network_test(2, 4, flags << 24 | address << 8, 0x07FFFF00))
                forms.append(headers.network_test(2, 4, (0x8100 | flags) << 16 | address, 0xFF07FFFF))
                continue
            forms.append(every(headers.network_test(2, 1, flags, 0x07), headers.network_test(2 + offset, 2, address)))
            padded = headers.network_test(2, 2, 0x8100 | flags, 0xFF07)
            forms.append(every(padded, headers.network_test(3 + offset, 2, address)))
        return some(*forms)

    return every(headers.carries(DECNET), _direction(term.qualifiers, at(15, 3), at(7, 1)))
