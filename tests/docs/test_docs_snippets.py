"""Every Python block of the documentation runs; those of one page run in order, as a reader would."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import kbpf
from kbpf.testing.plugin import need

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
BLOCK = re.compile(r"(?:<!-- requires: ([\w ]+) -->\n)?```python\n(.*?)```", re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)\)")


@pytest.mark.filterwarnings("ignore::kbpf.EmulationWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(page.read_text())], ids=lambda page: page.name)
def test_the_snippets_of_a_page_run(page: Path) -> None:
    text = page.read_text()
    namespace: dict[str, Any] = {}
    for block in BLOCK.finditer(text):
        if block[1]:
            need(*block[1].split())
        # Line numbers of errors are the page's.
        code = "\n" * text.count("\n", 0, block.start(2)) + block[2]
        exec(compile(code, str(page), "exec", dont_inherit=True), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_reference_of_python_names_all_that_is_public() -> None:
    page = (ROOT / "docs/reference/python.md").read_text()
    assert [name for name in kbpf.__all__ if not re.search(rf"\b{name}\b", page)] == []
