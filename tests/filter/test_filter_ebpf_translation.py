"""Classic filters translated to socket filters that Linux loads: the same return values on the same packets."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import kbpf
from kbpf.isa import cbpf, ebpf
from kbpf.isa.cbpf import stmt
from kbpf.kernel.backend import kernel_backend
from kbpf.specs import SOCKET_LAYOUTS
from kbpf.testing.generate_classic import LONG, OPEN_ANCILLARY, generate
from kbpf.testing.generate_packets import frame, payload

LD, LDX, ALU, JMP, RET, ABS, IND = cbpf.LD, cbpf.LDX, cbpf.ALU, cbpf.JMP, cbpf.RET, cbpf.ABS, cbpf.IND
# No field of the context and no helper gives these.
UNKNOWN = {12, 16, 28, 52}
# What differs from packet to packet of the same bytes.
OPEN = OPEN_ANCILLARY | {32}


class Receiver:
    """One end of a pair of UNIX sockets: what is left of a packet is what the filter returned."""

    def __init__(self, sender: socket.socket, receiver: socket.socket) -> None:
        self.sender, self.receiver = sender, receiver
        receiver.setblocking(False)

    def kept(self, data: bytes) -> int | None:
        self.sender.send(data)
        try:
            return len(self.receiver.recv(1 << 16))
        except BlockingIOError:
            return None


@contextmanager
def receiver() -> Iterator[Receiver]:
    sender, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with sender, end:
        yield Receiver(sender, end)


def ancillary_loads(program: tuple[cbpf.Instruction, ...]) -> set[int]:
    loads = [i.k - cbpf.AD_OFF for i in program if i.code & 0xE7 == LD | ABS and i.k >= cbpf.AD_OFF]
    return set(loads)


@pytest.mark.requires("kernel")
def test_random_programs_return_what_the_classic_ones_do() -> None:
    rng = random.Random(11)
    compared = 0
    with receiver() as classic, receiver() as loaded:
        while compared < 400:
            instructions = generate(rng)
            try:
                spec = kbpf.Filter(instructions, layout=SOCKET_LAYOUTS["unix"]).to_ebpf()
            except kbpf.FilterError:
                assert ancillary_loads(instructions) & UNKNOWN
                continue
            if compared:
                # Replacing needs room for both in the socket's option memory.
                kernel_backend().socket_detach(classic.receiver)
            kernel_backend().socket_attach_filter(classic.receiver, cbpf.encode(instructions))
            with kbpf.load_program(spec, backend="kernel") as program:
                kernel_backend().socket_attach_bpf(loaded.receiver, program.fileno())
                for data in (payload(rng), payload(rng), rng.randbytes(LONG)):
                    assert classic.kept(data) == loaded.kept(data), (instructions, data.hex())
            compared += 1


@pytest.mark.requires("kernel")
def test_the_kernel_and_the_emulator_run_the_translation_alike() -> None:
    rng = random.Random(12)
    for _ in range(100):
        instructions = generate(rng)
        if ancillary_loads(instructions) & (UNKNOWN | OPEN):
            continue
        spec = kbpf.Filter(instructions).to_ebpf()
        packets = [frame(rng) for _ in range(3)]
        with kbpf.load_program(spec, backend="kernel") as one, kbpf.load_program(spec, backend="emulator") as other:
            for data in packets:
                assert one.run(data).value == other.run(data).value, (instructions, data.hex())


ANCILLARY = {
    0: 0x0800,
    4: 0,
    8: 1,
    20: 0x1234,
    24: 0,
    44: 0,
    48: 0,
    60: 0,
}


@pytest.mark.parametrize("offset", sorted(ANCILLARY))
def test_ancillary_words_come_from_the_context(offset: int, backend: str) -> None:
    filter = kbpf.Filter([stmt(LD | ABS, cbpf.AD_OFF + offset), stmt(RET | cbpf.A)])
    with kbpf.load_program(filter.to_ebpf(), backend=backend) as program:
        packet = bytes(12) + b"\x08\x00" + bytes(40)
        assert program.run(packet, context={"mark": 0x1234}).value == ANCILLARY[offset]


def test_processor_and_random_come_from_helpers(backend: str) -> None:
    for offset in (36, 56):
        filter = kbpf.Filter([stmt(LD | ABS, cbpf.AD_OFF + offset), stmt(RET | cbpf.A)])
        with kbpf.load_program(filter.to_ebpf(), backend=backend) as program:
            values = {program.run(bytes(60)).value for _ in range(8)}
        assert (len(values) == 8) if offset == 56 else all(value < 4096 for value in values)


@pytest.mark.requires("kernel")
def test_without_a_device_its_index_ends_the_program_with_a() -> None:
    instructions = [stmt(LD | cbpf.IMM, 7), stmt(LD | ABS, cbpf.AD_OFF + 8), stmt(RET | cbpf.K, 3)]
    filter = kbpf.Filter(instructions)
    with (
        receiver() as loaded,
        kbpf.load_program(filter.to_ebpf(), backend="kernel") as program,
        program.attach(loaded.receiver, drain=False),
    ):
        assert loaded.kept(bytes(20)) == 7


@pytest.mark.parametrize("offset", sorted(UNKNOWN))
def test_what_no_program_can_know_is_named(offset: int) -> None:
    filter = kbpf.Filter([stmt(LD | ABS, cbpf.AD_OFF + offset), stmt(RET | cbpf.A)])
    with pytest.raises(kbpf.FilterError, match=cbpf.ANCILLARY[offset].name):
        filter.to_ebpf()


def test_code_that_nothing_reaches_is_left_out(backend: str) -> None:
    filter = kbpf.Filter(
        [
            stmt(JMP | cbpf.JA, 1),
            stmt(LD | ABS, cbpf.AD_OFF + 28),
            cbpf.jump(JMP | cbpf.JEQ, 0, 0, 1),
            stmt(RET | cbpf.K, 5),
            stmt(RET | cbpf.K, 6),
            stmt(LD | cbpf.LEN),
            stmt(RET | cbpf.A),
        ]
    )
    with kbpf.load_program(filter.to_ebpf(), backend=backend) as program:
        assert program.run(bytes(60)).value == 5


@pytest.mark.parametrize("base", (cbpf.NET_OFF, cbpf.LL_OFF))
def test_loads_relative_to_a_header_stay_so(base: int, backend: str) -> None:
    filter = kbpf.Filter(
        [stmt(LDX | cbpf.IMM, 2), stmt(LD | cbpf.H | IND, base), stmt(RET | cbpf.A)], layout=SOCKET_LAYOUTS["packet"]
    )
    packet = bytes(range(12)) + b"\x88\xb5" + bytes(range(100, 160))
    with kbpf.load_program(filter.to_ebpf(), backend=backend) as program:
        assert program.run(packet).value == (0x6667 if base == cbpf.NET_OFF else 0x0203)


def test_a_compiled_filter_gives_its_snaplen(backend: str) -> None:
    filter = kbpf.compile("udp port 53", link="RAW", snaplen=96)
    udp = b"\x45" + bytes(8) + b"\x11" + bytes(10) + b"\x00\x35\x10\x00" + bytes(20)
    with kbpf.load_program(filter.to_ebpf(), backend=backend) as program:
        assert program.run(bytes(12) + b"\x08\x00" + udp).value == 96
        assert program.run(bytes(12) + b"\x08\x00" + udp[:20] + bytes(20)).value == 0


def test_an_invalid_filter_is_refused() -> None:
    with pytest.raises(kbpf.FilterError, match="last instruction"):
        kbpf.Filter([stmt(LD | cbpf.IMM, 1)]).to_ebpf()
    assert kbpf.Filter([stmt(RET | cbpf.K, 1)]).to_ebpf().instructions[-1].opcode == ebpf.JMP | ebpf.EXIT
