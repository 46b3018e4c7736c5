"""``kbpf doctor``: what this process may do with BPF, what is missing, and what to do about it."""

from __future__ import annotations

import json

import click

from kbpf.kernel.doctor import doctor_report

_COLOURS = {"ok": "green", "missing": "yellow", "info": None}


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON array of findings.")
def command(as_json: bool) -> None:
    """Say what this process may do with BPF, what is missing, and the remedy.

    Changes nothing: what is tried is let go again.
    """
    report = doctor_report()
    if as_json:
        click.echo(json.dumps([finding._asdict() for finding in report]))
        return
    for finding in report:
        click.echo(f"{click.style(f'{finding.state:8}', fg=_COLOURS[finding.state])}{finding.name}: {finding.detail}")
        if finding.remedy:
            click.echo(f"{'':10}{finding.remedy}")
