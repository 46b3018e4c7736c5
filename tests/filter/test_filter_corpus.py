"""The public corpus of expressions: libpcap's verdict on every packet, and figures against its optimiser."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kbpf.errors import FilterError
from kbpf.filter import compile_filter
from kbpf.filter.names import Names
from kbpf.specs import FILE_LAYOUTS

CORPUS = Path(os.environ.get("KBPF_CORPUS", Path(__file__).parents[2] / "../shared/corpus")) / "filters"


@pytest.mark.requires("corpus")
def test_the_corpus_agrees_with_libpcap(tmp_path: Path) -> None:
    check = [sys.executable, str(CORPUS / "check.py")]
    quick = ["--quick", "400"]
    listed = subprocess.run([*check, "--list", *quick], capture_output=True, text=True, check=True).stdout
    names = Names(services=str(CORPUS / "services"), protocols=str(CORPUS / "protocols"), ethers=None, hosts=None)
    layouts = {layout.dlt: layout for layout in FILE_LAYOUTS.values()}
    lines = []
    for line in listed.splitlines():
        record = json.loads(line)
        try:
            program = compile_filter(record["expr"], layouts[record["dlt"]], names=names).instructions
            record.update(ok=True, insns=program)
        except FilterError as error:
            record.update(ok=False, err=str(error))
        lines.append(json.dumps(record))
    candidate = tmp_path / "candidate.jsonl"
    candidate.write_text("\n".join(lines))
    command = [*check, str(candidate), *quick, "--base", "best", "--json"]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=False).stdout)
    assert report["wrong_verdicts"] == 0 and report["wrong_bitmaps"] == 0
    assert set(report["notes"]) <= {"programs with backward jumps"}
    assert report["dynamic_ratio_gm"] <= 0.96
    assert report["static_ratio_gm"] <= 0.99
