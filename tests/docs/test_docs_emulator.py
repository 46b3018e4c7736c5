"""The reference of the emulator names all that there is, and all that is refused."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from kbpf.emulator import events, helpers, test_runs
from kbpf.emulator.attach_types import EXPECTED
from kbpf.emulator.environment import Environment
from kbpf.emulator.helpers.allowed import allowed
from kbpf.emulator.maps import KINDS
from kbpf.uapi.enums import HELPERS, MAP_TYPES, PROG_TYPES

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "emulator.md").read_text()


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def names(text: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", text))


def refused(title: str) -> set[str]:
    return names(section(title).split("\nRefused: ")[1])


def first_column(title: str) -> dict[str, str]:
    """What each name in the first column of a section's table stands beside."""
    rows = re.findall(r"^\| (`.*?) \| (.*) \|$", section(title), re.MULTILINE)
    return {name: rest for cell, rest in rows for name in names(cell)}


def test_types_of_programs() -> None:
    there = first_column("Types of programs")
    assert set(there) == set(helpers.ALLOWED)
    assert refused("Types of programs") == set(PROG_TYPES) - set(there) - {"unspec"}
    for type, how in there.items():
        if "the same" not in how:
            assert ("Program.run" in how) == (type in test_runs.RUNNERS), type
            assert ("emulator.run_program" in how) == (type in events.TYPES), type


def test_types_of_maps() -> None:
    assert refused("Maps") == set(MAP_TYPES) - set(KINDS) - {"unspec"}
    assert names(section("Maps").split("\nRefused: ")[0]) == set(KINDS)


@pytest.mark.parametrize("type", helpers.ALLOWED)
def test_helpers_that_are_refused(type: str) -> None:
    there = helpers.functions(type)
    lacking = {
        name
        for attach_type in EXPECTED.get(type, {0})
        for name, number in HELPERS.items()
        if number in allowed(type, attach_type) and number not in there and name != "tail_call"
    }
    told = {
        name for name, rest in first_column("Helpers").items() if rest.startswith("everywhere") or type in names(rest)
    }
    assert lacking == told


def test_what_a_test_can_set() -> None:
    assert set(first_column("The machine that programs ask")) == {
        field.name for field in dataclasses.fields(Environment)
    }
