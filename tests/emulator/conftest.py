"""The kernel and the emulator, side by side."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sides import Side
from socks import Scene

from kbpf.emulator.backend import EmulatorBackend
from kbpf.emulator.environment import environment
from kbpf.testing.network import NetworkNamespace

pytest.register_assert_rewrite("hosts", "sockmaps")


@pytest.fixture
def emulator() -> Side:
    return Side(EmulatorBackend())


@pytest.fixture
def kernel() -> Side:
    from kbpf.kernel.backend import KernelBackend

    return Side(KernelBackend())


@pytest.fixture
def scene() -> Iterator[Scene]:
    """Real sockets in a network namespace, and emulated ones that are like them."""
    before = environment.sockets
    with NetworkNamespace() as namespace, Scene(namespace, environment) as scene:
        yield scene
    environment.sockets = before
