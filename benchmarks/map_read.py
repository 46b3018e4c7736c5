"""How long does it take to read a map into Python?

    python benchmarks/map_read.py [--entries N] [--rounds N]

A hash of 100,000 counters into a ``dict``, against bcc and a bare loop of ctypes; one lookup, the same; and an array of
256 counters as a list. All read the same, in turns. Goals: the whole hash 10 times as fast as bcc's ``items()``, no
slower than its batches, and in the time of the bare loop plus a quarter; a lookup faster than bcc's, and in the time of
a bare one plus 30 %; the mapped array 100 times as fast as bcc's. Needs root and the distribution's bcc.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import gc
import os
import statistics
import struct
import time
from collections.abc import Callable
from typing import Any

import kbpf
from kbpf.kernel import syscall
from kbpf.kernel.backend import kernel_backend
from kbpf.kernel.bcc import import_bcc
from kbpf.kernel.headers import find_headers
from kbpf.kernel.packages import install_command
from kbpf.runtime.maps.arrays import ArrayMap
from kbpf.types import Int
from kbpf.uapi.constants import BPF_F_MMAPABLE

U32 = Int(name="u32", size=4)
U64 = Int(name="u64", size=8)


def bcc_tables(hash_entries: int, array_entries: int) -> tuple[Any, Any]:
    """A hash from u32 to u64 and an array of u64, made by bcc as its users do."""
    headers = find_headers()
    if headers is None:
        raise SystemExit(f"bcc needs kernel headers: {install_command('headers')}")
    if headers.source is not None:
        os.environ["BCC_KERNEL_SOURCE"] = str(headers.source)
    text = f"BPF_HASH(bench, u32, u64, {hash_entries}); BPF_ARRAY(numbers, u64, {array_entries});"
    made = import_bcc().BPF(text=text, cflags=list(headers.flags))
    return made["bench"], made["numbers"]


def bare_batches(fd: int, count: int) -> Callable[[], dict[int, int]]:
    """The least that any reader has to do: bpf(2) through ctypes into arrays that are there, and one decoding."""
    call = ctypes.CDLL(None, use_errno=True).syscall
    keys, values, bucket = (ctypes.c_uint * count)(), (ctypes.c_ulonglong * count)(), ctypes.c_uint()
    layout, lookup_batch = struct.Struct("=QQQQIIQQ"), 24

    def read() -> dict[int, int]:
        found: dict[int, int] = {}
        first = 0
        while True:
            addresses = map(ctypes.addressof, (bucket, keys, values))
            packed = layout.pack(first, *addresses, count, fd, 0, 0)
            attr = ctypes.create_string_buffer(packed, len(packed))
            failed = call(syscall._SYS_BPF, lookup_batch, attr, len(packed)) < 0
            if failed and ctypes.get_errno() != errno.ENOENT:
                raise OSError(ctypes.get_errno(), "lookup batch")
            length = layout.unpack(attr.raw)[4]
            found.update(zip(keys[:length], values[:length], strict=True))
            if failed:
                return found
            first = ctypes.addressof(bucket)

    return read


def in_turns(rounds: int, readers: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The median time of each reader, in seconds; who begins changes, as each finds the memory that the last left."""
    times: dict[str, list[float]] = {name: [] for name in readers}
    names = list(readers)
    for turn in range(rounds * len(names)):
        name = names[(turn + turn // len(names)) % len(names)]
        gc.collect()
        start = time.perf_counter()
        readers[name]()
        times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    count = options.entries
    table, numbers = bcc_tables(count, 256)
    kernel = kernel_backend()
    with kbpf.Map.from_fd(kernel, kernel.duplicate(table.map_fd), U32, U64) as map:
        keys, values = struct.pack(f"={count}I", *range(count)), struct.pack(f"={count}Q", *range(count))
        kernel.map_update_batch(map.fileno(), keys, values, count)

        def bcc_items() -> dict[int, int]:
            return {key.value: value.value for key, value in table.items()}

        def bcc_batch() -> dict[int, int]:
            return dict(table.items_lookup_batch())

        whole: dict[str, Callable[[], object]] = {
            "kbpf dict(map.items())": lambda: dict(map.items()),
            "kbpf map.snapshot()": map.snapshot,
            "bare ctypes batches": bare_batches(map.fileno(), count),
            "bcc items_lookup_batch()": bcc_batch,
            "bcc items()": bcc_items,
        }
        expected = {number: number for number in range(count)}
        for name, read in whole.items():
            assert read() == expected, name
        median = in_turns(options.rounds, whole)
        print(f"{count} entries into a dict of ints, median of {options.rounds}:")
        for name, seconds in median.items():
            ratio, bare = median["bcc items()"] / seconds, median["bare ctypes batches"] / seconds
            print(
                f"  {name:26} {seconds * 1e3:9.1f} ms   {ratio:6.1f} times bcc items(), {bare:5.2f} times the bare loop"
            )
        lookups(map, table, options.rounds)
    arrays(numbers, options.rounds)


def lookups(map: kbpf.Map, table: Any, rounds: int, each: int = 20_000) -> None:
    """One typed lookup, many times."""
    bare, wanted = bare_lookup(map), ctypes.c_uint(7)

    # Each in a loop of its own, so that none has a call more than it needs.
    def by_kbpf() -> None:
        for _ in range(each):
            map[7]

    def by_hand() -> None:
        for _ in range(each):
            bare()

    def by_bcc() -> None:
        for _ in range(each):
            table[wanted].value  # noqa: B018

    readers = {"kbpf map[key]": by_kbpf, "bare ctypes": by_hand, "bcc table[key]": by_bcc}
    median = in_turns(rounds, readers)
    print(f"one lookup, of {each}:")
    for name, seconds in median.items():
        print(f"  {name:26} {seconds / each * 1e6:9.2f} us   {seconds / median['bare ctypes']:6.2f} times bare ctypes")


def arrays(table: Any, rounds: int, each: int = 50) -> None:
    """All of an array as a list, by commands and from its own memory."""
    entries = len(table)
    spec = kbpf.MapSpec(type="array", key_size=4, value_size=8, max_entries=entries, flags=BPF_F_MMAPABLE)
    with ArrayMap.create(spec, "kernel", value=U64) as map:
        map.update(enumerate(range(entries)))
        for index in range(entries):
            table[index] = ctypes.c_ulonglong(index)
        view = map.view()

        def many(read: Callable[[], list[int]]) -> Callable[[], None]:
            assert read() == list(range(entries))

            def run() -> None:
                for _ in range(each):
                    read()

            return run

        readers = {
            "kbpf map.view().tolist()": many(lambda: map.view().tolist()),
            "kbpf view.tolist()": many(view.tolist),
            "kbpf list(map.values())": many(lambda: list(map.values())),
            "bcc table.values()": many(lambda: [value.value for value in table.values()]),
        }
        median = in_turns(rounds, readers)
        del view
    print(f"{entries} entries of an array as a list:")
    for name, seconds in median.items():
        ratio = median["bcc table.values()"] / seconds
        print(f"  {name:26} {seconds / each * 1e6:9.1f} us   {ratio:6.1f} times as fast as bcc table.values()")


def bare_lookup(map: kbpf.Map) -> Callable[[], int]:
    """bpf(2) through ctypes with its packing and unpacking, and nothing else."""
    call = ctypes.CDLL(None, use_errno=True).syscall
    key, value = ctypes.create_string_buffer(4), ctypes.create_string_buffer(8)
    packed = struct.pack("=I4xQQQ", map.fileno(), ctypes.addressof(key), ctypes.addressof(value), 0)
    attr = ctypes.create_string_buffer(packed, len(packed))
    pack_key, unpack_value = struct.Struct("=I"), struct.Struct("=Q")
    number, lookup_elem, size = syscall._SYS_BPF, 1, len(packed)

    def read() -> int:
        pack_key.pack_into(key, 0, 7)
        if call(number, lookup_elem, attr, size) < 0:
            raise OSError(ctypes.get_errno(), "lookup")
        found: int = unpack_value.unpack_from(value)[0]
        return found

    return read


if __name__ == "__main__":
    main()
