"""How fast are whole captures? Goals: 1.3 times tcpdump when counting, 0.9 times when writing; start-up in 250 ms.

    python benchmarks/captures.py [--packets N] [--rounds N]

Captures of so many packets, and of a quarter of that, are made in a temporary folder. `kbpf run` and `tcpdump -r` take
turns as processes, over files in the page cache; the time a packet is what the larger one takes longer, of the
processor's time in and for the process. Start-up is the time that passes for a capture without packets. Both count, or
write, the same packets.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EXPRESSION = "tcp and dst port 7070"


def packet(rng: random.Random) -> bytes:
    protocol, port = rng.choice((6, 6, 6, 17, 1)), rng.choice((7070, 80, 443, 53, 443, 443, 80))
    if rng.random() < 0.1:
        return (
            bytes(12)
            + b"\x86\xdd"
            + struct.pack(">IHBB", 6 << 28, 20, 6, 64)
            + bytes(32)
            + struct.pack(">HH", 1, port)
            + bytes(16)
        )
    header = struct.pack(">BBHHHBBH", 0x45, 0, 40, 0, 0x4000, 64, protocol, 0) + bytes(8)
    body = struct.pack(">HH", 1234, port) + bytes(rng.choice((16, 36, 416, 1416, 22, 22)))
    return bytes(12) + b"\x08\x00" + header + body


def make(path: Path, count: int) -> None:
    """Bursts of packets of some thousand kinds."""
    rng = random.Random(5)
    kinds = [packet(rng) for _ in range(5000)]
    with path.open("wb") as file:
        file.write(struct.pack("=IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 262144, 1))
        done = 0
        while done < count:
            kind = rng.choice(kinds)
            for _ in range(min(1 + int(rng.expovariate(1 / 4)), count - done)):
                file.write(
                    struct.pack("=IIII", 1_700_000_000 + done // 1_000_000, done % 1_000_000, len(kind), len(kind))
                )
                file.write(kind)
                done += 1


def spent(command: list[str]) -> tuple[float, float]:
    """Seconds of the processor, and seconds that passed."""
    before, start = os.times(), time.monotonic()
    subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True)
    after, passed = os.times(), time.monotonic() - start
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return used, passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packets", type=int, default=2_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    tcpdump = shutil.which("tcpdump") or "/usr/bin/tcpdump"
    kbpf = [str(Path(sys.executable).with_name("kbpf")), "run", EXPRESSION]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        full, part, empty = folder / "full.pcap", folder / "part.pcap", folder / "empty.pcap"
        for path, count in ((full, options.packets), (part, options.packets // 4), (empty, 0)):
            make(path, count)
        ours, theirs = folder / "ours.pcap", folder / "theirs.pcap"
        questions = {
            "counting": (
                lambda path: [*kbpf, "--count", str(path)],
                lambda path: [tcpdump, "-r", str(path), "--count", EXPRESSION],
            ),
            "writing": (
                lambda path: [*kbpf, str(path), "-w", str(ours)],
                lambda path: [tcpdump, "-Z", "root", "-r", str(path), "-w", str(theirs), EXPRESSION],
            ),
        }
        for question, commands in questions.items():
            per_packet: list[list[float]] = [[], []]
            starts: list[list[float]] = [[], []]
            for _ in range(options.rounds):
                for index, command in enumerate(commands):
                    more, less = spent(command(full))[0], spent(command(part))[0]
                    per_packet[index].append((more - less) / (options.packets - options.packets // 4) * 1e9)
                    starts[index].append(spent(command(empty))[1])
            mine, others = map(statistics.median, per_packet)
            print(f"{question}: {mine:.0f} ns a packet, {others / mine:.2f} times as fast as tcpdump ({others:.0f} ns)")
            began, begun = (1e3 * statistics.median(each) for each in starts)
            print(f"  start-up {began:.0f} ms (tcpdump {begun:.0f} ms)")
        spent(questions["writing"][0](full))
        spent(questions["writing"][1](full))
        assert ours.read_bytes() == theirs.read_bytes()


if __name__ == "__main__":
    main()
