"""What IPsec has done to a packet that came in: a stand-in for the kernel's ``struct xfrm_state``, set by tests."""

from __future__ import annotations

import ipaddress
import socket
import struct
from dataclasses import dataclass

from kbpf.uapi.structs import STRUCTS

SIZE = STRUCTS["bpf_xfrm_state"].size


@dataclass(frozen=True, kw_only=True)
class XfrmState:
    """One transformation: ``XfrmState(spi=0x100, remote="192.0.2.1")``, `remote` being where the packet came from."""

    spi: int
    remote: str
    reqid: int = 0

    def packed(self) -> bytes:
        """``struct bpf_xfrm_state``. The SPI is in network order, as the kernel keeps it."""
        remote = ipaddress.ip_address(self.remote)
        family = socket.AF_INET if remote.version == 4 else socket.AF_INET6
        head = struct.pack("=I", self.reqid) + struct.pack(">I", self.spi) + struct.pack("=HH", family, 0)
        return (head + remote.packed).ljust(SIZE, b"\0")
