"""BPF_PROG_TEST_RUN for netfilter programs (`bpf_prog_test_run_nf`, net/bpf/test_run.c, Linux 6.4)."""

from __future__ import annotations

import errno

from kbpf.emulator.ethernet import received_protocol
from kbpf.emulator.maps.base import refused
from kbpf.emulator.netfilter import NetfilterContext
from kbpf.emulator.packet import Packet
from kbpf.emulator.program import Program
from kbpf.emulator.test_run import ETH_HLEN, MOST_DATA, timed
from kbpf.runs import RawRun, RunOptions
from kbpf.specs import NETFILTER_FAMILIES, NETFILTER_HOOKS
from kbpf.uapi.constants import ETH_P_IP, ETH_P_IPV6

#: ``struct nf_hook_state``: the hook and the family, a byte each, then pointers that user space may not give.
_STATE, _FIRST_POINTER = 48, 8
_LOCAL_OUT = NETFILTER_HOOKS["local_out"]
_PAGE = 4096
_IPV4_HEADER = 20
#: By family: what its frames say, and the shortest of them.
_FRAMES = {
    NETFILTER_FAMILIES["ipv4"]: (ETH_P_IP, ETH_HLEN + 20),
    NETFILTER_FAMILIES["ipv6"]: (ETH_P_IPV6, ETH_HLEN + 40),
}


def test_run(program: Program, data: bytes, context: bytes, options: RunOptions) -> RawRun:
    """Run as the command does; raises `OSError` with the kernel's errno, and `EmulationFault`."""
    if options.flags or options.cpu or options.batch_size or not _IPV4_HEADER <= len(data) <= MOST_DATA:
        raise refused(errno.EINVAL)
    if len(context) > _PAGE or any(context[_STATE:]):
        raise refused(errno.E2BIG)
    hook, family = _LOCAL_OUT, NETFILTER_FAMILIES["ipv4"]
    if context:
        state = context[:_STATE].ljust(_STATE, b"\0")
        hook, family = state[:2]
        if family not in _FRAMES or any(state[_FIRST_POINTER:]):
            raise refused(errno.EINVAL)
        if hook != _LOCAL_OUT:
            _check_frame(data, family)
    shown = NetfilterContext(hook, family)
    value, duration = timed(options.repeat, lambda: program.execute(Packet(buffer=b""), b"", shown))
    return RawRun(value, b"", context, duration)


def _check_frame(data: bytes, family: int) -> None:
    """What comes in has a link header, of a frame of that family."""
    if len(data) < ETH_HLEN + _IPV4_HEADER:
        raise refused(errno.EINVAL)
    protocol = received_protocol(data)
    if protocol not in (ETH_P_IP, ETH_P_IPV6):
        raise refused(errno.EPROTO)
    expected, shortest = _FRAMES[family]
    if protocol != expected or len(data) < shortest:
        raise refused(errno.EINVAL)
