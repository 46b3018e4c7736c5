"""Run random programs on the kernel and in the emulator, and say where they differ: ``python -m kbpf.testing.fuzz``.

Three kinds compare: ``cbpf``, classic filters on live sockets; ``ebpf``, socket filters over all instructions
(`generate_ebpf`); ``direct``, every type of program that has a test run, over all helpers, maps and the packet
(`generate_direct`). ``all`` shares the count out among them (`SHARES`). The fourth is ``wild``: programs that no
verifier has accepted (`generate_wild`), which the emulator must end; there is nothing to compare, and what goes wrong
is an exception or the end of a process.

With ``--engine jit`` native code is compared, too: to the kernel as the interpreter is, and to the interpreter where
programs are wild (`wild_engines`). One in four programs is compiled as usual, the others at LLVM's lowest level.

Those that compare need root (bpf(2), and network namespaces, in which all traffic stays). Case N of a seed is the same
program and packets everywhere. A run begins with case ``--from`` and goes on until ``--count`` programs were accepted
by the kernel (of wild ones, loaded by the emulator), so a long one can be cut into parts: ``all --count 100000 --from
200000`` is the third of ten that make a million.

What differs is made small and printed as a test. The exit status is 1 if something differs, or if a run of at least
`FULL` programs of a kind left out something that it should cover (`kbpf.testing.coverage`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context
from random import Random
from typing import Any, Protocol

from kbpf.backend import LoadRefused
from kbpf.emulator.classic import ClassicProgram
from kbpf.testing import carriers, coverage, differ, generate_direct, generate_ebpf, wild, wild_engines
from kbpf.testing.differ import ClassicCase, ClassicOutcome, EbpfOutcome
from kbpf.testing.generate_ebpf import EbpfCase
from kbpf.testing.generate_wild import Wild
from kbpf.testing.native import level_for
from kbpf.testing.network import NetworkNamespace

#: The kinds that compare, and how many of a thousand programs each gets of ``all``.
SHARES = {"cbpf": 300, "ebpf": 300, "direct": 400}
KINDS = (*SHARES, "wild")
#: From this many programs on, a run must cover everything.
FULL = {"cbpf": 5_000, "ebpf": 5_000, "direct": 20_000, "wild": 300_000}
#: One in so many cases is watched for coverage: watching makes the emulator slow.
_WATCHED = 4
#: Cases that a process takes at a time: setting up sockets and namespaces takes as long as a few hundred.
_CHUNK = 2000
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
        return sorted(_REQUIRED[self.kind]() - self.coverage.keys())


_REQUIRED: dict[str, Callable[[], set[str]]] = {
    "cbpf": coverage.required_classic,
    "ebpf": coverage.required_ebpf,
    "direct": coverage.required_direct,
    "wild": coverage.required_wild,
}


class _Kind(Protocol):
    def run(self, seed: str, number: int) -> None:
        """Run a case, and add to the report what came of it."""
        ...


class _Comparison:
    """The kernel and the emulator, ready for the cases of a kind, which subclasses know how to make and run."""

    def __init__(self, report: Report, stack: ExitStack, jit: bool) -> None:
        self.report = report
        self.jit = jit

    def run(self, seed: str, number: int) -> None:
        report, case = self.report, self.case(seed, number)
        truth = self.kernel(case)
        if refused := self.refused(truth):
            report.refused[refused] += 1
            return
        report.accepted += 1
        report.runs += self.runs(case)
        name = f"seed_{seed}_case_{number}"
        if self.emulator(case, number % _WATCHED == 0) != truth:
            report.differences.append(self.as_test(case, name))
        elif self.jit:
            with level_for(number):
                if self.native(case) != truth:
                    report.differences.append("# native code\n" + self.as_test(case, name, native=True))

    def case(self, seed: str, number: int) -> Any:
        raise NotImplementedError

    def kernel(self, case: Any) -> Any:
        raise NotImplementedError

    def emulator(self, case: Any, watched: bool) -> Any:
        raise NotImplementedError

    def native(self, case: Any) -> Any:
        raise NotImplementedError

    def refused(self, outcome: Any) -> str:
        """What the kernel said of a program that it did not accept, without what differs from program to program."""
        raise NotImplementedError

    def runs(self, case: Any) -> int:
        raise NotImplementedError

    def as_test(self, case: Any, name: str, native: bool = False) -> str:
        """A case that differs, made small, as a test."""
        raise NotImplementedError


class _Classic(_Comparison):
    def __init__(self, report: Report, stack: ExitStack, jit: bool) -> None:
        super().__init__(report, stack, jit)
        self._emulated, self._native = (
            stack.enter_context(carriers.emulated(partial(ClassicProgram, engine=engine)))
            for engine in ("interpreter", "jit")
        )
        self._watched = stack.enter_context(
            carriers.emulated(lambda program: coverage.WatchedFilter(program, report.coverage))
        )
        self._kernel = stack.enter_context(carriers.kernel())

    def case(self, seed: str, number: int) -> ClassicCase:
        # The carriers change more slowly than what is watched: so all are.
        name = carriers.NAMES[number // _WATCHED % len(carriers.NAMES)]
        return differ.classic_case(Random(f"{seed}/cbpf/{number}"), name)

    def kernel(self, case: ClassicCase) -> ClassicOutcome:
        return differ.run_classic(self._kernel, case)

    def emulator(self, case: ClassicCase, watched: bool) -> ClassicOutcome:
        return differ.run_classic(self._watched if watched else self._emulated, case)

    def native(self, case: ClassicCase) -> ClassicOutcome:
        return differ.run_classic(self._native, case)

    def refused(self, outcome: ClassicOutcome) -> str:
        return f"errno {outcome}" if isinstance(outcome, int) else ""

    def runs(self, case: ClassicCase) -> int:
        return len(case.packets)

    def as_test(self, case: ClassicCase, name: str, native: bool = False) -> str:
        small = differ.shrink_classic(self._kernel, self._native if native else self._emulated, case)
        return differ.classic_as_test(small, name, self.kernel(small))


class _Ebpf(_Comparison):
    def __init__(self, report: Report, stack: ExitStack, jit: bool) -> None:
        from kbpf.emulator.backend import EmulatorBackend
        from kbpf.kernel.backend import kernel_backend

        super().__init__(report, stack, jit)
        self._kernel = kernel_backend()
        self._emulated, self._native = EmulatorBackend("interpreter"), EmulatorBackend("jit")
        stack.enter_context(differ.one_processor())

    def case(self, seed: str, number: int) -> EbpfCase:
        return generate_ebpf.generate(Random(f"{seed}/ebpf/{number}"))

    def kernel(self, case: EbpfCase) -> EbpfOutcome:
        return differ.run_ebpf(self._kernel, case)

    def emulator(self, case: EbpfCase, watched: bool) -> EbpfOutcome:
        watches: list[coverage.Watch] = []
        outcome = differ.run_ebpf(
            self._emulated,
            case,
            (lambda fd: watches.append(coverage.Watch(self._emulated.program(fd)))) if watched else None,
        )
        for watch in watches:
            self.count(watch)
        return outcome

    def native(self, case: EbpfCase) -> EbpfOutcome:
        return differ.run_ebpf(self._native, case)

    def count(self, watch: coverage.Watch) -> None:
        coverage.count_ebpf(self.report.coverage, watch)

    def refused(self, outcome: EbpfOutcome) -> str:
        return f"errno {outcome.refused}: {differ.last_words(outcome.log)}" if outcome.refused else ""

    def runs(self, case: EbpfCase) -> int:
        return len(case.runs)

    def as_test(self, case: EbpfCase, name: str, native: bool = False) -> str:
        small = differ.shrink_ebpf(self._kernel, self._native if native else self._emulated, case)
        why = differ.differences(self.kernel(small), self.native(small) if native else self.emulator(small, False))
        return "\n".join([*(f"# {line}" for line in why), differ.ebpf_as_test(small, name)])


class _Direct(_Ebpf):
    def case(self, seed: str, number: int) -> EbpfCase:
        types = generate_direct.TYPES
        return generate_direct.generate(Random(f"{seed}/direct/{number}"), types[number // _WATCHED % len(types)])

    def count(self, watch: coverage.Watch) -> None:
        coverage.count_direct(self.report.coverage, watch)


class _Wild:
    """Programs that only the emulator takes: what matters is that they end, and how, on both engines."""

    def __init__(self, report: Report, stack: ExitStack, jit: bool) -> None:
        self.report = report
        self._engines = wild_engines.Engines(stack) if jit else None
        self._runner = self._engines.runner if self._engines is not None else wild.Runner(stack)

    def run(self, seed: str, number: int) -> None:
        case = self._runner.case(seed, number)
        try:
            self._run(case, number)
        except Exception:
            self.report.differences.append(f"# seed {seed}, case {number}\n{traceback.format_exc()}{case}")

    def _run(self, case: Wild, number: int) -> None:
        report, backend = self.report, self._runner.backend
        try:
            fd = self._runner.load(case)
        except LoadRefused as refusal:
            report.refused[f"errno {refusal.errno}: {differ.last_words(refusal.log)}"] += 1
            return
        try:
            report.accepted += 1
            report.runs += 1
            watches: list[coverage.Watch] = []

            def watch() -> None:
                if number % _WATCHED == 0:
                    watches.append(coverage.Watch(backend.program(fd)))

            if self._engines is None:
                watch()
                way, *what = self._runner.run(fd, case)
            else:
                (way, *what), forges = self._engines.compare(fd, case, number, watch)
                report.coverage["forged addresses of the stack"] += forges
            report.coverage[f"ended in {way}"] += 1
            for watched in watches:
                coverage.count_wild(report.coverage, watched, what[0] if way == "fault" else None)
        finally:
            backend.close(fd)


_KINDS: dict[str, Callable[[Report, ExitStack, bool], _Kind]] = {
    "cbpf": _Classic,
    "ebpf": _Ebpf,
    "direct": _Direct,
    "wild": _Wild,
}


def run_cases(kind: str, seed: str, cases: Iterable[int], enough: int = _ENOUGH, jit: bool = False) -> Report:
    """Run the cases of these numbers, in native code, too, if `jit` says so; stop after `enough` differences."""
    if kind == "wild":
        return _run_cases(kind, seed, cases, enough, jit)
    with NetworkNamespace() as namespace:
        return namespace.call(_run_cases, kind, seed, cases, enough, jit)


def _run_cases(kind: str, seed: str, cases: Iterable[int], enough: int, jit: bool) -> Report:
    report = Report(kind)
    with ExitStack() as stack:
        runner = _KINDS[kind](report, stack, jit)
        for number in cases:
            runner.run(seed, number)
            if len(report.differences) >= enough:
                break
    return report


def fuzz(
    kind: str,
    count: int,
    seed: str,
    first: int = 0,
    workers: int | None = None,
    progress: Callable[[Report], object] = lambda _: None,
    jit: bool = False,
) -> Report:
    """Run from case `first` on until the kernel has accepted `count` programs, in several processes.

    `progress` is told now and then.
    """
    begin = time.monotonic()
    report = Report(kind)
    workers = workers or len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        following = first
        running: dict[Future[Report], range] = {}
        asked = 0
        while report.accepted < count and len(report.differences) < _ENOUGH:
            while asked < count - report.accepted and len(running) < 2 * workers:
                size = min(_CHUNK, count - report.accepted - asked)
                cases = range(following, following + size)
                running[pool.submit(run_cases, kind, seed, cases, _ENOUGH, jit)] = cases
                following += size
                asked += size
            done = next(as_completed(running))
            cases = running.pop(done)
            try:
                part = done.result()
            except BrokenProcessPool:
                # What else was running has gone with it.
                report.differences += [
                    f"# a process ended in seed {seed}, {cases}" for cases in (cases, *running.values())
                ]
                break
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
    parser = argparse.ArgumentParser(
        prog="python -m kbpf.testing.fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=(*KINDS, "all"))
    parser.add_argument("--count", type=int, default=1_000_000, help="programs that are accepted, of all kinds")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the number of the first case of each kind")
    parser.add_argument("--seed", default="1", help="any text; the same seed gives the same cases")
    parser.add_argument("--engine", choices=("interpreter", "jit"), default="interpreter", help="jit: both")
    parser.add_argument("--workers", type=int, help="processes; as many as processors by default")
    parser.add_argument("--json", action="store_true", help="one JSON object a kind on standard output")
    options = parser.parse_args(arguments)
    status = 0
    for kind in SHARES if options.kind == "all" else (options.kind,):
        count = options.count * SHARES[kind] // sum(SHARES.values()) if options.kind == "all" else options.count
        with _progress(kind, count) as tell:
            report = fuzz(kind, count, options.seed, options.first, options.workers, tell, options.engine == "jit")
        if options.json:
            print(json.dumps({**asdict(report), "share": report.share, "missing": report.missing()}), flush=True)
        else:
            _print(report)
        if report.differences or (report.accepted >= FULL[kind] and report.missing()):
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
