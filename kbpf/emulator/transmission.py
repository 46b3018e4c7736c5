"""What one end of a TCP connection sends, and what again (RFC 9293; net/ipv4/tcp_output.c, tcp_timer.c)."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from kbpf.emulator import headers, tcp_events
from kbpf.emulator.clock import Event, timeline
from kbpf.emulator.datapath import backlog
from kbpf.emulator.environment import environment
from kbpf.emulator.headers import ACK, FIN, PSH, SYN, TcpHeader, TcpOptions
from kbpf.emulator.inetsocket import IpOptions, bare
from kbpf.emulator.ports import Binding
from kbpf.emulator.segment import M32
from kbpf.uapi.constants import BPF_TCP_CLOSE, BPF_TCP_NEW_SYN_RECV, BPF_TCP_SYN_SENT, BPF_TCP_TIME_WAIT

if TYPE_CHECKING:
    from kbpf.emulator.tcp import TcpLayer

_SECOND = 1_000_000_000
#: TCP_TIMEOUT_INIT, TCP_RTO_MIN, TCP_RTO_MAX.
_RTO_FIRST, RTO_LEAST, _RTO_MOST = _SECOND, _SECOND // 5, 120 * _SECOND
#: net.ipv4.tcp_syn_retries and tcp_syn_linear_timeouts, tcp_synack_retries, tcp_retries2.
_SYN_RETRIES, _SYN_LINEAR, _SYNACK_RETRIES, _RETRIES = 10, 4, 5, 15
_WINDOW_SCALE, _MOST_WINDOW, _DEFAULT_MSS = 7, 0xFFFF, 536
_FIRST_CWND = 10
_TIMESTAMPS_SIZE = 12
#: net.ipv4.tcp_rmem's default; half of it is for data, the rest for what packets need beside it.
RCVBUF = 131072


class Transmission:
    """The sending half of a connection, with what it must know of the other half."""

    def __init__(self, layer: TcpLayer, binding: Binding) -> None:
        self.layer, self.binding, self.sock = layer, binding, binding.sock
        self.ip = IpOptions()
        self.nodelay = False
        self.hash = environment.random32() or 1
        # Sending: what is not acknowledged, from `snd_una` on, of which up to `snd_nxt` was sent.
        self.iss = environment.random32()
        self.snd_una = self.snd_nxt = self.iss
        self.snd_wnd = 0
        self.outgoing = bytearray()
        self.mss = _DEFAULT_MSS
        self.cwnd = _FIRST_CWND
        self._fin = self._fin_sent = False
        # Receiving.
        self.rcv_nxt = 0
        self.incoming = bytearray()
        #: Bytes that may wait to be read, and what the other end was last told of that.
        self.room = RCVBUF // 2
        self._promised = 0
        # What the handshake agreed on.
        self._scale_in = self._scale_out = 0
        self._timestamps = self._sack = False
        self._echo = 0
        # The timer, and what is known of losses: how far was sent when one was noticed, and how far again.
        self._timer: Event | None = None
        self._retries = 0
        self._recover = self._again = self.iss
        self._owes_ack = False
        self._round_trips = tcp_events.RoundTrips(self.sock)
        #: How long the timer was set for, and what the first one of a handshake is.
        self._timeout, self._first_timeout = 0, _RTO_FIRST
        self.counts = {"segs_in": 0, "segs_out": 0, "data_segs_in": 0, "data_segs_out": 0, "total_retrans": 0,
                       "bytes_received": 0, "bytes_acked": 0}  # fmt: skip

    def fail(self, number: int) -> None:
        """It is over, and the user learns why."""
        raise NotImplementedError

    @property
    def unread(self) -> int:
        """Bytes that wait to be read."""
        return len(self.incoming) + (0 if self.sock.psock is None else self.sock.psock.size)

    # The handshake.

    def _start(self, flags: int) -> None:
        """Send the first segment of this end."""
        self.snd_nxt = self.iss + 1 & M32
        self._start_timer(self._first_timeout)
        self._round_trips.sent(self.snd_nxt)
        self._emit(flags, self.iss)

    def _agree(self, header: TcpHeader) -> None:
        """On what the other end's SYN says (`tcp_parse_options`)."""
        options = header.options
        self.rcv_nxt = header.seq + 1 & M32
        self._promised = self.rcv_nxt + min(self.room, _MOST_WINDOW) & M32
        self.snd_wnd = header.window
        if options.window_scale is not None:
            self._scale_out, self._scale_in = options.window_scale, _WINDOW_SCALE
        self._timestamps, self._sack = options.timestamps is not None, options.sack_permitted
        self._note(header)
        overhead = _TIMESTAMPS_SIZE if self._timestamps else 0
        self.mss = max(min(options.mss or _DEFAULT_MSS, self._own_mss()) - overhead, 1)

    def _note(self, header: TcpHeader) -> None:
        if header.options.timestamps is not None:
            self._echo = header.options.timestamps[0]

    def _own_mss(self) -> int:
        target = bare(self.sock.remote)
        try:
            mtu = self.layer.inet.path(target, self.layer.network.by_index(self.sock.bound_dev_if)).device.mtu
        except OSError:
            return _DEFAULT_MSS
        size = headers.IPV4_SIZE if len(target) == 4 else headers.IPV6_SIZE
        return min(mtu, 0xFFFF if len(target) == 4 else 0xFFFF + 1) - size - headers.TCP_SIZE

    # Sending.

    def _emit(self, flags: int, seq: int, data: bytes = b"") -> None:
        """Send one segment (`tcp_transmit_skb`)."""
        sock = self.sock
        shown = self._window(bool(flags & SYN))
        options = TcpOptions(timestamps=(environment.clock() // 1_000_000 & M32, self._echo))
        if flags & SYN:
            offered = not flags & ACK
            options = TcpOptions(
                mss=self._own_mss(),
                window_scale=_WINDOW_SCALE if offered or self._scale_in else None,
                sack_permitted=offered or self._sack,
                timestamps=options.timestamps if offered or self._timestamps else None,
            )
        elif not self._timestamps:
            options = TcpOptions()
        ack = self.rcv_nxt if flags & ACK else 0
        made = headers.tcp(sock.local_port, sock.remote_port, seq & M32, ack, flags, shown, options) + data
        target = bare(sock.remote)
        # A SYN-ACK is made of a request, not of a socket.
        segments = 0 if flags & SYN and flags & ACK else 1
        self._owes_ack = False
        self.counts["segs_out"] += 1
        self.counts["data_segs_out"] += bool(data)
        self._show()
        how = self.ip.sending(sock, target, self.hash, segments)
        self.layer.send(bare(sock.local), target, made, how, sock.bound_dev_if)

    def _window(self, syn: bool) -> int:
        """What the window field says; what was promised is never taken back."""
        free = max(self.room - self.unread, 0)
        if syn:
            shown = min(free, _MOST_WINDOW)
            self._promised = self.rcv_nxt + shown & M32
            return shown
        left = self._promised - self.rcv_nxt & M32
        left = left if left < 1 << 31 else 0
        if free < min(self.mss, self.room // 2):
            free = 0
        shown = min(max(free, left) >> self._scale_in, _MOST_WINDOW)
        shown = max(shown, -(-left >> self._scale_in))
        self._promised = self.rcv_nxt + (shown << self._scale_in) & M32
        return shown

    def _flight(self) -> int:
        return self.snd_nxt - self.snd_una & M32

    def push(self, probing: bool = False) -> None:
        """Send what may be sent, however little it is where that is a probe (`tcp_write_xmit`)."""
        if self.sock.state in (BPF_TCP_SYN_SENT, BPF_TCP_NEW_SYN_RECV, BPF_TCP_CLOSE, BPF_TCP_TIME_WAIT):
            return
        with backlog.event():
            while not self._fin_sent:
                sent = self._flight()
                unsent = len(self.outgoing) - sent
                room = min(self.snd_wnd, self.cwnd * self.mss) - sent
                size = max(min(self.mss, unsent, room), 0)
                last = self._fin and size == unsent
                little = size < self.mss and bool(sent) and not ((self.nodelay or probing) and size == unsent)
                if not last and (not size or little):
                    # Nothing to send, no room, or too little while something is under way (Nagle; silly windows).
                    break
                data = bytes(self.outgoing[sent : sent + size])
                flags = ACK | (PSH if data and size == unsent else 0) | (FIN if last else 0)
                seq, self.snd_nxt = self.snd_nxt, self.snd_nxt + size + last & M32
                self._fin_sent = last
                if self._timer is None:
                    self._start_timer(RTO_LEAST)
                self._round_trips.sent(self.snd_nxt)
                self._emit(flags, seq, data)
            if self._timer is None and len(self.outgoing) > self._flight() == 0:
                # The window is closed: ask now and then whether it still is.
                self._start_timer(RTO_LEAST)

    def send_ack(self) -> None:
        self._emit(ACK, self.snd_nxt)

    def _resend(self) -> None:
        """Send again what comes first of all that is not acknowledged (`tcp_retransmit_skb`)."""
        self.counts["total_retrans"] += 1
        state = self.sock.state
        if state == BPF_TCP_SYN_SENT:
            self._round_trips.sent(self.snd_nxt)
            self._emit(SYN, self.iss)
            tcp_events.retransmitted(self.sock, self.iss)
            return
        if state == BPF_TCP_NEW_SYN_RECV:
            self._round_trips.sent(self.snd_nxt)
            self._emit(SYN | ACK, self.iss)
            return
        if not self._flight():
            # A probe of a closed window: a byte that was acknowledged long ago, which is answered.
            self._emit(ACK, self.snd_una - 1)
            return
        size = min(self.mss, len(self.outgoing), self._flight())
        last = self._fin_sent and size == len(self.outgoing)
        self._again = self.snd_una + size + last & M32
        flags = ACK | (PSH if size and size == len(self.outgoing) else 0) | (FIN if last else 0)
        self._round_trips.sent(self._again)
        self._emit(flags, self.snd_una, bytes(self.outgoing[:size]))
        tcp_events.retransmitted(self.sock, self.snd_una)

    # The timer.

    def _start_timer(self, after_ns: int, action: Callable[[], None] | None = None) -> None:
        self._stop_timer()
        self._timeout = after_ns
        self._timer = timeline.at(environment.clock() + after_ns, action or self._timed_out)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _timed_out(self) -> None:
        """Nothing was acknowledged in time (`tcp_retransmit_timer`)."""
        with backlog.event():
            self._timer = None
            state = self.sock.state
            most = {BPF_TCP_SYN_SENT: _SYN_RETRIES, BPF_TCP_NEW_SYN_RECV: _SYNACK_RETRIES}.get(state, _RETRIES)
            if self._retries >= most:
                self.fail(errno.ETIMEDOUT)
                return
            self._retries += 1
            before = self.snd_nxt
            if self._retries == 1:
                # Something new tells as much as something old (`tcp_send_loss_probe`).
                self.push(probing=True)
            if self.snd_nxt != before:
                return
            first = RTO_LEAST
            doublings = self._retries
            if state in (BPF_TCP_SYN_SENT, BPF_TCP_NEW_SYN_RECV):
                first = self._first_timeout
                doublings -= min(self._retries, _SYN_LINEAR) if state == BPF_TCP_SYN_SENT else 0
                if state == BPF_TCP_SYN_SENT:
                    if self._retries > 1:
                        tcp_events.tried_again(self.sock)
                    tcp_events.timed_out(self.sock, self._retries - 1, self._timeout)
            elif self._flight():
                # The first time only probes for a loss.
                doublings -= 1
                if self._retries > 1:
                    tcp_events.timed_out(self.sock, self._retries - 2, self._timeout)
            self.cwnd, self._recover = 1, self.snd_nxt
            self._start_timer(min(first << doublings, _RTO_MOST))
            self._resend()
            if state == BPF_TCP_SYN_SENT:
                tcp_events.tried_again(self.sock)

    def _show(self) -> None:
        """What programs see in ``struct bpf_tcp_sock``."""
        self.sock.tcp = {
            **self.counts,
            "snd_cwnd": self.cwnd,
            "srtt_us": self._round_trips.smoothed,
            "snd_una": self.snd_una,
            "snd_nxt": self.snd_nxt,
            "rcv_nxt": self.rcv_nxt,
            "mss_cache": self.mss,
        }
