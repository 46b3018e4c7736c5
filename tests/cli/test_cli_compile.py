"""``kbpf compile`` as a user meets it: what it prints where, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SIXTEEN = """\
(000) ldh      [12]
(001) jeq      #0x800           jt 2	jf 9
(002) ldb      [23]
(003) jeq      #0x6             jt 4	jf 15
(004) ldh      [20]
(005) jset     #0x1fff          jt 15	jf 6
(006) ldxb     4*([14]&0xf)
(007) ldh      [x + 16]
(008) jeq      #0x1b9e          jt 14	jf 15
(009) jeq      #0x86dd          jt 10	jf 15
(010) ldb      [20]
(011) jeq      #0x6             jt 12	jf 15
(012) ldh      [56]
(013) jeq      #0x1b9e          jt 14	jf 15
(014) ret      #262144
(015) ret      #0
"""


def test_libpcaps_order_gives_the_well_known_sixteen_instructions(cli) -> None:
    done = cli("compile", "-d", "--order", "libpcap", "tcp and dst port 7070")
    assert (done.status, done.out, done.err) == (0, SIXTEEN, "")


@pytest.mark.requires("tcpdump")
@pytest.mark.parametrize("style", ["-d", "-dd", "-ddd"])
@pytest.mark.parametrize("expression", ["tcp and dst port 7070", "udp portrange 50-60", "not host 10.1.2.3", ""])
def test_listings_are_tcpdumps(cli, style: str, expression: str) -> None:
    command = ["tcpdump", style, "-y", "EN10MB", *([expression] if expression else [])]
    theirs = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert cli("compile", style, "--order", "libpcap", expression).out == theirs


def test_several_arguments_are_one_expression(cli) -> None:
    assert cli("compile", "udp", "port", "53").out == cli("compile", "udp port 53").out


def test_an_expression_that_does_not_parse_is_shown_with_a_caret(cli) -> None:
    done = cli("compile", "-d", "tcp and dst port")
    assert done.status == 2
    assert done.out == ""
    message, text, caret = done.err.splitlines()
    assert message.startswith("kbpf: ")
    assert message.endswith("at position 16")
    assert text == "  tcp and dst port"
    assert caret == " " * 18 + "^"


def test_json_gives_the_instructions(cli) -> None:
    answer = json.loads(cli("compile", "--json", "--snaplen", "96", "ip").out)
    assert answer["expr"] == "ip"
    assert answer["dlt"] == 1
    assert answer["insns"] == [[0x28, 0, 0, 12], [0x15, 0, 1, 0x800], [6, 0, 0, 96], [6, 0, 0, 0]]


def test_a_wrong_option_is_a_usage_error(cli) -> None:
    done = cli("compile", "--link", "TOKENRING", "ip")
    assert done.status == 2
    assert "TOKENRING" in done.err


def test_a_batch_answers_every_line_and_goes_on_after_errors(cli, tmp_path: Path) -> None:
    requests = [
        '{"expr": "ip", "dlt": 1, "id": 7}',
        '{"expr": "ip and", "dlt": 1}',
        '{"expr": "ip", "dlt": 12}',
        '{"expr": "ip", "dlt": 999}',
        '{"expr": 5}',
        "this is no JSON",
        '{"expr": "ip6", "dlt": 0}',
    ]
    file = tmp_path / "batch.jsonl"
    file.write_text("\n".join(requests) + "\n")
    done = cli("compile", "--batch", str(file))
    assert (done.status, done.err) == (0, "")
    answers = [json.loads(line) for line in done.out.splitlines()]
    assert [answer["ok"] for answer in answers] == [True, False, True, False, False, False, True]
    assert answers[0] | {"insns": None} == {
        "expr": "ip",
        "dlt": 1,
        "id": 7,
        "ok": True,
        "error": None,
        "insns": None,
    }
    assert answers[0]["insns"][1] == [0x15, 0, 1, 0x800]
    assert "position 6" in answers[1]["error"]
    assert all(answer["insns"] is None and answer["error"] for answer in answers if not answer["ok"])


def test_a_batch_looks_up_no_host_names(cli, tmp_path: Path) -> None:
    file = tmp_path / "batch.jsonl"
    file.write_text('{"expr": "host localhost.example", "dlt": 1}\n')
    [answer] = [json.loads(line) for line in cli("compile", "--batch", str(file)).out.splitlines()]
    assert not answer["ok"]


def test_a_batch_that_is_not_there_is_said_in_a_line(cli) -> None:
    done = cli("compile", "--batch", "/nonexistent/file.jsonl")
    assert done.status == 2
    assert "/nonexistent/file.jsonl" in done.err
    assert "Traceback" not in done.err


def test_compiling_loads_nothing_that_it_does_not_need() -> None:
    code = (
        "import sys; from kbpf.cli.main import main; sys.argv[1:] = ['compile', '-d', 'ip']\n"
        "try: main()\n"
        "finally: print([name for name in ('rich', 'pyroute2', 'elftools', 'asyncio') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_reader_that_leaves_early_is_no_error() -> None:
    code = "from kbpf.cli.main import main; main()"
    command = [sys.executable, "-c", code, "compile", "-d", "ip"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "kbpf", "compile", "ip"], capture_output=True, text=True, check=True)
    assert (
        done.stdout
        == subprocess.run(
            [sys.executable, "-c", "from kbpf.cli.main import main; main()", "compile", "ip"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
