"""Runs the command line within the test's process."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

from kbpf.cli.main import main


class Done(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Call with arguments; gives the exit status and what was printed."""

    def run(*arguments: str) -> Done:
        monkeypatch.setattr("sys.argv", ["kbpf", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main()
        return Done(int(exit.value.code or 0), *capsys.readouterr())

    return run
