"""How much longer does Python take to start with ``import kbpf``? Against a bare interpreter; goal: 60 ms more.

    python benchmarks/import_time.py [--runs N]

Whole processes are timed, in turns, and medians compared. `kbpf compile` is timed too (goal: 150 ms in all).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "bare interpreter": ["-c", "pass"],
    "import kbpf": ["-c", "import kbpf"],
    "use all its names": ["-c", "from kbpf import *"],
    "kbpf compile": ["-c", "from kbpf.cli.main import main; main()", "compile", "-d", "tcp and dst port 7070"],
}


def milliseconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return (time.perf_counter() - start) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=21)
    runs = parser.parse_args().runs
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for name in list(COMMANDS) * (runs + 1):
        times[name].append(milliseconds(COMMANDS[name]))
    # The first of each filled the caches.
    median = {name: statistics.median(each[1:]) for name, each in times.items()}
    bare = median["bare interpreter"]
    for name, value in median.items():
        print(f"{name:18} {value:7.1f} ms   {value - bare:+7.1f} ms   {value / bare:5.2f} times the bare interpreter")


if __name__ == "__main__":
    main()
