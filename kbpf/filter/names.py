"""Names to numbers: services, protocols, hosts, networks and Ethernet addresses, from the system's files.

The files are read once each and again when they have changed.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

#: EtherTypes by pcap-filter(7)'s names.
ETHERTYPES: dict[str, int] = {
    "aarp": 0x80F3,
    "arp": 0x0806,
    "atalk": 0x809B,
    "decnet": 0x6003,
    "ip": 0x0800,
    "ip6": 0x86DD,
    "lat": 0x6004,
    "lldp": 0x88CC,
    "loopback": 0x9000,
    "mopdl": 0x6001,
    "moprc": 0x6002,
    "pup": 0x0200,
    "rarp": 0x8035,
    "sca": 0x6007,
    "slow": 0x8809,
    "sprite": 0x0500,
    "trail": 0x1000,
    "vexp": 0x805B,
    "vprod": 0x805C,
    "xns": 0x0600,
}
#: 802.2 service access points by name.
LLC_SAPS: dict[str, int] = {"iso": 0xFE, "stp": 0x42, "ipx": 0xE0, "netbeui": 0xF0}


class Port(NamedTuple):
    """A service's port, and its protocol's number where only one has that name."""

    number: int
    protocol: int | None


class Names:
    """Where names are looked up; `None` for a path means that there is no such file."""

    def __init__(
        self,
        *,
        services: str | None = "/etc/services",
        protocols: str | None = "/etc/protocols",
        networks: str | None = "/etc/networks",
        ethers: str | None = "/etc/ethers",
        hosts: str | None = "/etc/hosts",
        dns: bool = False,
    ) -> None:
        self.services = services
        self.protocols = protocols
        self.networks = networks
        self.ethers = ethers
        self.hosts = hosts
        self.dns = dns

    def port(self, name: str) -> Port | None:
        """A service's port, by name or as a decimal number."""
        if name.isascii() and name.isdecimal():
            return Port(int(name), None) if len(name) < 8 and int(name) < 65536 else None
        found = {
            protocol: int(port)
            for port, _, protocol in (entry.partition("/") for entry in _table(self.services).get(name, ()))
            if port.isdecimal()
        }
        tcp, udp = found.get("tcp"), found.get("udp")
        if tcp is not None:
            return Port(tcp, None if tcp == udp else 6)
        if udp is not None:
            return Port(udp, 17)
        return Port(found["sctp"], 132) if "sctp" in found else None

    def port_range(self, name: str) -> tuple[int, int, int | None] | None:
        """``first-last``, each a number or a name without a hyphen, or one number."""
        first, hyphen, last = name.partition("-")
        if not hyphen and not name.isdecimal():
            return None
        ends = self.port(first), self.port(last if hyphen else first)
        if ends[0] is None or ends[1] is None:
            return None
        return ends[0].number, ends[1].number, ends[0].protocol if ends[0].protocol == ends[1].protocol else None

    def protocol(self, name: str) -> int | None:
        """An IP protocol's number."""
        for number in _table(self.protocols).get(name, ()):
            if number.isdecimal():
                return int(number)
        return None

    def network(self, name: str) -> int | None:
        """A network's number as /etc/networks gives it: as many bytes as are written there."""
        for text in _table(self.networks).get(name, ()):
            try:
                octets = [int(octet) for octet in text.split(".")]
            except ValueError:
                continue
            if len(octets) > 4 or any(octet > 255 for octet in octets):
                continue
            return int.from_bytes(bytes(octets), "big")
        return None

    def ethernet(self, name: str) -> int | None:
        """A host's Ethernet address (ethers(5) puts it before the name)."""
        if self.ethers is None:
            return None
        for line in _lines(self.ethers):
            if len(line) >= 2 and line[1] == name:
                parts = line[0].split(":")
                if len(parts) == 6 and all(re.fullmatch("[0-9A-Fa-f]{1,2}", part) for part in parts):
                    return int("".join(part.zfill(2) for part in parts), 16)
        return None

    def host(self, name: str) -> list[tuple[int, int]]:
        """A host's addresses as (4 or 6, number): from /etc/hosts, and from DNS where that is allowed."""
        if self.dns:
            import socket

            try:
                found = socket.getaddrinfo(name, None, proto=socket.IPPROTO_TCP)
            except OSError:
                return []
            texts = [str(address[4][0]).partition("%")[0] for address in found]
        else:
            texts = [line[0] for line in (_lines(self.hosts) if self.hosts else ()) if name in line[1:]]
        import ipaddress

        addresses: list[tuple[int, int]] = []
        for text in texts:
            try:
                address = ipaddress.ip_address(text)
            except ValueError:
                continue
            if (address.version, int(address)) not in addresses:
                addresses.append((address.version, int(address)))
        return addresses


def names(policy: str | Names) -> Names:
    """The `Names` that ``"system"``, ``"system+dns"`` or ``"numeric"`` stands for."""
    if isinstance(policy, Names):
        return policy
    if policy == "numeric":
        return Names(services=None, protocols=None, networks=None, ethers=None, hosts=None)
    if policy in ("system", "system+dns"):
        return Names(dns=policy == "system+dns")
    raise ValueError(f"no way to look up names {policy!r}: system, system+dns or numeric")


def _lines(path: str) -> tuple[tuple[str, ...], ...]:
    stamp = _stamp(path)
    return () if stamp is None else _read(path, stamp)


@lru_cache(maxsize=16)
def _read(path: str, stamp: int) -> tuple[tuple[str, ...], ...]:
    from pathlib import Path

    try:
        text = Path(path).read_text("utf-8", "replace")
    except OSError:
        return ()
    return tuple(tuple(words) for words in (line.partition("#")[0].split() for line in text.splitlines()) if words)


def _table(path: str | None) -> dict[str, tuple[str, ...]]:
    """A file of ``name value alias...`` lines as values by name and alias."""
    stamp = None if path is None else _stamp(path)
    return {} if path is None or stamp is None else _indexed(path, stamp)


def _stamp(path: str) -> int | None:
    """When the file was changed last; None where there is none."""
    # Numbers need no files, and this import is not cheap.
    from pathlib import Path

    try:
        return Path(path).stat().st_mtime_ns
    except OSError:
        return None


@lru_cache(maxsize=16)
def _indexed(path: str, stamp: int) -> dict[str, tuple[str, ...]]:
    table: dict[str, tuple[str, ...]] = {}
    for line in _read(path, stamp):
        if len(line) >= 2:
            for name in (line[0], *line[2:]):
                table[name] = (*table.get(name, ()), line[1])
    return table
