"""A TCP connection: its states, and what it receives (RFC 9293; net/ipv4/tcp.c, tcp_input.c)."""

from __future__ import annotations

import errno
import weakref
from typing import TYPE_CHECKING

from kbpf.emulator import tcp_events
from kbpf.emulator.headers import ACK, FIN, RST, SYN, IpHeader, TcpHeader
from kbpf.emulator.maps.local_storage import inherit_values
from kbpf.emulator.packet import Packet
from kbpf.emulator.ports import Binding
from kbpf.emulator.segment import M32, Segment, after, filtered
from kbpf.emulator.slot import Slot
from kbpf.emulator.transmission import RTO_LEAST, Transmission
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

#: How long TIME_WAIT and an orphan's FIN_WAIT2 last.
_WAIT = 60_000_000_000
#: The states in which data may still be sent.
SENDING = (BPF_TCP_ESTABLISHED, BPF_TCP_CLOSE_WAIT)
_RECEIVING = (BPF_TCP_ESTABLISHED, BPF_TCP_FIN_WAIT1, BPF_TCP_FIN_WAIT2)


class Connection(Transmission):
    """One end of a connection, from its SYN until it is closed; whoever uses it may be gone before that."""

    def __init__(self, layer: TcpLayer, binding: Binding) -> None:
        super().__init__(layer, binding)
        self.sock.connection = weakref.ref(self)
        self.slot = Slot()
        self.listener: Listener | None = None
        self.endpoint: weakref.ref[TcpSocket] | None = None
        #: An errno for the user, once.
        self.error = 0
        #: What has come before its turn, by sequence number.
        self._early: dict[int, Segment] = {}
        self.fin_received = False
        #: Whether data is still wanted, and whether there is a user.
        self.deaf = self.orphan = False
        #: Whether the user's socket is gone, and its remains only answer for it (``struct inet_timewait_sock``).
        self._remains = False
        #: The index of the device that the last segment came by.
        self.came_by = 0

    # Beginning.

    def open(self) -> None:
        """Send a SYN."""
        self.layer.hold(self.sock, self)
        self.enter(BPF_TCP_SYN_SENT)
        self._first_timeout = tcp_events.connecting(self.sock) or self._first_timeout
        self._start(SYN)

    def answer(self, segment: Segment) -> None:
        """Take a SYN as a listener does, and send a SYN-ACK."""
        self.layer.hold(self.sock, self)
        self._agree(segment.header)
        self._first_timeout = tcp_events.requested(self.sock) or self._first_timeout
        self._start(SYN | ACK)

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
        self.came_by = packet.ifindex or 0
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
        self.sock.state, self.sock.accepted = BPF_TCP_SYN_RECV, True
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
        # Who reads no more still gets what comes while the connection stands, and not when it is on its way out.
        unwanted = self.orphan or (self.deaf and state != BPF_TCP_ESTABLISHED)
        if segment.data and unwanted and after(segment.end, self.rcv_nxt):
            self.layer.refuse(ip, segment)
            if self.orphan:
                self.finish()
            else:
                self._reset()
            return
        if segment.end != header.seq:
            self._owes_ack = True
            if state in _RECEIVING:
                self._early[header.seq] = segment
                self._assemble()
                if self.sock.psock is not None:
                    self.sock.psock.arrived(self, header.flags, fin=self.fin_received)
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
        if self.sock.psock is not None:
            self.sock.psock.go_on()
        if self._flight():
            self._start_timer(RTO_LEAST)
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
        free = max(self.room - self.unread, 0)
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
