"""How long is the code of filters, and how much of it runs? Against libpcap's optimiser, on a corpus of expressions.

The corpus has libpcap's programs for each expression and packets to run them on; `KBPF_CORPUS` names its folder. Prints
geometric means of the ratios to the better of two versions of libpcap: of all instructions (goal: 0.99), and of those
that run over the packets (goal: 0.96); and how many expressions come out longer (goal: 2 %).

    python benchmarks/filter_code.py [--order libpcap]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from kbpf.errors import FilterError
from kbpf.filter import compile_filter
from kbpf.filter.names import Names
from kbpf.specs import FILE_LAYOUTS

CORPUS = Path(os.environ.get("KBPF_CORPUS", Path(__file__).parents[1] / "../shared/corpus")) / "filters"


def answers(order: str) -> list[str]:
    """What kbpf compiles the corpus to, a line of JSON each."""
    check = [sys.executable, str(CORPUS / "check.py"), "--list"]
    listed = subprocess.run(check, capture_output=True, text=True, check=True).stdout
    names = Names(services=str(CORPUS / "services"), protocols=str(CORPUS / "protocols"), ethers=None, hosts=None)
    layouts = {layout.dlt: layout for layout in FILE_LAYOUTS.values()}
    lines = []
    for line in listed.splitlines():
        record = json.loads(line)
        try:
            spec = compile_filter(record["expr"], layouts[record["dlt"]], names=names, order=order)  # type: ignore[arg-type]
            record.update(ok=True, insns=spec.instructions)
        except FilterError as error:
            record.update(ok=False, err=str(error))
        lines.append(json.dumps(record))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--order", choices=["traffic", "libpcap"], default="traffic")
    order = parser.parse_args().order
    if not (CORPUS / "check.py").exists():
        sys.exit(f"there is no corpus in {CORPUS}")
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as candidate:
        candidate.write("\n".join(answers(order)))
        candidate.flush()
        command = [sys.executable, str(CORPUS / "check.py"), candidate.name, "--base", "best", "--json"]
        report = json.loads(subprocess.run(command, capture_output=True, text=True, check=False).stdout)
    compared = sum(report["static"].values())
    print(f"expressions on a link type     {compared:8}")
    print(f"verdicts or packets wrong      {report['wrong_verdicts'] + report['wrong_bitmaps']:8}")
    for name, title in (("static", "instructions"), ("dynamic", "instructions that run")):
        print(f"{title:30} {report[name + '_ratio_gm']:8.4f} times libpcap's, in the geometric mean")
        print(f"{'':30} {report[name].get('worse', 0) / compared:8.2%} of the expressions have more than libpcap")


if __name__ == "__main__":
    main()
