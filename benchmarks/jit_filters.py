"""How fast is native code for a filter? Goals: 0.25 of the time of libpcap's bpf_filter(), 0.35 of the kernel's JIT.

    python benchmarks/jit_filters.py [--rounds N] [EXPRESSION]

A million packets lie in one buffer. Ours is `Filter.match_all`, after the first two million, from when on processors
that can run it in vectors; libpcap's bpf_filter() is called with the same instructions by the same native loop. For the
kernel's JIT there are two numbers. "on a socket" is what the classic filter, made to drop everything, adds to sending
the same packets over a UNIX socket: part by part, by two sockets with the filter and two without in turns. "foreknown"
is its translation to eBPF under BPF_PROG_TEST_RUN, each packet many times in a row, so that its branches are known
beforehand and it is in the nearest cache, less what a program takes there that returns at once: what the kernel reaches
at best. All take turns; medians of processor time a packet, and for "on a socket", of the differences within a round.
Needs root.

The mixes are of 1,000 packets, of which 1 in 5 matches: in `flows` they come in bursts, as links carry them; in `drawn`
each is drawn by itself, which no branch predictor can foresee; `one` is one packet that matches.
"""

from __future__ import annotations

import argparse
import ctypes
import random
import socket
import statistics
import struct
import time
from array import array
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import kbpf
from kbpf.emulator.jit import batch
from kbpf.emulator.jit.buffers import unwritten
from kbpf.emulator.jit.layout import Native
from kbpf.isa import cbpf
from kbpf.specs import ProgramSpec

COUNT = 1_000_000
#: Packets that are sent in a round, and in a turn of either socket.
SENT, PART = 200_000, 2_000


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


def mixes() -> tuple[list[bytes], dict[str, list[int]]]:
    """Packets, and which of them come, in order."""
    rng = random.Random(7)
    kinds = [packet(rng, rng.choice((7070, 7070, 53, 80, 443, 443, 22, 8080))) for _ in range(1000)]
    flows: list[int] = []
    while len(flows) < COUNT:
        flows += [rng.randrange(1000)] * (1 + int(rng.expovariate(1 / 8)))
    one = next(n for n, kind in enumerate(kinds) if kbpf.compile("tcp and dst port 7070").run(kind))
    drawn = [rng.randrange(1000) for _ in range(COUNT)]
    return kinds, {"flows": flows[:COUNT], "drawn": drawn, "one": [one] * COUNT}


def together(kinds: list[bytes], order: list[int]) -> kbpf.Packets:
    """Packets in this order, in a buffer that holds each once."""
    offsets = [0]
    for kind in kinds:
        offsets.append(offsets[-1] + len(kind))
    return kbpf.Packets(b"".join(kinds), [offsets[n] for n in order], [len(kinds[n]) for n in order])


class Loop:
    """A function in C, called by our loop with the arguments that `call` names of a packet."""

    def __init__(self, call: str) -> None:
        self._run = Native()
        self.address = ctypes.addressof(self._run)
        each = f"""
define i64 @each(ptr %run, ptr %data, i64 %size, i64 %wirelen) alwaysinline {{
  %short = trunc i64 %size to i32
  %result = {call}
  %wide = zext i32 %result to i64
  ret i64 %wide
}}
"""
        self._loops = batch.Loops(each, "matches", asks=False)

    def __call__(self, packets: kbpf.Packets) -> bytes:
        out = unwritten(len(packets))
        self._loops.over_spans(self, packets.buffer, packets.offsets, packets.sizes, array("Q"), out)  # type: ignore[arg-type]
        return out

    def finish(self, result: int) -> int:
        """As a session's."""
        return result


def function(library: str | None, name: str) -> str:
    return f"inttoptr (i64 {ctypes.cast(getattr(ctypes.CDLL(library), name), ctypes.c_void_p).value} to ptr)"


def libpcap(code: ctypes.Array[ctypes.c_char]) -> Loop:
    program = f"ptr inttoptr (i64 {ctypes.addressof(code)} to ptr)"
    arguments = f"({program}, ptr %data, i32 %short, i32 %short)"
    return Loop(f"call i32 {function('libpcap.so.0.8', 'bpf_filter')}{arguments}")


def sending(to: socket.socket) -> Loop:
    return Loop(f"call i32 {function(None, 'send')}(i32 {to.fileno()}, ptr %data, i64 %size, i32 0)")


def dropping(filter: kbpf.Filter) -> kbpf.Filter:
    """The filter with nothing kept."""
    returns = cbpf.RET | cbpf.K
    return kbpf.Filter([(*each[:3], 0) if each[0] == returns else each for each in filter.instructions])


def in_the_kernel(program: kbpf.Program, packets: list[bytes]) -> float:
    """Nanoseconds a packet, as BPF_PROG_TEST_RUN reports them."""
    return statistics.mean(program.run(each, repeat=2000).duration_ns for each in packets)


def added(senders: dict[Loop, bool], parts: list[kbpf.Packets]) -> float:
    """What those that filter take longer than the others, in many short turns: sending takes a hundred times that."""
    times: dict[bool, list[float]] = {True: [], False: []}
    for turn, part in enumerate(parts):
        first = turn % len(senders)
        for send in [*senders, *senders][first : first + len(senders)]:
            times[senders[send]].append(spent(partial(send, part)) / len(part))
    return statistics.median(times[True]) - statistics.median(times[False])


def warm(action: Callable[[], object]) -> float:
    """What it takes the fourth time in a row: caches and wide registers that slept take some milliseconds to wake."""
    for _ in range(3):
        action()
    return spent(action)


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
    code = ctypes.create_string_buffer(cbpf.encode(filter.instructions))
    reference = libpcap(code)
    nothing = ProgramSpec(instructions=((0xB7, 0, 0, 0, 0), (0x95, 0, 0, 0, 0)))  # type: ignore[arg-type]
    # The kernel takes the link header off before a socket filter runs under BPF_PROG_TEST_RUN.
    translated = kbpf.compile(options.expression, link="RAW").to_ebpf()
    kinds, orders = mixes()
    idle = kbpf.Filter([(cbpf.RET | cbpf.K, 0, 0, 0)])
    with (
        kbpf.load_program(translated, backend="kernel") as program,
        kbpf.load_program(nothing, backend="kernel") as empty,
        ExitStack() as stack,
    ):  # fmt: skip
        senders = {}
        # Two of each kind: which memory a socket has makes a difference of its own.
        for filters in (True, False, True, False):
            to, receiver = map(stack.enter_context, socket.socketpair(type=socket.SOCK_DGRAM))
            stack.enter_context(kbpf.attach(receiver, dropping(filter) if filters else idle, backend="kernel"))
            senders[sending(to)] = filters
        for name, order in orders.items():
            many, few = together(kinds, order), [kinds[n] for n in order[::10_000]]
            parts = [together(kinds, order[at : at + PART]) for at in range(0, SENT, PART)]
            kept = filter.match_all(kinds, engine="interpreter")
            expected = bytes(kept[n] for n in order)
            assert all(filter.match_all(many, engine="jit") == expected for _ in range(3))
            assert reference(many) == expected
            ours, theirs = partial(filter.match_all, many, engine="jit"), partial(reference, many)
            times: dict[str, list[float]] = {
                key: [] for key in ("ours", "libpcap", "kernel's JIT, on a socket", "kernel's JIT, foreknown")
            }
            for _ in range(options.rounds):
                on_socket = added(senders, parts)
                foreknown = in_the_kernel(program, few) - in_the_kernel(empty, few)
                measured = warm(ours) / COUNT, warm(theirs) / COUNT, on_socket, foreknown
                for each, value in zip(times.values(), measured, strict=True):
                    each.append(value)
            median = {key: statistics.median(each) for key, each in times.items()}
            print(f"{name}: {median['ours']:.1f} ns a packet, of {sum(expected) / COUNT:.0%} that match")
            for key in list(median)[1:]:
                print(f"  {median['ours'] / median[key]:5.2f} of the time of {key} ({median[key]:.1f} ns)")


if __name__ == "__main__":
    main()
