"""What ``import kbpf`` gives, and what it does not load."""

from __future__ import annotations

import subprocess
import sys

import pytest

import kbpf


def test_every_public_name_is_there() -> None:
    for name in kbpf.__all__:
        assert getattr(kbpf, name) is not None
        assert name in dir(kbpf)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = kbpf.nothing


def test_submodules_are_attributes_without_an_import_of_their_own() -> None:
    code = "import kbpf; kbpf.emulator.inject; kbpf.bcc.load"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_loads_nothing_heavy() -> None:
    heavy = ["click", "ctypes", "dataclasses", "elftools", "pyroute2", "rich"]
    code = f"import sys, kbpf; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
