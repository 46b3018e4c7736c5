"""Primitives of their own: directions, lengths, single bytes, broadcast and multicast, 802.2 frames."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kbpf.errors import FilterError
from kbpf.filter import hosts, sets, syntax, wireless
from kbpf.filter.links import IP, IP6
from kbpf.filter.syntax import Qualifiers
from kbpf.filter.values import Condition, every, negated, some
from kbpf.isa.cbpf import AD_OFF

if TYPE_CHECKING:
    from kbpf.filter.lower import Lowering

# The control byte's value under a mask, for I frames, S frames, U frames and their kinds.
_LLC_FORMS: dict[str, tuple[int, int]] = {
    "i": (0, 0x01),
    "s": (0x01, 0x03),
    "u": (0x03, 0x03),
    "rr": (0x01, 0x0F),
    "rnr": (0x05, 0x0F),
    "rej": (0x09, 0x0F),
    **{
        name: (control, 0xEF)
        for name, control in {
            "ui": 0x03,
            "ua": 0x63,
            "disc": 0x43,
            "dm": 0x0F,
            "sabme": 0x6F,
            "test": 0xE3,
            "xid": 0xAF,
            "frmr": 0x87,
        }.items()
    },
}


def _number(term: syntax.Special, index: int) -> int:
    value = term.arguments[index]
    assert isinstance(value, int)
    return value


def _metadata(lowering: Lowering, what: str, term: syntax.Special) -> None:
    if not lowering.layout.live:
        raise FilterError(f'"{what}" can be asked of live sockets only, not of {lowering.headers.describe()}')


def direction(lowering: Lowering, term: syntax.Special) -> Condition:
    headers = lowering.headers
    outgoing = 4
    if headers.link == "LINUX_SLL":
        out = headers.link_test(0, 2, outgoing)
    elif headers.link == "LINUX_SLL2":
        out = headers.link_test(10, 1, outgoing)
    else:
        _metadata(lowering, term.name, term)
        out = lowering.pool.test("eq", lowering.pool.load(None, AD_OFF + 4, 2), outgoing)
    return out if term.name == "outbound" else negated(out)


def ifindex(lowering: Lowering, term: syntax.Special) -> Condition:
    index = _number(term, 0)
    if lowering.headers.link == "LINUX_SLL2":
        return lowering.headers.link_test(4, 4, index)
    _metadata(lowering, term.name, term)
    return lowering.pool.test("eq", lowering.pool.load(None, AD_OFF + 8, 4), index)


def less(lowering: Lowering, term: syntax.Special) -> Condition:
    return negated(lowering.pool.test("gt", lowering.pool.length, _number(term, 0)))


def greater(lowering: Lowering, term: syntax.Special) -> Condition:
    return lowering.pool.test("ge", lowering.pool.length, _number(term, 0))


def byte(lowering: Lowering, term: syntax.Special) -> Condition:
    offset, operator, k = _number(term, 0), term.arguments[1], _number(term, 2)
    lowering.limit(k, 255, "byte", term)
    byte = lowering.headers.load(lowering.headers.header, offset, 1)
    if operator == "=":
        return lowering.pool.test("eq", byte, k)
    if operator == ">":
        return lowering.pool.test("gt", byte, k)
    if operator == "<":
        return negated(lowering.pool.test("ge", byte, k))
    kind = "and" if operator == "&" else "or"
    return negated(lowering.pool.test("eq", lowering.pool.op(kind, byte, lowering.pool.const(k)), 0))


def broadcast(lowering: Lowering, term: syntax.Special) -> Condition:
    if term.protocol in ("", "link"):
        return hosts.mac(lowering, [(1 << 48) - 1], Qualifiers("link", "dst", ""), "broadcast")
    if term.protocol != "ip":
        raise lowering.fail(f'"broadcast" does not go with "{term.protocol}"', term.position)
    if lowering.netmask is None:
        raise FilterError('"ip broadcast" needs the network mask, which is not known here')
    host = ~lowering.netmask & 0xFFFFFFFF
    word = lowering.headers.network_word(16, 4)
    return every(
        lowering.headers.carries(IP),
        some(lowering.pool.test("eq", word, 0, host), lowering.pool.test("eq", word, host, host)),
    )


def multicast(lowering: Lowering, term: syntax.Special) -> Condition:
    headers = lowering.headers
    if term.protocol in ("", "link"):
        if headers.link in wireless.LINKS:
            return wireless.multicast(headers)
        is_ethernet = headers.ethernet(f'"{term.name}"')
        return every(is_ethernet, negated(headers.link_test(0, 1, 0, 1)))
    if term.protocol == "ip":
        if lowering.order == "libpcap":
            return every(headers.carries(IP), headers.network_test(16, 1, 0xE0, 0xF0))
        return every(headers.carries(IP), sets.within(lowering.pool, headers.network_word(16, 1), 0xE0, 0xEF))
    if term.protocol == "ip6":
        return every(headers.carries(IP6), headers.network_test(24, 1, 255))
    raise lowering.fail(f'"multicast" does not go with "{term.protocol}"', term.position)


def llc(lowering: Lowering, term: syntax.Special) -> Condition:
    headers = lowering.headers
    headers.require('"llc"', "EN10MB", *wireless.LINKS)
    if headers.link == "EN10MB":
        frame = every(headers.is_802_3(), negated(lowering.pool.test("eq", headers.llc_word(0, 2), 0xFFFF)))
    else:
        frame = headers.wireless_data()
    if not term.arguments:
        return frame
    name = str(term.arguments[0])
    form = _LLC_FORMS.get(name)
    if form is None:
        raise lowering.fail(f'"{name}" is no kind of LLC frame', term.position)
    return every(frame, lowering.pool.test("eq", headers.llc_word(2, 1), *form))
