"""How fast is native code for a filter? Goals: 0.25 of the time of libpcap's bpf_filter(), 0.35 of the kernel's JIT.

    python benchmarks/jit_filters.py [--rounds N] [EXPRESSION]

Packets lie in one buffer. Ours is `Filter.match_all`; libpcap's bpf_filter() is called with the same instructions by
the same native loop, with the same prefetching. In the kernel the filter's translation to eBPF runs by
BPF_PROG_TEST_RUN, each packet many times in a row, so that its branches are known beforehand; its time is given as the
kernel reports it, and without what a program takes there that returns at once. All take turns; medians of processor
time a packet.

Three mixes of 1,000 packets, of which 1 in 8 matches: `flows` has packets of 100 flows in bursts, as links carry them;
`drawn` has each packet drawn by itself, which no branch predictor can foresee; `one` is a packet that matches.
"""

from __future__ import annotations

import argparse
import ctypes
import random
import statistics
import struct
import time
from collections.abc import Callable
from functools import partial

import kbpf
from kbpf.emulator.jit import batch
from kbpf.emulator.jit.layout import Native
from kbpf.isa import cbpf
from kbpf.specs import ProgramSpec

#: How often a loop goes over the packets, so that its start does not count.
TIMES = 100


def packet(rng: random.Random, port: int) -> bytes:
    """Mostly TCP, some UDP, some IPv6, some that is no IP."""
    kind = rng.choices(("tcp", "udp", "tcp6", "arp"), (6, 2, 1, 1))[0]
    if kind == "arp":
        return rng.randbytes(12) + b"\x08\x06" + rng.randbytes(46)
    ports = struct.pack(">HH", rng.randrange(1024, 65536), port)
    segment = ports + struct.pack(">IIBBHHH", 1, 1, 0x50, 0x10, 500, 0, 0)
    body = (ports + struct.pack(">HH", 200, 0) if kind == "udp" else segment) + bytes(rng.choice((0, 64, 512, 1400)))
    if kind == "tcp6":
        return rng.randbytes(12) + b"\x86\xdd" + struct.pack(">IHBB", 6 << 28, len(body), 6, 64) + bytes(32) + body
    header = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0x4000, 64, 17 if kind == "udp" else 6, 0)
    return rng.randbytes(12) + b"\x08\x00" + header + rng.randbytes(8) + body


def mixes() -> dict[str, list[bytes]]:
    rng = random.Random(7)
    kinds = [packet(rng, rng.choice((7070, 7070, 53, 80, 443, 443, 22, 8080))) for _ in range(100)]
    flows: list[bytes] = []
    while len(flows) < 1000:
        flows += [rng.choice(kinds)] * (1 + int(rng.expovariate(1 / 8)))
    one = next(k for k in kinds if kbpf.compile("tcp and dst port 7070").run(k))
    return {"flows": flows[:1000], "drawn": [rng.choice(kinds) for _ in range(1000)], "one": [one] * 1000}


def together(packets: list[bytes]) -> kbpf.Packets:
    """The packets `TIMES` times, in a buffer that holds them once."""
    offsets = [0]
    for each in packets:
        offsets.append(offsets[-1] + len(each))
    sizes = [len(each) for each in packets]
    return kbpf.Packets(b"".join(packets), offsets[:-1] * TIMES, sizes * TIMES)


class Libpcap:
    """bpf_filter() in our loop."""

    def __init__(self, filter: kbpf.Filter) -> None:
        library = ctypes.CDLL("libpcap.so.0.8")
        function = ctypes.cast(library.bpf_filter, ctypes.c_void_p).value
        self._code = ctypes.create_string_buffer(cbpf.encode(filter.instructions))
        self._run = Native()
        each = f"""
define i64 @each(ptr %run, ptr %data, i64 %size, i64 %wirelen) alwaysinline {{
  %w = trunc i64 %wirelen to i32
  %s = trunc i64 %size to i32
  %code = inttoptr i64 {ctypes.addressof(self._code)} to ptr
  %r = call i32 inttoptr (i64 {function} to ptr)(ptr %code, ptr %data, i32 %w, i32 %s)
  %z = zext i32 %r to i64
  ret i64 %z
}}
"""
        self._loops = batch.Loops(each, "matches", asks=False)

    def __call__(self, packets: kbpf.Packets) -> bytes:
        out = bytearray(len(packets))
        none = batch.numbers(None, len(packets))
        self._loops.over_spans(_Session(self._run), packets.buffer, packets.offsets, packets.sizes, none, out)  # type: ignore[arg-type]
        return bytes(out)


class _Session:
    """As much of a session as a loop looks at."""

    def __init__(self, run: Native) -> None:
        self.address = ctypes.addressof(run)

    def finish(self, result: int) -> int:
        return result


def in_the_kernel(program: kbpf.Program, packets: list[bytes]) -> float:
    """Nanoseconds a packet, as BPF_PROG_TEST_RUN reports them."""
    return statistics.mean(program.run(each, repeat=2000).duration_ns for each in packets)


def spent(action: Callable[[], object]) -> float:
    start = time.process_time_ns()
    action()
    return time.process_time_ns() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("expression", nargs="?", default="tcp and dst port 7070")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    filter = kbpf.compile(options.expression)
    libpcap = Libpcap(filter)
    nothing = ProgramSpec(instructions=((0xB7, 0, 0, 0, 0), (0x95, 0, 0, 0, 0)))  # type: ignore[arg-type]
    # The kernel takes the link header off before a socket filter runs: it is kept by loads relative to it.
    translated = kbpf.compile_ebpf(options.expression).programs["filter"]
    with (
        kbpf.load_program(translated, backend="kernel") as program,
        kbpf.load_program(nothing, backend="kernel") as empty,
    ):
        for name, packets in mixes().items():
            many, few = together(packets), packets[:: max(len(packets) // 100, 1)]
            expected = filter.match_all(packets, engine="interpreter") * TIMES
            assert filter.match_all(many, engine="jit") == libpcap(many) == expected
            ours, theirs = partial(filter.match_all, many, engine="jit"), partial(libpcap, many)
            times: dict[str, list[float]] = {key: [] for key in ("ours", "libpcap", "kernel", "kernel, net")}
            for _ in range(options.rounds):
                times["ours"].append(spent(ours) / len(many))
                times["libpcap"].append(spent(theirs) / len(many))
                whole, idle = in_the_kernel(program, few), in_the_kernel(empty, few)
                times["kernel"].append(whole)
                times["kernel, net"].append(whole - idle)
            median = {key: statistics.median(each) for key, each in times.items()}
            print(f"{name}: {median['ours']:.1f} ns a packet, of {sum(expected) / len(expected):.0%} that match")
            for key in ("libpcap", "kernel", "kernel, net"):
                print(f"  {median['ours'] / median[key]:5.2f} of the time of {key} ({median[key]:.1f} ns)")


if __name__ == "__main__":
    main()
