"""Headers within headers: VLAN tags, MPLS labels, PPPoE, Geneve and VXLAN."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kbpf.errors import FilterError
from kbpf.filter import syntax
from kbpf.filter.links import IP, IP6, MPLS, PPPOED, PPPOES, VLAN_TYPES
from kbpf.filter.values import Condition, Value, every, negated, some
from kbpf.isa.cbpf import AD_OFF

if TYPE_CHECKING:
    from kbpf.filter.lower import Lowering

_GENEVE_PORT, _VXLAN_PORT = 6081, 4789


def _argument(lowering: Lowering, term: syntax.Special, limit: int, what: str) -> int | None:
    if not term.arguments:
        return None
    number = term.arguments[0]
    assert isinstance(number, int)
    if number > limit:
        raise lowering.fail(f"{what} numbers end at {limit}, {number} is too large", term.position)
    return number


def vlan(lowering: Lowering, term: syntax.Special) -> Condition:
    """``vlan [ID]``: the tag is in the bytes of a capture; on a live socket it is mostly in the metadata."""
    headers, pool = lowering.headers, lowering.pool
    number = _argument(lowering, term, 4095, "VLAN")
    if headers.labels:
        raise lowering.fail('"vlan" cannot follow "mpls"', term.position)
    metadata = headers.layout.live and not headers.vlans and not headers.tunnel
    if headers.link == "METADATA" and metadata:
        headers.vlans += 1
        tagged = pool.test("eq", pool.load(None, AD_OFF + 48, 4), 1)
        return tagged if number is None else every(tagged, _tag(lowering, number))
    headers.require('"vlan"', "EN10MB", "IEEE802_11", "IEEE802_11_RADIO")
    tagged = some(*(headers.carries(kind) for kind in VLAN_TYPES))
    inside = True if number is None else headers.network_test(0, 2, number, 0x0FFF)
    if not (metadata and headers.link == "EN10MB"):
        headers.into_vlan()
        return every(tagged, inside)
    present = pool.load(None, AD_OFF + 48, 4)
    stripped = pool.test("eq", present, 1)
    in_band = pool.op("lsh", pool.op("xor", present, pool.const(1)), pool.const(2))
    headers.into_maybe_vlan(in_band)
    if number is not None:
        return some(every(stripped, _tag(lowering, number)), every(negated(stripped), tagged, inside))
    return some(stripped, tagged)


def _tag(lowering: Lowering, number: int) -> Condition:
    return lowering.pool.test("eq", lowering.pool.load(None, AD_OFF + 44, 4), number, 0x0FFF)


def mpls(lowering: Lowering, term: syntax.Special) -> Condition:
    """``mpls [LABEL]``."""
    headers = lowering.headers
    if headers.labels:
        # Not the bottom of the stack.
        stacked = headers.network_test(-2, 1, 0, 1)
    else:
        headers.require('"mpls"', "EN10MB", "METADATA", "PPP")
        stacked = headers.carries(MPLS)
    label = _argument(lowering, term, 0xFFFFF, "MPLS label")
    if label is not None:
        stacked = every(stacked, headers.network_test(0, 4, label << 12, 0xFFFFF000))
    headers.into_mpls()
    return stacked


def pppoed(lowering: Lowering, term: syntax.Special) -> Condition:
    """PPPoE discovery."""
    return lowering.headers.carries(PPPOED)


def pppoes(lowering: Lowering, term: syntax.Special) -> Condition:
    """``pppoes [SESSION]``: what follows is about the PPP packet inside."""
    headers = lowering.headers
    session = _argument(lowering, term, 0xFFFF, "PPPoE session")
    condition = headers.carries(PPPOES)
    if session is not None:
        whole = lowering.order == "libpcap"
        word = headers.network_test(0, 4, session, 0xFFFF) if whole else headers.network_test(2, 2, session)
        condition = every(condition, word)
    headers.into_pppoe()
    return condition


def _udp_tunnel(lowering: Lowering, port: int, header: tuple[int, int, int], vni: int | None) -> Condition:
    """UDP to `port` over either IP; `header` is a word's size, value and mask at the tunnel header's start."""
    headers, pool = lowering.headers, lowering.pool
    versions = []
    for version, ethertype in ((4, IP), (6, IP6)):
        udp = headers.transport(version)
        versions.append(
            every(
                headers.carries(ethertype),
                headers.network_test(9 if version == 4 else 6, 1, 17),
                lowering.first_fragment() if version == 4 else True,
                pool.test("eq", headers.load(udp, 2, 2), port),
                pool.test("eq", headers.load(udp, 8, header[0]), header[1], header[2]),
                True if vni is None else pool.test("eq", headers.load(udp, 12, 4), vni << 8, 0xFFFFFF00),
            )
        )
    return lowering.versions(versions[0], versions[1], six_first=False)


def _tunnel_start(lowering: Lowering) -> Value:
    """Where the header after UDP is, in IPv4 or IPv6, without a branch: by the version in the first nibble."""
    headers, pool = lowering.headers, lowering.pool
    first = headers.network_word(0, 1)
    # Bit 5 of the first byte is set in 6x and not in 4x.
    six = pool.op("rsh", pool.op("and", first, pool.const(0x20)), pool.const(5))
    four_length = pool.op("lsh", pool.op("and", first, pool.const(0xF)), pool.const(2))
    length = pool.op(
        "add", pool.op("mul", pool.op("xor", six, pool.const(1)), four_length), pool.op("mul", six, pool.const(40))
    )
    if headers.payload.base is not None:
        length = pool.op("add", length, headers.payload.base)
    return pool.op("add", length, pool.const(headers.payload.k + headers.network + 8))


def _tunnel_allowed(lowering: Lowering, what: str) -> None:
    if lowering.layout.live and lowering.layout.start == "transport":
        raise FilterError(f"{what} cannot be answered on {lowering.headers.describe()}")


def geneve(lowering: Lowering, term: syntax.Special) -> Condition:
    """``geneve [VNI]``: what follows is about the packet inside."""
    headers, pool = lowering.headers, lowering.pool
    vni = _argument(lowering, term, 0xFFFFFF, "Geneve VNI")
    _tunnel_allowed(lowering, '"geneve"')
    condition = _udp_tunnel(lowering, _GENEVE_PORT, (1, 0, 0xC0), vni)
    start = _tunnel_start(lowering)
    options = pool.op("lsh", pool.op("and", pool.load(start, 0, 1), pool.const(0x3F)), pool.const(2))
    headers.into_tunnel("geneve", start, pool.op("add", options, pool.const(8)), 2)
    return condition


def vxlan(lowering: Lowering, term: syntax.Special) -> Condition:
    """``vxlan [VNI]``: what follows is about the frame inside."""
    headers = lowering.headers
    vni = _argument(lowering, term, 0xFFFFFF, "VXLAN VNI")
    _tunnel_allowed(lowering, '"vxlan"')
    condition = _udp_tunnel(lowering, _VXLAN_PORT, (1, 0x08, 0x08), vni)
    headers.into_tunnel("vxlan", _tunnel_start(lowering), 8, None)
    return condition
