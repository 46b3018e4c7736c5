"""``kbpf explain``: what a filter asks, in words, and the path that a packet takes through it."""

from __future__ import annotations

import json
from itertools import islice
from typing import Literal, TextIO

import click

import kbpf
from kbpf.asm.numbers import parse_numbers
from kbpf.cli import options

Packet = tuple[bytes, int]


@click.command("explain")
@click.argument("expression", nargs=-1)
@options.link
@options.order
@options.no_dns
@click.option(
    "--instructions",
    type=click.File("r"),
    metavar="FILE",
    help="Explain these numbers instead, as `tcpdump -dd` or `-ddd` prints them (- for standard input).",
)
@click.option(
    "--packet", metavar="FILE[:N]|HEX", help="Show the path of packet N (1 the first) of a capture, or of bytes."
)
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object.")
def command(
    expression: tuple[str, ...],
    link: str,
    order: Literal["traffic", "libpcap"],
    no_dns: bool,
    instructions: TextIO | None,
    packet: str | None,
    as_json: bool,
) -> None:
    """Explain EXPRESSION, or a filter given as numbers: its decisions, and what each instruction does.

    An offset gets the name of the header field there, as far as the tests before it have settled what the packet is.
    """
    if instructions is not None:
        if expression:
            raise click.UsageError("--instructions and an expression exclude each other.")
        filter = kbpf.Filter(parse_numbers(instructions.read()), link=link)
    else:
        names: Literal["system+dns", "system"] = "system" if no_dns else "system+dns"
        filter = kbpf.compile(" ".join(expression), link=link, order=order, names=names)
    explained = filter.explain()
    path = None if packet is None else filter.path(*_packet(packet, filter))
    if as_json:
        rows = [
            {"insn": insn, "remark": remark}
            for insn, remark in zip(filter.instructions, explained.remarks, strict=True)
        ]
        taken = None if path is None else {"instructions": path.instructions, "kept": path.kept}
        click.echo(json.dumps({"instructions": rows, "decisions": explained.decisions(), "path": taken}))
        return
    click.echo(explained.decisions())
    lines = [line.expandtabs() for line in str(filter).splitlines()]
    width = max(map(len, lines))
    walked = set() if path is None else set(path.instructions)
    for pc, (line, remark) in enumerate(zip(lines, explained.remarks, strict=True)):
        mark = "" if path is None else "* " if pc in walked else "  "
        click.echo(f"{mark}{line.ljust(width)}  {remark}".rstrip())
    if path is not None:
        way = " ".join(f"({pc:03})" for pc in path.instructions)
        click.echo(f"\npath: {way}\n{f'accepted: {path.kept} bytes kept' if path.kept else 'rejected'}")


def _packet(text: str, filter: kbpf.Filter) -> Packet:
    """The packet that the option names: bytes and length on the wire."""
    digits = "".join(text.split())
    if digits and not set(digits.lower()) - set("0123456789abcdef"):
        if len(digits) % 2:
            raise click.UsageError("--packet: an odd number of hexadecimal digits")
        data = bytes.fromhex(digits)
        return data, len(data)
    file, colon, number = text.rpartition(":")
    if not colon or not number.isdecimal():
        file, number = text, "1"
    from kbpf.pcapfile import open_capture

    with open_capture(file) as capture:
        record = next(islice(capture, int(number) - 1, None), None) if int(number) else None
    if record is None:
        raise click.UsageError(f"--packet: {file} has no packet {number}")
    if record.dlt != filter.layout.dlt:
        raise click.UsageError(
            f"--packet: link type {record.dlt} in {file}, where the filter is for {filter.layout.name}"
        )
    return record.data, record.wirelen
