"""BPF_PROG_TEST_RUN for socket lookup programs (`bpf_prog_test_run_sk_lookup`, net/bpf/test_run.c, Linux 5.14).

No packet comes in: the context says who looks for a socket. What comes out is the cookie of the chosen one.
"""

from __future__ import annotations

import errno
import socket
import sys

from kbpf.emulator.maps.base import refused
from kbpf.emulator.packet import Packet
from kbpf.emulator.program import Program
from kbpf.emulator.sk_lookup import LookupContext
from kbpf.emulator.test_run import decode, padded, timed
from kbpf.runs import RawRun, RunOptions
from kbpf.uapi.structs import STRUCTS

_LAYOUT = STRUCTS["bpf_sk_lookup"]
_MOST_PORT = 0xFFFF


def test_run(program: Program, data: bytes, context: bytes, options: RunOptions) -> RawRun:
    """Run as the command does; raises `OSError` with the kernel's errno, and `EmulationFault`."""
    if data or options.flags or options.cpu or options.batch_size:
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

    def once() -> int:
        looked.selected, looked.no_reuseport = None, False
        return int(program.execute(packet, b"", looked) != 0)

    value, duration = timed(options.repeat, once)
    chosen = looked.selected if value else None
    if chosen is not None and chosen.reuseport is not None and not looked.no_reuseport:
        raise refused(errno.EOPNOTSUPP)
    cookie = _LAYOUT.fields["cookie"]
    shown = (0 if chosen is None else chosen.cookie).to_bytes(cookie.size, sys.byteorder)
    return RawRun(value, b"", shown + given[cookie.size :], duration)
