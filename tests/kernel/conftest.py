"""What the tests of the kernel backend share: the backend, descriptors that are closed again, and another user."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import kbpf
from kbpf.kernel.backend import KernelBackend
from kbpf.testing.requirements import SYSTEM_PYTHON, as_nobody

Runner = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def kernel() -> KernelBackend:
    return KernelBackend()


@pytest.fixture
def keep(kernel: KernelBackend) -> Iterator[Callable[[int], int]]:
    """``fd = keep(kernel.map_create(spec))``: closed when the test ends."""
    kept: list[int] = []

    def add(fd: int) -> int:
        kept.append(fd)
        return fd

    yield add
    for fd in kept:
        os.close(fd)


def open_descriptors() -> set[int]:
    return {int(path.name) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}


@pytest.fixture(autouse=True)
def no_descriptor_leaks() -> Iterator[None]:
    before = open_descriptors()
    yield
    gc.collect()
    assert open_descriptors() <= before


@pytest.fixture(scope="session")
def readable_kbpf() -> Iterator[Path]:
    """A copy of the package that any user can read, whatever the modes of the checkout's parents are."""
    folder = Path(tempfile.mkdtemp(prefix="kbpf-nobody-"))
    folder.chmod(0o755)
    shutil.copytree(Path(kbpf.__file__).parent, folder / "kbpf", ignore=shutil.ignore_patterns("__pycache__"))
    yield folder
    shutil.rmtree(folder)


def _run(folder: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def nobody(readable_kbpf: Path) -> Runner:
    """``nobody(script, *arguments)``: run Python as a user with no capabilities, or with the given ones."""

    def run(script: str, *rest: str, capabilities: str = "") -> subprocess.CompletedProcess[str]:
        command = as_nobody(SYSTEM_PYTHON, "-c", script, *rest)
        if capabilities:
            command[1:1] = [f"--inh-caps={capabilities}", f"--ambient-caps={capabilities}"]
            command.remove("--inh-caps=-all")
        return _run(readable_kbpf, command)

    return run


@pytest.fixture
def own_namespace(readable_kbpf: Path) -> Runner:
    """The same as root of a new user and network namespace."""
    return lambda script, *rest: _run(readable_kbpf, as_nobody("unshare", "-Urn", SYSTEM_PYTHON, "-c", script, *rest))


@pytest.fixture
def network_namespace(readable_kbpf: Path) -> Runner:
    """Run a shell command in a new network namespace, as root; ``$PYTHON`` is this interpreter."""
    return lambda command: _run(readable_kbpf, ["unshare", "--net", "sh", "-ec", f"PYTHON={sys.executable}; {command}"])


@pytest.fixture
def bpffs(tmp_path: Path) -> Iterator[Path]:
    """A BPF file system of the test's own."""
    place = tmp_path / "bpf"
    place.mkdir()
    subprocess.run(["mount", "-t", "bpf", "bpf", str(place)], check=True)
    yield place
    subprocess.run(["umount", str(place)], check=True)
