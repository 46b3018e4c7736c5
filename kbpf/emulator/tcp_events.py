"""What sock_ops programs of a socket's control group are told of TCP, and asked about it (Linux 4.13 on).

`tcp_call_bpf` and its kin in net/ipv4. The emulated TCP has the events below, and those that a program must ask for
(bpf_sock_ops_cb_flags_set) of states, round trips, retransmissions and timeouts. What a program answers about windows
(BPF_SOCK_OPS_RWND_INIT) and congestion notification (BPF_SOCK_OPS_NEEDS_ECN) changes nothing here; options of headers
are never asked for.
"""

from __future__ import annotations

from kbpf.emulator.cgroup_hooks import sock_ops
from kbpf.emulator.environment import environment
from kbpf.emulator.segment import M32, Segment, after
from kbpf.emulator.sock import Sock
from kbpf.uapi import constants as uapi

_SECOND, _MICROSECOND = 1_000_000_000, 1_000
#: TCP_RTO_MAX.
_MOST_TIMEOUT = 120 * _SECOND


def listening(sock: Sock) -> None:
    """listen() has been called for the first time."""
    sock_ops(sock, uapi.BPF_SOCK_OPS_TCP_LISTEN_CB)


def connecting(sock: Sock) -> int | None:
    """A SYN is about to be sent; see `requested`."""
    sock_ops(sock, uapi.BPF_SOCK_OPS_TCP_CONNECT_CB)
    return requested(sock)


def requested(sock: Sock) -> int | None:
    """A SYN or its answer is about to be sent: after how many nanoseconds again, where a program has its say."""
    sock_ops(sock, uapi.BPF_SOCK_OPS_RWND_INIT)
    asked = sock_ops(sock, uapi.BPF_SOCK_OPS_TIMEOUT_INIT)
    sock_ops(sock, uapi.BPF_SOCK_OPS_NEEDS_ECN)
    ticks = 0 if asked is None else asked.args[0]
    return min(ticks * _SECOND // environment.ticks, _MOST_TIMEOUT) if 0 < ticks < 1 << 31 else None


def tried_again(sock: Sock) -> None:
    """Asked of an unanswered SYN, to know how long is too long (`retransmits_timed_out`): it changes nothing."""
    sock_ops(sock, uapi.BPF_SOCK_OPS_TIMEOUT_INIT)


def established(sock: Sock, op: int, segment: Segment) -> None:
    """A connection is there, by this segment; `op` says from which end."""
    sock_ops(sock, op, segment=segment.start, length=len(segment.start) + len(segment.data))


def state(sock: Sock, new: int) -> None:
    """The state is about to change."""
    if sock.sock_ops_cb_flags & uapi.BPF_SOCK_OPS_STATE_CB_FLAG:
        sock_ops(sock, uapi.BPF_SOCK_OPS_STATE_CB, sock.state, new)


def retransmitted(sock: Sock, seq: int) -> None:
    """A segment was sent again."""
    if sock.sock_ops_cb_flags & uapi.BPF_SOCK_OPS_RETRANS_CB_FLAG:
        sock_ops(sock, uapi.BPF_SOCK_OPS_RETRANS_CB, seq & M32, 1, 0)


def timed_out(sock: Sock, before: int, timeout: int) -> None:
    """Nothing was acknowledged for `timeout` nanoseconds; so often it was like that before."""
    if sock.sock_ops_cb_flags & uapi.BPF_SOCK_OPS_RTO_CB_FLAG:
        sock_ops(sock, uapi.BPF_SOCK_OPS_RTO_CB, before, timeout * environment.ticks // _SECOND, 0)


class RoundTrips:
    """How long segments and their acknowledgements take (`tcp_rtt_estimator`)."""

    def __init__(self, sock: Sock) -> None:
        self._sock = sock
        #: When segments were sent last, by the sequence number that follows them.
        self._sent: dict[int, int] = {}
        #: ``srtt_us``: the smoothed time, in eighths of microseconds.
        self.smoothed = 0

    def sent(self, end: int) -> None:
        """A segment was sent, or sent again."""
        self._sent[end & M32] = environment.clock()

    def acknowledged(self, ack: int) -> None:
        """The other end has all before `ack`."""
        times = [self._sent.pop(end) for end in list(self._sent) if not after(end, ack)]
        if not times:
            return
        took = (environment.clock() - times[0]) // _MICROSECOND
        self.smoothed += took - (self.smoothed >> 3) if self.smoothed else took << 3
        sock = self._sock
        if sock.sock_ops_cb_flags & uapi.BPF_SOCK_OPS_RTT_CB_FLAG:
            sock_ops(sock, uapi.BPF_SOCK_OPS_RTT_CB, took & M32, self.smoothed & M32)
        self.smoothed = max(self.smoothed, 1)
