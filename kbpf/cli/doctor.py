"""``kbpf doctor``: what this process may do with BPF, what is missing, and what to do about it."""

from __future__ import annotations

import json

import click

from kbpf import features
from kbpf.kernel.doctor import doctor_report
from kbpf.uapi.enums import HELPERS

_COLOURS = {"ok": "green", "missing": "yellow", "info": None}
_ANSWERS = {"yes": "green", "no": "red", "not permitted": "yellow", "inconclusive": "yellow"}


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON array of findings.")
@click.option("--features", "show_features", is_flag=True, help="Say what the kernel or the emulator has instead.")
@click.option("--helpers", metavar="TYPE", help="With --features: the helpers of programs of this type alone.")
def command(as_json: bool, show_features: bool, helpers: str | None) -> None:
    """Say what this process may do with BPF, what is missing, and the remedy.

    With --features: which program types, map types, attach types and link types the kernel has (the emulator, with
    KBPF_BACKEND=emulator), and the Linux that brought each. Changes nothing: what is tried is let go again.
    """
    if show_features or helpers:
        _features(as_json, helpers)
        return
    report = doctor_report()
    if as_json:
        click.echo(json.dumps([finding._asdict() for finding in report]))
        return
    for finding in report:
        click.echo(f"{click.style(f'{finding.state:8}', fg=_COLOURS[finding.state])}{finding.name}: {finding.detail}")
        if finding.remedy:
            click.echo(f"{'':10}{finding.remedy}")


def _features(as_json: bool, helpers: str | None) -> None:
    if helpers:
        names = [name for name in HELPERS if name != "unspec"]
        try:
            found = {"helper": {name: features.helper(helpers, name) for name in names}}
        except ValueError as error:
            raise click.UsageError(str(error)) from None
    else:
        found = features.survey()
    if as_json:
        told = {kind: {name: answer._asdict() for name, answer in answers.items()} for kind, answers in found.items()}
        click.echo(json.dumps(told))
        return
    for kind, answers in found.items():
        click.secho(f"{kind.replace('_', ' ')}s", bold=True)
        width = max(map(len, answers))
        for name, (answer, detail, since) in answers.items():
            said = click.style(f"{answer:13}", fg=_ANSWERS[answer])
            click.echo(f"  {name:{width}}  {said}  {f'Linux {since}' if since else '':10}  {detail}".rstrip())
