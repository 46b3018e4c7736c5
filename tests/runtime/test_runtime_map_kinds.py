"""The classes of map types; every fact holds on both backends."""

from __future__ import annotations

import errno
import itertools
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from pathlib import Path
from typing import Any

import pytest

import kbpf
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.kernel.features import MAPS
from kbpf.runtime.backends import get_backend
from kbpf.runtime.maps.base import as_created
from kbpf.runtime.maps.unmade import reasons
from kbpf.testing.btf_bytes import BtfBytes
from kbpf.types import Int, Member, Struct
from kbpf.uapi.constants import BPF_F_LOCK, BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, BPF_F_RDONLY_PROG
from kbpf.uapi.enums import MAP_TYPES

#: What needs more than sizes, and what is no type.
NOT_MADE = ("arena", "struct_ops", "unspec")
CODE = (Instruction(ebpf.ALU64 | ebpf.MOV, 0, imm=0), Instruction(ebpf.JMP | ebpf.EXIT))
U32 = Int(name="u32", size=4)


def made(type: str, backend: str, key: Any = None, value: Any = None, **spec: Any) -> Any:
    """A map of the class that its type has."""
    return kbpf.BpfMap.create(kbpf.MapSpec(type=type, **spec), backend, key=key, value=value)


def program(backend: str, type: str = "socket_filter", **spec: Any) -> kbpf.Program:
    return kbpf.load_program(kbpf.ProgramSpec(type=type, instructions=CODE, **spec), backend=backend)


@contextmanager
def udp() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound


def refused_with(number: int) -> Any:
    return pytest.raises(kbpf.BpfError, check=lambda error: error.errno == number)


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ({"type": "hsh"}, "did you mean 'hash'"),
        ({"type": "zzzz"}, "there is no map type 'zzzz'$"),
        ({"type": "hash", "key_size": 0}, "say what keys are"),
        ({"type": "hash", "value_size": 0}, "say what values are"),
        ({"type": "hash", "max_entries": 0}, "max_entries is 0"),
        ({"type": "array", "key_size": 8}, "4 bytes, not 8"),
        ({"type": "queue"}, "no keys: key_size must be 0 and not 4"),
        ({"type": "lpm_trie", "key_size": 8}, "flags=BPF_F_NO_PREALLOC"),
        ({"type": "lpm_trie", "flags": BPF_F_NO_PREALLOC}, "1 to 256 bytes of a prefix"),
        ({"type": "prog_array", "value_size": 8}, "values have 4 bytes, not 8"),
        ({"type": "ringbuf", "key_size": 0, "value_size": 0, "max_entries": 5000}, "a power of two"),
        ({"type": "ringbuf", "key_size": 0, "max_entries": 4096}, "no values"),
        ({"type": "sk_storage", "max_entries": 0}, "flags=BPF_F_NO_PREALLOC"),
        ({"type": "sk_storage", "flags": BPF_F_NO_PREALLOC}, "max_entries must be 0"),
        ({"type": "sk_storage", "flags": BPF_F_NO_PREALLOC, "max_entries": 0}, "it takes BTF"),
        ({"type": "hash_of_maps"}, "after another map"),
        ({"type": "array_of_maps"}, "after another map"),
    ],
)
def test_a_map_that_cannot_be_says_what_is_wrong(backend, spec, why):
    with pytest.raises(kbpf.BpfError, match=why) as refused:
        made(**{"backend": backend, "key_size": 4, "value_size": 4, "max_entries": 4, **spec})
    assert refused.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    "type",
    [
        pytest.param(type, marks=[pytest.mark.requires(f"linux-{MAPS[type].since}")] if type in MAPS else [])
        for type in sorted(MAP_TYPES)
    ],
)
def test_no_reason_is_found_in_what_the_kernel_makes(backend, type):
    """Of the sizes that a type may have, all that it takes are without a reason."""
    btf = BtfBytes()
    storage = {"btf": btf.bytes(), "btf_key_type_id": btf.int, "btf_value_type_id": btf.int}
    taken = 0
    with made("array", backend, key_size=4, value_size=4, max_entries=1) as template:
        for key, value, entries, flags in itertools.product((0, 4, 8, 16), (0, 4, 8), (0, 1, 4096), (0, 1)):
            spec = kbpf.MapSpec(type=type, key_size=key, value_size=value, max_entries=entries, flags=flags)
            if type.endswith("_storage"):
                spec = replace(spec, **storage)
            try:
                map = kbpf.BpfMap.create(spec, backend, inner=template if "of_maps" in type else None)
            except kbpf.BpfError:
                continue
            map.close()
            taken += 1
            assert reasons(as_created(spec, get_backend(backend))) == (), spec
    assert taken or type in NOT_MADE, type


def test_a_type_has_one_class_and_others_refuse_it(backend):
    spec = kbpf.MapSpec(type="queue", value_size=4, max_entries=1)
    with pytest.raises(TypeError, match="type queue is no Map: use Queue"):
        kbpf.Map.create(spec, backend)
    with kbpf.Queue.create(spec, backend) as queue, kbpf.BpfMap.open(fd=queue.fileno(), backend=backend) as same:
        assert type(same) is kbpf.Queue
        with pytest.raises(TypeError, match="use Queue"):
            kbpf.Map.open(fd=queue.fileno(), backend=backend)
        assert not hasattr(queue, "items")


def test_a_queue_gives_the_oldest_and_a_stack_the_newest(backend):
    for type, first in (("queue", 1), ("stack", 2)):
        with made(type, backend, value="I", max_entries=2) as map:
            with pytest.raises(IndexError, match="empty"):
                map.peek()
            map.push(1)
            map.push(2)
            assert (map.peek(), map.pop()) == (first, first)
            map.push(3)
            with pytest.raises(kbpf.MapFullError, match="it holds 2 entries"):
                map.push(4)
            map.push(4, overwrite=True)
            assert map.pop() == (3 if type == "queue" else 4)
            assert map.pop() == (4 if type == "queue" else 3)
            with pytest.raises(IndexError, match="empty"):
                map.pop()
            with pytest.raises(TypeError):
                iter(map)


def test_a_bloom_filter_knows_what_was_added(backend):
    with made("bloom_filter", backend, value="I", max_entries=1000) as map:
        added = range(0, 2000, 2)
        for number in added:
            map.add(number)
        assert all(number in map for number in added)
        # It errs on one in some thirty; on none, or half, it would be none.
        assert sum(number in map for number in range(1, 2000, 2)) < 500
        for walk in (iter, list):
            with pytest.raises(TypeError):
                walk(map)


def test_a_trie_finds_the_longest_prefix(backend):
    with made("lpm_trie", backend, value="I", key_size=8, max_entries=8, flags=BPF_F_NO_PREALLOC) as trie:
        trie["10.0.0.0/8"] = 8
        trie[IPv4Network("10.1.0.0/16")] = 16
        trie[(24, b"\x0a\1\2")] = 24
        assert [trie[key] for key in ("10.9.9.9", "10.1.9.9", IPv4Address("10.1.2.3"), "10.1.2.0/24")] == [
            8,
            16,
            24,
            24,
        ]
        assert trie["10.1.0.0/12"] == 8
        assert "11.0.0.1" not in trie
        assert set(trie) == {IPv4Network("10.0.0.0/8"), IPv4Network("10.1.0.0/16"), IPv4Network("10.1.2.0/24")}
        # Deleting, and what deletes or stores on the condition, is of exactly this prefix.
        with pytest.raises(KeyError):
            del trie["10.1.2.128/25"]
        assert trie.pop("10.1.2.128/25", None) is None
        assert trie.setdefault("10.2.0.0/16", 2) == 2
        assert trie.setdefault("10.2.0.0/16", 3) == 2
        assert trie.pop("10.1.2.0/24") == 24
        assert trie["10.1.2.3"] == 16
        with pytest.raises(ValueError, match="prefix"):
            trie["::1"]
        with pytest.raises(ValueError, match="number"):
            trie[10]
        with pytest.raises(kbpf.BpfError, match="a prefix has up to 32 bits"):
            trie[(33, bytes(4))] = 1


def test_a_tries_keys_are_what_their_size_or_type_says(backend):
    common = {"value": "I", "max_entries": 8, "flags": BPF_F_NO_PREALLOC}
    with made("lpm_trie", backend, key_size=20, **common) as six:
        six["2001:db8::/32"] = 1
        assert six.snapshot() == {IPv6Network("2001:db8::/32"): 1}
        assert six["2001:db8::7"] == 1
    with made("lpm_trie", backend, key_size=7, **common) as other:
        other[(12, b"\xab\xc0")] = 1
        assert other.snapshot() == {(12, b"\xab\xc0\0"): 1}
        assert other[(24, b"\xab\xcf\0")] == 1
    with made("lpm_trie", backend, key="=II", **common) as own:
        own[(32, 7)] = 1
        assert own.snapshot() == {(32, 7): 1}
    prefix = Struct(
        name="key", size=8, members=(Member(name="bits", type=U32), Member(name="to", type=U32, bit_offset=32))
    )
    with made("lpm_trie", backend, key_size=8, key_type=prefix, **common) as described:
        described["10.0.0.0/8"] = 1
        assert list(described) == [IPv4Network("10.0.0.0/8")]


def test_an_array_is_a_mapping_from_each_index(backend):
    with made("array", backend, value="I", key_size=4, max_entries=3) as array:
        array[1] = 7
        assert (list(array), list(array.values()), dict(array.items())) == ([0, 1, 2], [0, 7, 0], {0: 0, 1: 7, 2: 0})
        assert (len(array), 2 in array, 3 in array, -1 in array, "x" in array) == (3, True, False, False, False)
        assert array.setdefault(1, 5) == 7
        for change in (lambda: array.pop(1), array.popitem, array.clear, lambda: array.__delitem__(1)):
            with pytest.raises(kbpf.BpfError, match="store zero") as refused:
                change()
            assert refused.value.errno == errno.EINVAL
        with pytest.raises(kbpf.BpfError, match="last index is 2"):
            array.update_many({0: 1, 3: 1})
        array.close()
        for use in (lambda: list(array), lambda: len(array), lambda: 1 in array):
            with refused_with(errno.EBADF):
                use()


@pytest.mark.parametrize("letter", ["B", "H", "i", "Q", "d"])
def test_an_arrays_memory_is_seen_as_its_values(backend, letter):
    with made("array", backend, value=letter, key_size=4, max_entries=600, flags=BPF_F_MMAPABLE) as array:
        array.update(enumerate(range(100)))
        view = array.view()
        assert view.tolist() == [*range(100), *[0] * 500]
        array[599] = 5
        assert view[599] == 5
        with pytest.raises(TypeError):
            view[0] = 1
        writable = array.view(writable=True)
        writable[1] = 77
        assert (array[1], view[1]) == (77, 77)
        with refused_with(errno.EBUSY):
            array.freeze()
        del writable
        assert len(array.memory()) == 600 * array.stride
    assert view[599] == 5  # The memory outlives the map.


def test_memory_is_for_arrays_that_have_it(backend):
    with (
        made("array", backend, value="I", key_size=4, max_entries=3) as array,
        pytest.raises(kbpf.BpfError, match="without BPF_F_MMAPABLE"),
    ):
        array.memory()
    with made("array", backend, value="IQ", key_size=4, max_entries=3, flags=BPF_F_MMAPABLE) as array:
        with pytest.raises(TypeError, match="no single numbers"):
            array.view()
        array.freeze()
        with pytest.raises(kbpf.PermissionDeniedError):
            array.memory(writable=True)
        assert array.memory()[:4] == bytes(4)


@pytest.mark.requires("numpy")
def test_an_arrays_memory_is_an_array_of_numpy(backend):
    import numpy as np

    with made("array", backend, value="I", key_size=4, max_entries=300, flags=BPF_F_MMAPABLE) as array:
        array.update(enumerate(range(300)))
        found = array.to_numpy()
        assert (found.dtype, found.shape, int(found.sum())) == (np.dtype("u4"), (300,), sum(range(300)))
        array[0] = 1000
        assert found[0] == 1000
        with pytest.raises(ValueError, match="read-only"):
            found[0] = 1
        array.to_numpy(writable=True)[1:3] = 9
        assert [array[index] for index in (1, 2, 3)] == [9, 9, 3]
        del found
    with made("array", backend, value="=HxxQ", key_size=4, max_entries=3, flags=BPF_F_MMAPABLE) as array:
        array[2] = (5, 6)
        assert array.to_numpy()[2].tolist() == (5, 6)
    for size, wanted in ((2, "u2"), (6, "V6")):
        with made("array", backend, value_size=size, key_size=4, max_entries=3, flags=BPF_F_MMAPABLE) as array:
            assert array.to_numpy().dtype == wanted


def test_a_program_array_takes_programs_and_gives_ids(backend):
    with made("prog_array", backend, key_size=4, value_size=4, max_entries=3) as table, program(backend) as entry:
        table[1] = entry
        assert (table[1], dict(table.items()), list(table), len(table), 0 in table) == (
            entry.id, {1: entry.id}, [1], 1, False,
        )  # fmt: skip
        with table.program(1) as same:
            assert same.id == entry.id
        # An id is no descriptor.
        with pytest.raises(TypeError, match="is no Program"):
            table[0] = table[1]
        with program(backend, "xdp") as other, refused_with(errno.EINVAL):
            table[0] = other
        with pytest.raises(TypeError, match="numbers"):
            table.increment(1)
        assert table.pop(1) == entry.id
        with pytest.raises(KeyError):
            del table[1]


@pytest.mark.requires("kernel")
def test_objects_of_two_backends_do_not_mix():
    with (
        made("prog_array", "kernel", key_size=4, value_size=4, max_entries=3) as table,
        program("emulator") as entry,
        pytest.raises(ValueError, match="emulator's"),
    ):
        table[0] = entry


def test_a_map_of_maps_takes_maps_and_gives_ids(backend):
    inner = kbpf.MapSpec(type="array", key_size=4, value_size=4, max_entries=1)
    for type, key in (("array_of_maps", 1), ("hash_of_maps", 1000)):
        with (
            made(type, backend, key="I", value_size=4, max_entries=3, inner=inner) as outer,
            kbpf.Map.create(inner, backend, value="I") as one,
        ):
            assert (len(outer), list(outer)) == (0, [])
            one[0] = 77
            outer[key] = one
            assert outer.snapshot() == {key: one.id}
            with outer.inner(key, key="I", value="I") as same:
                assert (same.id, same[0]) == (one.id, 77)
            with made("hash", backend, key="I", value="I", max_entries=1) as unlike:
                with pytest.raises(kbpf.BpfError, match="of its template"):
                    outer[key] = unlike
                with pytest.raises(kbpf.BpfError, match="of its template"):
                    outer.update_many({key: unlike})
            assert outer.pop(key) == one.id
            assert key not in outer


@pytest.mark.parametrize(("type", "key"), [("sockmap", 1), ("sockhash", 1000)])
def test_a_socket_map_takes_sockets_and_gives_cookies(backend, type, key):
    with made(type, backend, key="I", value_size=8, max_entries=3) as map, udp() as sock:
        map[key] = sock
        cookie = int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, 57, 8), "little")
        assert (map[key], list(map), len(map), map.snapshot()) == (cookie, [key], 1, {key: cookie})
        with pytest.raises(TypeError, match="is no socket"):
            map[key] = cookie
        with pytest.raises(KeyError):
            del map[2]
        del map[key]
        assert key not in map
        map[key] = sock
        sock.close()
        assert len(map) == 0
    with made(type, backend, key="I", value_size=4, max_entries=3) as map, udp() as sock:
        map[key] = sock
        with pytest.raises(kbpf.BpfError, match="values of 8"):
            map[key]


def test_a_reuseport_array_takes_sockets(backend):
    with (
        made("reuseport_sockarray", backend, key="I", value_size=8, max_entries=3) as map,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
    ):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(("127.0.0.1", 0))
        map[2] = sock
        assert list(map) == [2]
        del map[2]
        with pytest.raises(KeyError):
            del map[2]


def test_devices_have_an_index_and_a_program(backend):
    with made("devmap", backend, key="I", value_size=8, max_entries=3) as map:
        map[1] = "lo"
        assert (map[1], map[1].ifindex, list(map)) == ((1, 0), 1, [1])
        with program(backend, "xdp", expected_attach_type="xdp_devmap") as entry:
            map[2] = ("lo", entry)
            assert map[2].program_id == entry.id
        del map[1]
        assert 1 not in map
        with refused_with(errno.ENODEV):
            map[1] = "nosuchif0"
    with made("devmap_hash", backend, key="I", value_size=4, max_entries=1) as map:
        map[1000] = 1
        assert map.snapshot() == {1000: 1}
        with pytest.raises(ValueError, match="no room for a program"), program(backend, "xdp") as entry:
            map[1000] = (1, entry)
        with pytest.raises(kbpf.MapFullError):
            map[1001] = 1


def test_processors_have_a_queue_and_a_program(backend):
    with made("cpumap", backend, key="I", value_size=8, max_entries=2) as map:
        map[0] = 192
        assert (map[0], map[0].queue_size, list(map)) == ((192, 0), 192, [0])
        with program(backend, "xdp", expected_attach_type="xdp_cpumap") as entry:
            map[0] = (64, entry)
            assert map[0] == (64, entry.id)


def test_control_groups_are_stored_by_path_and_not_read(backend):
    group = next(path for path in ("/sys/fs/cgroup/unified", "/sys/fs/cgroup") if Path(path, "cgroup.procs").exists())
    with made("cgroup_array", backend, key="I", value_size=4, max_entries=2) as map:
        map[0] = group
        for read in (lambda: map[0], lambda: len(map), lambda: list(map), map.snapshot):
            with pytest.raises(kbpf.NotSupportedError):
                read()
        del map[0]
        with pytest.raises(KeyError):
            del map[0]
        with refused_with(errno.ENOENT):
            map[0] = "/no/such/group"


def test_a_storage_is_a_mapping_from_objects(backend):
    btf = BtfBytes()
    spec = {"key_size": 4, "flags": BPF_F_NO_PREALLOC, "btf": btf.bytes(), "btf_key_type_id": btf.int,
            "btf_value_type_id": btf.u64, "value_size": 8}  # fmt: skip
    with made("sk_storage", backend, value="Q", **spec) as storage, udp() as sock, udp() as other:
        storage[sock] = 7
        assert (storage[sock], storage[sock.fileno()], other in storage) == (7, 7, False)
        with sock.dup() as same:
            assert storage[same] == 7
        assert storage.setdefault(other, 9) == 9
        assert storage.pop(sock) == 7
        with pytest.raises(KeyError):
            del storage[sock]
        for walk in (list, len, lambda map: map.snapshot()):
            with pytest.raises(kbpf.NotSupportedError):
                walk(storage)
        with pytest.raises(TypeError, match="is no descriptor"):
            storage["sock"]
    with made("task_storage", backend, value="Q", **spec) as storage:
        process = os.pidfd_open(os.getpid())
        try:
            storage[process] = 5
            assert storage[process] == 5
        finally:
            os.close(process)


def test_a_ring_buffer_is_a_map_without_elements(backend):
    with made("ringbuf", backend, max_entries=4096) as ring:
        assert type(ring) is kbpf.BpfMap
        with ring.events("I") as events:
            assert events.read_all() == []


def test_a_snapshot_of_what_nobody_can_change_is_consistent(backend):
    constant = {"key_size": 4, "max_entries": 3, "flags": BPF_F_RDONLY_PROG, "contents": ((bytes(4), b"\7\0\0\0"),)}
    with made("array", backend, value="I", frozen=True, **constant) as array:
        assert (array.snapshot(), array.snapshot().consistent) == ({0: 7, 1: 0, 2: 0}, True)
    with made("array", backend, value="I", **constant) as array:
        assert not array.snapshot().consistent


def test_values_with_a_lock_are_read_and_written_under_it(backend):
    btf = BtfBytes()
    lock = btf.structure("bpf_spin_lock", 4, ("val", btf.int, 0))
    value = btf.structure("value", 16, ("lock", lock, 0), ("number", btf.u64, 8))
    types = {"btf": btf.bytes(), "btf_key_type_id": btf.int, "btf_value_type_id": value}
    with made("hash", backend, key="I", value="I4xQ", key_size=4, value_size=16, max_entries=4, **types) as map:
        map.update_element(1, (0, 7), BPF_F_LOCK)
        assert map.lookup_element(1, BPF_F_LOCK) == map.lookup_element(1) == (0, 7)
        with pytest.raises(KeyError):
            map.lookup_element(2, BPF_F_LOCK)
    with made("hash", backend, key="I", value="Q", max_entries=4) as plain:
        plain[1] = 1
        with pytest.raises(kbpf.BpfError) as caught:
            plain.lookup_element(1, BPF_F_LOCK)
        assert caught.value.errno == errno.EINVAL
