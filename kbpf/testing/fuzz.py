"""Run random programs on the kernel and in the emulator, and say where they differ: ``python -m kbpf.testing.fuzz``.

Needs root (bpf(2), and network namespaces for all carriers of classic filters but UNIX sockets). Case N of a seed
is the same program and packets everywhere. What differs is made small and printed as a test. The exit status is 1 if
something differs, or if a run of at least `FULL` programs left out something that it should cover
(`kbpf.testing.coverage`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from random import Random

from kbpf.testing import carriers, coverage, differ, generate_direct, generate_ebpf
from kbpf.testing.generate_ebpf import MAP_TYPES

KINDS = ("cbpf", "ebpf", "direct")
#: From this many programs on, a run must cover everything.
FULL = 5000
#: One in so many cases is watched for coverage: watching makes the emulator slow.
_WATCHED = 4
_CHUNK = 500
#: After so many differences there is no use in going on.
_ENOUGH = 10


@dataclass
class Report:
    """What a run found. `refused` counts by errno, `coverage` by what ran, `differences` are texts of tests."""

    kind: str
    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    seconds: float = 0.0
    coverage: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)

    def add(self, other: Report) -> None:
        self.accepted += other.accepted
        self.refused += other.refused
        self.runs += other.runs
        self.coverage += other.coverage
        self.differences += other.differences

    @property
    def share(self) -> float:
        """How many of the programs the kernel accepted."""
        tried = self.accepted + sum(self.refused.values())
        return self.accepted / tried if tried else 0.0

    def missing(self) -> list[str]:
        """What should have been covered and was not."""
        required = {
            "cbpf": coverage.required_classic,
            "ebpf": lambda: coverage.required_ebpf((*MAP_TYPES, "prog_array")),
            "direct": generate_direct.required,
        }[self.kind]()
        return sorted(required - self.coverage.keys())


def fuzz_cbpf(seed: str, cases: Iterable[int], enough: int = _ENOUGH) -> Report:
    """Run the cases of these numbers, over all carriers in turn; stop after `enough` differences."""
    names = carriers.NAMES
    report = Report("cbpf")
    emulated = carriers.emulated()
    watched = carriers.emulated(lambda program: coverage.WatchedFilter(program, report.coverage))
    with carriers.kernel() as kernel:
        for number in cases:
            case = differ.classic_case(Random(f"{seed}/cbpf/{number}"), names[number % len(names)])
            truth = differ.run_classic(kernel, case)
            if isinstance(truth, int):
                report.refused[f"errno {truth}"] += 1
                continue
            report.accepted += 1
            report.runs += len(case.packets)
            if differ.run_classic(emulated if number // len(names) % _WATCHED else watched, case) != truth:
                small = differ.shrink_classic(kernel, emulated, case)
                report.differences.append(
                    differ.classic_as_test(small, f"seed_{seed}_case_{number}", differ.run_classic(kernel, small))
                )
                if len(report.differences) >= enough:
                    break
    return report


def fuzz_ebpf(seed: str, cases: Iterable[int], enough: int = _ENOUGH) -> Report:
    """Run the cases of these numbers; stop after `enough` differences."""
    from kbpf.emulator.backend import EmulatorBackend
    from kbpf.kernel.backend import kernel_backend

    report = Report("ebpf")
    kernel, emulated = kernel_backend(), EmulatorBackend()
    with differ.one_processor():
        for number in cases:
            case = generate_ebpf.generate(Random(f"{seed}/ebpf/{number}"))
            truth = differ.run_ebpf(kernel, case)
            if truth.refused:
                report.refused[f"errno {truth.refused}: {differ.last_words(truth.log)}"] += 1
                continue
            report.accepted += 1
            report.runs += len(case.runs)
            watches: list[coverage.Watch] = []
            watch = (
                None if number % _WATCHED else lambda fd, to=watches: to.append(coverage.Watch(emulated.program(fd)))
            )
            got = differ.run_ebpf(emulated, case, watch)
            for seen in watches:
                coverage.count_ebpf(report.coverage, seen)
            if got != truth:
                small = differ.shrink_ebpf(kernel, emulated, case)
                why = differ.differences(differ.run_ebpf(kernel, small), differ.run_ebpf(emulated, small))
                text = differ.ebpf_as_test(small, f"seed_{seed}_case_{number}")
                report.differences.append("\n".join([*(f"# {line}" for line in why), text]))
                if len(report.differences) >= enough:
                    break
    return report


def fuzz_direct(seed: str, cases: Iterable[int], enough: int = _ENOUGH) -> Report:
    """Run the cases of these numbers, of all the types that reach into packets in turn."""
    from kbpf.emulator.backend import EmulatorBackend
    from kbpf.kernel.backend import kernel_backend

    report = Report("direct")
    kernel, emulated = kernel_backend(), EmulatorBackend()
    types = generate_direct.TYPES
    with differ.one_processor():
        for number in cases:
            program_type = types[number % len(types)]
            case = generate_direct.generate(Random(f"{seed}/direct/{number}"), program_type)
            truth = differ.run_ebpf(kernel, case)
            if truth.refused:
                report.refused[f"errno {truth.refused}: {differ.last_words(truth.log)}"] += 1
                continue
            report.accepted += 1
            report.runs += len(case.runs)
            report.coverage.update(f"{program_type} {name}" for name in generate_direct.called(case))
            if differ.run_ebpf(emulated, case) != truth:
                small = differ.shrink_ebpf(kernel, emulated, case)
                why = differ.differences(differ.run_ebpf(kernel, small), differ.run_ebpf(emulated, small))
                text = differ.ebpf_as_test(small, f"seed_{seed}_case_{number}")
                report.differences.append("\n".join([*(f"# {line}" for line in why), text]))
                if len(report.differences) >= enough:
                    break
    return report


_FUZZERS: dict[str, Callable[[str, Iterable[int]], Report]] = {
    "cbpf": fuzz_cbpf,
    "ebpf": fuzz_ebpf,
    "direct": fuzz_direct,
}


def fuzz(
    kind: str, count: int, seed: str, workers: int | None = None, progress: Callable[[Report], object] = lambda _: None
) -> Report:
    """Run until the kernel has accepted `count` programs, in several processes; `progress` is told now and then."""
    begin = time.monotonic()
    report = Report(kind)
    workers = workers or len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        following = 0
        running: set[Future[Report]] = set()
        asked = 0
        while report.accepted < count and len(report.differences) < _ENOUGH:
            while asked < count - report.accepted and len(running) < 2 * workers:
                size = min(_CHUNK, count - report.accepted - asked)
                running.add(pool.submit(_FUZZERS[kind], seed, range(following, following + size)))
                following += size
                asked += size
            done = next(as_completed(running))
            running.remove(done)
            part = done.result()
            asked -= part.accepted + sum(part.refused.values())
            report.add(part)
            report.seconds = time.monotonic() - begin
            progress(report)
        for future in running:
            future.cancel()
    return report


@contextmanager
def _progress(kind: str, count: int) -> Iterator[Callable[[Report], object]]:
    """Tells on standard error how far a run is: a bar on a terminal, else a line now and then."""
    if not sys.stderr.isatty():
        last = [time.monotonic()]

        def tell(report: Report) -> None:
            if time.monotonic() - last[0] > 10:
                last[0] = time.monotonic()
                print(
                    f"{kind}: {report.accepted} of {count}, {len(report.differences)} differ",
                    file=sys.stderr,
                    flush=True,
                )

        yield tell
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(kind, total=count)
        yield lambda report: bar.update(task, completed=report.accepted)


def _print(report: Report) -> None:
    print(
        f"{report.kind}: {report.accepted} programs, {report.runs} runs in {report.seconds:.0f} s;"
        f" accepted {report.share:.2%}; {len(report.differences)} differ"
    )
    for reason, times in report.refused.most_common(10):
        print(f"  refused {times} times: {reason}")
    print(f"  covered (counted in one case of {_WATCHED}):")
    for name, times in sorted(report.coverage.items()):
        print(f"    {name:40} {times}")
    for name in report.missing():
        print(f"  NOT COVERED: {name}")
    for text in report.differences:
        print(f"\n{text}\n")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m kbpf.testing.fuzz", description=__doc__)
    parser.add_argument("kind", choices=(*KINDS, "all"))
    parser.add_argument("--count", type=int, default=100_000, help="programs of each kind that the kernel accepts")
    parser.add_argument("--seed", default="1", help="any text; the same seed gives the same cases")
    parser.add_argument("--workers", type=int, help="processes; as many as processors by default")
    parser.add_argument("--json", action="store_true", help="one JSON object a kind on standard output")
    options = parser.parse_args(arguments)
    status = 0
    for kind in KINDS if options.kind == "all" else (options.kind,):
        with _progress(kind, options.count) as tell:
            report = fuzz(kind, options.count, options.seed, options.workers, tell)
        if options.json:
            print(json.dumps({**asdict(report), "share": report.share, "missing": report.missing()}))
        else:
            _print(report)
        if report.differences or (report.accepted >= FULL and report.missing()):
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
