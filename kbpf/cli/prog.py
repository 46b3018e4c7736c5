"""``kbpf prog``: what programs are loaded, what is told of them, and their instructions."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from typing import Any

import click

import kbpf
from kbpf.cli import objects
from kbpf.cli.objects import PROGRAM_SELECTOR, as_json, with_pins
from kbpf.info import ProgramInfo


@click.group("prog")
def command() -> None:
    """Look at the programs that are loaded."""


@command.command("show")
@click.argument("which", nargs=-1, metavar=f"[{PROGRAM_SELECTOR}]")
@with_pins
@as_json
def show(which: tuple[str, ...], bpffs: bool, as_json: bool) -> None:
    """Show all programs, or one by its id, pin, name or tag, as ``bpftool prog show`` does.

    How often a program ran, and how long, is told once it has been counted: see kernel.bpf_stats_enabled, or
    kbpf.statistics() in Python.
    """
    found, is_list = objects.listed(which, "program", _all, kbpf.Program.open)
    objects.write(found, is_list, as_json, objects.pins("program") if bpffs else None, _fields, _text)


command.add_command(show, "list")


@command.command("dump")
@click.argument("what", type=click.Choice(["xlated", "jited"]))
@click.argument("which", nargs=-1, required=True, metavar=PROGRAM_SELECTOR)
@as_json
def dump(what: str, which: tuple[str, ...], as_json: bool) -> None:
    """Print a program's instructions as they run: ``xlated``, or ``jited``, the native code.

    Native code takes capstone, the `disasm` extra.
    """
    chosen = objects.one_id(which, "program", _all)
    with kbpf.Program.open(**chosen, backend=objects.backend()) as program:
        lines = list(program.listing() if what == "xlated" else _native(program))
    if as_json:
        click.echo(json.dumps([{"disasm": text} if what == "xlated" else _parts(at, text) for at, text in lines]))
        return
    for at, text in lines:
        click.echo(f"{at:4}: {text}" if what == "xlated" else f"{at:4x}:\t{text}")


def _all() -> Iterator[ProgramInfo]:
    return kbpf.programs(objects.backend())


def _parts(at: int, text: str) -> dict[str, Any]:
    """An instruction of native code."""
    operation, _, operands = text.partition(" ")
    return {"pc": hex(at), "operation": operation, "operands": operands.split(", ") if operands else []}


def _native(program: kbpf.Program) -> Iterator[tuple[int, str]]:
    code = program.jited()
    if not code:
        raise click.ClickException(f"{program.label} has no native code, or it may not be read.")
    try:
        import capstone
    except ImportError:
        raise kbpf.MissingDependencyError("native code is listed by capstone: pip install 'kbpf[disasm]'") from None
    machine = {
        "x86_64": (capstone.CS_ARCH_X86, capstone.CS_MODE_64),
        "aarch64": (capstone.CS_ARCH_ARM64, capstone.CS_MODE_ARM),
    }.get(os.uname().machine)
    if machine is None:
        raise click.ClickException(f"native code of {os.uname().machine} is not listed.")
    for found in capstone.Cs(*machine).disasm(code, 0):
        yield found.address, f"{found.mnemonic} {found.op_str}".rstrip()


def _fields(info: ProgramInfo) -> dict[str, Any]:
    """bpftool's, in its order."""
    fields: dict[str, Any] = {"id": info.id, "type": info.type}
    if info.name:
        fields["name"] = info.name
    fields |= {"tag": info.tag.hex(), "gpl_compatible": info.gpl_compatible}
    if info.run_time_ns:
        fields |= {"run_time_ns": info.run_time_ns, "run_cnt": info.run_count}
    if info.recursion_misses:
        fields["recursion_misses"] = info.recursion_misses
    fields |= {"loaded_at": _loaded_at(info), "uid": info.uid, "bytes_xlated": info.xlated_size}
    fields["jited"] = bool(info.jited_size)
    if info.jited_size:
        fields["bytes_jited"] = info.jited_size
    if info.memlock is not None:
        fields["bytes_memlock"] = info.memlock
    if info.map_ids:
        fields["map_ids"] = list(info.map_ids)
    if info.btf_id:
        fields["btf_id"] = info.btf_id
    return fields


def _text(info: ProgramInfo) -> tuple[list[str], list[str]]:
    fields = _fields(info)
    head = [f"{info.id}: {info.type}", *([f"name {info.name}"] if info.name else []), f"tag {fields['tag']}"]
    line = "  ".join([*head, *(["gpl"] if info.gpl_compatible else [])])
    line += "".join(
        f" {name} {fields[name]}" for name in ("run_time_ns", "run_cnt", "recursion_misses") if name in fields
    )
    when = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(fields["loaded_at"]))
    sizes = [f"xlated {info.xlated_size}B", f"jited {info.jited_size}B" if info.jited_size else "not jited"]
    if info.memlock is not None:
        sizes.append(f"memlock {info.memlock}B")
    if info.map_ids:
        sizes.append(f"map_ids {','.join(map(str, info.map_ids))}")
    lines = [line, f"loaded_at {when}  uid {info.uid}", "  ".join(sizes)]
    return lines, [f"btf_id {info.btf_id}"] if info.btf_id else []


def _loaded_at(info: ProgramInfo) -> int:
    """The second of the load, of the time of day."""
    booted = time.clock_gettime_ns(time.CLOCK_REALTIME) - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    return (booted + info.load_time_ns) // 1_000_000_000
