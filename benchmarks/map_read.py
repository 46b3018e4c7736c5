"""How long does it take to read a map into Python? A hash of 100,000 entries against bcc; goal: items() 8 times faster.

    python benchmarks/map_read.py [--entries N] [--rounds N]

Both read the same map into the same ``dict`` of ints, in turns. Needs root and the distribution's bcc.
"""

from __future__ import annotations

import argparse
import ctypes
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
from kbpf.types import Int

U32 = Int(name="u32", size=4)
U64 = Int(name="u64", size=8)


def bcc_table(entries: int) -> Any:
    """A hash from u32 to u64, made by bcc as its users do."""
    headers = find_headers()
    if headers is None:
        raise SystemExit(f"bcc needs kernel headers: {install_command('headers')}")
    if headers.source is not None:
        os.environ["BCC_KERNEL_SOURCE"] = str(headers.source)
    bpf = import_bcc().BPF(text=f"BPF_HASH(bench, u32, u64, {entries});", cflags=list(headers.flags))
    return bpf["bench"]


def bare_batches(map: kbpf.Map) -> dict[int, int]:
    """The least that any reader has to do: the batch commands and one decoding."""
    backend, found, token = kernel_backend(), {}, None
    while True:
        batch = backend.map_lookup_batch(map.fileno(), token, map.shape.max_entries, 4, 8)
        keys, values = memoryview(batch.keys).cast("I").tolist(), memoryview(batch.values).cast("Q").tolist()
        found.update(zip(keys, values, strict=True))
        token = batch.token
        if token is None:
            return found


def in_turns(rounds: int, readers: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The median time of each reader, in seconds."""
    times: dict[str, list[float]] = {name: [] for name in readers}
    for name in list(readers) * rounds:
        start = time.perf_counter()
        readers[name]()
        times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    count = options.entries
    table = bcc_table(count)
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
            "bare batch commands": lambda: bare_batches(map),
            "bcc items_lookup_batch()": bcc_batch,
            "bcc items()": bcc_items,
        }
        expected = {number: number for number in range(count)}
        for name, read in whole.items():
            assert read() == expected, name
        median = in_turns(options.rounds, whole)
        print(f"{count} entries into a dict of ints, median of {options.rounds}:")
        for name, seconds in median.items():
            ratio = median["bcc items()"] / seconds
            print(f"  {name:26} {seconds * 1e3:9.1f} ms   {ratio:6.1f} times as fast as bcc items()")
        lookups(map, table, options.rounds)


def lookups(map: kbpf.Map, table: Any, rounds: int, each: int = 20_000) -> None:
    """One typed lookup, many times."""
    bare = bare_lookup(map)

    def many(read: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(each):
                read()

        return run

    readers = {
        "kbpf map[key]": lambda: map[7],
        "bare ctypes": bare,
        "bcc table[key]": lambda: table[ctypes.c_uint(7)].value,
    }
    median = in_turns(rounds, {name: many(read) for name, read in readers.items()})
    print(f"one lookup, of {each}:")
    for name, seconds in median.items():
        print(f"  {name:26} {seconds / each * 1e6:9.2f} us   {seconds / median['bare ctypes']:6.2f} times bare ctypes")


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
