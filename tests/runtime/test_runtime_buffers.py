"""Ring buffers read from memory that a test fills: what a program seldom lets anybody see."""

import errno
import mmap
import struct
from random import Random

import pytest

from kbpf.runtime.buffers import RingBuffer
from kbpf.runtime.records import Run, decoder
from kbpf.uapi.constants import BPF_RINGBUF_BUSY_BIT, BPF_RINGBUF_DISCARD_BIT

PAGE = mmap.PAGESIZE


class Memory:
    """What a backend gives of a ring, and the producer's side of it; as the kernel's data, or as the emulator's."""

    def __init__(self, size, position, twice):
        self.consumer, self.producer = bytearray(PAGE), bytearray(PAGE + (1 + twice) * size)
        self.size, self.twice = size, twice
        self.position = position
        self.consumer[:8] = self.producer[:8] = position.to_bytes(8, "little")
        self.barriers = 0

    def memory_barrier(self):
        def barrier():
            self.barriers += 1

        return barrier

    def map_memory(self, fd, size, offset=0, writable=False):
        if not offset:
            return memoryview(self.consumer)
        if size > len(self.producer):
            raise OSError(errno.EOPNOTSUPP, "")
        return memoryview(self.producer)

    def add(self, fd, writing=False):
        pass

    def close(self, fd):
        pass

    @property
    def consumed(self):
        return int.from_bytes(self.consumer[:8], "little")

    def put(self, position, data):
        for index, byte in enumerate(data):
            at = PAGE + (position + index) % self.size
            self.producer[at] = byte
            if self.twice:
                self.producer[at + self.size] = byte

    def write(self, data, flags=0):
        """A record; returns where it lies."""
        start = self.position
        length = len(data) + 15 & ~7
        assert self.position + length - self.consumed <= self.size
        self.put(start, struct.pack("=II", len(data) | flags, start % 77) + data)
        self.position += length
        self.producer[:8] = self.position.to_bytes(8, "little")
        return start

    def commit(self, start, length, flags=0):
        self.put(start, struct.pack("=I", length | flags))


def read(ring, memory, most=1 << 18):
    runs, events = [], []
    before = memory.consumed
    taken = ring.take(most, runs)
    assert memory.consumed - before == taken
    for run in runs:
        ring.decode(run, events)
    return events


@pytest.fixture(params=[True, False], ids=["mapped twice", "mapped once"])
def twice(request):
    return request.param


def test_a_busy_record_is_waited_for_and_a_discarded_one_skipped(twice):
    memory = Memory(PAGE, 0, twice)
    ring = RingBuffer(memory, 3, PAGE, None, memory)
    memory.write(b"one")
    held = memory.write(b"two", BPF_RINGBUF_BUSY_BIT)
    memory.write(b"three")
    assert read(ring, memory) == [b"one"]
    assert ring.busy
    assert read(ring, memory) == []
    memory.commit(held, 3)
    assert read(ring, memory) == [b"two", b"three"]
    assert not ring.busy
    for flags in (BPF_RINGBUF_DISCARD_BIT, 0, BPF_RINGBUF_DISCARD_BIT, BPF_RINGBUF_DISCARD_BIT):
        memory.write(b"four", flags)
    assert read(ring, memory) == [b"four"]
    assert memory.consumed == memory.position
    held = memory.write(b"five", BPF_RINGBUF_BUSY_BIT)
    memory.commit(held, 4, BPF_RINGBUF_DISCARD_BIT)
    assert read(ring, memory) == []
    assert memory.consumed == memory.position


@pytest.mark.parametrize("position", (0, 8, PAGE - 8, (1 << 32) - 16, (1 << 62) + 40))
def test_random_records_come_as_they_were_written(twice, position):
    rng = Random(position)
    memory = Memory(PAGE, position, twice)
    ring = RingBuffer(memory, 3, PAGE, None, memory)
    wanted, held = [], []
    for step in range(3000):
        size = rng.choice((0, 8, 8, 8, 16, 16, rng.randrange(300)))
        if memory.position + size + 15 - memory.consumed < PAGE:
            data = rng.randbytes(size)
            kind = rng.random()
            if kind < 0.1:
                memory.write(data, BPF_RINGBUF_DISCARD_BIT)
            elif kind < 0.2:
                held.append((memory.write(data, BPF_RINGBUF_BUSY_BIT), size))
                wanted.append((held[-1][0], data))
            else:
                wanted.append((memory.write(data), data))
        if held and rng.random() < 0.3:
            start, size = held.pop(rng.randrange(len(held)))
            flags = rng.choice((0, BPF_RINGBUF_DISCARD_BIT))
            memory.commit(start, size, flags)
            if flags:
                wanted = [entry for entry in wanted if entry[0] != start]
        if rng.random() < 0.3:
            first = min((start for start, _ in held), default=1 << 64)
            limit = rng.choice((1, 100, 1 << 18))
            events = read(ring, memory, limit)
            readable = [data for start, data in wanted if start < first]
            assert events == readable[: len(events)], step
            if limit == 1 << 18:
                assert len(events) == len(readable)
            wanted = wanted[len(events) :]


def test_reading_is_between_barriers(twice):
    """After the position, after the headers, and before the position is given back."""
    memory = Memory(PAGE, 0, twice)
    ring = RingBuffer(memory, 3, PAGE, None, memory)
    memory.write(b"one")
    read(ring, memory)
    assert memory.barriers == 3


def test_one_run_of_many_sizes_of_records():
    decode = decoder("=QQ")
    events = []
    decode(Run(b"".join(bytes(8) + struct.pack("=QQ4xI", n, n + 1, 9) for n in range(5)), 20, 32), events)
    assert events == [(n, n + 1) for n in range(5)]


@pytest.mark.requires("kernel")
def test_barriers_of_the_kernel_backend(monkeypatch):
    import os

    from kbpf.kernel import syscall
    from kbpf.kernel.backend import kernel_backend

    names = list(os.uname())
    assert callable(syscall.full_barrier())
    assert kernel_backend().memory_barrier() is None or names[4] not in ("x86_64", "s390x")
    names[4] = "aarch64"
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(names))
    # libatomic's, where it is installed.
    try:
        barrier, full = kernel_backend().memory_barrier(), syscall.full_barrier()
    except OSError as error:
        assert error.errno == errno.EOPNOTSUPP
        assert "libatomic" in str(error)
    else:
        assert barrier() is None
        assert full() is None
