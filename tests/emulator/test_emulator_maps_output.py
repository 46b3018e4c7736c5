"""Ring buffers and perf event arrays: what programs hand to user space, against the kernel's memory byte for byte."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Iterator
from random import Random

import pytest
from mapcode import Code, attempt, call, copy, made, main, mov, put, run, stack, the_map, unless_null
from sides import FRAME, Side

from kbpf.emulator.backend import EmulatorBackend
from kbpf.errors import EmulationFault
from kbpf.isa.ebpf import ld_imm64
from kbpf.specs import MapSpec, ProgramSpec
from kbpf.uapi import constants as uapi

pytestmark = pytest.mark.requires("kernel")

PAGE = mmap.PAGESIZE
RING = MapSpec(type="ringbuf", max_entries=PAGE)


def output(size: int, flags: int = 0) -> Code:
    return main(
        *[put(offset, offset) for offset in range(-512, -512 + (size + 7 & ~7), 8)],
        the_map(1),
        stack(2, -512),
        mov(3, size),
        mov(4, flags),
        call("ringbuf_output"),
    )


def reserve(size: int, commit: str, flags: int = 0) -> Code:
    """R0 becomes 1 where there was room."""
    fill = [*put(0, size, 6)] if size >= 8 else []
    use = [*copy(6, 0), *fill, *copy(1, 6), *mov(2, 0), *call(commit), *mov(0, 1)]
    return main(the_map(1), mov(2, size), mov(3, flags), call("ringbuf_reserve"), unless_null(0, use))


def hold_two(first: str, second: str) -> Code:
    """Two records at once; the second is committed first."""
    inner = [*copy(7, 0), *put(0, 77, 7), *copy(1, 7), *mov(2, 0), *call(second)]
    body = [
        *copy(6, 0),
        *put(8, 66, 6),
        *the_map(1),
        *mov(2, 24),
        *mov(3, 0),
        *call("ringbuf_reserve"),
        *unless_null(0, inner),
        *copy(1, 6),
        *mov(2, 0),
        *call(first),
    ]
    return main(the_map(1), mov(2, 16), mov(3, 0), call("ringbuf_reserve"), unless_null(0, body), mov(0, 0))


def query(what: int) -> Code:
    return main(the_map(1), mov(2, what), call("ringbuf_query"))


class Rings:
    """The same ring on both sides, and a consumer."""

    def __init__(self, sides: tuple[Side, Side], fds: tuple[int, int]) -> None:
        self.sides = sides
        self.fds = fds
        self.consumers = [s.backend.map_memory(fd, PAGE, 0, True) for s, fd in zip(sides, fds, strict=True)]
        self.producers = [s.backend.map_memory(fd, 2 * PAGE, PAGE) for s, fd in zip(sides, fds, strict=True)]

    def both(self, program: Code) -> int:
        """What a program gives, after which memory is alike."""
        kernel, emulator = (run(side, program, [fd]) for side, fd in zip(self.sides, self.fds, strict=True))
        assert emulator == kernel
        assert self.producers[1][:8] == self.producers[0][:8]
        assert self.producers[1][PAGE:] == self.producers[0][PAGE:]
        return kernel

    def consume(self, position: int) -> None:
        for consumer in self.consumers:
            consumer[:8] = position.to_bytes(8, "little")

    def close(self) -> None:
        for view in (*self.consumers, *self.producers):
            view.release()


@pytest.fixture
def rings(kernel: Side, emulator: Side) -> Iterator[Rings]:
    with made(kernel, RING) as (one,), made(emulator, RING) as (other,):
        both = Rings((kernel, emulator), (one, other))
        yield both
        both.close()


def test_records_lie_in_memory_as_in_the_kernel(rings: Rings) -> None:
    for size in (0, 1, 8, 13, 200):
        rings.both(output(size))
    for commit in ("ringbuf_submit", "ringbuf_discard"):
        for size in (1, 8, 100):
            rings.both(reserve(size, commit))
    for first in ("ringbuf_submit", "ringbuf_discard"):
        rings.both(hold_two(first, "ringbuf_discard"))


def test_a_full_ring_takes_nothing_until_user_space_reads(rings: Rings) -> None:
    results = [rings.both(output(504)) for _ in range(9)]
    assert results[-2:] == [2**64 - 11] * 2
    rings.consume(512)
    assert [rings.both(output(504)) for _ in range(2)] == [0, 2**64 - 11]
    for size in (PAGE - 8, PAGE - 7, PAGE, 1 << 30, (1 << 30) - 1):
        rings.both(reserve(size, "ringbuf_submit"))
    rings.consume(8 * 512)
    for size in (PAGE - 16, PAGE - 8):
        rings.both(reserve(size, "ringbuf_submit"))


def test_flags_and_queries(rings: Rings) -> None:
    for flags in range(6):
        rings.both(output(8, flags))
        rings.both(reserve(8, "ringbuf_submit", flags))
    rings.consume(16)
    assert [rings.both(query(what)) for what in range(6)][1] == PAGE


def test_random_use_of_a_ring(rings: Rings) -> None:
    rng = Random(5)
    consumed = 0
    for _ in range(150):
        kind = rng.randrange(4)
        size = rng.randrange(500)
        if kind == 0:
            rings.both(output(size))
        elif kind == 1:
            rings.both(reserve(size + 1, rng.choice(("ringbuf_submit", "ringbuf_discard"))))
        elif kind == 2:
            rings.both(hold_two(*(rng.choice(("ringbuf_submit", "ringbuf_discard")) for _ in range(2))))
        else:
            produced = int.from_bytes(rings.producers[0][:8], "little")
            consumed = rng.randrange(consumed, produced + 1, 8)
            rings.consume(consumed)


def test_what_may_be_mapped(kernel: Side, emulator: Side) -> None:
    with made(kernel, RING) as (one,), made(emulator, RING) as (other,):

        def mapped(side: Side, fd: int, size: int, offset: int, writable: bool) -> object:
            return attempt(lambda: len(side.backend.map_memory(fd, size, offset, writable)))

        # Linux maps the data twice; the emulator refuses to, by name.
        for size, offset in ((PAGE, 0), (PAGE, PAGE), (2 * PAGE, 0), (2 * PAGE, PAGE), (3 * PAGE, 0), (5 * PAGE, 0)):
            if offset + size != 4 * PAGE:
                for writable in (False, True):
                    assert mapped(emulator, other, size, offset, writable) == mapped(
                        kernel, one, size, offset, writable
                    ), (size, offset, writable)


# Perf events.

_SYS_PERF_EVENT_OPEN = {"x86_64": 298, "aarch64": 241}[os.uname().machine]
#: PERF_TYPE_SOFTWARE, the attribute's size, PERF_COUNT_SW_BPF_OUTPUT; PERF_SAMPLE_RAW.
_ATTRIBUTE = struct.pack("=IIQQQ", 1, 112, 10, 1, 1 << 10).ljust(112, b"\0")
_PERF_EVENT_IOC_ENABLE = 0x2400


def perf_event(cpu: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    fd = int(libc.syscall(_SYS_PERF_EVENT_OPEN, _ATTRIBUTE, -1, cpu, -1, 8))
    assert fd >= 0, os.strerror(ctypes.get_errno())
    libc.ioctl(fd, _PERF_EVENT_IOC_ENABLE, 0)
    return fd


def perf_output(index: int, size: int, packet: int = 0) -> Code:
    flags = packet << 32 | index & 2**64 - 1
    return main(
        *[put(offset, offset) for offset in range(-512, -512 + (size + 7 & ~7), 8)],
        copy(1, 9),
        the_map(2),
        [*ld_imm64(3, flags & 2**64 - 1)],
        stack(4, -512),
        mov(5, size),
        call("perf_event_output"),
    )


class Buffers:
    """A perf event array and a buffer for the first processor on each side; runs stay on that processor."""

    def __init__(self, kernel: Side, emulator: Side, fds: tuple[int, int]) -> None:
        assert isinstance(emulator.backend, EmulatorBackend)
        self.sides, self.fds = (kernel, emulator), fds
        self.real = perf_event(0)
        self.memory = mmap.mmap(self.real, 2 * PAGE)
        self.emulated = emulator.backend.perf_buffer(0, 1)
        self.view = emulator.backend.map_memory(self.emulated, 2 * PAGE, 0, True)

    def both(self, program: Code) -> int:
        kernel, emulator = (run(side, program, [fd]) for side, fd in zip(self.sides, self.fds, strict=True))
        assert emulator == kernel
        assert self.view[1024:1056] == self.memory[1024:1056]
        assert self.normal(bytes(self.view[PAGE:])) == self.normal(self.memory[PAGE:])
        return kernel

    def normal(self, data: bytes) -> bytes:
        """The data with the id of lost records left out: that is the kernel's choice."""
        out = bytearray(data)
        head, at = struct.unpack_from("=QQ", self.view, 1024)
        while at < head:
            kind, _, size = struct.unpack_from("=IHH", data, at % PAGE)
            if kind == 2:
                out[at % PAGE + 8 : at % PAGE + 16] = bytes(8)
            at += size
        return bytes(out)

    def read(self, upto: int) -> None:
        self.memory[1032:1040] = self.view[1032:1040] = upto.to_bytes(8, "little")

    def close(self) -> None:
        self.memory.close()
        os.close(self.real)
        self.sides[1].backend.close(self.emulated)


@pytest.fixture
def buffers(kernel: Side, emulator: Side) -> Iterator[Buffers]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {0})
    spec = MapSpec(type="perf_event_array", key_size=4, value_size=4, max_entries=2)
    with made(kernel, spec) as (one,), made(emulator, spec) as (other,):
        both = Buffers(kernel, emulator, (one, other))
        yield both
        both.close()
    os.sched_setaffinity(0, before)


def place(buffers: Buffers, index: int) -> None:
    for side, fd, event in zip(buffers.sides, buffers.fds, (buffers.real, buffers.emulated), strict=True):
        side.backend.map_update(fd, struct.pack("=I", index), struct.pack("=I", event))


def test_perf_samples_lie_in_memory_as_in_the_kernel(buffers: Buffers) -> None:
    assert buffers.both(perf_output(0, 8)) == 2**64 - 2
    place(buffers, 0)
    for size in (0, 1, 8, 13):
        buffers.both(perf_output(0, size))
    for packet in (1, 7, 64, len(FRAME) - 14, len(FRAME), 0xFFFFF):
        buffers.both(perf_output(0, 8, packet))
    for index in (1, 2, 77, 0xFFFFFFFF, -1):
        buffers.both(perf_output(index, 8))


def test_perf_samples_that_find_no_room_are_counted(buffers: Buffers) -> None:
    place(buffers, 0)
    results = [buffers.both(perf_output(0, 500)) for _ in range(10)]
    assert results[-1] == 2**64 - 28
    buffers.read(512)
    buffers.both(perf_output(0, 300))
    buffers.both(perf_output(0, 300))


def test_a_buffer_goes_with_the_descriptor_it_was_put_in_by(kernel: Side, emulator: Side) -> None:
    assert isinstance(emulator.backend, EmulatorBackend)
    for flags, kept in ((0, False), (uapi.BPF_F_PRESERVE_ELEMS, True)):
        spec = MapSpec(type="perf_event_array", key_size=4, value_size=4, max_entries=2, flags=flags)
        for side in (kernel, emulator):
            event = perf_event(0) if side is kernel else emulator.backend.perf_buffer(0, 1)
            with made(side, spec) as (fd,):
                other = side.backend.open_by_id("map", side.backend.map_info(fd).id)
                side.backend.map_update(other, bytes(4), struct.pack("=I", event))
                side.backend.close(other)
                assert attempt(lambda: side.backend.map_delete(fd, bytes(4))) == (  # noqa: B023
                    None if kept else ("ENOENT", None)
                )
            os.close(event) if side is kernel else emulator.backend.close(event)


def test_a_program_array_is_emptied_when_user_space_lets_it_go(kernel: Side, emulator: Side) -> None:
    """Programs that hold it go on, and find nothing in it."""
    spec = MapSpec(type="prog_array", key_size=4, value_size=4, max_entries=1)
    tail = [*copy(9, 1), *the_map(2), *mov(3, 0), *call("tail_call"), *mov(0, 1), *main(mov(0, 1))[-2:]]
    for side in (kernel, emulator):
        with made(side, spec) as (fd,):
            target = side.backend.program_load(ProgramSpec(instructions=tuple(main(mov(0, 5)))), [])
            program = side.backend.program_load(ProgramSpec(instructions=tuple(tail)), [fd])
            side.backend.map_update(fd, bytes(4), struct.pack("=I", target))
            assert side.backend.program_run(program, FRAME, bytes(192)).context[48] == 5
        if side is emulator:
            assert side.backend.program_run(program, FRAME, bytes(192)).context[48] == 0
        for each in (target, program):
            side.backend.close(each)


def test_a_record_that_is_kept_is_a_fault_and_no_obstacle(emulator: Side) -> None:
    keep = main(the_map(1), mov(2, 16), mov(3, 0), call("ringbuf_reserve"))
    with made(emulator, RING) as (fd,):
        with pytest.raises(EmulationFault, match="reserved record"):
            run(emulator, keep, [fd])
        assert run(emulator, output(8), [fd]) == 0
        data = emulator.backend.map_memory(fd, PAGE, 2 * PAGE)
        assert int.from_bytes(data[:4], "little") == 16 | uapi.BPF_RINGBUF_DISCARD_BIT
