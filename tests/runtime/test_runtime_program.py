"""Runs of a program as a user asks for them; every fact holds on both backends."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import kbpf

RETURN_SEVEN = kbpf.ProgramSpec(instructions=b"\xb7\0\0\0\x07\0\0\0\x95\0\0\0\0\0\0\0")
FRAME = bytes(60)


def test_a_run_gives_value_packet_and_context(backend: str) -> None:
    with kbpf.load_program(RETURN_SEVEN, backend=backend) as program:
        done = program.run(FRAME, {"mark": 7, "cb": [1, 2]}, wirelen=100)
    assert (done.value, done.data, done.context["mark"], done.context["cb"]) == (7, FRAME, 7, (1, 2, 0, 0, 0))


@pytest.mark.parametrize("context", [{"mark": 1 << 32}, {"cb": [1] * 6}, {"no_such_field": 1}])
def test_a_context_that_does_not_fit_is_refused(backend: str, context: dict[str, Any]) -> None:
    with kbpf.load_program(RETURN_SEVEN, backend=backend) as program, pytest.raises(ValueError, match="__sk_buff"):
        program.run(FRAME, context)


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_descriptor_keeps_one_owner(backend: str, way: Callable[[object], object]) -> None:
    with kbpf.load_program(RETURN_SEVEN, backend=backend) as program:
        with pytest.raises(TypeError, match="owns a descriptor"):
            way(program)
        assert program.run(FRAME).value == 7


@pytest.mark.filterwarnings("error::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.requires("kernel")
def test_a_program_that_is_dropped_is_closed_even_if_warnings_are_errors() -> None:
    program = kbpf.load_program(RETURN_SEVEN, backend="kernel")
    descriptor = Path(f"/proc/self/fd/{program.fileno()}")
    del program
    assert not os.path.lexists(descriptor)


def test_a_number_is_no_packet(backend: str) -> None:
    with kbpf.load_program(RETURN_SEVEN, backend=backend) as program, pytest.raises(TypeError):
        program.run(60)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong", [{"expected_attach_type": "no_such_type"}, {"expected_attach_type": -1}, {"flags": 1 << 32}]
)
def test_a_spec_takes_no_attach_type_or_flags_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"attach|flags"):
        kbpf.ProgramSpec(instructions=b"", **wrong)


@pytest.mark.requires("kernel")
@pytest.mark.parametrize("flag", [1 << bit for bit in (*range(10), 15, 31)])
def test_both_backends_take_the_same_flags(flag: int) -> None:
    taken = {}
    for backend in ("kernel", "emulator"):
        try:
            kbpf.load_program(replace(RETURN_SEVEN, flags=flag), backend=backend).close()
            taken[backend] = 0
        except kbpf.VerifierError as error:
            taken[backend] = error.errno or 0
    assert taken["kernel"] == taken["emulator"]
