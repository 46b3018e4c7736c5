"""Socket lookup programs: their context, and BPF_PROG_TEST_RUN (`bpf_prog_test_run_sk_lookup`, Linux 5.14).

No packet comes in: the context says who looks for a socket.
"""

from __future__ import annotations

import errno
import socket
import sys

from kbpf.backend import RawRun
from kbpf.emulator.interpreter import Run
from kbpf.emulator.maps.base import refused
from kbpf.emulator.packet import Packet
from kbpf.emulator.program import Program
from kbpf.emulator.test_run import decode, padded, timed
from kbpf.uapi.structs import STRUCTS

_LAYOUT = STRUCTS["bpf_sk_lookup"]
_MOST_PORT = 0xFFFF
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

    __slots__ = ("given",)

    def __init__(self, given: bytes) -> None:
        self.given = given

    def show(self, run: Run) -> None:
        """There is no packet."""

    def _word(self, offset: int) -> int:
        return int.from_bytes(self.given[offset : offset + 4], sys.byteorder)

    def load(self, offset: int, size: int) -> int | None:
        if offset % size:
            return None
        if size == 8:
            # The socket that was chosen: none yet.
            return 0 if offset == 0 else None
        at = offset & ~3
        name = next((name for name, (start, width, count, *_) in _LAYOUT.fields.items()
                     if width < 8 and start <= at < start + max(4, width * count)), None)  # fmt: skip
        if name is None:
            return None
        family = self._word(_LAYOUT.fields["family"].offset) & 0xFFFF
        value = self._word(at) if _FAMILY_OF.get(name, family) == family else 0
        if name in _SHORT:
            value &= 0xFFFF
            if name == "remote_port" and offset >= _LAYOUT.fields[name].offset + 2:
                return 0
        kept = 2 if name in _SHORT else 4
        return value if size >= kept else value >> 8 * (offset & 3) & (1 << 8 * size) - 1

    def store(self, offset: int, size: int, value: int) -> bool:
        return False


def test_run(program: Program, data: bytes, context: bytes, repeat: int) -> RawRun:
    """Run as the command does; raises `OSError` with the kernel's errno, and `EmulationFault`."""
    if data:
        raise refused(errno.EINVAL)
    fields = decode(context, _LAYOUT)
    given = padded(context, _LAYOUT)
    port = _LAYOUT.fields["local_port"]
    if not context or fields["sk"] or any(given[port.offset + port.size :]):
        raise refused(errno.EINVAL)
    if fields["local_port"] > _MOST_PORT:
        raise refused(errno.ERANGE)
    if fields["family"] & 0xFFFF not in (socket.AF_INET, socket.AF_INET6):
        raise refused(errno.EAFNOSUPPORT)
    looked = LookupContext(given)
    packet = Packet(buffer=b"")
    value, duration = timed(repeat, lambda: program.execute(packet, b"", looked))
    return RawRun(int(value != 0), b"", given, duration)
