"""``kbpf map``: look at maps that are there already."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import click

import kbpf
from kbpf.cli import elements, objects
from kbpf.cli.objects import SELECTOR, as_json, with_pins
from kbpf.cli.output import Table, plain, show_rows, text, until_interrupted, write_array
from kbpf.cli.output import show as show_tables
from kbpf.info import MapInfo
from kbpf.runtime.maps.watch import Change
from kbpf.uapi.constants import BPF_ANY, BPF_EXIST, BPF_NOEXIST


@click.group("map")
def command() -> None:
    """Look at the maps of running programs."""


@command.command("show")
@click.argument("which", nargs=-1, metavar=f"[{SELECTOR}]")
@with_pins
@as_json
def show(which: tuple[str, ...], bpffs: bool, as_json: bool) -> None:
    """Show all maps, or one by its id, pin or name, as ``bpftool map show`` does."""
    found, is_list = objects.listed(which, "map", _all, kbpf.BpfMap.open)
    objects.write(found, is_list, as_json, objects.pins("map") if bpffs else None, _fields, _text)


command.add_command(show, "list")


@command.command("dump")
@click.argument("which", nargs=-1, required=True, metavar=SELECTOR)
@click.option("--json", "as_json", is_flag=True, help="Write one JSON array, with bpftool's fields.")
def dump(which: tuple[str, ...], as_json: bool) -> None:
    """Print what is in a map, given by its id, pin or name.

    Keys and values are typed where the map says what they are (BTF), and hexadecimal digits otherwise.
    """
    with opened(which) as map:
        if not isinstance(map, kbpf.Map):
            raise click.UsageError(f"A map of type {map.type} has no keys, and nothing walks over it.")
        if as_json:
            write_array(elements.fields(map, key, value) for key, value in map.raw_items())
        else:
            rows = ([text(key), text(value)] for key, value in map.items())
            show_rows(f"{map.name or 'unnamed'} ({map.type})", ["key", "value"], rows)


_UPDATE_FLAGS = {"any": BPF_ANY, "exist": BPF_EXIST, "noexist": BPF_NOEXIST}
_WORDS = f"{SELECTOR} key KEY"


@command.command("get", context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, required=True, metavar=_WORDS)
@click.option("--json", "as_json", is_flag=True, help="Write a JSON object, with bpftool's fields.")
def get(words: tuple[str, ...], as_json: bool) -> None:
    """Print the value of one key; of a queue or stack, the value that is next.

    A KEY is what its type has: a number, an address or network, fields (host=1 port=2); or its bytes, as bpftool takes
    them: as many numbers as there are (1 0 0 0), or hex and two digits each (hex 01 00 00 00).
    """
    which, given = elements.split(words, ("key",))
    with opened(which) as map:
        key, value = elements.read(map, given)
        if as_json:
            click.echo(json.dumps(elements.fields(map, key, value)))
        else:
            click.echo(text(map.value_codec.decode(value)))


@command.command("set", context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, required=True, metavar=f"{_WORDS} value VALUE")
@click.option("--if", "condition", type=click.Choice(["new", "there"]), help="Only a key that is new, or is there.")
def set(words: tuple[str, ...], condition: str | None) -> None:
    """Store a value; a queue or stack takes it without a key.

    A VALUE is written as a KEY is (see get); exist or noexist may stand behind it, as in bpftool, for --if. Each
    processor's value is set where each has its own. Arrays of programs and maps of maps take id N or pinned PATH.
    """
    which, given = elements.split(words, ("key", "value"))
    value, flags = given.get("value", ()), {None: BPF_ANY, "new": BPF_NOEXIST, "there": BPF_EXIST}[condition]
    if len(value) > 1 and value[-1] in _UPDATE_FLAGS:
        given["value"], flags = value[:-1], _UPDATE_FLAGS[value[-1]]
    with opened(which) as map:
        elements.store(map, given, flags)


@command.command("watch")
@click.argument("which", nargs=-1, required=True, metavar=SELECTOR)
@click.option("--interval", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True, metavar="SECONDS")
@click.option("--count", type=click.IntRange(1), metavar="N", help="Stop after so many intervals.")
@click.option("--json", "as_json", is_flag=True, help="Write a JSON object a line.")
def watch(which: tuple[str, ...], interval: float, count: int | None, as_json: bool) -> None:
    """Print what changes in a map of counters, and how much that is a second, until Ctrl-C."""
    with opened(which) as map, until_interrupted():
        if not isinstance(map, kbpf.Map):
            raise click.UsageError(f"A map of type {map.type} has no keys to watch.")
        try:
            for change in map.watch(interval, count=count):
                if as_json:
                    click.echo(json.dumps(_change_as_json(change)))
                else:
                    show_tables([_change_as_table(map, change)])
        except TypeError as error:
            raise click.ClickException(f"{map.label}: {error}.") from None


def _change_as_json(change: Change) -> dict[str, Any]:
    changed = [
        {"key": plain(key), "value": plain(change.values[key]), "delta": plain(delta), "rate": plain(change.rates[key])}
        for key, delta in change.deltas.items()
    ]
    return {"elapsed": round(change.elapsed, 3), "changed": changed, "removed": [plain(key) for key in change.removed]}


def _change_as_table(map: kbpf.Map, change: Change) -> Table:
    rows = [
        [text(key), text(change.values[key]), text(delta), text(rounded(change.rates[key]))]
        for key, delta in change.deltas.items()
    ]
    rows += [[text(key), "-", "-", "-"] for key in change.removed]
    return Table(f"{map.name or 'unnamed'} ({map.type})", ["key", "value", "delta", "a second"], rows)


def rounded(rate: Any) -> Any:
    """A rate, or a struct of them, to a tenth."""
    if isinstance(rate, float):
        return round(rate, 1)
    if isinstance(rate, tuple):
        parts = [rounded(one) for one in rate]
        return rate._make(parts) if hasattr(rate, "_make") else tuple(parts)
    return rate


def opened(which: tuple[str, ...]) -> kbpf.BpfMap:
    """The map that a selector names."""
    return kbpf.BpfMap.open(**objects.one_id(which, "map", _all), backend=objects.backend())


def _all() -> Iterator[MapInfo]:
    return kbpf.maps(objects.backend())


def _fields(info: MapInfo) -> dict[str, Any]:
    """bpftool's, in its order."""
    fields: dict[str, Any] = {"id": info.id, "type": info.type}
    if info.name:
        fields["name"] = info.name
    fields |= {
        "flags": info.flags,
        "bytes_key": info.key_size,
        "bytes_value": info.value_size,
        "max_entries": info.max_entries,
    }
    if info.memlock is not None:
        fields["bytes_memlock"] = info.memlock
    if info.owner_type:
        fields |= {"owner_prog_type": info.owner_type, "owner_jited": info.owner_jited}
    fields["frozen"] = int(info.frozen)
    if info.btf_id:
        fields["btf_id"] = info.btf_id
    return fields


def _text(info: MapInfo) -> tuple[list[str], list[str]]:
    head = [f"{info.id}: {info.type}", *([f"name {info.name}"] if info.name else []), f"flags 0x{info.flags:x}"]
    sizes = [f"key {info.key_size}B", f"value {info.value_size}B", f"max_entries {info.max_entries}"]
    if info.memlock is not None:
        sizes.append(f"memlock {info.memlock}B")
    lines = ["  ".join(head), "  ".join(sizes)]
    if info.owner_type:
        lines.append(f"owner_prog_type {info.owner_type}  owner {'' if info.owner_jited else 'not '}jited")
    more = [*([f"btf_id {info.btf_id}"] if info.btf_id else []), *(["frozen"] if info.frozen else [])]
    return lines, ["  ".join(more)] if more else []
