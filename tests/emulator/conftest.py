"""The kernel and the emulator, side by side."""

from __future__ import annotations

import pytest
from sides import Side

from kbpf.emulator.backend import EmulatorBackend

pytest.register_assert_rewrite("hosts")


@pytest.fixture
def emulator() -> Side:
    return Side(EmulatorBackend())


@pytest.fixture
def kernel() -> Side:
    from kbpf.kernel.backend import KernelBackend

    return Side(KernelBackend())
