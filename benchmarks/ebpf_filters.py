"""How fast are compiled filters as eBPF, against the same classic filter translated instruction by instruction?

Prints nanoseconds a packet under BPF_PROG_TEST_RUN without the cost of running an empty program, for each type of
program, and the ratio to the translation, whose loads are LD_ABS and LD_IND as in the kernel's own. Then how long a
list of 10,000 networks takes to compile and to load. Needs root.

    python benchmarks/ebpf_filters.py
"""

from __future__ import annotations

import ipaddress
import random
import struct
import time

import kbpf
from kbpf.isa import ebpf

REPEAT = 200_000
ROUNDS = 7
NETWORKS = 10_000
TARGETS = ("socket_filter", "sched_cls", "xdp")

EXPRESSIONS = (
    "ip",
    "tcp port 80",
    "udp port 53 and src net 10.0.0.0/8",
    "tcp[tcpflags] & (tcp-syn|tcp-fin) != 0 and not src and dst net 127.0.0.0/8",
    "ip6 or (udp and not port 53)",
    " or ".join(f"host 192.0.2.{last}" for last in range(1, 65)),
    " or ".join(f"host 192.0.{net}.{last}" for net in (2, 3, 4, 5) for last in range(1, 251)),
)


def packet(protocol: int, source: str, port: int) -> bytes:
    """A frame of 100 bytes: IPv4 with TCP or UDP."""
    addresses = ipaddress.ip_address(source).packed + ipaddress.ip_address("198.51.100.1").packed
    header = struct.pack(">BBHHHBBH", 0x45, 0, 86, 0, 0x4000, 64, protocol, 0) + addresses
    body = struct.pack(">HHIIBBHHH", 40000, port, 0, 0, 0x50, 0x12, 0, 0, 0)
    return (bytes(12) + b"\x08\x00" + header + body).ljust(100, b"\0")


PACKETS = (packet(6, "10.1.2.3", 80), packet(17, "10.1.2.3", 53), packet(6, "192.0.2.200", 443))


def nanoseconds(program: kbpf.Program) -> float:
    """The mean over the packets, each the best of some rounds."""
    best = [min(program.run(data, repeat=REPEAT).duration_ns for _ in range(ROUNDS)) for data in PACKETS]
    return sum(best) / len(best)


def empty(target: str) -> float:
    code = (ebpf.Instruction(ebpf.ALU64 | ebpf.MOV | ebpf.K, 0, 0, 0, 2), ebpf.Instruction(ebpf.JMP | ebpf.EXIT))
    with kbpf.load_program(kbpf.ProgramSpec(type=target, instructions=code), backend="kernel") as program:
        return nanoseconds(program)


def programs() -> None:
    nothing = {target: empty(target) for target in TARGETS}
    print(f"{'ns a packet':<44}{'LD_ABS':>8}", *(f"{target:>20}" for target in TARGETS))
    for expression in EXPRESSIONS:
        # Under BPF_PROG_TEST_RUN offset 0 is the network header.
        classic = kbpf.compile(expression, link="RAW")
        with kbpf.load_program(classic.to_ebpf(), backend="kernel") as program:
            translated = nanoseconds(program) - nothing["socket_filter"]
        row = [f"{expression if len(expression) < 43 else expression[:39] + ' ...':<44}{translated:>8.1f}"]
        for target in TARGETS:
            with kbpf.load(kbpf.compile_ebpf(expression, target), backend="kernel") as collection:
                spent = nanoseconds(collection.programs["filter"]) - nothing[target]
            row.append(f"{spent:>13.1f} ({spent / max(translated, 1):.2f})")
        print(*row)


def networks() -> None:
    rng = random.Random(1)
    chosen: set[ipaddress.IPv4Network] = set()
    while len(chosen) < NETWORKS:
        chosen.add(ipaddress.IPv4Network((rng.getrandbits(32), rng.choice((16, 20, 24, 28))), strict=False))
    expression = " or ".join(f"net {network}" for network in sorted(chosen))
    for target in TARGETS:
        start = time.perf_counter()
        spec = kbpf.compile_ebpf(expression, target)
        compiled = time.perf_counter()
        with kbpf.load(spec, backend="kernel") as collection:
            loaded = time.perf_counter()
            spent = nanoseconds(collection.programs["filter"]) - empty(target)
        print(
            f"{NETWORKS} networks, {target}: compiled in {compiled - start:.2f} s, "
            f"loaded in {loaded - compiled:.3f} s, {spent:.1f} ns a packet"
        )


if __name__ == "__main__":
    programs()
    networks()
