#!/usr/bin/env python3
"""Count the bytes of TCP, UDP and ICMP on lo with an eBPF program: five times, a second apart.

    sockex1.py

The program is attached to a packet socket with SO_ATTACH_BPF, its array map read from Python. Needs CAP_BPF
and CAP_NET_RAW; with KBPF_BACKEND=emulator and KBPF_EMULATED_CAPTURE=FILE it counts a capture instead, without
any privilege.
"""

import argparse
import time
from pathlib import Path

import kbpf

OBJECT = Path(kbpf.__file__).with_name("objects") / "sockex1.bpf.o"
ICMP, TCP, UDP = 1, 6, 17


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between two readings (default 1)")
    parser.add_argument("--times", type=int, default=5, help="readings (default 5)")
    arguments = parser.parse_args()
    with (
        kbpf.packet_socket("lo") as sock,
        kbpf.load(OBJECT) as collection,
        collection.programs["count"].attach(sock),
    ):
        counted = collection.maps["bytes"]
        for _ in range(arguments.times):
            time.sleep(arguments.interval)
            print(f"TCP {counted[TCP]} UDP {counted[UDP]} ICMP {counted[ICMP]} bytes", flush=True)


if __name__ == "__main__":
    main()
