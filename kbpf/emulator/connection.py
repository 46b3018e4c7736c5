"""A TCP connection and its states (RFC 9293; net/ipv4/tcp_input.c, tcp_output.c, tcp_timer.c)."""

from __future__ import annotations

import errno
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from kbpf.emulator import headers, tcp_events
from kbpf.emulator.clock import Event, timeline
from kbpf.emulator.datapath import backlog
from kbpf.emulator.environment import environment
from kbpf.emulator.headers import ACK, FIN, PSH, RST, SYN, IpHeader, TcpHeader, TcpOptions
from kbpf.emulator.inetsocket import IpOptions, bare
from kbpf.emulator.maps.local_storage import inherit_values
from kbpf.emulator.packet import Packet
from kbpf.emulator.ports import Binding
from kbpf.emulator.segment import M32, Segment, after, filtered
from kbpf.emulator.slot import Slot
from kbpf.uapi.constants import (
    BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB,
    BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB,
    BPF_TCP_CLOSE,
    BPF_TCP_CLOSE_WAIT,
    BPF_TCP_CLOSING,
    BPF_TCP_ESTABLISHED,
    BPF_TCP_FIN_WAIT1,
    BPF_TCP_FIN_WAIT2,
    BPF_TCP_LAST_ACK,
    BPF_TCP_NEW_SYN_RECV,
    BPF_TCP_SYN_RECV,
    BPF_TCP_SYN_SENT,
    BPF_TCP_TIME_WAIT,
)

if TYPE_CHECKING:
    from kbpf.emulator.tcp import Listener, TcpLayer
    from kbpf.emulator.tcpsocket import TcpSocket

_SECOND = 1_000_000_000
#: TCP_TIMEOUT_INIT, TCP_RTO_MIN, TCP_RTO_MAX, and how long TIME_WAIT and an orphan's FIN_WAIT2 last.
_RTO_FIRST, _RTO_LEAST, _RTO_MOST, _WAIT = _SECOND, _SECOND // 5, 120 * _SECOND, 60 * _SECOND
#: net.ipv4.tcp_syn_retries and tcp_syn_linear_timeouts, tcp_synack_retries, tcp_retries2.
_SYN_RETRIES, _SYN_LINEAR, _SYNACK_RETRIES, _RETRIES = 10, 4, 5, 15
_WINDOW_SCALE, _MOST_WINDOW, _DEFAULT_MSS = 7, 0xFFFF, 536
_FIRST_CWND = 10
_TIMESTAMPS_SIZE = 12
#: net.ipv4.tcp_rmem's default; half of it is for data, the rest for what packets need beside it.
RCVBUF = 131072

#: The states in which data may still be sent.
SENDING = (BPF_TCP_ESTABLISHED, BPF_TCP_CLOSE_WAIT)
_RECEIVING = (BPF_TCP_ESTABLISHED, BPF_TCP_FIN_WAIT1, BPF_TCP_FIN_WAIT2)


class Connection:
    """One end of a connection, from its SYN until it is closed; whoever uses it may be gone before that."""

    def __init__(self, layer: TcpLayer, binding: Binding) -> None:
        self.layer, self.binding, self.sock = layer, binding, binding.sock
        self.slot = Slot()
        self.ip = IpOptions()
        self.listener: Listener | None = None
        self.endpoint: weakref.ref[TcpSocket] | None = None
        self.nodelay = False
        #: An errno for the user, once.
        self.error = 0
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
        self._early: dict[int, Segment] = {}
        self.fin_received = False
        #: Whether data is still wanted, and whether there is a user.
        self.deaf = self.orphan = False
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
        #: Whether the user's socket is gone, and its remains only answer for it (``struct inet_timewait_sock``).
        self._remains = False
        self.counts = {"segs_in": 0, "segs_out": 0, "data_segs_in": 0, "data_segs_out": 0, "total_retrans": 0,
                       "bytes_received": 0, "bytes_acked": 0}  # fmt: skip

    # Beginning.

    def open(self) -> None:
        """Send a SYN."""
        self.layer.hold(self.sock, self)
        self.enter(BPF_TCP_SYN_SENT)
        self._first_timeout = tcp_events.connecting(self.sock) or _RTO_FIRST
        self._start(SYN)

    def answer(self, segment: Segment) -> None:
        """Take a SYN as a listener does, and send a SYN-ACK."""
        self.layer.hold(self.sock, self)
        self._agree(segment.header)
        self._first_timeout = tcp_events.requested(self.sock) or _RTO_FIRST
        self._start(SYN | ACK)

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

    def enter(self, state: int) -> None:
        """Change the state: the one place."""
        if not self._remains and (state, self.sock.state) != (BPF_TCP_CLOSE, BPF_TCP_CLOSE):
            # The user's socket is closed when others are still waited for.
            self._remains = state == BPF_TCP_TIME_WAIT
            tcp_events.state(self.sock, BPF_TCP_CLOSE if self._remains else state)
        self.sock.state = state
        if state == BPF_TCP_CLOSE:
            self._stop_timer()
            self.layer.drop(self.sock)
        self.woken()

    def woken(self) -> None:
        """Have the user look again."""
        endpoint = None if self.endpoint is None else self.endpoint()
        if endpoint is not None:
            endpoint.woken()

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
        free = max(self.room - len(self.incoming), 0)
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
                    self._start_timer(_RTO_LEAST)
                self._round_trips.sent(self.snd_nxt)
                self._emit(flags, seq, data)
            if self._timer is None and len(self.outgoing) > self._flight() == 0:
                # The window is closed: ask now and then whether it still is.
                self._start_timer(_RTO_LEAST)

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
            first = _RTO_LEAST
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

    # Receiving.

    def receive(self, packet: Packet, ip: IpHeader, header: TcpHeader) -> None:
        """A segment for this connection comes in."""
        state = self.sock.state
        if state == BPF_TCP_TIME_WAIT:
            self._late(header, packet.length - header.size)
            return
        if state == BPF_TCP_NEW_SYN_RECV:
            # The listener's filter, and its socket.
            assert self.listener is not None
            segment = filtered(self.listener.sock, self.listener.slot, packet, header)
        else:
            segment = filtered(self.sock, self.slot, packet, header)
        if segment is None:
            return
        self.counts["segs_in"] += 1
        self.counts["data_segs_in"] += bool(segment.data)
        if state == BPF_TCP_SYN_SENT:
            self._opened(ip, segment)
        elif self._expected(segment) and (state != BPF_TCP_NEW_SYN_RECV or self._accepted(ip, segment)):
            self._take(ip, segment)
        self._show()

    def _late(self, header: TcpHeader, length: int) -> None:
        """Something comes in TIME_WAIT (`tcp_timewait_state_process`)."""
        if header.flags & RST:
            if header.seq == self.rcv_nxt:
                self.finish()
        elif length or header.flags & (SYN | FIN):
            self.send_ack()

    def _opened(self, ip: IpHeader, segment: Segment) -> None:
        """An answer to the SYN (`tcp_rcv_synsent_state_process`)."""
        header = segment.header
        if header.flags & ACK and header.ack != self.snd_nxt:
            self.layer.refuse(ip, segment)
        elif header.flags & RST:
            if header.flags & ACK:
                self.fail(errno.ECONNREFUSED)
        elif header.flags & SYN and header.flags & ACK:
            self._agree(header)
            self._answered(header)
            self.enter(BPF_TCP_ESTABLISHED)
            tcp_events.established(self.sock, BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, segment)
            self.send_ack()
            self.push()

    def _answered(self, header: TcpHeader) -> None:
        """The other end has this one's SYN."""
        self.snd_una = header.ack
        self._recover = self._again = self.snd_una
        self._retries = 0
        self._stop_timer()
        self._round_trips.acknowledged(header.ack)

    def _accepted(self, ip: IpHeader, segment: Segment) -> bool:
        """Whether a segment ends the handshake of a request (`tcp_check_req`), which is then a connection."""
        header, listener = segment.header, self.listener
        assert listener is not None
        if header.ack != self.snd_nxt:
            self.layer.refuse(ip, segment)
            return False
        endpoint = listener.endpoint()
        if listener.full or endpoint is None:
            return False
        self.slot = listener.slot.copy()
        inherit_values(self.sock, listener.sock)
        self.snd_wnd = header.window << self._scale_out
        self.sock.listener = self.listener = None
        self.sock.sock_ops_cb_flags = listener.sock.sock_ops_cb_flags
        listener.requests.remove(self)
        listener.pending.append(self)
        self.sock.state = BPF_TCP_SYN_RECV
        self._answered(header)
        tcp_events.established(self.sock, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, segment)
        self.enter(BPF_TCP_ESTABLISHED)
        endpoint.woken()
        return True

    def _expected(self, segment: Segment) -> bool:
        """Whether a segment is one that may come now; others are answered (`tcp_validate_incoming`)."""
        header = segment.header
        window_end = self._promised
        if header.flags & RST:
            if header.seq == self.rcv_nxt:
                self._reset()
            elif not after(self.rcv_nxt, header.seq) and not after(header.seq, window_end):
                self.send_ack()
            return False
        if after(self.rcv_nxt, segment.end) or after(header.seq, window_end) or header.flags & SYN:
            if self.sock.state == BPF_TCP_NEW_SYN_RECV and header.flags & SYN:
                self._emit(SYN | ACK, self.iss)
            else:
                self.send_ack()
            return False
        return bool(header.flags & ACK)

    def _reset(self) -> None:
        """The other end has given up (`tcp_reset`)."""
        if self.sock.state == BPF_TCP_NEW_SYN_RECV:
            self.finish()
        else:
            self.fail(errno.EPIPE if self.sock.state == BPF_TCP_CLOSE_WAIT else errno.ECONNRESET)

    def _take(self, ip: IpHeader, segment: Segment) -> None:
        """A segment that may come now (`tcp_rcv_established`, `tcp_rcv_state_process`)."""
        header = segment.header
        self._note(header)
        if after(header.ack, self.snd_nxt):
            self.send_ack()
            return
        self._acknowledged(header)
        state = self.sock.state
        if state in (BPF_TCP_CLOSE, BPF_TCP_TIME_WAIT):
            return
        if segment.data and self.orphan and after(segment.end, self.rcv_nxt):
            # There is nobody to read it.
            self.layer.refuse(ip, segment)
            self.finish()
            return
        if segment.end != header.seq:
            self._owes_ack = True
            if state in _RECEIVING:
                self._early[header.seq] = segment
                self._assemble()
        if self.sock.state != BPF_TCP_TIME_WAIT:
            self.push()
        if self._owes_ack:
            self.send_ack()

    def _acknowledged(self, header: TcpHeader) -> None:
        """What the other end has, and how much more it may be sent (`tcp_ack`)."""
        self.snd_wnd = header.window << self._scale_out
        count = header.ack - self.snd_una & M32
        if not after(header.ack, self.snd_una):
            return
        fin = self._fin_sent and header.ack == self.snd_nxt
        del self.outgoing[: count - fin]
        self.counts["bytes_acked"] += count - fin
        self.snd_una = header.ack
        self._round_trips.acknowledged(header.ack)
        self.cwnd += max(count // self.mss, 1)
        self._retries = 0
        self._stop_timer()
        if self._flight():
            self._start_timer(_RTO_LEAST)
            if after(self._recover, self.snd_una) and not after(self._again, self.snd_una):
                # What was sent after the loss is taken to be lost, too.
                self._resend()
        if fin:
            self._fin_acknowledged()
        self.woken()

    def _fin_acknowledged(self) -> None:
        state = self.sock.state
        if state == BPF_TCP_FIN_WAIT1:
            self.enter(BPF_TCP_FIN_WAIT2)
            if self.orphan:
                self._leave()
        elif state == BPF_TCP_CLOSING:
            self._wait()
        elif state == BPF_TCP_LAST_ACK:
            self.finish()

    def _assemble(self) -> None:
        """Put what has come into its order (`tcp_data_queue`, `tcp_ofo_queue`)."""
        while True:
            ready = [seq for seq in self._early if not after(seq, self.rcv_nxt)]
            if not ready:
                return
            segment = self._early.pop(ready[0])
            if not after(segment.end, self.rcv_nxt):
                continue
            skipped = self.rcv_nxt - segment.header.seq & M32
            data = segment.data[skipped:]
            room = self._promised - self.rcv_nxt & M32
            whole = len(data) <= room
            data = data[:room]
            self.rcv_nxt = self.rcv_nxt + len(data) & M32
            self.counts["bytes_received"] += len(data)
            if not self.deaf:
                self.incoming += data
            self.woken()
            if whole and segment.fin:
                self._early.clear()
                self._ended()

    def _ended(self) -> None:
        """The other end sends no more (`tcp_fin`)."""
        self.rcv_nxt = self.rcv_nxt + 1 & M32
        self.fin_received = True
        state = self.sock.state
        if state == BPF_TCP_ESTABLISHED:
            self.enter(BPF_TCP_CLOSE_WAIT)
        elif state == BPF_TCP_FIN_WAIT1:
            self.enter(BPF_TCP_CLOSING)
        elif state == BPF_TCP_FIN_WAIT2:
            self.send_ack()
            self._wait()

    def read(self) -> None:
        """The user has read: tell the other end if there is much more room now (`tcp_cleanup_rbuf`)."""
        left = self._promised - self.rcv_nxt & M32
        free = max(self.room - len(self.incoming), 0)
        if (
            self.sock.state in _RECEIVING
            and 2 * left <= self.room
            and free >= 2 * left
            and free - left >= self.mss // 2
        ):
            self.send_ack()

    # The end.

    def end(self) -> None:
        """Send no more: a FIN follows what there is to send."""
        state = self.sock.state
        if state in SENDING:
            self._fin = True
            self.enter(BPF_TCP_FIN_WAIT1 if state == BPF_TCP_ESTABLISHED else BPF_TCP_LAST_ACK)
            self.push()

    def close(self, harshly: bool) -> None:
        """The user has gone (`__tcp_close`)."""
        self.endpoint, self.orphan, self.deaf = None, True, True
        state = self.sock.state
        if state == BPF_TCP_SYN_SENT:
            self.finish()
        elif harshly or (self.incoming and state in (*_RECEIVING, BPF_TCP_CLOSE_WAIT)):
            self.abort()
        elif state == BPF_TCP_FIN_WAIT2:
            self.enter(state)
            self._leave()
        elif state != BPF_TCP_CLOSE:
            self.end()
        else:
            self.finish()

    def abort(self) -> None:
        """Send a RST, and forget the connection (`tcp_send_active_reset`)."""
        tells = self.sock.state not in (BPF_TCP_CLOSE, BPF_TCP_TIME_WAIT, BPF_TCP_SYN_SENT)
        self.finish()
        if tells:
            self.layer.inet.counters["TcpOutRsts"] += 1
            self._emit(RST | ACK, self.snd_nxt)

    def _leave(self) -> None:
        """Nobody is there to read what may still come (`tcp_time_wait` of FIN_WAIT2)."""
        tcp_events.state(self.sock, BPF_TCP_CLOSE)
        self._remains = True
        self._start_timer(_WAIT, self.finish)

    def _wait(self) -> None:
        """TIME_WAIT: something may be late."""
        self.enter(BPF_TCP_TIME_WAIT)
        self._start_timer(_WAIT, self.finish)

    def fail(self, number: int) -> None:
        """It is over, and the user learns why."""
        self.error = number
        self.finish()

    def finish(self) -> None:
        """It is over, and the port free (`tcp_done`)."""
        listener = self.listener
        if listener is not None and self in listener.requests:
            listener.requests.remove(self)
        self.outgoing.clear()
        endpoint = None if self.endpoint is None else self.endpoint()
        if endpoint is None or endpoint.any_port:
            self.layer.inet.ports.release(self.binding)
        self.enter(BPF_TCP_CLOSE)

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
