"""sock_ops programs: their context, and options of TCP headers, against the kernel's connections over loopback."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from hooks import Recorder, attached, call, direct_bytes, load, on_stack, parts, real_group, whole
from sides import Side

from kbpf.emulator import events
from kbpf.emulator.packet import Packet
from kbpf.emulator.sock import Sock
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.uapi import constants as uapi
from kbpf.uapi.structs import STRUCTS

pytestmark = pytest.mark.requires("kernel")

I = Instruction  # noqa: E741
FIELDS = STRUCTS["bpf_sock_ops"].fields
TCP = [name for name in STRUCTS["bpf_tcp_sock"].fields if name in FIELDS]
ENDS = ("family", "remote_ip4", "local_ip4", "remote_ip6", "local_ip6", "remote_port", "local_port", "is_fullsock")
HEADER = 60


@pytest.fixture(scope="module")
def group() -> Iterator[int]:
    with real_group() as descriptor:
        yield descriptor


def connection(family: int) -> tuple[socket.socket, socket.socket]:
    """Both ends of a connection over loopback; the first has connected."""
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.bind(("127.0.0.1" if family == socket.AF_INET else "::1", 0))
        listener.listen()
        one = socket.socket(family, socket.SOCK_STREAM)
        one.connect(listener.getsockname())
        other, _ = listener.accept()
    return one, other


def find(option: bytes, size: int, flags: int = 0) -> list[list[Instruction]]:
    """bpf_load_hdr_opt and what it has written."""
    first = [*on_stack(option.ljust(48, b"\xee"), -48), *call("load_hdr_opt", "context", (10, -48), size, flags)]
    return [first, *([I(ebpf.LDX | ebpf.MEM | ebpf.DW, 0, 10, at)] for at in range(-48, 0, 8))]


OPTIONS = (
    find(b"\x02\0", 4) + find(b"\x02\0", 2) + find(b"\x03\0", 40) + find(b"\x08\0", 40) + find(b"\x04\0", 12)
    + find(b"\x05\0", 8) + find(b"\x02\4", 8) + find(b"\x01\0", 8) + find(b"\0\0", 8) + find(b"\x02\0", 1)
    + find(b"\x02\0", 8, 1) + find(b"\x02\0", 8, 2) + find(b"\xfd\4ab", 8) + find(b"\xfe\6abcd", 8)
    + find(b"\xfd\0", 8) + find(b"\xfe\3a", 8) + find(b"\xfe\6abcd", 4)
)  # fmt: skip


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
@pytest.mark.parametrize("op", [uapi.BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, uapi.BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB])
def test_a_connection_is_there(kernel: Side, emulator: Side, group: int, family: int, op: int) -> None:
    """The emulator gets the socket and the segment that the kernel's program saw."""
    numbers = whole("bpf_sock_ops", *TCP, "sk_txhash", "skb_len")
    numbers += direct_bytes("bpf_sock_ops", "skb_data", "skb_data_end", HEADER)
    flags = [load(FIELDS["skb_tcp_flags"].offset, size) for size in (1, 2, 4)]
    reply = [
        [
            I(ebpf.ALU64 | ebpf.MOV, 1, 0, 0, 0x1234567),
            I(ebpf.STX | ebpf.MEM | ebpf.W, 6, 1, FIELDS[name].offset),
            *load(FIELDS[name].offset, 4),
        ]
        for name in ("reply", "sk_txhash")
    ]
    callbacks = [
        step
        for value in (0x7F, 0x80, -1, 1 << 32, 0x1FF, 0)
        for step in (call("sock_ops_cb_flags_set", "context", value), load(FIELDS["bpf_sock_ops_cb_flags"].offset, 4))
    ]
    steps = [*numbers, *whole("bpf_sock_ops", "op", "args", "state", "bpf_sock_ops_cb_flags", *ENDS)]
    steps += [*flags, *OPTIONS, *reply, *callbacks]
    steps += [call("store_hdr_opt", "context", (10, -8), 4, 0), call("reserve_hdr_opt", "context", 4, 0)]
    with Recorder(kernel, "sock_ops", "cgroup_sock_ops", steps, only=(0, op)) as recorder, attached(group, recorder):
        one, other = connection(family)
        truth = recorder.recorded()
        end = one if op == uapi.BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB else other
        local, remote = end.getsockname(), end.getpeername()
        one.close()
        other.close()
    assert truth[0] == 1
    known = dict(zip([*TCP, "sk_txhash", "skb_len"], truth[1:], strict=False))
    segment = bytes(byte - 256 for byte in truth[1 + len(known) : 1 + len(known) + HEADER] if byte)
    sock = Sock(
        family=family, type=1, protocol=6, state=uapi.BPF_TCP_ESTABLISHED, tx_hash=known["sk_txhash"],
        local=socket.inet_pton(family, local[0]), local_port=local[1],
        remote=socket.inet_pton(family, remote[0]), remote_port=remote[1],
        tcp={name: known[name] for name in TCP}, accepted=end is other,
    )  # fmt: skip
    if op == uapi.BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
        sock.state = uapi.BPF_TCP_SYN_RECV
    with Recorder(emulator, "sock_ops", "cgroup_sock_ops", steps, only=(0, op)) as recorder:
        program = emulator.backend.program(recorder.fd)  # type: ignore[attr-defined]
        packet = Packet(buffer=segment, length=known["skb_len"])
        result = events.run_event(program, {"op": op}, sock=sock, packet=packet)
        assert recorder.recorded() == truth
    assert result.context == {"reply": 0x1234567, "sk_txhash": 0x1234567, "bpf_sock_ops_cb_flags": 0}


def test_states_are_told_where_they_were_asked_for(kernel: Side, emulator: Side, group: int) -> None:
    steps = [*whole("bpf_sock_ops", "op", "args", "state", "skb_data", "skb_data_end", "skb_len", "skb_hwtstamp")]
    steps += parts("bpf_sock_ops", "skb_tcp_flags")[:1] + find(b"\x02\0", 4) + find(b"\x02\0", 4, 1)
    op = uapi.BPF_SOCK_OPS_STATE_CB
    ask = [call("sock_ops_cb_flags_set", "context", uapi.BPF_SOCK_OPS_STATE_CB_FLAG)]
    asked = uapi.BPF_SOCK_OPS_TCP_CONNECT_CB
    asking = Recorder(kernel, "sock_ops", "cgroup_sock_ops", ask, only=(0, asked))
    recorder = Recorder(kernel, "sock_ops", "cgroup_sock_ops", steps, only=(0, op))
    with asking, recorder, attached(group, asking), attached(group, recorder):
        one, other = connection(socket.AF_INET)
        one.close()
        truth = recorder.recorded()
        other.close()
    sock = Sock(family=2, type=1, protocol=6, state=uapi.BPF_TCP_ESTABLISHED)
    with Recorder(emulator, "sock_ops", "cgroup_sock_ops", steps, only=(0, op)) as recorder:
        program = emulator.backend.program(recorder.fd)  # type: ignore[attr-defined]
        # The program is asked before the state changes.
        assert truth[2:4] == (uapi.BPF_TCP_ESTABLISHED, uapi.BPF_TCP_FIN_WAIT1)
        events.run_event(program, {"op": op, "args": truth[2:6]}, sock=sock)
        assert recorder.recorded()[1:] == truth[1:]


def test_options_are_reserved_and_written(kernel: Side, emulator: Side, group: int) -> None:
    """Room for ten bytes is asked for, and what is stored in it or too much is answered alike."""
    ask = [call("sock_ops_cb_flags_set", "context", uapi.BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG)]
    reserve = [
        call("reserve_hdr_opt", "context", size, flags) for size, flags in ((1, 0), (4, 1), (10, 0), (41, 0))
    ] + [call("store_hdr_opt", "context", (10, -8), 4, 0), *find(b"\x02\0", 4)[:1]]

    def store(option: bytes, size: int, flags: int = 0) -> list[Instruction]:
        return [*on_stack(option.ljust(48, b"\0"), -48), *call("store_hdr_opt", "context", (10, -48), size, flags)]

    write = [
        store(b"\xfd\4ab", 4, 1), store(b"\xfd\4ab", 1), store(b"\x01\2", 2), store(b"\0\2", 2), store(b"\xfd\3a", 3),
        store(b"\xfd\x14ab", 20), store(b"\xfd\4ab", 2), store(b"\xfd\4ab", 4), store(b"\xfd\4ab", 4),
        store(b"\xfe\4ab", 4), store(b"\x55\2", 2), store(b"\x56\2", 2), store(b"\x57\2", 2),
        *find(b"\xfd\4ab", 8), *find(b"\x55\0", 8), call("reserve_hdr_opt", "context", 4, 0),
    ]  # fmt: skip
    ops = {
        uapi.BPF_SOCK_OPS_TCP_CONNECT_CB: ask,
        uapi.BPF_SOCK_OPS_HDR_OPT_LEN_CB: reserve,
        uapi.BPF_SOCK_OPS_WRITE_HDR_OPT_CB: direct_bytes("bpf_sock_ops", "skb_data", "skb_data_end", HEADER) + write,
    }
    recorders = [Recorder(kernel, "sock_ops", "cgroup_sock_ops", steps, only=(0, op)) for op, steps in ops.items()]
    with attached(group, recorders[0]), attached(group, recorders[1]), attached(group, recorders[2]):
        one, other = connection(socket.AF_INET)
    truth = [recorder.recorded() for recorder in recorders]
    for end in (one, other, *recorders):
        end.close()
    segment = bytes(byte - 256 for byte in truth[2][1 : 1 + HEADER] if byte)
    for (op, steps), seen in zip(ops.items(), truth, strict=True):
        with Recorder(emulator, "sock_ops", "cgroup_sock_ops", steps, only=(0, op)) as recorder:
            program = emulator.backend.program(recorder.fd)  # type: ignore[attr-defined]
            context = events.MAKERS["sock_ops"](program, {"op": op}, None, Packet(buffer=segment))
            context.room = 12 if op == uapi.BPF_SOCK_OPS_WRITE_HDR_OPT_CB else 40 - 20  # type: ignore[attr-defined]
            events.run(program, context)
            assert recorder.recorded()[1:] == seen[1:], op
