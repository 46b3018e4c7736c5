"""BPF_F_TEST_XDP_LIVE_FRAMES: what XDP programs decide on frames is carried out, against a network namespace."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from mapcode import EXIT, Code, call, copy, made, mov
from sides import Side
from socks import here

from kbpf.emulator import network
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.specs import MapSpec, ProgramSpec
from kbpf.testing.network import NetworkNamespace
from kbpf.uapi.constants import BPF_F_TEST_XDP_LIVE_FRAMES

pytestmark = pytest.mark.requires("kernel")

DROP, PASS, TX, REDIRECT = 1, 2, 3, 4
FRAME = bytes(12) + b"\x88\xb5" + bytes(range(46))
COUNTS = MapSpec(type="array", key_size=4, value_size=16, max_entries=1)


@pytest.fixture(scope="module")
def namespace() -> Iterator[NetworkNamespace]:
    with NetworkNamespace() as made:
        yield made


@pytest.fixture(autouse=True)
def machine() -> Iterator[None]:
    network.reset()
    yield
    network.reset()


def program(action: int, body: Code | None = None) -> Code:
    """Count the runs, and add up the first byte of each frame, which goes up by one."""
    inside = [
        Instruction(ebpf.LDX | ebpf.MEM | ebpf.B, 5, 3, 0),
        Instruction(ebpf.STX | ebpf.ATOMIC | ebpf.DW, 7, 5, 8, 0),
        Instruction(ebpf.ALU64 | ebpf.ADD, 5, 0, 0, 1),
        Instruction(ebpf.STX | ebpf.MEM | ebpf.B, 3, 5, 0),
    ]
    return [
        *copy(6, 1), Instruction(ebpf.LD_IMM64, 7, ebpf.PSEUDO_MAP_IDX_VALUE, 0, 0), Instruction(0),
        *mov(2, 1), Instruction(ebpf.STX | ebpf.ATOMIC | ebpf.DW, 7, 2, 0, 0),
        Instruction(ebpf.LDX | ebpf.MEM | ebpf.W, 3, 6, 0), Instruction(ebpf.LDX | ebpf.MEM | ebpf.W, 4, 6, 4),
        *copy(2, 3), Instruction(ebpf.ALU64 | ebpf.ADD, 2, 0, 0, 14),
        Instruction(ebpf.JMP | ebpf.JGT | ebpf.X, 2, 4, len(inside)), *inside,
        *(body or []), *mov(0, action), EXIT,
    ]  # fmt: skip


def run(side: Side, code: Code, call_in: Any, data: bytes = FRAME, context: bytes = b"", **how: int) -> Any:
    """What the run gives, and the counts."""
    with made(side, COUNTS) as (counts,):
        fd = side.backend.program_load(ProgramSpec(type="xdp", instructions=tuple(code)), [counts])
        try:
            how.setdefault("flags", BPF_F_TEST_XDP_LIVE_FRAMES)
            given: Any = call_in(partial(side.backend.program_run, fd, data, context, **how))[:3]
        except OSError as error:
            given = errno.errorcode[error.errno or 0]
        finally:
            side.backend.close(fd)
        return given, struct.unpack("=QQ", side.backend.map_lookup(counts, bytes(4), 16))


def test_sizes_contexts_and_options(kernel: Side, emulator: Side, namespace: NetworkNamespace) -> None:
    contexts = [b"", *(struct.pack("=6I", *words) for words in (
        (0, 60, 0, 0, 0, 0), (8, 60, 0, 0, 0, 0), (0, 50, 0, 0, 0, 0), (0, 60, 0, 1, 0, 0), (0, 60, 0, 99, 0, 0),
        (48, 60, 0, 0, 0, 0), (0, 60, 0, 1, 1, 0), (0, 60, 0, 0, 0, 1)))]  # fmt: skip
    questions: list[tuple[bytes, bytes, dict[str, int]]] = [(FRAME, context, {}) for context in contexts]
    questions += [(bytes(size), b"", {}) for size in (13, 14, 3408, 3409)]
    questions += [(bytes(size), struct.pack("=6I", 32, size, 0, 0, 0, 0), {}) for size in (3440, 3441)]
    questions += [(FRAME, b"", {"batch_size": size}) for size in (1, 256, 257)]
    questions += [(FRAME, b"", {"cpu": 1}), (FRAME, b"", {"flags": 3})]
    for data, context, how in questions:
        truth = run(kernel, program(DROP), namespace.call, data, context, **how)
        assert run(emulator, program(DROP), here, data, context, **how) == truth, (len(data), context, how)


@pytest.mark.parametrize("action", (0, DROP, PASS, TX, REDIRECT, 5, 77))
def test_frames_come_again_with_what_was_written(
    kernel: Side, emulator: Side, namespace: NetworkNamespace, action: int
) -> None:
    sides = ((kernel, namespace.call), (emulator, here))
    for repeat in (4, 100, 200):
        outcomes = [run(side, program(action), where, repeat=repeat) for side, where in sides]
        assert outcomes[1] == outcomes[0], repeat
    # With other batches it is open which pages come again.
    given = [run(side, program(action), where, repeat=200, batch_size=7) for side, where in sides]
    assert [(result, counts[0]) for result, counts in given] == [((0, b"", b""), 200)] * 2


@pytest.mark.parametrize("change", (-216, -217, 0, 10))
def test_the_room_around_a_frame(kernel: Side, emulator: Side, namespace: NetworkNamespace, change: int) -> None:
    for helper, by in (("xdp_adjust_head", change), ("xdp_adjust_tail", 3348), ("xdp_adjust_tail", 3349)):
        body = [*copy(1, 6), *mov(2, by), *call(helper), Instruction(ebpf.STX | ebpf.ATOMIC | ebpf.DW, 7, 0, 8, 0)]
        outcomes = [
            run(side, program(DROP, body), where, repeat=3)
            for side, where in ((kernel, namespace.call), (emulator, here))
        ]
        assert outcomes[1] == outcomes[0], helper


def test_what_passes_is_received(kernel: Side, emulator: Side, namespace: NetworkNamespace) -> None:
    """By packet sockets on loopback: the frames as the program left them, and nothing of what goes elsewhere."""
    shorter = [*copy(1, 6), *mov(2, 4), *call("xdp_adjust_head")]
    seen = []
    for side, where in ((kernel, namespace.call), (emulator, here)):
        with where(side.backend.packet_socket, "lo") as listener:
            listener.settimeout(0.5)
            for action in (DROP, TX, REDIRECT, PASS):
                run(side, program(action, shorter), where, repeat=3)
            got = [listener.recvfrom(2000) for _ in range(3)]
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.recv(2000)
        seen.append([(data, address[1:3]) for data, address in got])
    assert seen[1] == seen[0]
    assert len(seen[0]) == 3
