"""Readers of ring buffers and perf event arrays; every fact holds on both backends."""

import asyncio
import ctypes
import errno
import os
import signal
import struct
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Annotated

import eventcode
import pytest
from eventcode import CB, NUMBERED, TO_PERF, TO_RING, program_of, reserved, ring, sender

import kbpf
from kbpf.emulator.clock import timeline
from kbpf.types import Int, Member, Struct
from kbpf.uapi.constants import BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP

KINDS = pytest.mark.parametrize("code", (TO_RING, TO_PERF), ids=("ring", "perf"))


@pytest.fixture(autouse=True)
def one_processor():
    """Runs stay on one: events of two have no order between them in a perf event array."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {0})
    yield
    os.sched_setaffinity(0, before)


@dataclass
class Event:
    number: Annotated[int, "I"]
    zero: Annotated[int, "I"]
    rest: Annotated[bytes, "8s"]


@dataclass(kw_only=True, frozen=True)
class Named:
    number: Annotated[int, "I"]
    zero: Annotated[int, "I"] = 0


class CEvent(ctypes.Structure):
    _fields_ = (("number", ctypes.c_uint32), ("zero", ctypes.c_uint32), ("rest", ctypes.c_uint64))


U32 = Int(name="u32", size=4)
U64 = Int(name="u64", size=8)
BTF = Struct(
    name="event", size=8, members=(Member(name="number", type=U32), Member(name="zero", type=U32, bit_offset=32))
)


@KINDS
def test_events_come_in_order(backend, code):
    with sender(backend, code) as it, it.map.events("=QQ") as events:
        for number in range(100):
            assert it.send(number) == 0
        assert [events.read(1.0) for _ in range(50)] == [(number, 0) for number in range(50)]
        assert events.read_all() == [(number, 0) for number in range(50, 100)]
        assert events.read_all() == []
        assert events.lost == 0


@KINDS
def test_events_have_the_type_that_is_asked_for(backend, code):
    with sender(backend, code) as it:
        for type, look in (
            ("=II8x", lambda event: event[0]),
            ("Q", lambda event: event),
            (Event, lambda event: event.number),
            (Named, lambda event: event.number),
            (CEvent, lambda event: event.number),
            (BTF, lambda event: event.number),
            (lambda data: int.from_bytes(data[:4], "little"), lambda event: event),
            (None, lambda event: int.from_bytes(event[:8], "little")),
        ):
            with it.map.events(type) as events:
                for number in (7, 8):
                    it.send(number)
                assert [look(event) for event in events.read_all()] == [7, 8]


def test_bytes_of_a_ring_are_what_the_program_gave_and_those_of_perf_rounded_up(backend):
    for code, length in ((TO_RING, lambda size: size), (TO_PERF, lambda size: size + -(size + 4) % 8)):
        with sender(backend, code) as it, it.map.events() as events:
            for size in (0, 1, 7, 8, 9, 12, 13, 200, 255):
                it.send(0x01020304, size)
                (data,) = events.read_all()
                assert len(data) == length(size)
                assert data[: min(size, 4)] == bytes([4, 3, 2, 1])[:size]


@KINDS
def test_a_record_that_is_shorter_than_its_type_raises_once_and_the_others_come(backend, code):
    with sender(backend, code) as it, it.map.events("=QQ") as events:
        for number, size in ((1, 16), (2, 2), (3, 2), (4, 20)):
            it.send(number, size)
        assert events.read() == (1, 0)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"a record of \d bytes where the type has 16"):
                events.read()
        assert events.read() == (4, 0)
        for number, size in ((1, 16), (2, 2), (3, 16)):
            it.send(number, size)
        assert events.read_all() == [(1, 0)]
        with pytest.raises(ValueError, match="where the type has 16"):
            events.read_all()
        assert events.read_all() == [(3, 0)]


def test_what_a_function_raises_comes_in_its_place(backend):
    def parse(data):
        number = int.from_bytes(data[:8], "little")
        if number % 3 == 2:
            raise LookupError(number)
        return number

    with sender(backend, TO_RING) as it, it.map.events(parse) as events:
        for number in range(6):
            it.send(number)
        seen = []
        for _ in range(6):
            try:
                seen.append(events.read(0))
            except LookupError as error:
                seen.append(error.args)
        assert seen == [0, 1, (2,), 3, 4, (5,)]


@KINDS
@pytest.mark.parametrize("at_once", [1, 2, 3, 256])
def test_events_that_are_made_some_at_a_time_are_the_same(backend, code, at_once, monkeypatch):
    monkeypatch.setattr("kbpf.runtime.events._AT_ONCE", at_once)

    def parse(data):
        number = int.from_bytes(data[:8], "little")
        if number % 4 == 2:
            raise LookupError(number)
        return number

    with sender(backend, code) as it, it.map.events(parse) as events:
        for number in range(10):
            it.send(number)
        seen = []
        for _ in range(8):
            try:
                seen.append(events.read(0))
            except LookupError as error:
                seen.append(error.args)
        assert seen == [0, 1, (2,), 3, 4, 5, (6,), 7]
        assert events.read_all() == [8, 9]


@KINDS
def test_the_ring_goes_on_at_its_start(backend, code):
    rng = Random(3)
    with sender(backend, code, 4096) as it, it.map.events(size=4096) as events:
        for _ in range(300):
            sent = [(rng.getrandbits(32), rng.randrange(8, 256)) for _ in range(rng.randrange(1, 8))]
            for number, size in sent:
                assert it.send(number, size) == 0
            assert [int.from_bytes(data[:8], "little") for data in events.read_all()] == [number for number, _ in sent]


def test_what_finds_no_room_in_a_perf_buffer_is_counted(backend):
    with sender(backend, TO_PERF) as it, it.map.events("Q", size=4096) as events:
        results = [it.send(number, 244) for number in range(20)]
        assert results == [0] * 15 + [2**32 - errno.ENOSPC] * 5
        assert events.read_all() == list(range(15))
        # The buffer tells with the next sample that finds room.
        assert events.lost == 0
        it.send(99)
        assert events.read_all() == [99]
        assert events.lost == 5


def test_what_finds_no_room_in_a_ring_is_told_to_the_program_alone(backend):
    with sender(backend, TO_RING, 4096) as it, it.map.events("Q") as events:
        results = [it.send(number, 248) for number in range(20)]
        assert results == [0] * 15 + [2**32 - errno.EAGAIN] * 5
        assert events.read_all() == list(range(15))
        assert it.send(99) == 0
        assert events.read_all() == [99]
        assert events.lost == 0


def test_discarded_records_are_no_events(backend):
    with (
        kbpf.BpfMap.create(ring(4096), backend=backend) as map,
        program_of(backend, reserved("ringbuf_submit"), [map]) as submit,
        program_of(backend, reserved("ringbuf_discard"), [map]) as discard,
        map.events("Q8x") as events,
    ):
        rng, wanted = Random(1), []
        for number in range(1000):
            program = rng.choice((submit, discard))
            context = bytearray(192)
            struct.pack_into("=I", context, CB, number)
            assert program.run(bytes(64), bytes(context)).value == 0
            if program is submit:
                wanted.append(number)
            if rng.random() < 0.1:
                assert events.read_all() == wanted
                wanted = []
        discard.run(bytes(64))
        events.read_all()
        with pytest.raises(TimeoutError):
            events.read(0.0)


@KINDS
def test_deadlines_hold(backend, code):
    with sender(backend, code) as it, it.map.events("Q") as events:
        for timeout in (-1.0, 0.0, 0.05):
            start = time.monotonic()
            with pytest.raises(TimeoutError, match="no event came in"):
                events.read(timeout)
            assert events.read_all(timeout) == []
            assert time.monotonic() - start >= 2 * max(timeout, 0.0)
        it.send(5)
        assert list(events.during(0.05)) == [5]


@KINDS
def test_a_waiting_reader_is_woken(backend, code):
    with sender(backend, code) as it, it.map.events("Q") as events:
        for read in (lambda: events.read(), lambda: events.read_all(None)[0], lambda: next(iter(events))):
            later = threading.Timer(0.05, it.send, (8,))
            later.start()
            assert read() == 8
            later.join()


def slept_on(it, events, **how):
    """Whether a reader that waits for 0.2 seconds finds an event only then. It never misses it."""
    later = threading.Timer(0.05, it.send, (7,), how)
    later.start()
    start = time.monotonic()
    assert events.read(0.2) == 7
    later.join()
    return time.monotonic() - start >= 0.2


def test_wakeups_are_the_programs_choice(backend):
    """Without one a sleeping reader goes on sleeping, and still finds the event at its deadline."""
    with sender(backend, TO_RING) as it, it.map.events("Q") as events:
        # On a busy machine the event may come before the reader sleeps.
        assert any(slept_on(it, events, flags=BPF_RB_NO_WAKEUP) for _ in range(10))
        it.send(2, flags=BPF_RB_NO_WAKEUP)
        assert events.read() == 2
        later = threading.Timer(0.05, it.send, (3, 16, BPF_RB_FORCE_WAKEUP))
        later.start()
        assert events.read() == 3
        later.join()


def test_readers_of_perf_events_can_be_woken_less_often(backend):
    with sender(backend, TO_PERF) as it:
        with it.map.events("Q", wakeup=1000) as events:
            assert any(slept_on(it, events) for _ in range(10))
        with it.map.events("Q", wakeup=3) as events:
            threads = [threading.Timer(0.05, it.send, (5,)) for _ in range(3)]
            for thread in threads:
                thread.start()
            assert [events.read() for _ in range(3)] == [5, 5, 5]
            for thread in threads:
                thread.join()


@contextmanager
def signals(handler, seconds):
    """SIGUSR1 for this thread, again and again."""
    over = threading.Event()
    main = threading.get_ident()

    def send():
        while not over.wait(seconds):
            signal.pthread_kill(main, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handler)
    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        signal.signal(signal.SIGUSR1, before)


@KINDS
def test_signals_do_not_shorten_a_wait_or_make_it_longer_and_their_handlers_run(backend, code):
    ran = []
    with sender(backend, code) as it, it.map.events("Q") as events:
        # Some come at the deadline itself.
        with signals(lambda *_: ran.append(1), 0.005):
            for _ in range(5):
                start = time.monotonic()
                with pytest.raises(TimeoutError):
                    events.read(0.05)
                assert time.monotonic() - start >= 0.05
        assert ran

        waiting = []

        def stop(*_):
            if waiting:
                waiting.clear()
                raise LookupError("stop")

        with pytest.raises(LookupError), signals(stop, 0.05):
            waiting.append(True)
            events.read()
        it.send(4)
        assert events.read() == 4


@KINDS
def test_a_signal_handler_may_close(backend, code):
    def close(*_):
        events.close()

    with sender(backend, code) as it, it.map.events("Q") as events:
        with signals(close, 0.05):
            assert list(events) == []
        assert events.closed


@KINDS
def test_closing_wakes_whoever_waits(backend, code):
    with sender(backend, code) as it:
        events = it.map.events("Q")
        caught = []

        def wait():
            try:
                events.read()
            except kbpf.BpfError as error:
                caught.append(error.errno)

        threads = [threading.Thread(target=wait) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.05)
        events.close()
        for thread in threads:
            thread.join()
        assert caught == [errno.EBADF] * 3
        for use in (events.read, events.read_all, lambda: events.add(it.map)):
            with pytest.raises(kbpf.BpfError, match="closed"):
                use()
        assert list(events) == []
        events.close()


@KINDS
def test_in_asyncio(backend, code):
    async def main(it):
        with it.map.events("Q") as events:
            loop = asyncio.get_running_loop()
            it.send(1)
            seen = [await anext(events)]
            loop.call_later(0.02, it.send, 2)
            seen.append(await anext(events))
            thread = threading.Timer(0.02, it.send, (3,))
            thread.start()
            seen.append(await anext(events))
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(anext(events), 0.02)
            # Two tasks, each with its own events.
            tasks = [asyncio.ensure_future(anext(events)) for _ in range(2)]
            loop.call_later(0.02, it.send, 4)
            loop.call_later(0.04, it.send, 5)
            seen += sorted(await asyncio.gather(*tasks))
            loop.call_later(0.02, events.close)
            seen += [event async for event in events]
            thread.join()
            return seen

    with sender(backend, code) as it:
        assert asyncio.run(main(it)) == [1, 2, 3, 4, 5]


@KINDS
def test_in_a_forked_child_a_reader_is_closed(backend, code):
    with sender(backend, code) as it, it.map.events("Q") as events:
        it.send(1)
        it.send(2)
        assert events.read() == 1
        child = os.fork()
        if not child:
            try:
                events.read(0)
            except kbpf.BpfError as error:
                os._exit(0 if "before the fork" in str(error) else 2)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        it.send(3)
        assert events.read_all() == [2, 3]


def test_a_reader_outlives_its_map_object(backend):
    with sender(backend, TO_RING) as it, it.map.events("Q") as events:
        it.map.close()
        it.send(6)
        assert events.read(1.0) == 6


def test_several_maps_in_one_reader(backend):
    with (
        sender(backend, TO_RING) as one,
        sender(backend, TO_RING) as two,
        sender(backend, TO_PERF) as three,
        one.map.events(lambda data: ("one", data[0])) as events,
    ):
        events.add(two.map, lambda data: ("two", data[0]))
        events.add(three.map, lambda data: ("three", data[0]))
        for number in range(3):
            for it in (one, two, three):
                it.send(number)
        seen = events.read_all()
        assert sorted(seen) == sorted((name, n) for name in ("one", "two", "three") for n in range(3))
        for name in ("one", "two", "three"):
            assert [n for which, n in seen if which == name] == [0, 1, 2]
        for it, name in ((two, "two"), (three, "three"), (one, "one")):
            later = threading.Timer(0.02, it.send, (9,))
            later.start()
            assert events.read() == (name, 9)
            later.join()


def test_only_maps_of_events_are_read(backend):
    spec = kbpf.MapSpec(type="array", key_size=4, value_size=4, max_entries=1)
    with kbpf.BpfMap.create(spec, backend=backend) as map:
        with pytest.raises(TypeError, match="events come from ringbuf and perf_event_array"):
            map.events()
        with pytest.raises(TypeError, match="user space writes to user_ringbuf"):
            map.writer()


def test_processors_and_wakeups_that_cannot_be_are_said(backend):
    with sender(backend, TO_PERF) as it:
        for cpu in (-1, it.map.shape.max_entries):
            with pytest.raises(ValueError, match=f"none for {cpu}"):
                it.map.events(cpus=[0, cpu])
        with pytest.raises(ValueError, match="-1"):
            it.map.events(wakeup=-1)


@KINDS
def test_closing_ends_what_goes_over_events(backend, code):
    with sender(backend, code) as it:
        for going in (iter, lambda events: events.during(60.0)):
            events = it.map.events("Q")
            it.send(1)
            seen = []
            for event in going(events):
                seen.append(event)
                events.close()
            assert seen == [1]
            assert list(going(events)) == []


@KINDS
def test_a_type_that_is_none_is_refused_and_nothing_stays_open(backend, code):
    with sender(backend, code) as it:
        for wrong in (int, "y", "", "0s", object()):
            with pytest.raises((TypeError, ValueError)):
                it.map.events(wrong)
        with it.map.events("Q") as events:
            with pytest.raises(ValueError, match="no format of struct"):
                events.add(it.map, "y")
            it.send(3)
            assert events.read() == 3


def test_the_next_reader_of_a_ring_goes_on_where_the_last_one_stopped(backend):
    with sender(backend, TO_RING, 4096) as it:
        for number in range(100):
            assert it.send(number, 200) == 0
            with it.map.events("Q") as events:
                assert events.read_all() == [number]


@pytest.mark.requires("kernel")
def test_a_reader_that_is_killed_leaves_what_it_has_not_read():
    with sender("kernel", TO_RING, 1 << 20) as it:
        for number in range(5000):
            assert it.send(number) == 0
        child = os.fork()
        if not child:
            for number, event in enumerate(it.map.events("Q")):
                if event != number:
                    os._exit(1)
                if number == 4000:
                    os.kill(os.getpid(), signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert it.send(5000) == 0
        with it.map.events("Q") as events:
            left = events.read_all()
            assert left == list(range(left[0], 5001))


def test_a_frozen_ring_cannot_be_read(backend):
    with kbpf.BpfMap.create(ring(4096), backend=backend) as map:
        map.freeze()
        with pytest.raises(kbpf.PermissionDeniedError, match="the map is frozen"):
            map.events()


def test_a_perf_array_is_free_for_the_next_reader(backend):
    with sender(backend, TO_PERF) as it:
        for number in range(3):
            with it.map.events("Q") as events:
                it.send(number)
                assert events.read_all() == [number]
            assert it.send(number) == 2**32 - errno.ENOENT


@pytest.mark.requires("numpy")
@KINDS
def test_arrays_of_numpy(backend, code):
    import numpy

    with sender(backend, code) as it:
        for type, field in ((Event, "number"), (CEvent, "number"), (BTF, "number"), ("=II8s", "f0"), ("Q", "f0")):
            with it.map.events(type) as events:
                for number in range(5):
                    it.send(number)
                for number, size in ((5, 24), (6, 17)):
                    it.send(number, size)
                array = events.read_array()
                assert array[field].tolist() == list(range(7))
                assert len(events.read_array()) == 0
                it.send(1)
                it.send(2, 1)
                assert events.read_array()[field].tolist() == [1]
                with pytest.raises(ValueError, match="where the type has"):
                    events.read_array()
        with it.map.events() as events:
            it.send(3)
            with pytest.raises(TypeError):
                events.read_array()
            assert events.read_array(dtype=numpy.dtype("<u8")).tolist() == [3]
        with it.map.events("Q") as events:
            for number in range(600):
                it.send(number)
            # What is made of the records already is not in the array.
            assert events.read() == 0
            rest = events.read_array()["f0"].tolist()
            assert rest == list(range(600 - len(rest), 600)) != []
            assert events.read_all() == list(range(1, 600 - len(rest)))


@KINDS
def test_no_wakeup_is_lost_where_each_event_waits_for_the_one_before(backend, code):
    """The reader falls asleep just when the program writes: an event without a wakeup would end the game."""
    rounds = 3000
    os.sched_setaffinity(0, os.sched_getaffinity(os.getppid()))
    turn = threading.Semaphore(0)
    with sender(backend, code) as it, it.map.events("Q") as events:

        def send():
            os.sched_setaffinity(0, {0})
            for number in range(rounds):
                it.send(number)
                turn.acquire()

        thread = threading.Thread(target=send)
        thread.start()
        try:
            for number in range(rounds):
                assert events.read(20.0) == number
                turn.release()
        finally:
            turn.release(rounds)
            thread.join()


def test_threads_share_the_events_and_each_comes_once(backend):
    count = 2000
    with sender(backend, TO_RING, 1 << 18) as it, it.map.events("Q8x") as events:
        seen = [[] for _ in range(4)]

        def read(into):
            try:
                while True:
                    into.append(events.read())
            except kbpf.BpfError:
                pass

        threads = [threading.Thread(target=read, args=(into,)) for into in seen]
        for thread in threads:
            thread.start()
        for number in range(count):
            while it.send(number):
                time.sleep(0.001)
        deadline = time.monotonic() + 30
        while sum(map(len, seen)) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        events.close()
        for thread in threads:
            thread.join()
        assert sorted(number for into in seen for number in into) == list(range(count))
        assert all(into == sorted(into) for into in seen)


@pytest.mark.requires("kernel")
def test_a_million_events_of_two_processors_come_without_loss_and_in_order():
    """Each processor's numbers have no gap, however the two mix."""
    cpus = sorted(os.sched_getaffinity(os.getppid()))[:2]
    counts = kbpf.MapSpec(type="percpu_array", key_size=4, value_size=8, max_entries=1, value_type=U64)
    os.sched_setaffinity(0, cpus)
    each = 1_000_000 // len(cpus)
    with (
        kbpf.Map.create(counts, backend="kernel") as counter,
        sender("kernel", NUMBERED, 1 << 20, [counter]) as it,
        it.map.events("QQ") as events,
    ):

        def send(cpu):
            os.sched_setaffinity(0, {cpu})
            # What finds no room is not numbered, and tried again.
            while (left := each - counter[bytes(4)][cpu]) > 0:
                it.program.run(bytes(64), repeat=min(left, 10_000))

        threads = [threading.Thread(target=send, args=(cpu,)) for cpu in cpus]
        for thread in threads:
            thread.start()
        following = dict.fromkeys(cpus, 0)
        for _ in range(each * len(cpus)):
            cpu, number = events.read(60.0)
            assert number == following[cpu]
            following[cpu] += 1
        for thread in threads:
            thread.join()
        assert events.read_all() == []


@pytest.fixture
def restless():
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("restless")
def test_emulated_programs_of_two_threads_send_at_the_same_time():
    each = 2000
    with sender("emulator", TO_RING, 4096) as it, it.map.events("=II8x") as events:

        def send(thread):
            for number in range(each):
                while it.send(thread << 24 | number):
                    time.sleep(0)

        threads = [threading.Thread(target=send, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        seen = [events.read(60.0)[0] for _ in range(2 * each)]
        for thread in threads:
            thread.join()
        for thread in range(2):
            assert [number & 0xFFFFFF for number in seen if number >> 24 == thread] == list(range(each))


@pytest.mark.requires("kernel")
@KINDS
def test_random_use_is_the_same_on_both_backends(code):
    for seed in range(20):
        outcomes = []
        for backend in ("kernel", "emulator"):
            rng, seen = Random(seed), []
            with sender(backend, code, 4096) as it, it.map.events(size=4096) as events:
                for _ in range(200):
                    action = rng.randrange(10)
                    if action < 7:
                        size, flags = rng.choice((0, 1, 8, 16, 16, 16, 100, 255)), rng.choice((0, 1, 2, 3, 4))
                        seen.append(it.send(rng.getrandbits(32), size, flags if code is TO_RING else 0))
                    elif action == 7:
                        seen.append(events.read_all())
                    elif action == 8:
                        try:
                            seen.append(events.read(0))
                        except TimeoutError:
                            seen.append("nothing")
                    else:
                        seen.append(events.lost)
                seen.append(events.read_all())
            outcomes.append(seen)
        assert outcomes[0] == outcomes[1], seed


def test_a_record_that_is_being_written_holds_up_those_behind_it():
    """The emulated program reads in the middle of its run, from where it prints."""
    format = b"now\0".ljust(8, b"\0")
    printing = [
        eventcode.mov(1, int.from_bytes(format[:4], "little")), eventcode.store(eventcode.FP, -8, 1),
        eventcode.copy(1, eventcode.FP), eventcode.add(1, -8), eventcode.mov(2, 4), eventcode.call("trace_printk"),
    ]  # fmt: skip
    environment = kbpf.emulator.environment
    seen = []
    with (
        kbpf.BpfMap.create(ring(4096), backend="emulator") as map,
        program_of("emulator", reserved("ringbuf_submit", between=printing), [map]) as program,
        program_of("emulator", TO_RING, [map]) as other,
        map.events("Q8x") as events,
    ):

        def in_the_middle(_):
            context = bytearray(192)
            struct.pack_into("=III", context, CB, 2, 16, 0)
            other.run(bytes(64), bytes(context))
            seen.append(events.read_all(0.03))

        environment.trace, before = in_the_middle, environment.trace
        try:
            context = bytearray(192)
            struct.pack_into("=I", context, CB, 1)
            program.run(bytes(64), bytes(context))
        finally:
            environment.trace = before
        assert seen == [[]]
        assert events.read_all() == [1, 2]


def test_time_of_the_emulated_machine_passes_for_whoever_waits():
    async def first(events):
        return await anext(events)

    clock = kbpf.emulator.environment.clock
    with sender("emulator", TO_RING) as it, it.map.events("Q8x") as events:
        timeline.at(clock() + 20_000_000, lambda: it.send(1))
        assert events.read() == 1
        timeline.at(clock() + 20_000_000, lambda: it.send(2))
        assert asyncio.run(first(events)) == 2
        timeline.at(clock(), lambda: it.send(3))
        assert events.read_all() == [3]
