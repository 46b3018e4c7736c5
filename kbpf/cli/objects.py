"""What ``kbpf prog``, ``map`` and ``link`` share: how one names an object, as in bpftool, and how lists are written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import click

from kbpf.info import LinkInfo, MapInfo, ProgramInfo
from kbpf.runtime.backends import select_for_socket

#: What stands on the command line for an object.
SELECTOR = "id N | pinned PATH | name NAME"

Told = TypeVar("Told", MapInfo, ProgramInfo, LinkInfo)

as_json = click.option("--json", "as_json", is_flag=True, help="Write JSON, with bpftool's fields.")


def backend() -> str:
    """The emulator of a new process has nothing loaded: it is asked only by name."""
    return select_for_socket(None).name


def selector(which: tuple[str, ...]) -> tuple[str, str]:
    """The kind of a selector, ``id``, ``pinned`` or ``name``, and what it says; the path of a pin may stand alone."""
    if len(which) == 1:
        return "pinned", which[0]
    if len(which) == 2 and which[0] in ("pinned", "name"):
        return which[0], which[1]
    if len(which) == 2 and which[0] == "id" and which[1].isdecimal():
        return which[0], which[1]
    raise click.UsageError(f"Name it as {SELECTOR}.")


def named(infos: Iterable[Told], kind: str, name: str) -> list[Told]:
    """Those of a name, which is cut to the length that the kernel keeps; `click.ClickException` for none."""
    from kbpf.backend import object_name

    found = [info for info in infos if not isinstance(info, LinkInfo) and info.name == object_name(name)]
    if not found:
        raise click.ClickException(f"no {kind} is called {name!r}.")
    return found


def listed(
    which: tuple[str, ...],
    kind: str,
    everything: Callable[[], Iterator[Told]],
    opened: Callable[..., Any],
) -> tuple[list[Told], bool]:
    """What is told of all, or of those that a selector names; and whether it is a list, and not one object."""
    if not which:
        return list(everything()), True
    how, what = selector(which)
    if how == "name":
        found = named(everything(), kind, what)
        return found, len(found) > 1
    chosen = {"id": int(what)} if how == "id" else {"path": what}
    with opened(**chosen, backend=backend()) as one:
        return [one.info], False


def write(
    infos: list[Told],
    is_list: bool,
    as_json: bool,
    fields: Callable[[Told], dict[str, Any]],
    text: Callable[[Told], str],
) -> None:
    """Write an array or one object as JSON, or the text of each."""
    if as_json:
        found = [fields(info) for info in infos]
        click.echo(json.dumps(found if is_list else found[0]))
        return
    for info in infos:
        click.echo(text(info))


def one_id(which: tuple[str, ...], kind: str, everything: Callable[[], Iterator[Told]]) -> dict[str, Any]:
    """How to open what a selector names, where it is to be one object: keywords of ``Program.open`` and its kin."""
    how, what = selector(which)
    if how == "id":
        return {"id": int(what)}
    if how == "pinned":
        return {"path": what}
    found = named(everything(), kind, what)
    if len(found) > 1:
        ids = ", ".join(str(info.id) for info in found)
        raise click.ClickException(f"{len(found)} {kind}s are called {what!r}: name one by id, of {ids}.")
    return {"id": found[0].id}
