"""`struct bpf_sock_ops` as sock_ops programs see it: a TCP socket, and what is asked or told of it (Linux 4.13).

`sock_ops_is_valid_access` and `sock_ops_convert_ctx_access` of net/core/filter.c, Linux 6.18.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from kbpf.emulator.fields import given, narrow
from kbpf.emulator.interpreter import PACKET_ADDRESS, Run
from kbpf.emulator.memory import M32
from kbpf.emulator.packet import Packet
from kbpf.emulator.sock import Sock, load
from kbpf.uapi.constants import BPF_SOCK_OPS_TSTAMP_SCHED_CB, BPF_SOCK_OPS_TSTAMP_SENDMSG_CB
from kbpf.uapi.structs import STRUCTS

if TYPE_CHECKING:
    from kbpf.emulator.program import Program

_LAYOUT = STRUCTS["bpf_sock_ops"].fields
_TCP = STRUCTS["bpf_tcp_sock"].fields
_ARGS = _LAYOUT["args"]
_REPLY, _TX_HASH = _LAYOUT["reply"].offset, _LAYOUT["sk_txhash"].offset


class SockOps:
    """A `kbpf.emulator.interpreter.Context`.

    `op` is BPF_SOCK_OPS_*; `args` are what comes with it, and the first of them is also the reply. `full` says that the
    socket is more than a request for a connection, `segment` is the TCP header with its options where there is one to
    look at, and `length` the bytes of the segment that it belongs to, from the header on.
    """

    __slots__ = ("args", "full", "hwtstamp", "length", "op", "retval", "room", "segment", "sock")

    def __init__(
        self,
        sock: Sock,
        op: int,
        args: tuple[int, ...] = (),
        *,
        full: bool | None = None,
        segment: bytes | None = None,
        length: int | None = None,
        hwtstamp: int = 0,
    ) -> None:
        self.sock = sock
        self.op = op
        #: What the system call is to return: 0, or a negative errno.
        self.retval = 0
        self.args = [*args, 0, 0, 0, 0][:4]
        self.full = sock.full if full is None else full
        self.segment = None if segment is None else bytearray(segment)
        self.length = len(segment or b"") if length is None else length
        self.hwtstamp = hwtstamp
        #: Bytes of options that may still be written or reserved.
        self.room = 0

    @property
    def locked(self) -> bool:
        """Whether the socket is the program's alone meanwhile, as it is but for timestamps."""
        return self.full and not BPF_SOCK_OPS_TSTAMP_SCHED_CB <= self.op <= BPF_SOCK_OPS_TSTAMP_SENDMSG_CB

    def show(self, run: Run) -> None:
        if self.segment is not None:
            run.show(self.segment, writable=False)

    def load(self, offset: int, size: int) -> int | None:
        read = _READ.get((offset & ~3, size))
        if read is not None:
            return read(self) if offset & 3 == 0 else None
        if offset == _LAYOUT["skb_tcp_flags"].offset and size < 4:
            return narrow(_flags(self), offset, size, 1)
        return None

    def store(self, offset: int, size: int, value: int) -> bool:
        if size != 4 or offset not in (_REPLY, _TX_HASH):
            return False
        if offset == _REPLY:
            self.args[0] = value
        elif self.locked:
            self.sock.tx_hash = value
        return True

    def result(self) -> dict[str, Any]:
        """The fields that programs may set, and the socket's flags, which a helper sets."""
        return {
            "reply": self.args[0],
            "sk_txhash": self.sock.tx_hash,
            "bpf_sock_ops_cb_flags": self.sock.sock_ops_cb_flags,
        }


def _flags(ops: SockOps) -> int:
    return ops.segment[13] if ops.segment is not None and len(ops.segment) > 13 else 0


def _argument(index: int) -> Callable[[SockOps], int]:
    return lambda ops: ops.args[index]


def _tcp(name: str) -> Callable[[SockOps], int]:
    mask = (1 << 8 * _TCP[name].size) - 1
    return lambda ops: ops.sock.tcp.get(name, 0) & mask if ops.locked else 0


def _shown(name: str, index: int = 0) -> Callable[[SockOps], int]:
    """What ``struct bpf_sock`` shows under another name."""
    offset = STRUCTS["bpf_sock"].fields[name].offset + 4 * index
    return lambda ops: load(ops.sock, offset, 4) or 0


_SINGLE: dict[str, Callable[[SockOps], int]] = {
    "op": lambda ops: ops.op,
    "family": lambda ops: ops.sock.family,
    "remote_ip4": _shown("dst_ip4"),
    "local_ip4": _shown("src_ip4"),
    # In network order, in the field's upper half.
    "remote_port": lambda ops: socket.htons(ops.sock.remote_port) << 16,
    "local_port": lambda ops: ops.sock.local_port,
    "is_fullsock": lambda ops: int(ops.full),
    "bpf_sock_ops_cb_flags": lambda ops: ops.sock.sock_ops_cb_flags if ops.locked else 0,
    "state": lambda ops: ops.sock.state,
    "sk_txhash": lambda ops: ops.sock.tx_hash & M32 if ops.locked else 0,
    "sk": lambda ops: ops.sock.address if ops.full else 0,
    "skb_data": lambda ops: 0 if ops.segment is None else PACKET_ADDRESS,
    "skb_data_end": lambda ops: 0 if ops.segment is None else PACKET_ADDRESS + len(ops.segment),
    "skb_len": lambda ops: ops.length,
    "skb_tcp_flags": _flags,
    "skb_hwtstamp": lambda ops: ops.hwtstamp,
    **{name: _tcp(name) for name in _TCP if name in _LAYOUT},
}
#: By offset and size: but for the flags, fields are read whole or not at all.
_READ = {
    **{(_LAYOUT[name].offset, _LAYOUT[name].size): read for name, read in _SINGLE.items()},
    **{(_ARGS.offset + 4 * index, 4): _argument(index) for index in range(_ARGS.count)},
    **{
        (_LAYOUT[name].offset + 4 * index, 4): _shown(shown, index)
        for name, shown in (("remote_ip6", "dst_ip6"), ("local_ip6", "src_ip6"))
        for index in range(4)
    },
}


def make(program: Program, fields: Mapping[str, Any], sock: Sock | None, packet: Packet) -> SockOps:
    """A context over a socket, by default a new TCP socket; the packet, if it has bytes, is the TCP segment."""
    if sock is None:
        sock = Sock(family=socket.AF_INET, type=socket.SOCK_STREAM, protocol=socket.IPPROTO_TCP)
    data = packet.data
    # The header and its options, which are all that programs see of a segment.
    header = data[: 4 * (data[12] >> 4)] if len(data) > 12 else data
    context = SockOps(sock, 0, segment=header if data else None, length=packet.length)
    for name, index, value in given("bpf_sock_ops", fields, ("op", "args", "is_fullsock", "skb_hwtstamp")):
        if name == "args":
            context.args[index] = value
        else:
            setattr(context, _GIVEN[name], value)
    return context


_GIVEN = {"op": "op", "is_fullsock": "full", "skb_hwtstamp": "hwtstamp"}
