"""Text of an expression to tokens, by pcap-filter(7)'s rules: the longest match wins.

A word may read as a keyword, a number in three bases, part of an IPv4 address, an IPv6
address, a MAC address in five spellings, or a name; which one it is depends on its
whole length, so ``aa0004001d04`` is a MAC address and ``aa0004001d0`` a name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from kbpf.errors import FilterSyntaxError


def _words(kind: str, text: str) -> dict[str, str]:
    """Words of one kind; without a kind each is its own."""
    return {word: kind or word for word in text.split()}


#: Words of the language by what the parser takes them for. The value is the token's kind.
KEYWORDS: dict[str, str] = {
    **_words("", "src dst host net mask port portrange proto protochain gateway type subtype dir ra ta"),
    **_words("", "less greater byte broadcast multicast and or not inbound outbound ifindex"),
    **_words("", "vlan mpls pppoed pppoes geneve vxlan llc len"),
    **{f"{long}{n}": f"addr{n}" for long in ("address", "addr") for n in (1, 2, 3, 4)},
    "direction": "dir",
    "length": "len",
    "&&": "and",
    "||": "or",
    "!": "not",
    # Protocols; the token's text is the protocol's one name.
    **_words("protocol", "ip ip6 arp rarp sctp tcp udp icmp icmp6 igmp igrp pim vrrp carp ah esp"),
    **_words("protocol", "atalk aarp decnet lat sca moprc mopdl iso esis es-is isis is-is clnp"),
    **_words("protocol", "l1 l2 iih lsp snp csnp psnp stp ipx netbeui radio"),
    **_words("protocol", "link ether ppp slip fddi tr wlan"),
    # Words of link types that kbpf has no captures of.
    **_words("pflog", "on ifname rset ruleset rnr rulenum srnr subrulenum reason action"),
    **_words("atm", "lane metac bcc oam oamf4 oamf4ec oamf4sc sc ilmic vpi vci connectmsg metaconnect"),
    **_words("ss7", "fisu lssu lsu msu hfisu hlssu hmsu sio opc dpc sls hsio hopc hdpc hsls"),
}

#: Protocol words that mean another.
PROTOCOL_ALIASES: dict[str, str] = {
    **dict.fromkeys(("ether", "ppp", "slip", "fddi", "tr", "wlan"), "link"),
    "es-is": "esis",
    "is-is": "isis",
}

#: Words that stand for numbers: offsets, ICMP types and TCP flags.
NUMBERS: dict[str, int] = {
    "icmptype": 0,
    "icmpcode": 1,
    "icmp6type": 0,
    "icmp6code": 1,
    "tcpflags": 13,
    **{f"tcp-{name}": 1 << bit for bit, name in enumerate(["fin", "syn", "rst", "push", "ack", "urg", "ece", "cwr"])},
    "icmp-echoreply": 0,
    "icmp-unreach": 3,
    "icmp-sourcequench": 4,
    "icmp-redirect": 5,
    "icmp-echo": 8,
    "icmp-routeradvert": 9,
    "icmp-routersolicit": 10,
    "icmp-timxceed": 11,
    "icmp-paramprob": 12,
    "icmp-tstamp": 13,
    "icmp-tstampreply": 14,
    "icmp-ireq": 15,
    "icmp-ireqreply": 16,
    "icmp-maskreq": 17,
    "icmp-maskreply": 18,
    "icmp6-destinationunreach": 1,
    "icmp6-packettoobig": 2,
    "icmp6-timeexceeded": 3,
    "icmp6-parameterproblem": 4,
    "icmp6-echo": 128,
    "icmp6-echoreply": 129,
    "icmp6-multicastlistenerquery": 130,
    "icmp6-multicastlistenerreportv1": 131,
    "icmp6-multicastlistenerdone": 132,
    "icmp6-routersolicit": 133,
    "icmp6-routeradvert": 134,
    "icmp6-neighborsolicit": 135,
    "icmp6-neighboradvert": 136,
    "icmp6-redirect": 137,
    "icmp6-routerrenum": 138,
    "icmp6-nodeinformationquery": 139,
    "icmp6-nodeinformationresponse": 140,
    "icmp6-ineighbordiscoverysolicit": 141,
    "icmp6-ineighbordiscoveryadvert": 142,
    "icmp6-multicastlistenerreportv2": 143,
    "icmp6-homeagentdiscoveryrequest": 144,
    "icmp6-homeagentdiscoveryreply": 145,
    "icmp6-mobileprefixsolicit": 146,
    "icmp6-mobileprefixadvert": 147,
    "icmp6-certpathsolicit": 148,
    "icmp6-certpathadvert": 149,
    "icmp6-multicastrouteradvert": 151,
    "icmp6-multicastroutersolicit": 152,
    "icmp6-multicastrouterterm": 153,
}

_BYTE = "[0-9A-Fa-f]{1,2}"
_PAIR = "[0-9A-Fa-f]{4}"
_NUMBER = "(?:0[xX][0-9A-Fa-f]+|[0-9]+)"
_SPACE = re.compile(r"[ \r\n\t]+")
_SYMBOL = re.compile(r">=|<=|!=|==|<<|>>|&&|\|\||[+\-*/%:\[\]!<>()&|^=]")
_WORD = re.compile(r"[A-Za-z0-9](?:[-_.A-Za-z0-9]*[.A-Za-z0-9])?")
_ESCAPED = re.compile(r"\\([^ !()\n\t]+)")
_ARCNET = re.compile(rf"\${_BYTE}")
_WHOLE_NUMBER = re.compile(_NUMBER)
_IPV4 = re.compile(rf"{_NUMBER}(?:\.{_NUMBER}){{1,3}}")
# Alternatives that can match at one place: the longest is taken.
_MACS = [re.compile(sep.join([_BYTE] * 6)) for sep in (":", "-", r"\.")] + [
    re.compile(rf"{_PAIR}\.{_PAIR}\.{_PAIR}"),
    re.compile(_PAIR * 3),
]
_BOGUS_MAC = re.compile(rf"{_BYTE}:+(?:{_BYTE}:+)+")
_IPV6_RUN = re.compile(r"[0-9A-Fa-f:.xX]{2,64}")
_IPV6_GROUP = re.compile(r"[0-9A-Fa-f]{1,4}\Z")
_IPV6_QUAD = re.compile(rf"{_NUMBER}(?:\.{_NUMBER}){{3}}\Z")


class Token(NamedTuple):
    """A token: `kind` is a keyword's name, a symbol, or one of number, name, ipv4, ipv6, mac, arcnet, end."""

    kind: str
    text: str
    position: int
    #: The number of a number, the 128 bits of an IPv6 address, the 48 of a MAC address.
    value: int = 0


def tokens(expression: str) -> Iterator[Token]:
    """The tokens of an expression, the last one of kind ``end``. Raises `FilterSyntaxError`."""
    position, length = 0, len(expression)
    while position < length:
        space = _SPACE.match(expression, position)
        if space:
            position = space.end()
            continue
        token, position = _token(expression, position)
        yield token
    yield Token("end", "", length)


def _token(expression: str, position: int) -> tuple[Token, int]:
    word = _WORD.match(expression, position)
    if word:
        text, end = word.group(), word.end()
        kind = KEYWORDS.get(text)
        # Only words with other readings are looked at further.
        if expression[end : end + 1] != ":" and (kind is not None or text in NUMBERS):
            return _keyword(kind, text, position), end
        return _word(expression, position, text)
    if expression.startswith("::", position):
        address = _longest_ipv6(expression, position)
        if address:
            return _ipv6(expression, position, address), position + len(address)
    symbol = _SYMBOL.match(expression, position)
    if symbol:
        text = symbol.group()
        return Token(KEYWORDS.get(text, "=" if text == "==" else text), text, position), symbol.end()
    escaped = _ESCAPED.match(expression, position)
    if escaped:
        return Token("name", escaped.group(1), position), escaped.end()
    arcnet = _ARCNET.match(expression, position)
    if arcnet:
        return Token("arcnet", arcnet.group(), position, int(arcnet.group()[1:], 16)), arcnet.end()
    raise FilterSyntaxError(f"unexpected character {expression[position]!r}", expression, position)


def _keyword(kind: str | None, text: str, position: int) -> Token:
    if kind is None:
        return Token("number", text, position, NUMBERS[text])
    return Token(kind, PROTOCOL_ALIASES.get(text, text) if kind == "protocol" else text, position)


def _word(expression: str, position: int, text: str) -> tuple[Token, int]:
    """The longest reading at `position`; among equals the order is MAC, number, IPv4, IPv6, keyword, name."""
    macs = [match.end() for match in (mac.match(expression, position) for mac in _MACS) if match]
    ipv6 = ""
    bogus = None
    if ":" in expression[position : position + 6]:
        ipv6 = _longest_ipv6(expression, position)
        bogus = _BOGUS_MAC.match(expression, position)
    readings = [
        (max(macs, default=0), 6),
        (_end(_WHOLE_NUMBER.match(expression, position)), 5),
        (_end(_IPV4.match(expression, position)), 4),
        (position + len(ipv6) if ipv6 else 0, 3),
        (_end(bogus), 2),
        (position + len(text), 1),
    ]
    end, reading = max(readings)
    matched = expression[position:end]
    if reading == 6:
        return Token("mac", matched, position, _mac_value(matched)), end
    if reading == 5:
        return Token("number", matched, position, number(matched, expression, position)), end
    if reading == 4:
        return Token("ipv4", matched, position), end
    if reading == 3:
        return _ipv6(expression, position, matched), end
    if reading == 2:
        raise FilterSyntaxError(f"{matched} is no Ethernet address", expression, position)
    kind = KEYWORDS.get(matched)
    if kind is not None or matched in NUMBERS:
        return _keyword(kind, matched, position), end
    return Token("name", matched, position), end


def _end(match: re.Match[str] | None) -> int:
    return match.end() if match else 0


def number(text: str, expression: str, position: int) -> int:
    """The 32-bit number that `text` spells: decimal, octal after a 0, hexadecimal after 0x."""
    try:
        value = int(text, 16) if text[1:2] in ("x", "X") else int(text, 8 if text[0] == "0" else 10)
    except ValueError:
        # Also what int() says of decimals too long to convert.
        what = "is too large a number" if len(text) > 100 else "is no octal number"
        raise FilterSyntaxError(f"{text[:100]} {what}", expression, position) from None
    if value > 0xFFFFFFFF:
        raise FilterSyntaxError(f"{text[:100]} does not fit 32 bits", expression, position)
    return value


def _mac_value(text: str) -> int:
    parts = re.split("[:.-]", text)
    if len(parts) == 6:
        text = "".join(part.zfill(2) for part in parts)
    return int(re.sub("[:.-]", "", text), 16)


def _longest_ipv6(expression: str, position: int) -> str:
    run = _IPV6_RUN.match(expression, position)
    candidate = run.group() if run else ""
    while candidate and not _is_ipv6(candidate):
        candidate = candidate[:-1]
    return candidate


def _is_ipv6(text: str) -> bool:
    """Whether `text` has the form of an IPv6 address (its numbers may still be out of range)."""
    if text.count("::") > 1 or ":::" in text or ":" not in text:
        return False
    left, gap, right = text.partition("::")
    groups = (left.split(":") if left else []) + (right.split(":") if right else [])
    words = len(groups)
    if groups and _IPV6_QUAD.match(groups[-1]) and not (gap and not right):
        groups.pop()
        words += 1
    if not all(_IPV6_GROUP.match(group) for group in groups):
        return False
    return words <= 7 if gap else words == 8


def _ipv6(expression: str, position: int, text: str) -> Token:
    import ipaddress

    try:
        return Token("ipv6", text, position, int(ipaddress.IPv6Address(text)))
    except ValueError:
        raise FilterSyntaxError(f"{text} is no IPv6 address", expression, position) from None
