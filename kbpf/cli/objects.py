"""What ``kbpf prog``, ``map`` and ``link`` share: how one names an object, as in bpftool, and how lists are written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import click

from kbpf.backend import ObjectKind, object_name
from kbpf.info import LinkInfo, MapInfo, ProgramInfo
from kbpf.runtime.backends import select_for_socket

#: What stands on the command line for an object.
SELECTOR = "id N | pinned PATH | name NAME"
PROGRAM_SELECTOR = "id N | pinned PATH | name NAME | tag TAG"

# As strtoul(3) reads it, but for octal.
_NUMBER = re.compile(r"0x[0-9a-fA-F]+|0|[1-9][0-9]*")

Told = TypeVar("Told", MapInfo, ProgramInfo, LinkInfo)

with_pins = click.option("-f", "--bpffs", is_flag=True, help="Show where it is pinned.")
as_json = click.option("--json", "as_json", is_flag=True, help="Write JSON, with bpftool's fields.")


def backend() -> str:
    """The emulator of a new process has nothing loaded: it is asked only by name."""
    return select_for_socket(None).name


def selector(which: tuple[str, ...], kind: str = "") -> tuple[str, str]:
    """The kind of a selector, ``id``, ``pinned`` or ``name``, and what it says; the path of a pin may stand alone.

    Programs also have a ``tag``.
    """
    words = ("pinned", "name", "tag") if kind == "program" else ("pinned", "name")
    if len(which) == 1 and which[0] not in ("id", *words):
        return "pinned", which[0]
    if len(which) == 2 and which[0] in words:
        return which[0], which[1]
    if len(which) == 2 and which[0] == "id" and _NUMBER.fullmatch(which[1]):
        number = int(which[1], 0)
        if number >> 32:
            raise click.UsageError(f"An id has 32 bits, {which[1]} does not fit.")
        return "id", str(number)
    raise click.UsageError(f"Name it as {PROGRAM_SELECTOR if kind == 'program' else SELECTOR}.")


def found_by(infos: Iterable[Told], kind: str, how: str, what: str) -> list[Told]:
    """Those of a tag, or of a name, cut to the length that the kernel keeps; `click.ClickException` for none."""

    def matches(info: Told) -> bool:
        if how == "tag":
            return isinstance(info, ProgramInfo) and info.tag.hex() == what.lower()
        # As a user gave it, or, with letters that are none in C, as it is shown.
        return not isinstance(info, LinkInfo) and info.name in (object_name(what), what)

    found = list(filter(matches, infos))
    if not found:
        raise click.ClickException(f"no {kind} {'has the tag' if how == 'tag' else 'is called'} {what!r}.")
    return found


def pins(kind: ObjectKind) -> dict[int, list[str]]:
    """Where those of a kind are pinned, by id."""
    from kbpf.runtime import inventory

    return inventory.pins(kind, backend())


def listed(
    which: tuple[str, ...],
    kind: str,
    everything: Callable[[], Iterator[Told]],
    opened: Callable[..., Any],
) -> tuple[list[Told], bool]:
    """What is told of all, or of those that a selector names; and whether it is a list, and not one object."""
    if not which:
        return list(everything()), True
    how, what = selector(which, kind)
    if how in ("name", "tag"):
        found = found_by(everything(), kind, how, what)
        return found, len(found) > 1
    chosen = {"id": int(what)} if how == "id" else {"path": what}
    with opened(**chosen, backend=backend()) as one:
        return [one.info], False


def write(
    infos: list[Told],
    is_list: bool,
    as_json: bool,
    pinned: Mapping[int, list[str]] | None,
    fields: Callable[[Told], dict[str, Any]],
    text: Callable[[Told], tuple[list[str], list[str]]],
) -> None:
    """Write an array or one object as JSON, or the lines of each: those before the places where it is `pinned`, if that
    is asked for, and those behind.
    """
    if as_json:
        # As in bpftool nothing is said of pins where there are none at all.
        found = [fields(info) | ({"pinned": pinned.get(info.id, [])} if pinned else {}) for info in infos]
        click.echo(json.dumps(found if is_list else found[0]))
        return
    for info in infos:
        click.echo(_joined(text(info), (pinned or {}).get(info.id, [])))


def _joined(lines: tuple[list[str], list[str]], places: list[str]) -> str:
    return "\n\t".join([*lines[0], *(f"pinned {path}" for path in places), *lines[1]])


def one_id(which: tuple[str, ...], kind: str, everything: Callable[[], Iterator[Told]]) -> dict[str, Any]:
    """How to open what a selector names, where it is to be one object: keywords of ``Program.open`` and its kin."""
    how, what = selector(which, kind)
    if how == "id":
        return {"id": int(what)}
    if how == "pinned":
        return {"path": what}
    found = found_by(everything(), kind, how, what)
    if len(found) > 1:
        ids = ", ".join(str(info.id) for info in found)
        are = "have the tag" if how == "tag" else "are called"
        raise click.ClickException(f"{len(found)} {kind}s {are} {what!r}: name one by id, of {ids}.")
    return {"id": found[0].id}
