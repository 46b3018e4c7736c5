"""Counters that programs read through a perf event array, against software events of the kernel."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator

import pytest
from mapcode import Code, attempt, call, copy, made, main, mov, put, run, stack, the_map
from sides import Side
from test_emulator_maps_output import perf_event

from kbpf.emulator import environment
from kbpf.emulator.backend import EmulatorBackend
from kbpf.emulator.maps.perf import PerfReading
from kbpf.errors import EmulationFault
from kbpf.isa import ebpf
from kbpf.isa.ebpf import ld_imm64
from kbpf.specs import MapSpec

pytestmark = pytest.mark.requires("kernel")

EVENTS = MapSpec(type="perf_event_array", key_size=4, value_size=4, max_entries=3)
READING = MapSpec(type="array", key_size=4, value_size=32, max_entries=1)
UNSET = b"\xee" * 32
#: PERF_TYPE_SOFTWARE; PERF_COUNT_SW_DUMMY, which counts nothing.
SOFTWARE, DUMMY = 1, 9
_SYS_PERF_EVENT_OPEN = 298


def counter(process: int, cpu: int) -> int:
    """A descriptor of an event that counts nothing, of a process (0: this one) or of a processor."""
    attribute = struct.pack("=IIQQQQ", SOFTWARE, 128, DUMMY, 0, 0, 0).ljust(128, b"\0")
    fd = int(ctypes.CDLL(None, use_errno=True).syscall(_SYS_PERF_EVENT_OPEN, attribute, process, cpu, -1, 8))
    assert fd >= 0, os.strerror(ctypes.get_errno())
    return fd


@pytest.fixture(autouse=True)
def first_processor() -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {0})
    yield
    os.sched_setaffinity(0, before)


class Events:
    """An array of events and a place for a reading on each side, with the same events in both."""

    def __init__(self, kernel: Side, emulator: Side, kernel_maps: tuple[int, ...], maps: tuple[int, ...]) -> None:
        self.each = ((kernel, kernel_maps), (emulator, maps))
        backend = emulator.backend
        assert isinstance(backend, EmulatorBackend)
        nothing = PerfReading(0, 7, 7)
        self.real = {"cpu": counter(-1, 0), "process": counter(0, -1), "buffer": perf_event(0)}
        self.emulated = {
            "cpu": backend.perf_counter(lambda: nothing, 0),
            "process": backend.perf_counter(lambda: nothing),
            "buffer": backend.perf_buffer(0, 1),
        }
        if os.cpu_count() != 1:
            self.real["other cpu"] = counter(-1, 1)
            self.emulated["other cpu"] = backend.perf_counter(lambda: nothing, 1)

    def put(self, name: str) -> None:
        for (side, maps), fds in zip(self.each, (self.real, self.emulated), strict=True):
            side.backend.map_update(maps[0], bytes(4), struct.pack("=I", fds[name]))

    def results(self, program: Code) -> list[tuple[int, bytes]]:
        """R0 on each side, and what the reading is: what was counted, and what lies behind."""
        out = []
        for side, maps in self.each:
            side.backend.map_update(maps[1], bytes(4), UNSET)
            value = run(side, program, maps)
            reading = side.backend.map_lookup(maps[1], bytes(4), 32)
            times = struct.unpack("=QQ", reading[8:24])
            out.append((value, reading[:8] + reading[24:] + bytes(time > 0 for time in times)))
        return out

    def close(self) -> None:
        for fd in self.real.values():
            os.close(fd)
        for fd in self.emulated.values():
            self.each[1][0].backend.close(fd)


@pytest.fixture
def events(kernel: Side, emulator: Side) -> Iterator[Events]:
    with made(kernel, EVENTS, READING) as one, made(emulator, EVENTS, READING) as other:
        events = Events(kernel, emulator, one, other)
        yield events
        events.close()


def read(index: int) -> Code:
    return main(the_map(1), [*ld_imm64(2, index & 2**64 - 1)], call("perf_event_read"))


def read_value(index: int, size: int = 24) -> Code:
    reading = ld_imm64(3, 1, ebpf.PSEUDO_MAP_IDX_VALUE)
    body = [*the_map(1), *ld_imm64(2, index & 2**64 - 1), *reading, *mov(4, size), *call("perf_event_read_value")]
    return main(body)


@pytest.mark.parametrize("name", ("cpu", "process", "other cpu", "buffer"))
def test_what_may_be_read_from_here(events: Events, name: str) -> None:
    if name not in events.real:
        pytest.skip("a second processor")
    events.put(name)
    for program in (read(0), read(0xFFFFFFFF), read_value(0), read_value(0xFFFFFFFF)):
        one, other = events.results(program)
        assert other == one


@pytest.mark.parametrize("index", (1, 2, 3, 0xFFFFFFFE, 1 << 32, 1 << 63, -1))
def test_other_indices_and_flags(events: Events, index: int) -> None:
    events.put("cpu")
    for program in (read(index), read_value(index)):
        one, other = events.results(program)
        assert other == one


@pytest.mark.parametrize("size", (1, 8, 16, 23, 24, 25, 32))
def test_the_size_of_a_reading(events: Events, size: int) -> None:
    events.put("cpu")
    one, other = events.results(read_value(0, size))
    assert other == one


def test_nobody_writes_to_a_counter(events: Events) -> None:
    events.put("cpu")
    output = main(put(-8, 0), copy(1, 9), the_map(2), mov(3, 0), stack(4, -8), mov(5, 8), call("perf_event_output"))
    one, other = events.results(output)
    assert other == one


def test_a_counter_says_what_the_test_gives_it(emulator: Side) -> None:
    backend = emulator.backend
    assert isinstance(backend, EmulatorBackend)
    with made(emulator, EVENTS, READING) as maps:
        readings = [PerfReading(5, 100, 60), PerfReading(2**64 - 1, 2**64 + 1, 3)]
        fd = backend.perf_counter(lambda: readings[0])
        backend.map_update(maps[0], bytes(4), struct.pack("=I", fd))
        assert run(emulator, read(0), maps) == 5
        readings.pop(0)
        assert run(emulator, read_value(0), maps) == 0
        assert struct.unpack("=QQQ", backend.map_lookup(maps[1], bytes(4), 32)[:24]) == (2**64 - 1, 1, 3)
        assert attempt(lambda: backend.map_memory(fd, 4096)) == ("ENODEV", None)
        backend.close(fd)


def test_counters_of_a_processor_are_read_there(emulator: Side) -> None:
    backend = emulator.backend
    assert isinstance(backend, EmulatorBackend)
    with made(emulator, EVENTS, READING) as maps:
        fd = backend.perf_counter(lambda: PerfReading(5, 1, 1), 1)
        backend.map_update(maps[0], bytes(4), struct.pack("=I", fd))
        assert run(emulator, read(0), maps) == 2**64 - 22
        environment.cpu = 1
        try:
            assert run(emulator, read(0), maps) == 5
        finally:
            environment.cpu = 0
        backend.close(fd)


def test_other_maps_have_no_counters(emulator: Side) -> None:
    with made(emulator, READING, READING) as maps:
        for program in (read(0), read_value(0)):
            with pytest.raises(EmulationFault):
                run(emulator, program, maps)
