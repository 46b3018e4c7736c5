"""Maps as typed mappings; every fact holds on both backends."""

import errno
import os
import struct
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest

import kbpf
from kbpf.runtime.backends import get_backend
from kbpf.testing.requirements import available
from kbpf.types import Int, Member, Struct
from kbpf.uapi.constants import BPF_F_RDONLY, BPF_F_WRONLY

U32 = Int(name="u32", size=4)
U64 = Int(name="u64", size=8)
FLOW = Struct(
    name="flow", size=8, members=(Member(name="host", type=U32), Member(name="port", type=U32, bit_offset=32))
)


def refused_with(number: int) -> Any:
    return pytest.raises(kbpf.BpfError, check=lambda error: error.errno == number)


def typed(type="hash", max_entries=8, **more):
    return kbpf.MapSpec(
        type=type, key_size=4, value_size=8, max_entries=max_entries, name="typed", key_type=U32, value_type=U64, **more
    )


def test_a_hash_is_a_mutable_mapping(backend):
    with kbpf.Map.create(typed(), backend=backend) as map:
        assert map.backend == backend
        map[5] = 50
        map[6] = 60
        assert map[5] == 50
        assert dict(map.items()) == {5: 50, 6: 60}
        assert sorted(map) == [5, 6]
        assert sorted(map.values()) == [50, 60]
        assert len(map) == 2
        assert 5 in map
        assert 7 not in map
        del map[5]
        assert map.get(5, "gone") == "gone"
        assert map.pop(6) == 60
        assert map.snapshot() == {}


def test_a_missing_key_is_a_key_error(backend):
    with kbpf.Map.create(typed(), backend=backend) as map:
        with pytest.raises(KeyError, match="9"):
            map[9]
        with pytest.raises(KeyError):
            del map[9]


def test_an_array_holds_every_index_from_the_start(backend):
    with kbpf.Map.create(typed("array", 4), backend=backend) as map:
        map[2] = 7
        assert map.snapshot() == {0: 0, 1: 0, 2: 7, 3: 0}
        assert len(map) == 4
        with pytest.raises(KeyError):
            map[4]
        with pytest.raises(kbpf.BpfError, match="last index is 3") as caught:
            map[4] = 1
        assert caught.value.errno == errno.E2BIG
        with pytest.raises(kbpf.BpfError) as caught:
            del map[0]
        assert caught.value.errno == errno.EINVAL


def test_a_full_hash_says_so(backend):
    with kbpf.Map.create(typed(max_entries=2), backend=backend) as map:
        map[1] = 1
        map[2] = 2
        with pytest.raises(kbpf.MapFullError, match="it holds 2 entries"):
            map[3] = 3
        map[2] = 4
        assert map.snapshot() == {1: 1, 2: 4}


def test_bytes_go_in_and_out_where_there_is_no_type(backend):
    spec = kbpf.MapSpec(type="hash", key_size=3, value_size=5, max_entries=4)
    with kbpf.Map.create(spec, backend=backend) as map:
        map[b"abc"] = b"12345"
        assert map.snapshot() == {b"abc": b"12345"}
        with pytest.raises(ValueError, match="2 bytes where 3"):
            map[b"ab"]


def test_struct_keys_are_named_tuples(backend):
    spec = kbpf.MapSpec(type="hash", key_size=8, value_size=8, max_entries=4, key_type=FLOW, value_type=U64)
    with kbpf.Map.create(spec, backend=backend) as map:
        map[{"host": 1, "port": 2}] = 3
        (key,) = map
        assert (key.host, key.port) == (1, 2)
        assert map[key] == 3
        assert map[1, 2] == 3


@pytest.mark.parametrize("type", ["percpu_array", "percpu_hash"])
def test_per_cpu_values_have_a_slot_for_each_possible_cpu(backend, type):
    with kbpf.Map.create(typed(type, 2), backend=backend) as map:
        cpus = map.value_codec.size // 8
        map[1] = range(cpus)
        assert map[1] == tuple(range(cpus))
        assert map[1].sum() == sum(range(cpus))
        assert map.snapshot()[1].sum() == sum(range(cpus))


def test_more_entries_than_one_batch_are_all_read(backend):
    count = 20_000
    with kbpf.Map.create(typed(max_entries=count), backend=backend) as map:
        for key in range(count):
            map[key] = key * 3
        assert map.snapshot() == {key: key * 3 for key in range(count)}
        assert len(map) == count


def test_first_contents_go_in_and_then_it_is_frozen(backend):
    spec = typed("array", 2, contents=((struct.pack("=I", 1), struct.pack("=Q", 9)),), frozen=True)
    with kbpf.Map.create(spec, backend=backend) as map:
        assert map[1] == 9
        with pytest.raises(kbpf.PermissionDeniedError):
            map[0] = 1


def test_contents_that_do_not_fit_leave_nothing_open(backend):
    spec = typed("array", 2, contents=((struct.pack("=I", 2), struct.pack("=Q", 9)),))
    with pytest.raises(kbpf.BpfError, match="fill map"):
        kbpf.Map.create(spec, backend=backend)


@pytest.mark.parametrize(
    ("wrong", "number"),
    [
        (kbpf.MapSpec(type="hash", key_size=0, value_size=8, max_entries=1), errno.EINVAL),
        (kbpf.MapSpec(type="array", key_size=8, value_size=8, max_entries=1), errno.EINVAL),
        (kbpf.MapSpec(type="array", key_size=4, value_size=8, max_entries=0), errno.EINVAL),
        (kbpf.MapSpec(type="hash", key_size=4, value_size=8, max_entries=1, flags=1 << 30), errno.EINVAL),
    ],
)
def test_a_map_that_cannot_be_is_refused_with_the_kernels_errno(backend, wrong, number):
    with pytest.raises(kbpf.BpfError, match="create map") as caught:
        kbpf.Map.create(wrong, backend=backend)
    assert caught.value.errno == number


def test_a_closed_map_says_so(backend):
    map = kbpf.Map.create(typed(), backend=backend)
    map.close()
    map.close()
    with pytest.raises(kbpf.BpfError, match="closed") as caught:
        map[1]
    assert caught.value.errno == errno.EBADF
    assert "closed" in repr(map)


def test_a_map_dropped_open_warns(backend):
    map = kbpf.Map.create(typed(), backend=backend)
    with pytest.warns(ResourceWarning, match='map "typed" was dropped open'):
        del map


def test_a_map_opens_again_by_its_descriptor_and_id(backend):
    with kbpf.Map.create(typed(), backend=backend) as map:
        map[1] = 11
        with kbpf.Map.open(fd=map.fileno(), backend=backend) as same:
            assert same.fileno() != map.fileno()
            assert same[struct.pack("=I", 1)] == struct.pack("=Q", 11)
        with kbpf.Map.open(id=map.id, backend=backend) as same:
            assert (same.name, same.type, same.shape.max_entries) == ("typed", "hash", 8)


def test_opening_takes_exactly_one_way(backend):
    with pytest.raises(TypeError, match="exactly one"):
        kbpf.Map.open(backend=backend)


def test_update_flags_are_the_kernels(backend):
    with kbpf.Map.create(typed(), backend=backend) as map:
        with pytest.raises(KeyError):
            map.update_element(1, 1, flags=2)
        map.update_element(1, 1, flags=1)
        with pytest.raises(kbpf.BpfError) as caught:
            map.update_element(1, 2, flags=1)
        assert caught.value.errno == errno.EEXIST


def test_a_map_without_batch_commands_is_still_read_whole(backend):
    spec = kbpf.MapSpec(type="lpm_trie", key_size=8, value_size=4, max_entries=8, flags=1, value_type=U32)
    with kbpf.Map.create(spec, backend=backend) as map:
        for value, length in enumerate((8, 16, 24)):
            map[struct.pack("=I4s", length, b"\x0a\0\0\0")] = value
        assert map.snapshot() == {
            IPv4Network("10.0.0.0/8"): 0,
            IPv4Network("10.0.0.0/16"): 1,
            IPv4Network("10.0.0.0/24"): 2,
        }


@pytest.mark.requires("kernel")
def test_a_pinned_map_outlives_its_descriptor(tmp_path):
    path = f"/sys/fs/bpf/kbpf-test-{tmp_path.name}"
    try:
        with kbpf.Map.create(typed(), backend="kernel") as map:
            map[1] = 2
            map.pin(path)
        with kbpf.Map.open(path=path, backend="kernel") as again:
            assert again[struct.pack("=I", 1)] == struct.pack("=Q", 2)
    finally:
        from pathlib import Path

        Path(path).unlink()


@pytest.mark.parametrize("by", ["path", "id", "name"])
def test_a_map_is_opened_for_reading_or_writing_alone(backend, by, tmp_path):
    path = Path(f"/sys/fs/bpf/kbpf-test-{tmp_path.name}")
    name = f"only_{tmp_path.name}"[-15:].replace("-", "_")
    with kbpf.Map.create(kbpf.MapSpec(type="hash", max_entries=4, name=name), backend, key="I", value="I") as map:
        map.pin(path)
        try:
            how = {"path": path, "id": map.id, "name": name}[by]
            map[1] = 5
            types = {"key": "I", "value": "I", "backend": backend}
            with kbpf.Map.open(**{by: how}, flags=BPF_F_RDONLY, **types) as reader:
                assert (reader[1], reader.snapshot()) == (5, {1: 5})
                writes = [lambda: reader.update({1: 6}), lambda: reader.pop(1), reader.clear]
                if backend == "emulator" or available("linux-6.5"):
                    writes.append(reader.freeze)  # Before, whoever had the map could.
                for write in writes:
                    with pytest.raises(kbpf.PermissionDeniedError, match="read-only"):
                        write()
            with kbpf.Map.open(**{by: how}, flags=BPF_F_WRONLY, **types) as writer:
                writer[1] = 7
                for read in (lambda: writer[1], lambda: len(writer)):
                    with pytest.raises(kbpf.PermissionDeniedError, match="may not be read"):
                        read()
            assert map[1] == 7
            with refused_with(errno.EINVAL):
                kbpf.Map.open(**{by: how}, flags=BPF_F_RDONLY | BPF_F_WRONLY, **types)
            with pytest.raises(TypeError, match="keeps the flags"):
                kbpf.Map.open(fd=map.fileno(), flags=BPF_F_RDONLY, **types)
        finally:
            get_backend(backend).unpin(str(path))


@pytest.mark.requires("kernel")
def test_whoever_may_read_a_pin_opens_it_for_reading(tmp_path):
    path = Path(f"/sys/fs/bpf/kbpf-test-{tmp_path.name}")
    with kbpf.Map.create(kbpf.MapSpec(type="hash", max_entries=4), "kernel", key="I", value="I") as map:
        map[1] = 5
        map.pin(path)
        path.chmod(0o644)
        try:
            child = os.fork()
            if not child:
                try:
                    os.setresuid(65534, 65534, 65534)
                    with pytest.raises(kbpf.PermissionDeniedError, match="BPF_F_RDONLY"):
                        kbpf.Map.open(path=path, backend="kernel")
                    with kbpf.Map.open(path=path, flags=BPF_F_RDONLY, backend="kernel", key="I", value="I") as reader:
                        os._exit(reader[1])
                finally:
                    os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
        finally:
            path.unlink()


@pytest.mark.parametrize("way", [{"id": "5"}, {"fd": "5"}, {"id": 1.5}])
def test_what_no_map_can_be_opened_by_is_a_type_error(backend, way):
    with pytest.raises(TypeError, match="integer"):
        kbpf.Map.open(backend=backend, **way)


def test_numbers_that_no_map_has(backend):
    for number in (-1, 1 << 40):
        with pytest.raises(ValueError, match="is no id"):
            kbpf.Map.open(id=number, backend=backend)
    with refused_with(errno.EBADF):
        kbpf.Map.open(fd=-1, backend=backend)


@pytest.mark.requires("kernel")
def test_a_perf_event_array_of_no_size_gets_one_for_each_cpu():
    spec = kbpf.MapSpec(type="perf_event_array", key_size=4, value_size=4)
    with kbpf.Map.create(spec, backend="kernel") as map, kbpf.Map.open(fd=map.fileno(), backend="kernel") as opened:
        assert opened.shape.max_entries >= 1


def test_iterating_ends_when_the_map_is_closed(backend):
    map = kbpf.Map.create(kbpf.MapSpec(type="lpm_trie", key_size=8, value_size=4, max_entries=4, flags=1), backend)
    for bits in (8, 16):
        map[bits.to_bytes(4, "little") + bytes([10, 1, 0, 0])] = bytes(4)
    for start in (lambda: iter(map), lambda: iter(map.items())):
        next(start())
    walk = iter(map)
    map.close()
    for use in (lambda: next(walk), lambda: map.update_element(bytes(8), bytes(4)), lambda: map[bytes(8)]):
        with pytest.raises(kbpf.BpfError, match="after it was closed") as refused:
            use()
        assert refused.value.errno == errno.EBADF


@pytest.mark.parametrize("field", ["key_size", "value_size", "max_entries", "flags"])
@pytest.mark.parametrize("value", [-1, 1 << 32])
def test_sizes_that_the_kernel_would_cut_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        kbpf.MapSpec(type="hash", **{field: value})


def test_opening_a_program_as_a_map_is_refused(backend):
    program = kbpf.ProgramSpec(instructions=b"\xb7\0\0\0\x07\0\0\0\x95\0\0\0\0\0\0\0")
    with kbpf.load_program(program, backend=backend) as loaded, kbpf.Map.create(typed(), backend=backend) as map:
        for opening in (
            lambda: kbpf.Map.open(fd=loaded.fileno(), backend=backend),
            lambda: kbpf.Program.open(fd=map.fileno(), backend=backend),
        ):
            with pytest.raises(kbpf.BpfError) as refused:
                opening()
            assert refused.value.errno == errno.EINVAL


def test_a_map_is_found_by_a_name_that_was_cut(backend):
    spec = kbpf.MapSpec(type="array", key_size=4, value_size=4, max_entries=1, name="kbpf_test_a_long_name")
    with kbpf.Map.create(spec, backend) as map, kbpf.Map.open(name=spec.name, backend=backend) as found:
        assert found.id == map.id


def test_a_refusal_says_why(backend):
    with kbpf.Map.create(typed(flags=16), backend=backend) as map:
        with pytest.raises(kbpf.PermissionDeniedError, match="may not be read"):
            map[1]
        map.freeze()
        with pytest.raises(kbpf.PermissionDeniedError, match="frozen"):
            map[1] = 1


@pytest.mark.parametrize(
    ("path", "number"),
    [
        ("", errno.ENOENT),
        ("/sys/fs/bpf", errno.EEXIST),
        ("/sys/fs/bpf/", errno.EEXIST),
        ("/sys/fs/bpf/kbpf.map", errno.EPERM),
        ("/sys/fs/bpf/" + "x" * 256, errno.ENAMETOOLONG),
        ("/tmp/kbpf-map", errno.EPERM),
    ],
)
def test_a_pin_under_a_name_that_cannot_be_is_refused(backend, path, number):
    with kbpf.Map.create(typed(), backend=backend) as map, pytest.raises(kbpf.BpfError) as caught:
        map.pin(path)
    assert caught.value.errno == number
