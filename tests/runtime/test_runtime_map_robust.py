"""Maps under fire: many at once, signals, forks, descriptors and pins that go away, writers that are killed."""

from __future__ import annotations

import contextlib
import errno
import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import kbpf
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.runtime.backends import get_backend
from kbpf.uapi.constants import BPF_F_NO_PREALLOC

KERNEL = pytest.mark.requires("kernel")
SPEC = kbpf.MapSpec(type="hash", max_entries=1000, name="robust")


def of(backend, type="hash", max_entries=1000, key="I", value="Q", **spec):
    spec = kbpf.MapSpec(type=type, max_entries=max_entries, **spec)
    return kbpf.Map.create(spec, backend, key=key, value=value)


class Threads:
    """Functions that run over and over, each in a thread, until the block ends; what they raise comes out there."""

    def __init__(self, *functions: Callable[[], object]) -> None:
        self.stop = threading.Event()
        self.errors: list[BaseException] = []
        self.rounds = [0] * len(functions)
        self.threads = [threading.Thread(target=self.loop, args=item) for item in enumerate(functions)]

    def loop(self, number: int, function: Callable[[], object]) -> None:
        try:
            while not self.stop.is_set():
                function()
                self.rounds[number] += 1
        except BaseException as error:
            self.errors.append(error)

    def __enter__(self) -> Threads:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()
        if self.errors:
            raise self.errors[0]
        assert all(self.rounds)


def churn(map: kbpf.Map, keys: range) -> Callable[[], None]:
    """Stores and deletes some of the keys, whose values are their doubles."""
    rng = random.Random(f"{keys}")

    def once() -> None:
        some = rng.sample(keys, 20)
        map.update_many({key: 2 * key for key in some})
        map.delete_many(some[:15])

    return once


def read_until(rounds: int, threads: Threads, look: Callable[[], None]) -> None:
    """Look again and again until every thread has been through some rounds."""
    while not threads.errors and min(threads.rounds) < rounds:
        look()


@pytest.mark.parametrize("type", ["hash", "lru_hash", "hash without batches"])
def test_a_snapshot_has_what_stays_while_others_come_and_go(backend, type, monkeypatch):
    if type.endswith("batches"):

        def refused(*_: object, **__: object) -> None:
            raise OSError(errno.EINVAL, "")

        for command in ("map_lookup_batch", "map_update_batch", "map_delete_batch"):
            monkeypatch.setattr(kbpf.runtime.backends.get_backend(backend).__class__, command, refused)
    stays = range(100)
    with of(backend, type.split()[0], 4000) as map:
        map.update_many({key: 2 * key for key in stays})

        def look() -> None:
            found = map.snapshot()
            assert all(value == 2 * key for key, value in found.items())
            if found.complete:
                assert found.keys() >= set(stays)
            for key, value in map.items():
                assert value == 2 * key
            assert len(list(map)) >= len(stays) or not found.complete

        with Threads(churn(map, range(1000, 1200)), churn(map, range(2000, 2200))) as threads:
            read_until(20, threads, look)


def test_threads_share_a_map(backend):
    with of(backend) as map:

        def writer(start: int) -> Callable[[], None]:
            def once() -> None:
                for key in range(start, start + 50):
                    map[key] = key * 3
                    assert map[key] == key * 3
                    assert map.pop(key) == key * 3

            return once

        with Threads(*(writer(start) for start in (0, 100, 200, 300))) as threads:
            read_until(5, threads, lambda: time.sleep(0.001))
        assert len(map) == 0


@pytest.fixture
def restless():
    """Threads take turns as often as the interpreter lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("type", ["hash", "lru_hash", "percpu_hash", "lpm_trie"])
def test_threads_leave_a_map_whole(backend, type, restless):
    """Each key has one value ever; afterwards walking and looking up find the same, and there is room for all."""
    trie = type == "lpm_trie"
    more = {"key": None, "key_size": 8, "flags": BPF_F_NO_PREALLOC} if trie else {}

    def key(number):
        return (32, number.to_bytes(4, "big")) if trie else number

    def number(key):
        return int(key.network_address) if trie else key

    with of(backend, type, 64, **more) as map:
        slots = len(map.value_codec.decode(bytes(map.value_codec.size))) if map.per_cpu else 0

        def value(number):
            return (number,) * slots if slots else number

        def churn(seed, rounds=600):
            rng = random.Random(seed)
            for _ in range(rounds):
                with contextlib.suppress(kbpf.MapFullError):
                    one = rng.randrange(100)
                    map[key(one)] = value(one)
                one = rng.randrange(100)
                assert map.get(key(one)) in (None, value(one))
                with contextlib.suppress(KeyError):
                    del map[key(rng.randrange(100))]
                if rng.random() < 0.1:
                    assert all(found == value(number(one)) for one, found in map.snapshot().items())

        failed = []

        def run(seed):
            try:
                churn(seed)
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failed == []
        walked = sorted(number(one) for one in map)
        assert walked == [one for one in range(100) if key(one) in map]
        map.clear()
        if type != "lru_hash":
            map.update_many({key(one): value(one) for one in range(64)})
            assert all(map[key(one)] == value(one) for one in range(64))


def test_increments_of_threads_add_up(backend):
    with of(backend) as map:

        def add() -> None:
            for _ in range(100):
                map.increment(1)
                map.increment(2, 3)

        threads = [threading.Thread(target=add) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert map.snapshot() == {1: 400, 2: 1200}


@KERNEL
def test_increments_of_processes_and_programs_add_up():
    """A program adds to the value too, by the instruction that compilers make of __sync_fetch_and_add."""
    with of("kernel", "array", 1, key=None, key_size=4) as map:
        code = (
            *ebpf.ld_imm64(1, 0, ebpf.PSEUDO_MAP_IDX_VALUE),
            Instruction(ebpf.ALU64 | ebpf.MOV, 0, imm=1),
            Instruction(ebpf.STX | ebpf.ATOMIC | ebpf.DW, 1, 0, 0, ebpf.ADD),
            Instruction(ebpf.JMP | ebpf.EXIT),
        )
        wanted = kbpf.MapSpec(type="array", key_size=4, value_size=8, max_entries=1)
        spec = kbpf.ProgramSpec(instructions=code, maps=(wanted,))

        def add() -> None:
            for _ in range(2000):
                map.increment(0)

        with kbpf.load_program(spec, [map], "kernel") as program:
            process = multiprocessing.get_context("fork").Process(target=add)
            process.start()
            program.run(bytes(64), repeat=200_000)
            add()
            process.join()
        assert (process.exitcode, map[0]) == (0, 204_000)


def test_a_full_map_refuses_each_thread_and_goes_on(backend):
    with of(backend, max_entries=10) as map:
        full = []

        def fill() -> None:
            for key in range(100):
                try:
                    map[key] = 1
                except kbpf.MapFullError:
                    full.append(key)
            map.delete_many(range(100))

        with Threads(fill, fill) as threads:
            read_until(5, threads, lambda: time.sleep(0.001))
        assert full
        map.clear()
        map.update_many(dict.fromkeys(range(10), 1))
        assert len(map) == 10


def test_signals_interrupt_nothing(backend):
    """The handler uses the map, too, in the middle of what the program does with it."""
    with of(backend) as map:
        seen: list[tuple[int, int]] = []
        numbers = itertools.count(1000)

        def handle(*_: object) -> None:
            # Another signal may come in the middle of this one.
            number = next(numbers)
            map[number] = 2 * number
            seen.append((map.pop(number), 2 * number))

        started = time.perf_counter()
        handle()
        # A slow machine must come to something between two signals.
        interval = max(0.001, 10 * (time.perf_counter() - started))
        before = signal.signal(signal.SIGALRM, handle)
        signal.setitimer(signal.ITIMER_REAL, interval, interval)
        try:
            while len(seen) < 50:
                map.update_many({key: key for key in range(100)})
                assert all(map[key] == key for key in range(100))
                assert map.snapshot().keys() >= set(range(100))
                assert map.delete_many(range(100)) == 100
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert all(found == stored for found, stored in seen)


def test_a_watch_keeps_its_times_while_signals_come(backend):
    with of(backend) as map:
        before = signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
        try:
            start = time.monotonic()
            assert len(list(map.watch(0.03, count=3))) == 3
            assert time.monotonic() - start >= 0.09
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


@KERNEL
def test_a_fork_shares_the_map_and_closes_its_own_descriptor():
    with of("kernel") as map:
        map[1] = 1

        def child() -> None:
            assert map[1] == 1
            map[2] = 22
            map.increment(3)
            map.close()

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join()
        assert (process.exitcode, map.snapshot()) == (0, {1: 1, 2: 22, 3: 1})


@KERNEL
def test_mapped_memory_is_shared_with_a_fork():
    with of("kernel", "array", 4, key=None, key_size=4, flags=1024) as map:
        view = map.view(writable=True)

        def child() -> None:
            view[2] = 7

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join()
        assert (process.exitcode, view[2], map[2]) == (0, 7, 7)


class Closing:
    """A number that closes a map while it is being packed, as another thread may; others are made meanwhile."""

    def __init__(self, map: kbpf.Map, others: contextlib.ExitStack) -> None:
        self.map, self.others = map, others

    def __index__(self) -> int:
        self.map.close()
        # Of values that the buffers of the first have no room for.
        other = self.others.enter_context(of(self.map.backend, value="9999s"))
        other[1] = bytes(9999)
        return 1


@pytest.mark.parametrize(
    "use",
    [
        lambda map, one: map[one],
        lambda map, one: map.__setitem__(one, 5),
        lambda map, one: map.__setitem__(1, one),
        lambda map, one: map.__delitem__(one),
        lambda map, one: map.with_types(value="q")[one],
    ],
)
def test_closing_waits_for_what_another_is_just_doing(backend, use):
    """Else the number would be another map's by then, whose values are longer than the room for them."""
    map = of(backend)
    map[1] = 7
    with kbpf.Map.open(fd=map.fileno(), backend=backend, key="I", value="Q") as same, contextlib.ExitStack() as others:
        descriptor = map.fileno()
        assert use(map, Closing(map, others)) in (7, None)
        assert map.closed
        assert same.get(1) in (7, 5, 1, None)
        with pytest.raises(kbpf.BpfError):
            map[1]
        # And then the number is free.
        with pytest.raises(kbpf.BpfError) as refused:
            kbpf.BpfMap.open(fd=descriptor, backend=backend).close()
        assert refused.value.errno == errno.EBADF


def test_closing_a_program_waits_for_its_run(backend, monkeypatch):
    """Else the number could be another program's when it is run."""
    code = (Instruction(ebpf.ALU64 | ebpf.MOV, 0, imm=7), Instruction(ebpf.JMP | ebpf.EXIT))
    program = kbpf.load_program(kbpf.ProgramSpec(type="socket_filter", instructions=code), backend=backend)
    known = type(get_backend(backend))
    whole = known.program_run

    def closing(self, *given):
        program.close()
        return whole(self, *given)

    monkeypatch.setattr(known, "program_run", closing)
    assert program.run(bytes(64)).value == 7
    assert program.closed
    with pytest.raises(kbpf.BpfError, match="closed"):
        program.run(bytes(64))


@KERNEL
def test_a_map_is_closed_while_threads_read_it():
    """With numbers that become those of maps with longer values, this ended the interpreter."""
    for _ in range(20):
        map = of("kernel", max_entries=64)
        map.update_many(dict.fromkeys(range(64), 1))
        seen: set[int | None] = set()

        def read(map: kbpf.Map = map, seen: set[int | None] = seen) -> None:
            with contextlib.suppress(kbpf.BpfError):
                while True:
                    seen.update((map[1], map.snapshot().get(2), map.pop(3, 1)))

        threads = [threading.Thread(target=read) for _ in range(2)]
        for thread in threads:
            thread.start()
        map.close()
        with of("kernel", value="9999s") as other:
            other.update(dict.fromkeys(range(4), b"A" * 9999))
            for thread in threads:
                thread.join()
        assert seen <= {1}


@KERNEL
def test_a_descriptor_closed_underneath_is_said():
    map = of("kernel")
    descriptor = map.fileno()
    os.close(descriptor)
    uses = (
        lambda: map[1],
        lambda: map.__setitem__(1, 1),
        lambda: list(map),
        map.snapshot,
        lambda: map.update_many({1: 1}),
    )
    for use in uses:
        with pytest.raises(kbpf.BpfError, match=f"descriptor {descriptor} was closed by something else") as refused:
            use()
        assert refused.value.errno == errno.EBADF
    with pytest.raises(kbpf.BpfError, match="closed by something else"):
        map.close()
    map.close()


@KERNEL
def test_a_descriptor_that_is_another_file_by_now_is_refused():
    map = of("kernel")
    with Path("/dev/null").open() as other:
        os.dup2(other.fileno(), map.fileno())
        with pytest.raises(kbpf.BpfError) as refused:
            map[1]
        assert refused.value.errno == errno.EINVAL
        map.close()


@KERNEL
def test_a_pin_removed_underneath_leaves_the_map_to_those_who_have_it(tmp_path):
    path = Path(f"/sys/fs/bpf/kbpf-test-{tmp_path.name}")
    with of("kernel") as map:
        map.pin(str(path))
        opened = kbpf.Map.open(path=str(path), backend="kernel", key="I", value="Q")
        path.unlink()
        with opened:
            opened[1] = 7
            with pytest.raises(kbpf.BpfError) as refused:
                kbpf.Map.open(path=str(path), backend="kernel")
            assert refused.value.errno == errno.ENOENT
        assert map[1] == 7


@KERNEL
def test_a_writer_that_is_killed_leaves_whole_values(tmp_path):
    """Each value is a number twice: one that was half written would have two."""
    path = Path(f"/sys/fs/bpf/kbpf-test-{tmp_path.name}")
    code = f"""
import itertools, kbpf
with kbpf.Map.open(path={str(path)!r}, backend="kernel", key="I", value="QQ") as map:
    print("ready", flush=True)
    for number in itertools.count():
        map.update_many({{key: (number, number) for key in range(500)}})
        map.delete_many(range(250))
"""
    with of("kernel", value="QQ") as map:
        map.pin(str(path))
        try:
            for _ in range(3):
                with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as writer:
                    try:
                        assert writer.stdout is not None
                        assert writer.stdout.readline() == b"ready\n"
                        until = time.monotonic() + 0.05
                        while time.monotonic() < until:
                            assert all(first == second for first, second in map.snapshot().values())
                    finally:
                        writer.kill()
                found = map.snapshot()
                assert all(first == second for first, second in found.values())
                assert found.keys() <= set(range(500))
                # Nothing is held: the map goes on for others.
                map.update_many(dict.fromkeys(range(1000), (0, 0)))
                assert len(map) == 1000
                map.clear()
        finally:
            path.unlink()


@KERNEL
def test_processes_read_and_write_at_once():
    with of("kernel", max_entries=5000) as map:
        stays = range(100)
        map.update_many({key: 2 * key for key in stays})

        def write(number: int) -> None:
            once = churn(map, range(1000 * number, 1000 * number + 200))
            for _ in range(200):
                once()

        fork = multiprocessing.get_context("fork")
        processes = [fork.Process(target=write, args=(number,)) for number in (1, 2, 3)]
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes):
            found = map.snapshot()
            assert found.keys() >= set(stays)
            assert all(value == 2 * key for key, value in found.items())
        for process in processes:
            process.join()
            assert process.exitcode == 0


@KERNEL
def test_memory_is_given_back_when_the_last_view_goes():
    """Mapping a map again and again keeps nothing: neither memory nor descriptors."""

    def held() -> tuple[int, int]:
        return Path("/proc/self/maps").read_text().count("bpf-map"), len(list(Path("/proc/self/fd").iterdir()))

    before = held()
    with of("kernel", "array", 4, key=None, key_size=4, flags=1024) as map:
        opened = held()
        for _ in range(100):
            map.view(writable=True).tolist()
        assert held() == opened
        for _ in range(100):
            view = map.view()
        # One mapping for all who read, with the file that mmap keeps.
        assert held() == (opened[0] + 1, opened[1] + 1)
    assert held()[0] == before[0] + 1
    assert view.tolist() == [0] * 4
    del view
    assert held() == before
