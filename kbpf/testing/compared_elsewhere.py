"""What the emulator has and random programs do not reach, with why, and the test that compares it with the kernel.

Everything else that the emulator has must be reached by a full run of the fuzzer; a test holds both.
"""

from __future__ import annotations

from typing import NamedTuple


class Elsewhere(NamedTuple):
    """Why it cannot be compared by random programs, and the test that compares it: a file of tests/ and a function."""

    why: str
    test: str


_NO_LOCKS = Elsewhere(
    "Linux lets socket filters use no map with a lock",
    "emulator/test_emulator_maps_locks.py::test_commands_with_a_lock",
)

#: Helpers, by name, or by program type and name.
HELPERS: dict[str, Elsewhere] = {
    "socket_filter spin_lock": _NO_LOCKS,
    "socket_filter spin_unlock": _NO_LOCKS,
}

#: Types of programs that have no test run in Linux, or one that a stream of random packets does not fit.
TYPES: dict[str, Elsewhere] = {}

#: Types of maps that no helper of the types that are generated reaches.
MAPS: dict[str, Elsewhere] = {
    type: Elsewhere(
        "only commands reach it",
        "emulator/test_emulator_maps_stateful.py::test_random_sequences_have_the_kernels_results",
    )
    for type in ("stack_trace", "sk_storage", "inode_storage", "task_storage", "cgrp_storage")
}


def where(helper: str, program_type: str) -> Elsewhere | None:
    """What is known of a helper as programs of that type call it; None if random programs do."""
    return HELPERS.get(helper) or HELPERS.get(f"{program_type} {helper}")
