"""Map commands on the running kernel."""

from __future__ import annotations

import errno
import signal
import struct
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kbpf.backend import object_name
from kbpf.errors import ENOTSUPP
from kbpf.info import MapInfo
from kbpf.kernel.backend import KernelBackend
from kbpf.kernel.maps import possible_cpus
from kbpf.specs import MapSpec
from kbpf.testing.requirements import available
from kbpf.uapi.constants import BPF_ANY, BPF_EXIST, BPF_F_NO_PREALLOC, BPF_F_NUMA_NODE, BPF_NOEXIST

pytestmark = pytest.mark.requires("kernel")

Keep = Callable[[int], int]

HASH = MapSpec(type="hash", key_size=4, value_size=8, max_entries=100, name="flows")
ARRAY = MapSpec(type="array", key_size=4, value_size=8, max_entries=4)


def u32(number: int) -> bytes:
    return struct.pack("=I", number)


def u64(number: int) -> bytes:
    return struct.pack("=Q", number)


def refused(number: int) -> pytest.RaisesExc[OSError]:
    return pytest.raises(OSError, check=lambda error: error.errno == number)


@pytest.mark.parametrize(
    "spec",
    [
        HASH,
        ARRAY,
        MapSpec(type="lru_hash", key_size=8, value_size=4, max_entries=10),
        MapSpec(type="percpu_array", key_size=4, value_size=4, max_entries=2),
        MapSpec(type="lpm_trie", key_size=8, value_size=1, max_entries=3, flags=BPF_F_NO_PREALLOC),
        MapSpec(type="queue", value_size=4, max_entries=3),
        MapSpec(type="ringbuf", max_entries=4096),
        MapSpec(type="bloom_filter", value_size=4, max_entries=10, map_extra=3),
        MapSpec(type="perf_event_array", key_size=4, value_size=4, max_entries=2),
    ],
    ids=lambda spec: spec.type,
)
def test_info_says_what_the_spec_asked_for(kernel: KernelBackend, keep: Keep, spec: MapSpec) -> None:
    info = kernel.map_info(keep(kernel.map_create(spec)))
    # A trie has no memory as long as it is empty, and a ring's was not counted before Linux 6.4.
    assert info.memlock or spec.type == "lpm_trie" or (spec.type == "ringbuf" and not available("linux-6.4"))
    assert replace(info, memlock=None) == MapInfo(
        spec.type, info.id, spec.key_size, spec.value_size, spec.max_entries, spec.flags, spec.name, spec.map_extra
    )
    assert info.id > 0


def test_names_are_made_acceptable(kernel: KernelBackend, keep: Keep) -> None:
    assert object_name("my map-é.rodata and more") == "my_map__.rodata"
    fd = keep(kernel.map_create(MapSpec(type="array", key_size=4, value_size=4, max_entries=1, name="a b-c.d_e")))
    assert kernel.map_info(fd).name == "a_b_c.d_e"


def test_numa_node_sets_its_flag(kernel: KernelBackend, keep: Keep) -> None:
    fd = keep(kernel.map_create(MapSpec(type="hash", key_size=4, value_size=4, max_entries=1, numa_node=0)))
    assert kernel.map_info(fd).flags == BPF_F_NUMA_NODE


@pytest.mark.parametrize(
    ("spec", "number"),
    [
        (MapSpec(type="hash", key_size=0, value_size=8, max_entries=1), errno.EINVAL),
        (MapSpec(type="hash", key_size=4, value_size=8, max_entries=0), errno.EINVAL),
        (MapSpec(type="array", key_size=8, value_size=8, max_entries=1), errno.EINVAL),
        (MapSpec(type="percpu_array", key_size=4, value_size=32769, max_entries=1), errno.E2BIG),
        (MapSpec(type="no_such_type", key_size=4, value_size=8, max_entries=1), errno.EINVAL),
    ],
)
def test_what_the_kernel_does_not_make_keeps_its_errno(kernel: KernelBackend, spec: MapSpec, number: int) -> None:
    with refused(number):
        kernel.map_create(spec)


def test_elements_of_a_hash(kernel: KernelBackend, keep: Keep) -> None:
    fd = keep(kernel.map_create(HASH))
    with refused(errno.ENOENT):
        kernel.map_lookup(fd, u32(1), 8)
    with refused(errno.ENOENT):
        kernel.map_next_key(fd, None, 4)
    with refused(errno.ENOENT):
        kernel.map_update(fd, u32(1), u64(7), BPF_EXIST)
    kernel.map_update(fd, u32(1), u64(7), BPF_NOEXIST)
    with refused(errno.EEXIST):
        kernel.map_update(fd, u32(1), u64(7), BPF_NOEXIST)
    assert kernel.map_lookup(fd, u32(1), 8) == u64(7)
    assert kernel.map_next_key(fd, None, 4) == u32(1)
    with refused(errno.ENOENT):
        kernel.map_next_key(fd, u32(1), 4)
    assert kernel.map_lookup_and_delete(fd, u32(1), 8) == u64(7)
    with refused(errno.ENOENT):
        kernel.map_delete(fd, u32(1))
    with refused(errno.EINVAL):
        kernel.map_lookup(fd, u32(1), 8, flags=1)


def test_a_full_hash_is_e2big(kernel: KernelBackend, keep: Keep) -> None:
    fd = keep(kernel.map_create(MapSpec(type="hash", key_size=4, value_size=4, max_entries=1)))
    kernel.map_update(fd, u32(1), u32(1))
    with refused(errno.E2BIG):
        kernel.map_update(fd, u32(2), u32(1))


def test_elements_of_an_array_cannot_be_deleted(kernel: KernelBackend, keep: Keep) -> None:
    fd = keep(kernel.map_create(ARRAY))
    assert kernel.map_lookup(fd, u32(3), 8) == u64(0)
    with refused(errno.EINVAL):
        kernel.map_delete(fd, u32(0))
    with refused(errno.E2BIG):
        kernel.map_update(fd, u32(4), u64(0))
    with refused(ENOTSUPP):
        kernel.map_lookup_and_delete(fd, u32(0), 8)


@pytest.mark.parametrize(("text", "count"), [("0", 1), ("0-3", 4), ("0-1,4-5", 4), ("0,2,4-7", 6)])
def test_numbers_that_no_processor_has_take_no_slot(text: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel has it (for_each_possible_cpu in bpf_percpu_hash_copy), and libbpf_num_possible_cpus."""
    possible_cpus.cache_clear()
    monkeypatch.setattr("pathlib.Path.read_text", lambda _: f"{text}\n")
    try:
        assert possible_cpus() == count
    finally:
        possible_cpus.cache_clear()


def test_a_per_cpu_value_has_a_slot_of_eight_bytes_for_every_possible_cpu(kernel: KernelBackend, keep: Keep) -> None:
    fd = keep(kernel.map_create(MapSpec(type="percpu_array", key_size=4, value_size=4, max_entries=1)))
    slots = b"".join(u64(index + 1) for index in range(kernel.possible_cpus()))
    kernel.map_update(fd, u32(0), slots)
    assert kernel.map_lookup(fd, u32(0), len(slots)) == slots


def test_a_queue_takes_no_key(kernel: KernelBackend, keep: Keep) -> None:
    fd = keep(kernel.map_create(MapSpec(type="queue", value_size=4, max_entries=2)))
    kernel.map_update(fd, None, u32(1))
    kernel.map_update(fd, None, u32(2))
    assert kernel.map_lookup(fd, None, 4) == u32(1)
    assert kernel.map_lookup_and_delete(fd, None, 4) == u32(1)
    assert kernel.map_lookup_and_delete(fd, None, 4) == u32(2)
    with refused(errno.ENOENT):
        kernel.map_lookup_and_delete(fd, None, 4)


def test_a_map_of_maps_takes_descriptors_and_gives_ids(kernel: KernelBackend, keep: Keep) -> None:
    inner = keep(kernel.map_create(ARRAY))
    outer = keep(
        kernel.map_create(MapSpec(type="array_of_maps", key_size=4, value_size=4, max_entries=1, inner=ARRAY), inner)
    )
    kernel.map_update(outer, u32(0), u32(inner))
    assert kernel.map_lookup(outer, u32(0), 4) == u32(kernel.map_info(inner).id)


def test_a_frozen_map_refuses_writers_and_a_second_freeze(kernel: KernelBackend, keep: Keep) -> None:
    fd = keep(kernel.map_create(ARRAY))
    kernel.map_freeze(fd)
    with refused(errno.EPERM):
        kernel.map_update(fd, u32(0), u64(1))
    with pytest.raises(OSError) as again:
        kernel.map_freeze(fd)
    # Older kernels look first whether it is frozen.
    assert again.value.errno in (errno.EPERM, errno.EBUSY)
    assert kernel.map_lookup(fd, u32(0), 8) == u64(0)


@pytest.mark.parametrize("spec", [HASH, ARRAY], ids=["hash", "array"])
def test_batches_give_every_element_once(kernel: KernelBackend, keep: Keep, spec: MapSpec) -> None:
    fd = keep(kernel.map_create(spec))
    wanted = {u32(i): u64(i * 3) for i in range(spec.max_entries)}
    stored = kernel.map_update_batch(fd, b"".join(wanted), b"".join(wanted.values()), len(wanted))
    assert stored == len(wanted)
    found: dict[bytes, bytes] = {}
    token = None
    while True:
        batch = kernel.map_lookup_batch(fd, token, 64, 4, 8)
        assert len(batch.keys) == 4 * batch.length and len(batch.values) == 8 * batch.length
        for index in range(batch.length):
            key = batch.keys[4 * index : 4 * index + 4]
            assert key not in found
            found[key] = batch.values[8 * index : 8 * index + 8]
        if batch.token is None:
            break
        token = batch.token
    assert found == wanted


def test_a_batch_of_an_empty_map_is_the_last(kernel: KernelBackend, keep: Keep) -> None:
    batch = kernel.map_lookup_batch(keep(kernel.map_create(HASH)), None, 10, 4, 8)
    assert batch == (b"", b"", 0, None)


def test_a_batch_can_delete_what_it_gives(kernel: KernelBackend, keep: Keep) -> None:
    fd = keep(kernel.map_create(HASH))
    kernel.map_update_batch(fd, u32(1) + u32(2), u64(3) + u64(4), 2)
    batch = kernel.map_lookup_batch(fd, None, 100, 4, 8, delete=True)
    assert (batch.length, batch.token) == (2, None)
    assert kernel.map_lookup_batch(fd, None, 100, 4, 8).length == 0


def test_a_batch_that_stops_early_says_how_far_it_came(kernel: KernelBackend, keep: Keep) -> None:
    fd = keep(kernel.map_create(MapSpec(type="hash", key_size=4, value_size=8, max_entries=5)))
    keys, values = b"".join(map(u32, range(8))), bytes(64)
    with refused(errno.E2BIG) as raised:
        kernel.map_update_batch(fd, keys, values, 8)
    assert raised.value.done == 5  # type: ignore[attr-defined]
    assert kernel.map_delete_batch(fd, keys, 2) == 2
    with refused(errno.ENOENT) as raised:
        kernel.map_delete_batch(fd, u32(2) + u32(0), 2)
    assert raised.value.done == 1  # type: ignore[attr-defined]
    with refused(errno.EINVAL) as raised:
        kernel.map_update_batch(fd, keys, values, 8, flags=BPF_NOEXIST)
    assert raised.value.done == 0  # type: ignore[attr-defined]


def test_a_type_without_batches_says_so(kernel: KernelBackend, keep: Keep) -> None:
    fd = keep(kernel.map_create(MapSpec(type="prog_array", key_size=4, value_size=4, max_entries=2)))
    with refused(ENOTSUPP):
        kernel.map_lookup_batch(fd, None, 2, 4, 4)


def test_descriptors_that_are_no_maps(kernel: KernelBackend) -> None:
    with refused(errno.EBADF):
        kernel.map_lookup(9999, u32(0), 4)
    with Path("/dev/null").open() as file, refused(errno.EINVAL):
        kernel.map_update(file.fileno(), u32(0), u32(0))


def btf(*types: bytes, strings: bytes = b"\0int\0f\0") -> bytes:
    """A BTF blob of these types."""
    body = b"".join(types)
    return struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(body), len(body), len(strings)) + body + strings


#: Type 1: ``int``.
INT = struct.pack("=IIII", 1, 1 << 24, 4, 1 << 24 | 32)
DESCRIBED = MapSpec(
    type="array", key_size=4, value_size=4, max_entries=1, btf=btf(INT), btf_key_type_id=1, btf_value_type_id=1
)


def test_btf_comes_back_from_the_kernel(kernel: KernelBackend, keep: Keep) -> None:
    fd = keep(kernel.map_create(DESCRIBED))
    info = kernel.map_info(fd)
    assert (info.btf_key_type_id, info.btf_value_type_id) == (1, 1)
    assert kernel.map_btf(fd) == DESCRIBED.btf
    assert kernel.map_btf(keep(kernel.map_create(ARRAY))) == b""


def test_btf_that_the_kernel_refuses_is_left_out(kernel: KernelBackend, keep: Keep) -> None:
    broken = MapSpec(**{**vars(DESCRIBED), "btf": b"nonsense"})
    assert kernel.map_info(keep(kernel.map_create(broken))).btf_id == 0
    untyped = MapSpec(**{**vars(DESCRIBED), "type": "perf_event_array"})
    assert kernel.map_info(keep(kernel.map_create(untyped))).btf_id == 0


def test_a_map_that_fails_with_and_without_btf_tells_the_first_reason(kernel: KernelBackend) -> None:
    with refused(errno.E2BIG):
        kernel.map_create(MapSpec(**{**vars(DESCRIBED), "type": "hash", "max_entries": 2**32 - 1}))


class TestReader:
    def test_gives_values_and_none(self, kernel: KernelBackend, keep: Keep) -> None:
        fd = keep(kernel.map_create(HASH))
        read = kernel.map_reader(fd, 4, 8)
        assert read(u32(1)) is None
        kernel.map_update(fd, u32(1), u64(5), BPF_ANY)
        assert read(u32(1)) == u64(5)

    def test_never_reads_past_a_short_key(self, kernel: KernelBackend, keep: Keep) -> None:
        read = kernel.map_reader(keep(kernel.map_create(HASH)), 4, 8)
        for key in (b"", b"abc", b"abcde"):
            with pytest.raises(ValueError, match="a key of"):
                read(key)

    def test_peeks_at_a_queue_with_no_key(self, kernel: KernelBackend, keep: Keep) -> None:
        fd = keep(kernel.map_create(MapSpec(type="queue", value_size=4, max_entries=2)))
        read = kernel.map_reader(fd, 0, 4)
        assert read(b"") is None
        kernel.map_update(fd, None, u32(9))
        assert read(b"") == u32(9)

    def test_raises_other_errors(self, kernel: KernelBackend, keep: Keep) -> None:
        fd = keep(kernel.map_create(MapSpec(type="perf_event_array", key_size=4, value_size=4, max_entries=1)))
        with refused(ENOTSUPP):
            kernel.map_reader(fd, 4, 4)(u32(0))
        with refused(errno.EBADF):
            kernel.map_reader(9999, 4, 4)(u32(0))

    def test_serves_many_threads_at_once(self, kernel: KernelBackend, keep: Keep) -> None:
        fd = keep(kernel.map_create(HASH))
        kernel.map_update_batch(fd, b"".join(map(u32, range(100))), b"".join(map(u64, range(100))), 100)
        read = kernel.map_reader(fd, 4, 8)
        wrong: list[int] = []

        def work(start: int) -> None:
            wrong.extend(n for n in range(3000) if read(u32((n + start) % 100)) != u64((n + start) % 100))

        threads = [threading.Thread(target=work, args=(25 * index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    def test_may_be_called_from_a_signal_handler(self, kernel: KernelBackend, keep: Keep) -> None:
        fd = keep(kernel.map_create(HASH))
        kernel.map_update_batch(fd, u32(1) + u32(2), u64(1) + u64(2), 2)
        read = kernel.map_reader(fd, 4, 8)
        inside: list[bytes | None] = []
        before = signal.signal(signal.SIGALRM, lambda *_: inside.append(read(u32(2))))
        signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
        try:
            while len(inside) < 50:
                assert read(u32(1)) == u64(1)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert set(inside) == {u64(2)}
