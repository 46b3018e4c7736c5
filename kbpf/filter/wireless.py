"""802.11: addresses by their place in the frame, frame types and directions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kbpf.errors import FilterError
from kbpf.filter import syntax
from kbpf.filter.links import Headers
from kbpf.filter.values import Condition, every, negated, some

if TYPE_CHECKING:
    from kbpf.filter.lower import Lowering

LINKS = ("IEEE802_11", "IEEE802_11_RADIO")
#: Directions that only 802.11 has.
DIRECTIONS = frozenset(("addr1", "addr2", "addr3", "addr4", "ra", "ta"))

_CONTROL, _ACK, _CTS = 0x04, 0xD0, 0xC0
_TYPES = {"data": 0x08, "mgt": 0x00, "management": 0x00, "ctl": 0x04, "control": 0x04}
_MANAGEMENT = {
    **dict.fromkeys(("assocreq", "assoc-req"), 0),
    **dict.fromkeys(("assocresp", "assoc-resp"), 16),
    **dict.fromkeys(("reassocreq", "reassoc-req"), 32),
    **dict.fromkeys(("reassocresp", "reassoc-resp"), 48),
    **dict.fromkeys(("probereq", "probe-req"), 64),
    **dict.fromkeys(("proberesp", "probe-resp"), 80),
    "beacon": 0x80,
    "atim": 0x90,
    **dict.fromkeys(("disassoc", "disassociation"), 160),
    **dict.fromkeys(("auth", "authentication"), 176),
    **dict.fromkeys(("deauth", "deauthentication"), 192),
}
_CONTROLS = {
    "bar": 0x80,
    "ba": 0x90,
    "ps-poll": 0xA0,
    "rts": 0xB0,
    "cts": 0xC0,
    "ack": 0xD0,
    "cf-end": 0xE0,
    "cf-end-ack": 0xF0,
}
_DATA = {
    "data": 0x00,
    "data-cf-ack": 0x10,
    "data-cf-poll": 0x20,
    "data-cf-ack-poll": 0x30,
    "null": 0x40,
    "cf-ack": 0x50,
    "cf-poll": 0x60,
    "cf-ack-poll": 0x70,
    "qos-data": 0x80,
    "qos-data-cf-ack": 0x90,
    "qos-data-cf-poll": 0xA0,
    "qos-data-cf-ack-poll": 0xB0,
    "qos": 0xC0,
    "qos-cf-poll": 0xE0,
    "qos-cf-ack-poll": 0xF0,
}
_SUBTYPES = {0x00: _MANAGEMENT, 0x04: _CONTROLS, 0x08: _DATA}
_FRAME_DIRECTIONS = {"nods": 0, "tods": 1, "fromds": 2, "dstods": 3}


def _flag(headers: Headers, offset: int, bit: int) -> Condition:
    return negated(headers.link_test(offset, 1, 0, bit))


def host(headers: Headers, data: bytes, direction: str) -> Condition:
    """A frame with this address; which of its places is the source and the destination, type and DS bits say."""

    def at(offset: int) -> Condition:
        return headers.bytes_test(headers.header, offset, data)

    if direction in ("", "or"):
        return some(host(headers, data, "src"), host(headers, data, "dst"))
    if direction == "and":
        return every(host(headers, data, "src"), host(headers, data, "dst"))
    not_low = negated(_flag(headers, 0, 0x04))
    is_data, to_ds, from_ds = _flag(headers, 0, 0x08), _flag(headers, 1, 0x01), _flag(headers, 1, 0x02)
    if direction == "src":
        inside = some(
            every(negated(from_ds), at(10)),
            every(from_ds, some(every(negated(to_ds), at(16)), every(to_ds, at(24)))),
        )
        return every(not_low, some(every(negated(is_data), at(10)), every(is_data, inside)))
    if direction == "dst":
        inside = some(every(negated(to_ds), at(4)), every(to_ds, at(16)))
        return every(not_low, some(every(negated(is_data), at(4)), every(is_data, inside)))
    control = headers.link_test(0, 1, _CONTROL, 0x0C)
    second = some(negated(control), every(*(negated(headers.link_test(0, 1, kind, 0xF0)) for kind in (_CTS, _ACK))))
    if direction == "addr1":
        return at(4)
    if direction == "addr2":
        return every(second, at(10))
    if direction == "addr3":
        return every(negated(control), at(16))
    if direction == "addr4":
        return every(headers.link_test(1, 1, 3, 3), at(24))
    if direction == "ra":
        return every(is_data, at(4))
    return every(is_data, second, at(10))


def multicast(headers: Headers) -> Condition:
    """A frame whose destination address is a group's."""
    is_data, to_ds = _flag(headers, 0, 0x08), _flag(headers, 1, 0x01)
    data = some(every(negated(to_ds), _flag(headers, 4, 1)), every(to_ds, _flag(headers, 16, 1)))
    return every(
        negated(_flag(headers, 0, 0x04)), some(every(negated(is_data), _flag(headers, 4, 1)), every(is_data, data))
    )


def _requires(lowering: Lowering, what: str) -> None:
    if lowering.headers.link not in LINKS:
        raise FilterError(f'"{what}" can be asked of 802.11 frames only, not of {lowering.headers.describe()}')


def frame_type(lowering: Lowering, term: syntax.Special) -> Condition:
    """``type T [subtype S]`` and ``subtype S``."""
    kind: int | None = None
    subtype: int | None = None
    if term.name == "type":
        kind = _named(lowering, term, term.arguments[0], _TYPES, 0x0C)
        if len(term.arguments) > 1:
            subtype = _named(lowering, term, term.arguments[1], _SUBTYPES.get(kind, {}), 0xF0)
    else:
        name = term.arguments[0]
        for number, table in _SUBTYPES.items():
            if kind is None and str(name).lower() in table:
                kind, subtype = number, table[str(name).lower()]
        if kind is None:
            raise lowering.fail(f'"{name}" is no subtype of 802.11 frames', term.position)
    _requires(lowering, term.name)
    if subtype is None:
        return lowering.headers.link_test(0, 1, kind, 0x0C)
    return lowering.headers.link_test(0, 1, kind | subtype, 0xFC)


def _named(lowering: Lowering, term: syntax.Special, given: int | str, table: dict[str, int], bits: int) -> int:
    number = given if isinstance(given, int) else table.get(given.lower())
    if number is None or number & ~bits:
        raise lowering.fail(f'"{given}" is no {term.name} of 802.11 frames', term.position)
    return number


def frame_direction(lowering: Lowering, term: syntax.Special) -> Condition:
    """``dir D``."""
    given = term.arguments[0]
    number = given if isinstance(given, int) else _FRAME_DIRECTIONS.get(given.lower())
    if number is None:
        raise lowering.fail(f'"{given}" is no direction of 802.11 frames', term.position)
    _requires(lowering, term.name)
    return lowering.headers.link_test(1, 1, number, 3)
