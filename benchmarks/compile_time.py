"""How long does it take to compile a filter expression? Against libpcap, called through ctypes, and tcpdump.

Prints medians and ratios: a process that compiles one expression and prints it (goal: 150 ms), typical expressions in a
process that has kbpf imported (goal: 3 ms), and lists of 1,000 (goal: 1 s). For those libpcap's optimiser, which takes
minutes, is left out.

    python benchmarks/compile_time.py [--runs N]
"""

from __future__ import annotations

import argparse
import ctypes
import ctypes.util
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import kbpf

EXPRESSIONS = (
    "tcp port 80",
    "udp port 53 and src net 10.0.0.0/8",
    "host 192.0.2.1 and not arp",
    "tcp[tcpflags] & (tcp-syn|tcp-fin) != 0 and not src and dst net 192.168.0.0/16",
    "tcp port 80 and (((ip[2:2] - ((ip[0]&0xf)<<2)) - ((tcp[12]&0xf0)>>2)) != 0)",
    "ip6 or (udp portrange 1000-2000 and ether host 02:00:00:00:00:01)",
    "vlan 5 and (icmp or icmp6)",
)
LISTS = {
    "1,000 hosts": " or ".join(f"host 10.{i % 7}.{i * 37 % 256}.{i * 11 % 256}" for i in range(1000)),
    "1,000 ports": " or ".join(f"port {i * 53 % 60000}" for i in range(1000)),
    "1,000 of both": " or ".join(f"tcp port {i}" if i % 2 else f"host 10.0.{i % 256}.{i // 8}" for i in range(1000)),
}
COMMAND = ["-c", "from kbpf.cli.main import main; main()", "compile", "-d", "tcp port 80"]


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint), ("instructions", ctypes.c_void_p))


def libpcap() -> Callable[[str, bool], None] | None:
    """libpcap's compiler for Ethernet, with or without its optimiser; None where it is not installed."""
    name = ctypes.util.find_library("pcap")
    if name is None:
        return None
    library = ctypes.CDLL(name)
    library.pcap_open_dead.restype = ctypes.c_void_p
    handle = ctypes.c_void_p(library.pcap_open_dead(1, 262144))
    program = _Program()

    def compile(expression: str, optimize: bool) -> None:
        if library.pcap_compile(handle, ctypes.byref(program), expression.encode(), int(optimize), 0):
            raise ValueError(expression)
        library.pcap_freecode(ctypes.byref(program))

    return compile


def median(run: Callable[[], object], runs: int) -> float:
    """Milliseconds; the first of several runs, which fills caches, is left out."""
    times = []
    for _ in range(runs + (runs > 1)):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1000)
    return statistics.median(times[runs > 1 :])


def process(command: list[str]) -> Callable[[], object]:
    return lambda: subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)


def report(what: str, ours: float, theirs: float | None) -> None:
    against = "" if theirs is None else f"   {theirs:9.3f} ms   {ours / theirs:7.2f} times"
    print(f"{what[:58]:58} {ours:9.3f} ms{against}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    reference = libpcap()
    tcpdump = shutil.which("tcpdump")
    print(f"{'':58} {'kbpf':>12}   {'libpcap':>12}")
    ours = median(process([sys.executable, *COMMAND]), runs)
    theirs = None if tcpdump is None else median(process([tcpdump, "-d", "-y", "EN10MB", "tcp port 80"]), runs)
    report("process: kbpf compile -d; tcpdump -d", ours, theirs)
    report("process: bare interpreter", median(process([sys.executable, "-c", "pass"]), runs), None)
    for text in EXPRESSIONS:
        compare(text, text, 10 * runs, reference)
    for name, text in LISTS.items():
        compare(name, text, 3, reference, optimize=False)


def compare(
    name: str, text: str, runs: int, reference: Callable[[str, bool], None] | None, optimize: bool = True
) -> None:
    theirs = None if reference is None else median(partial(reference, text, optimize), runs if optimize else 1)
    report(name, median(partial(kbpf.compile, text), runs), theirs)


if __name__ == "__main__":
    main()
