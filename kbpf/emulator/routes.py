"""Routes, neighbours and devices that programs ask for: a stand-in for the kernel's, set by tests.

A `Device` is what an interface's index leads to, a `Route` a line of the routing table, a neighbour's link address that
of a next hop. What policy routing, multipath and tunnels add is not here.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

#: RT_TABLE_MAIN and RT_TABLE_LOCAL, which are one as long as nobody has made rules for routing.
_ONE_TABLE = {254, 255}

Address: TypeAlias = "ipaddress.IPv4Address | ipaddress.IPv6Address"


@dataclass(frozen=True, kw_only=True)
class Device:
    """A network device: its MTU, link header's length and address, and whether it forwards IPv4 and IPv6."""

    mtu: int = 1500
    header: int = 14
    address: bytes = bytes(6)
    forwards: bool = False
    forwards6: bool = False


@dataclass(frozen=True, kw_only=True)
class Route:
    """A route: ``Route(to="10.0.0.0/8", device=2, via="192.0.2.1")``.

    `kind` is ``"unicast"``, or ``"blackhole"``, ``"unreachable"``, ``"prohibit"`` or ``"local"``. `mtu` of 0 is the
    device's, `source` the address that is preferred for packets of this machine.
    """

    to: str
    device: int = 0
    via: str | None = None
    kind: str = "unicast"
    metric: int = 0
    mtu: int = 0
    source: str | None = None
    table: int = 254

    @property
    def network(self) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
        return ipaddress.ip_network(self.to)


def find(routes: Iterable[Route], to: Address, table: int | None, output: int | None) -> Route | None:
    """The route with the longest prefix, then the lowest metric; of one table and through one device where given."""
    fits = [
        route
        for route in routes
        if to in route.network
        and (table is None or route.table == table or {route.table, table} == _ONE_TABLE)
        and (output is None or route.device == output or route.kind != "unicast")
    ]
    return min(fits, key=lambda route: (-route.network.prefixlen, route.metric), default=None)
