"""``kbpf compile``: an expression as classic BPF, in tcpdump's listings or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, Literal, TextIO

import click

import kbpf
from kbpf.asm.listing import Style, listing
from kbpf.cli import options
from kbpf.cli.main import describe
from kbpf.specs import FILE_LAYOUTS

_STYLES: tuple[Style, ...] = ("d", "d", "dd", "ddd")
_LINKS = {layout.dlt: name for name, layout in FILE_LAYOUTS.items()}


@click.command("compile")
@click.argument("expression", nargs=-1)
@click.option("-d", "style", count=True, help="List as tcpdump does: -d assembler, -dd C, -ddd numbers.")
@options.link
@options.order
@click.option("-O", "--no-optimize", is_flag=True, help="Leave the code as it was generated.")
@options.no_dns
@click.option("--snaplen", type=click.IntRange(1, 0xFFFFFFFF), default=262144, show_default=True, metavar="BYTES")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object.")
@click.option(
    "--batch",
    type=click.File("r", encoding="utf-8", errors="replace"),
    metavar="FILE",
    help='Compile each line {"expr": ..., "dlt": ...} of a file (- for standard input), and write a line for each.',
)
def command(
    expression: tuple[str, ...],
    style: int,
    link: str,
    order: Literal["traffic", "libpcap"],
    no_optimize: bool,
    no_dns: bool,
    snaplen: int,
    as_json: bool,
    batch: TextIO | None,
) -> None:
    """Compile EXPRESSION, a pcap-filter(7) expression, to classic BPF.

    Several arguments are joined by spaces; none at all matches every packet.
    """
    settings: dict[str, Any] = {
        "snaplen": snaplen,
        "optimize": not no_optimize,
        "order": order,
        "names": "system" if no_dns or batch is not None else "system+dns",
    }
    if batch is not None:
        if expression:
            raise click.UsageError("--batch and an expression exclude each other.")
        for answer in _answers(batch, settings):
            click.echo(json.dumps(answer))
        return
    text = " ".join(expression)
    compiled = kbpf.compile(text, link=link, **settings)
    if as_json:
        click.echo(json.dumps({"expr": text, "dlt": compiled.layout.dlt, "insns": compiled.instructions}))
    else:
        click.echo(listing(compiled.instructions, _STYLES[min(style, 3)]), nl=False)


def _answers(lines: Iterable[str], settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Each line's object with "ok", "error" and "insns" added; a line that is no such object is answered too."""
    for line in lines:
        if not line.strip():
            continue
        answer: dict[str, Any] = {}
        try:
            answer = _request(line)
            compiled = kbpf.compile(answer["expr"], link=_link(answer), **settings)
            yield {**answer, "ok": True, "error": None, "insns": compiled.instructions}
        except (kbpf.KbpfError, ValueError) as error:
            yield {**answer, "ok": False, "error": describe(error), "insns": None}


def _request(line: str) -> dict[str, Any]:
    request = json.loads(line)
    if not isinstance(request, dict) or not isinstance(request.get("expr"), str):
        raise ValueError('not an object with a string "expr"')
    return request


def _link(request: dict[str, Any]) -> str:
    dlt = request.get("dlt", 1)
    if isinstance(dlt, bool) or not isinstance(dlt, int) or dlt not in _LINKS:
        raise ValueError(f"no link type has the number {dlt!r}; there are {', '.join(map(str, _LINKS))}")
    return _LINKS[dlt]
