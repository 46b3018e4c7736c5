"""`struct bpf_sk_lookup` as socket lookup programs see it: who looks for a socket, and which one was chosen.

`sk_lookup_is_valid_access` and its conversion in net/core/filter.c (Linux 5.9).
"""

from __future__ import annotations

import socket
import sys

from kbpf.emulator.interpreter import Run
from kbpf.emulator.sock import Sock
from kbpf.uapi.structs import STRUCTS

_LAYOUT = STRUCTS["bpf_sk_lookup"]
#: What the kernel keeps in two bytes, whatever programs read.
_SHORT = ("family", "protocol", "remote_port", "local_port")
_FAMILY_OF = {
    "remote_ip4": socket.AF_INET,
    "local_ip4": socket.AF_INET,
    "remote_ip6": socket.AF_INET6,
    "local_ip6": socket.AF_INET6,
}


class LookupContext:
    """A `kbpf.emulator.interpreter.Context` over ``struct bpf_sk_lookup`` as user space fills it in."""

    __slots__ = ("given", "no_reuseport", "selected")

    def __init__(self, given: bytes) -> None:
        self.given = given
        #: The socket that the program has chosen, and whether others that share its port are to be left out.
        self.selected: Sock | None = None
        self.no_reuseport = False

    @property
    def family(self) -> int:
        return self._word(_LAYOUT.fields["family"].offset) & 0xFFFF

    @property
    def protocol(self) -> int:
        return self._word(_LAYOUT.fields["protocol"].offset) & 0xFFFF

    def show(self, run: Run) -> None:
        """There is no packet."""

    def _word(self, offset: int) -> int:
        return int.from_bytes(self.given[offset : offset + 4], sys.byteorder)

    def load(self, offset: int, size: int) -> int | None:
        if offset % size:
            return None
        if size == 8:
            if offset != _LAYOUT.fields["sk"].offset:
                return None
            return 0 if self.selected is None else self.selected.address
        at = offset & ~3
        name = next((name for name, (start, width, count, *_) in _LAYOUT.fields.items()
                     if width < 8 and start <= at < start + max(4, width * count)), None)  # fmt: skip
        if name is None:
            return None
        value = self._word(at) if _FAMILY_OF.get(name, self.family) == self.family else 0
        if name in _SHORT:
            value &= 0xFFFF
            if name == "remote_port" and offset >= _LAYOUT.fields[name].offset + 2:
                return 0
        kept = 2 if name in _SHORT else 4
        return value if size >= kept else value >> 8 * (offset & 3) & (1 << 8 * size) - 1

    def store(self, offset: int, size: int, value: int) -> bool:
        return False


def asks(protocol: int, remote: bytes, remote_port: int, local: bytes, local_port: int, ifindex: int) -> bytes:
    """The context of a packet that looks for its socket: packed addresses, ports in host order."""
    version = "4" if len(local) == 4 else "6"
    values = {
        "family": (socket.AF_INET if version == "4" else socket.AF_INET6).to_bytes(4, sys.byteorder),
        "protocol": protocol.to_bytes(4, sys.byteorder),
        f"remote_ip{version}": remote,
        "remote_port": remote_port.to_bytes(2, "big"),
        f"local_ip{version}": local,
        "local_port": local_port.to_bytes(4, sys.byteorder),
        "ingress_ifindex": ifindex.to_bytes(4, sys.byteorder),
    }
    given = bytearray(_LAYOUT.size)
    for name, value in values.items():
        at = _LAYOUT.fields[name].offset
        given[at : at + len(value)] = value
    return bytes(given)
