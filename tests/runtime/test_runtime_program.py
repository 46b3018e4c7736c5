"""Runs of a program as a user asks for them; every fact holds on both backends."""

from __future__ import annotations

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


def test_a_number_is_no_packet(backend: str) -> None:
    with kbpf.load_program(RETURN_SEVEN, backend=backend) as program, pytest.raises(TypeError):
        program.run(60)  # type: ignore[arg-type]
