"""Random programs give the same on the kernel and in the emulator, and a fault in the emulator would be seen.

A few thousand here; `make fuzz` runs a million.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pytest

from kbpf.emulator import semantics
from kbpf.emulator.jit import arithmetic
from kbpf.isa import ebpf
from kbpf.testing import fuzz
from kbpf.testing.fuzz import Report

pytestmark = [pytest.mark.requires("kernel"), pytest.mark.requires("netns")]

FULL = os.environ.get("KBPF_FUZZ") == "full"


def test_classic_filters_agree_on_every_kind_of_socket() -> None:
    report = fuzz.run_cases("cbpf", "test", range(3000))
    assert report.differences == []
    assert report.share > 0.99


def test_programs_agree() -> None:
    report = fuzz.run_cases("ebpf", "test", range(1500))
    assert report.differences == []
    assert report.share > 0.99


@pytest.mark.fuzz
@pytest.mark.skipif(not FULL, reason="the full run: make fuzz")
@pytest.mark.requires("llvmlite")
def test_a_hundred_thousand_programs_agree_in_native_code(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        assert fuzz.main(["all", "--count", "100000", "--engine", "jit"]) == 0


@pytest.mark.fuzz
@pytest.mark.skipif(not FULL, reason="the full run: make fuzz")
def test_a_million_programs_agree_and_leave_nothing_out(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        assert fuzz.main(["all", "--count", "1000000"]) == 0


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[int, str], int, str], None]]:
    """Puts a wrong meaning into one of the tables of instructions."""

    def put(table: dict[int, str], operation: int, meaning: str) -> None:
        monkeypatch.setitem(table, operation, meaning)
        semantics.factory.cache_clear()

    yield put
    monkeypatch.undo()
    semantics.factory.cache_clear()


@pytest.mark.parametrize(
    ("table", "operation", "meaning"),
    [
        (semantics.ARITHMETIC, ebpf.ARSH, "{a} >> ({b} & {shift})"),
        (semantics.ARITHMETIC, ebpf.MOD, "{a} % {b} if {b} else 0"),
        (semantics.SIGNED_ARITHMETIC, ebpf.MOD, "{a} % {b} if {b} else {a}"),
        (semantics.CONDITIONS, ebpf.JSGE, "{a} >= {b}"),
        (semantics.CONDITIONS, ebpf.JSET, "{a} == {b}"),
        (semantics.ATOMICS, ebpf.XOR, "{a} | {b}"),
    ],
)
def test_a_wrong_instruction_is_found_and_made_small(
    wrong: Callable[[dict[int, str], int, str], None], table: dict[int, str], operation: int, meaning: str
) -> None:
    wrong(table, operation, meaning)
    report = fuzz.run_cases("ebpf", "wrong", range(600), enough=1)
    assert len(report.differences) == 1
    # A test that can be kept.
    compile(report.differences[0], "difference", "exec")


@pytest.mark.requires("llvmlite")
@pytest.mark.parametrize("kind", ["cbpf", "ebpf", "direct"])
def test_native_code_agrees_and_a_wrong_instruction_in_it_is_found(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    report = fuzz.run_cases(kind, "native", range(200), jit=True)
    assert report.differences == []
    assert report.accepted > 150
    monkeypatch.setitem(arithmetic._PLAIN, ebpf.ADD, "or")
    report = fuzz.run_cases(kind, "native", range(200), enough=1, jit=True)
    assert report.differences[0].startswith("# native code")
    compile(report.differences[0], "difference", "exec")


class _Dead:
    """An executor whose processes have ended."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __enter__(self) -> _Dead:
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, *_: object) -> Future[Report]:
        future = Future[Report]()
        future.set_exception(BrokenProcessPool())
        return future


def test_a_process_that_ends_is_reported_with_its_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "ProcessPoolExecutor", _Dead)
    report = fuzz.fuzz("wild", 10, "dead", first=7, workers=1)
    assert report.differences == ["# a process ended in seed dead, range(7, 17)"]


def test_the_command_reports_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(kind: str, count: int, *_: Any) -> Report:
        return Report(kind, accepted=count, differences=["def test_it(): ..."])

    monkeypatch.setattr(fuzz, "fuzz", run)
    assert fuzz.main(["ebpf", "--count", "10", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["accepted"], found["differences"]) == ("ebpf", 10, ["def test_it(): ..."])


def test_a_full_run_that_leaves_something_out_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "fuzz", lambda kind, count, *_: Report(kind, accepted=count))
    assert fuzz.main(["cbpf", "--count", str(fuzz.FULL["cbpf"])]) == 1
