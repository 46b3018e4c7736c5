"""What all the tests share: the plugin that kbpf ships, and where the optional corpus is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kbpf.testing import requirements

pytest_plugins = ["kbpf.testing.plugin"]

ROOT = Path(__file__).resolve().parent.parent
CORPUS = Path(os.environ.get("KBPF_CORPUS") or ROOT.parent / "shared" / "corpus")

requirements.PROBES["corpus"] = ("the corpus of filters and packets (KBPF_CORPUS=FOLDER)", CORPUS.is_dir)


@pytest.fixture(scope="session")
def corpus() -> Path:
    """The folder of the corpus; a test that uses it is marked ``requires("corpus")``."""
    return CORPUS
