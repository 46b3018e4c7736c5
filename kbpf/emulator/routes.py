"""Routes that programs and sockets ask for: a stand-in for the kernel's, set by tests.

They are beside those that interfaces' addresses bring (`Inet.routes`). What policy routing, multipath and tunnels add
is not here.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

RT_TABLE_MAIN, RT_TABLE_LOCAL = 254, 255
#: Those of IPv4 are one as long as nobody has made rules for routing.
_ONE_TABLE = {RT_TABLE_MAIN, RT_TABLE_LOCAL}

Address: TypeAlias = "ipaddress.IPv4Address | ipaddress.IPv6Address"


@dataclass(frozen=True, kw_only=True)
class Route:
    """A route: ``Route(to="10.0.0.0/8", device=2, via="192.0.2.1")``.

    `kind` is ``"unicast"``, or ``"blackhole"``, ``"unreachable"``, ``"prohibit"``, ``"local"`` or ``"broadcast"``.
    `mtu` of 0 is the device's, `source` the address that is preferred for packets of this machine.
    """

    to: str
    device: int = 0
    via: str | None = None
    kind: str = "unicast"
    metric: int = 0
    mtu: int = 0
    source: str | None = None
    table: int = RT_TABLE_MAIN

    @property
    def network(self) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
        return ipaddress.ip_network(self.to)


def find(routes: Iterable[Route], to: Address, table: int | None, output: int | None) -> Route | None:
    """The route with the longest prefix, then the lowest metric; of one table and through one device where given."""
    fits = [
        route
        for route in routes
        if to in route.network
        and (table is None or route.table == table or (to.version == 4 and {route.table, table} == _ONE_TABLE))
        and (output is None or route.device == output or route.kind != "unicast")
    ]
    return min(fits, key=lambda route: (-route.network.prefixlen, route.metric), default=None)
