"""What does a packet cost that Python holds? Goals: 50 ns in a list, 1.2 us one at a time; compiling a filter in 30 ms.

    python benchmarks/batches.py [--rounds N]

The peer is libpcap as Python reaches it: bpf_filter() through ctypes, a call a packet. Packets are bytes objects, which
take turns through `Filter.match_all`, `Filter.run` in native code and the peer; medians of processor time. Compiling is
the first run in native code of a filter that was not seen before, with llvmlite imported.
"""

from __future__ import annotations

import argparse
import ctypes
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from jit_filters import mixes

import kbpf
from kbpf.isa import cbpf

EXPRESSION = "tcp and dst port 7070"


def libpcap(filter: kbpf.Filter) -> Callable[[bytes], int]:
    function = ctypes.CDLL("libpcap.so.0.8").bpf_filter
    function.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = ctypes.c_uint
    code = cbpf.encode(filter.instructions)
    return lambda packet: int(function(code, packet, len(packet), len(packet)))


def spent(action: Callable[[], object]) -> int:
    start = time.process_time_ns()
    action()
    return time.process_time_ns() - start


def compiling() -> tuple[float, int]:
    """Milliseconds for one filter, and its instructions."""
    port = random.randrange(1, 65536)
    filter = kbpf.compile(f"tcp and dst port {port} and not src net 10.{port % 256}.0.0/16")
    return spent(lambda: filter.run(bytes(60), engine="jit")) / 1e6, len(filter)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    filter, (kinds, orders) = kbpf.compile(EXPRESSION), mixes()
    packets = [kinds[number] for number in orders["drawn"][:10_000]]
    peer = libpcap(filter)
    expected = filter.match_all(packets, engine="interpreter")
    assert bytes(peer(packet) > 0 for packet in packets) == expected
    ways: dict[str, Callable[[], bytes]] = {
        "match_all": lambda: filter.match_all(packets, engine="jit"),
        "one at a time": lambda: bytes([filter.run(packet, engine="jit") > 0 for packet in packets]),
        "libpcap": lambda: bytes([peer(packet) > 0 for packet in packets]),
    }
    assert all(way() == expected for way in ways.values())
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(spent(way) / len(packets))
    median = {name: statistics.median(each) for name, each in times.items()}
    for name, each in median.items():
        print(f"{name:14} {each:8.1f} ns a packet, {each / median['libpcap']:.3f} of the time of libpcap")
    compiled = [compiling() for _ in range(rounds)]
    sizes = {size for _, size in compiled}
    print(f"compiling {min(sizes)} instructions: {statistics.median(each for each, _ in compiled):.1f} ms")
    code = "import time; t = time.process_time(); import llvmlite.binding; print(time.process_time() - t)"
    loads = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(5)]
    print(f"importing llvmlite: {1e3 * statistics.median(loads):.0f} ms, once, when a program is first compiled")


if __name__ == "__main__":
    main()
