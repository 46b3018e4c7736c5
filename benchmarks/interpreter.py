"""How many packets a second does `Filter.run` take in the interpreter, against a plain loop over the instructions?

The plain loop is the one that a Python programmer would write over `struct sock_filter`: fetch, compare the opcode,
load from the packet. libpcap runs the same instructions in C, called through ctypes once a packet. All three take the
same packets in turn, round by round; the medians of the rounds are printed, and how often ours goes into theirs. Also
checked: that all three keep the same packets.

    python benchmarks/interpreter.py [--rounds N]
"""

from __future__ import annotations

import argparse
import ctypes
import ctypes.util
import ipaddress
import random
import statistics
import struct
import time
from collections.abc import Callable, Sequence

import kbpf
from kbpf.isa import cbpf

EXPRESSIONS = (
    "ip",
    "tcp and dst port 7070",
    "udp port 53 and src net 10.0.0.0/8",
    "tcp[tcpflags] & (tcp-syn|tcp-fin) != 0 and not src and dst net 127.0.0.0/8",
    " or ".join(f"host 192.0.2.{last}" for last in range(1, 33)),
)
PACKETS = 4000
SNAPSHOT = 262144

Run = Callable[[bytes], int]


def frame(rng: random.Random, port: int) -> bytes:
    """What a link carries: mostly TCP, some UDP, some IPv6, some that is no IP."""
    kind = rng.choices(("tcp", "udp", "tcp6", "arp"), (6, 2, 1, 1))[0]
    if kind == "arp":
        return rng.randbytes(12) + b"\x08\x06" + rng.randbytes(46)
    ports = struct.pack(">HH", rng.randrange(1024, 65536), port)
    segment = ports + struct.pack(">IIBBHHH", 1, 1, 0x50, rng.choice((0x10, 0x10, 0x18, 2)), 500, 0, 0)
    body = (ports + struct.pack(">HH", 200, 0) if kind == "udp" else segment) + rng.randbytes(rng.choice((0, 64, 512)))
    if kind == "tcp6":
        return rng.randbytes(12) + b"\x86\xdd" + struct.pack(">IHBB", 6 << 28, len(body), 6, 64) + bytes(32) + body
    source = ipaddress.IPv4Address(rng.choice(("10.0.0.0", "192.0.2.0"))) + rng.randrange(64)
    header = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0x4000, 64, 17 if kind == "udp" else 6, 0)
    return rng.randbytes(12) + b"\x08\x00" + header + source.packed + bytes((198, 51, 100, 1)) + body


def mix() -> list[bytes]:
    rng = random.Random(1)
    return [frame(rng, rng.choice((7070, 53, 80, 443))) for _ in range(PACKETS)]


_JUMPS: dict[int, Callable[[int, int], bool]] = {
    0x10: lambda a, b: a == b,
    0x20: lambda a, b: a > b,
    0x30: lambda a, b: a >= b,
    0x40: lambda a, b: bool(a & b),
}


def plain(instructions: Sequence[cbpf.Instruction]) -> Run:
    """The loop. It has what compiled expressions use."""
    code = [tuple(instruction) for instruction in instructions]

    def run(packet: bytes) -> int:
        pc, a, x, memory, size = 0, 0, 0, [0] * 16, len(packet)
        while True:
            opcode, jt, jf, k = code[pc]
            pc += 1
            kind = opcode & 7
            if kind == 0:
                mode, width = opcode & 0xE0, (4, 2, 1)[opcode >> 3 & 3]
                if mode in (0x20, 0x40):
                    at = k + x if mode == 0x40 else k
                    if at + width > size:
                        return 0
                    a = int.from_bytes(packet[at : at + width], "big")
                else:
                    a = {0x00: k, 0x60: memory[k & 15], 0x80: size}[mode]
            elif kind == 1:
                if opcode & 0xE0 == 0xA0:
                    if k >= size:
                        return 0
                    x = 4 * (packet[k] & 15)
                else:
                    x = memory[k] if opcode & 0xE0 == 0x60 else k
            elif kind == 2:
                memory[k] = a
            elif kind == 3:
                memory[k] = x
            elif kind == 4:
                b = x if opcode & 8 else k
                operation = opcode & 0xF0
                if operation == 0x50:
                    a &= b
                elif operation == 0x00:
                    a = a + b & 0xFFFFFFFF
                elif operation == 0x70:
                    a >>= b
                else:
                    raise NotImplementedError(hex(opcode))
            elif kind == 5:
                if not opcode & 0xF0:
                    pc += k
                else:
                    pc += jt if _JUMPS[opcode & 0xF0](a, x if opcode & 8 else k) else jf
            elif kind == 6:
                return a if opcode & 0x18 == 0x10 else k
            else:
                x, a = (a, a) if not opcode & 0x80 else (x, x)

    return run


def libpcap(instructions: Sequence[cbpf.Instruction]) -> Run | None:
    """`bpf_filter` (pcap.h); None without libpcap."""
    name = ctypes.util.find_library("pcap") or "libpcap.so.0.8"
    try:
        function = ctypes.CDLL(name).bpf_filter
    except OSError:
        return None
    function.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = ctypes.c_uint
    code = cbpf.encode(instructions)
    return lambda packet: int(function(code, packet, len(packet), len(packet)))


def ours(filter: kbpf.Filter) -> Run:
    return lambda packet: filter.run(packet, engine="interpreter")


def measure(text: str, packets: list[bytes], rounds: int) -> None:
    filter = kbpf.compile(text)
    runs: dict[str, Run] = {"kbpf": ours(filter), "loop": plain(filter.instructions)}
    reference = libpcap(filter.instructions)
    if reference is not None:
        runs["libpcap"] = reference
    kept = {name: [run(packet) > 0 for packet in packets] for name, run in runs.items()}
    assert all(other == kept["kbpf"] for other in kept.values()), text
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            for packet in packets:
                run(packet)
            taken[name].append(time.perf_counter() - start)
    rates = {name: len(packets) / statistics.median(times) for name, times in taken.items()}
    against = "".join(
        f"  {rate:11,.0f} {rates['kbpf'] / rate:6.2f} times" for name, rate in rates.items() if name != "kbpf"
    )
    print(f"{text[:44]:44} {rates['kbpf']:11,.0f}{against}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    packets = mix()
    print(f"{'packets a second':44} {'kbpf':>11}  {'plain loop':>24}  {'libpcap through ctypes':>24}")
    for text in EXPRESSIONS:
        measure(text, packets, rounds)


if __name__ == "__main__":
    main()
