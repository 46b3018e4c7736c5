"""The subcommands that look at what is loaded, beside bpftool on the kernel, and on the emulator."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import kbpf
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction
from kbpf.kernel.attrs import command
from kbpf.kernel.backend import kernel_backend
from kbpf.specs import MapSpec, ProgramSpec
from kbpf.testing.btf_bytes import BtfBytes
from kbpf.uapi.enums import MAP_TYPES

EXIT = Instruction(ebpf.JMP | ebpf.EXIT)
RETURNS_0 = (Instruction(ebpf.ALU64 | ebpf.MOV), EXIT)
TYPES = BtfBytes()
FLOWS = MapSpec(
    type="hash",
    key_size=4,
    value_size=8,
    max_entries=7,
    flags=1,
    name=f"flows{os.getpid()}"[:15],
    btf=TYPES.bytes(),
    btf_key_type_id=TYPES.int,
    btf_value_type_id=TYPES.u64,
)
USER = ProgramSpec(
    type="xdp",
    name=f"user{os.getpid()}"[:15],
    maps=(FLOWS,),
    instructions=(
        *ebpf.ld_imm64(1, 0, ebpf.PSEUDO_MAP_IDX),
        Instruction(ebpf.ALU64 | ebpf.MOV | ebpf.X, 2, 10),
        Instruction(ebpf.ALU64 | ebpf.ADD, 2, imm=-4),
        Instruction(ebpf.ST | ebpf.MEM | ebpf.W, 2, imm=7),
        Instruction(ebpf.JMP | ebpf.CALL, imm=2),
        *RETURNS_0,
    ),
)


def bpftool(*arguments: str) -> Any:
    done = subprocess.run(["bpftool", "-j", *arguments], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def text_of_bpftool(*arguments: str) -> list[str]:
    done = subprocess.run(["bpftool", *arguments], capture_output=True, text=True, check=True)
    return [line.rstrip() for line in done.stdout.splitlines()]


@pytest.fixture
def program() -> Iterator[kbpf.Program]:
    """A program with a map in the kernel."""
    spec = ProgramSpec(type="xdp", name=USER.name, maps=(FLOWS,), instructions=CALLS)
    with kbpf.load_program(spec, backend="kernel") as loaded:
        yield loaded


#: bpf_map_lookup_elem is a function of the map's type then, bpf_ktime_get_ns one by its name.
CALLS = (
    *ebpf.ld_imm64(1, 0, ebpf.PSEUDO_MAP_IDX),
    Instruction(ebpf.ALU64 | ebpf.MOV | ebpf.X, 2, 10),
    Instruction(ebpf.ALU64 | ebpf.ADD, 2, imm=-8),
    Instruction(ebpf.ST | ebpf.MEM | ebpf.DW, 10, 0, -8, 7),
    Instruction(ebpf.JMP | ebpf.CALL, imm=1),
    Instruction(ebpf.JMP | ebpf.JEQ, 0, 0, 4),
    Instruction(ebpf.ALU64 | ebpf.MOV, 1, imm=1),
    Instruction(ebpf.STX | ebpf.ATOMIC | ebpf.DW, 0, 1, 0, ebpf.ADD),
    Instruction(ebpf.STX | ebpf.ATOMIC | ebpf.DW, 0, 1, 0, ebpf.XCHG),
    Instruction(ebpf.LDX | ebpf.MEM | ebpf.DW, 3, 0),
    Instruction(ebpf.JMP | ebpf.CALL, imm=5),
    Instruction(ebpf.ALU | ebpf.MOV | ebpf.X, 1, 0),
    Instruction(ebpf.ALU | ebpf.END | ebpf.X, 1, imm=16),
    Instruction(ebpf.ALU64 | ebpf.NEG, 1),
    Instruction(ebpf.ALU | ebpf.ARSH, 1, imm=3),
    Instruction(ebpf.JMP32 | ebpf.JSGT, 1, 0, 1, -5),
    Instruction(ebpf.JMP | ebpf.JSET | ebpf.X, 1, 0, 0),
    *RETURNS_0,
)


@pytest.mark.requires("kernel", "bpftool")
@pytest.mark.parametrize("way", ["id", "pinned", "name"])
def test_prog_show_has_what_bpftool_shows(cli, program: kbpf.Program, way: str) -> None:
    pin = f"/sys/fs/bpf/kbpf-test-prog-{os.getpid()}"
    which = {"id": str(program.id), "pinned": pin, "name": program.name}[way]
    with kbpf.statistics("kernel"):
        program.run(bytes(60), repeat=3)
    program.pin(pin)
    try:
        told = json.loads(cli("prog", "show", way, which, "--json").out)
        theirs = bpftool("prog", "show", way, which)
        assert abs(told.pop("loaded_at") - theirs.pop("loaded_at")) <= 1
        assert told == theirs
        assert list(told) == list(theirs)
        lines, expected = cli("prog", "show", way, which).out.splitlines(), text_of_bpftool("prog", "show", way, which)
        assert lines[0] == expected[0] and lines[2:] == expected[2:]
    finally:
        Path(pin).unlink()


@pytest.mark.requires("kernel", "bpftool")
def test_the_lists_have_the_fields_of_bpftools(cli, program: kbpf.Program) -> None:
    for kind, id in (("prog", program.id), ("map", program.maps[0].id)):
        for word in ("list", "show"):
            told = {one["id"]: one for one in json.loads(cli(kind, word, "--json").out)}
            theirs = {one["id"]: one for one in bpftool(kind, word)}
            for one in (told, theirs):
                one[id].pop("loaded_at", None)
            assert told[id] == theirs[id]


@pytest.mark.requires("kernel", "bpftool")
@pytest.mark.parametrize(
    "spec",
    [
        FLOWS,
        MapSpec(type="array", key_size=4, value_size=4, max_entries=1, frozen=True),
        MapSpec(type="ringbuf", max_entries=4096, name="events"),
        MapSpec(type="prog_array", key_size=4, value_size=4, max_entries=1),
        # Which has no memory as long as it is empty.
        MapSpec(type="lpm_trie", key_size=8, value_size=4, max_entries=1, flags=1),
        MapSpec(type="percpu_array", key_size=4, value_size=4, max_entries=1, name="percpu"),
        MapSpec(type="queue", value_size=4, max_entries=1),
        MapSpec(
            type="hash_of_maps",
            key_size=4,
            value_size=4,
            max_entries=1,
            inner=MapSpec(type="array", key_size=4, value_size=4, max_entries=1),
        ),
    ],
    ids=lambda spec: spec.type,
)
def test_map_show_has_what_bpftool_shows(cli, spec: MapSpec) -> None:
    with (
        kbpf.BpfMap.create(spec, "kernel") as map,
        kbpf.load_program(ProgramSpec(type="xdp", instructions=RETURNS_0), backend="kernel") as entry,
    ):
        if spec.type == "prog_array":
            map.update_element(bytes(4), entry.fileno().to_bytes(4, "little"))
        told = json.loads(cli("map", "show", "id", str(map.id), "--json").out)
        theirs = bpftool("map", "show", "id", str(map.id))
        assert told == theirs
        assert list(told) == list(theirs)
        assert cli("map", "show", "id", str(map.id)).out.splitlines() == text_of_bpftool(
            "map", "show", "id", str(map.id)
        )


@pytest.mark.requires("kernel", "bpftool")
def test_pins_are_shown_as_bpftool_shows_them(cli, program: kbpf.Program) -> None:
    folder = Path(f"/sys/fs/bpf/kbpf-test {os.getpid()}")
    folder.mkdir()
    paths = [str(folder / "program"), str(folder / "map"), str(folder / "again")]
    try:
        program.pin(paths[0])
        for path in paths[1:]:
            program.maps[0].pin(path)
        for kind, id, places in (("prog", program.id, paths[:1]), ("map", program.maps[0].id, paths[1:])):
            told = json.loads(cli(kind, "show", "id", str(id), "--bpffs", "--json").out)
            theirs = bpftool("-f", kind, "show", "id", str(id))
            assert sorted(told["pinned"]) == sorted(theirs["pinned"]) == sorted(places)
            assert list(told) == list(theirs)
            lines = cli(kind, "show", "id", str(id), "-f").out.splitlines()
            expected = text_of_bpftool("-f", kind, "show", "id", str(id))
            assert sorted(lines) == sorted(expected)
            assert ["pinned" in line for line in lines] == ["pinned" in line for line in expected]
        assert "pinned" not in cli("prog", "show", "id", str(program.id)).out
    finally:
        for path in paths:
            Path(path).unlink(missing_ok=True)
        folder.rmdir()


@pytest.mark.requires("kernel", "bpftool")
def test_a_program_is_named_by_its_tag(cli, program: kbpf.Program) -> None:
    told = json.loads(cli("prog", "list", "tag", program.tag, "--json").out)
    found = [one["id"] for one in (told if isinstance(told, list) else [told])]
    theirs = bpftool("prog", "list", "tag", program.tag)
    assert program.id in found and found == [one["id"] for one in (theirs if isinstance(theirs, list) else [theirs])]
    assert "no program has the tag" in cli("prog", "show", "tag", "0" * 16).err
    assert cli("map", "show", "tag", program.tag).status == 2


@pytest.mark.requires("kernel", "bpftool")
def test_prog_dump_lists_instructions_as_bpftool_does(cli, program: kbpf.Program) -> None:
    which = ("xlated", "id", str(program.id))
    assert cli("prog", "dump", *which).out.splitlines() == text_of_bpftool("prog", "dump", *which)
    assert json.loads(cli("prog", "dump", *which, "--json").out) == bpftool("prog", "dump", *which)
    assert "call bpf_ktime_get_ns#" in program.dump()


@pytest.mark.requires("kernel")
def test_prog_dump_lists_native_code(cli, program: kbpf.Program) -> None:
    pytest.importorskip("capstone")
    if os.uname().machine != "x86_64":
        pytest.skip("the listing is that of x86-64")
    told = json.loads(cli("prog", "dump", "jited", "id", str(program.id), "--json").out)
    assert told[0]["pc"] == "0x0"
    assert ("push", ["rbp"]) in [(one["operation"], one["operands"]) for one in told]
    assert ("mov", ["rbp", "rsp"]) in [(one["operation"], one["operands"]) for one in told]
    starts = [int(one["pc"], 16) for one in told]
    assert starts == sorted(set(starts)) and program.info.jited_size - 15 <= starts[-1] < program.info.jited_size


@pytest.mark.requires("kernel")
def test_what_there_is_not_is_said_in_a_line(cli) -> None:
    for kind in ("prog", "map", "link"):
        done = cli(kind, "show", "id", str(2**31))
        assert (done.status, done.out) == (1, "")
        assert "ENOENT" in done.err
        for wrong in ("x", "-1", "010", str(2**32), "9" * 40, "\u00b2"):
            assert cli(kind, "show", "id", wrong).status == 2
        assert cli(kind, "show", "id").status == 2
    for kind in ("prog", "map"):
        assert "is called" in cli(kind, "show", "name", "no_such").err


@pytest.mark.requires("kernel", "bpftool")
def test_an_id_may_be_hexadecimal(cli, program: kbpf.Program) -> None:
    assert json.loads(cli("prog", "show", "id", hex(program.id), "--json").out)["id"] == program.id
    assert bpftool("prog", "show", "id", hex(program.id))["id"] == program.id


@pytest.mark.requires("kernel")
def test_names_that_others_gave_with_letters_of_latin_1_are_found(cli) -> None:
    name = f"caf\u00e9{os.getpid()}"
    sizes = {"key_size": 4, "value_size": 4, "max_entries": 1}
    fd = command("map_create", map_type=MAP_TYPES["hash"], map_name=name.encode("latin-1"), **sizes)
    try:
        assert json.loads(cli("map", "show", "name", name, "--json").out)["name"] == name
        assert f"name {name} " in cli("map", "show", "name", name).out
    finally:
        os.close(fd)


@pytest.mark.requires("kernel")
def test_a_name_that_several_have_shows_them_all_and_opens_none(cli) -> None:
    # A name of its own: what other tests have closed may be listed for a moment.
    named = replace(FLOWS, name=f"twice{os.getpid()}"[:15])
    with kbpf.Map.create(named, "kernel") as one, kbpf.Map.create(named, "kernel") as two:
        told = json.loads(cli("map", "show", "name", named.name, "--json").out)
        assert [info["id"] for info in told] == [one.id, two.id]
        done = cli("map", "dump", "name", named.name)
        assert done.status == 1 and str(one.id) in done.err
        closed = two.id
        two.close()
        while closed in kernel_backend().ids("map"):
            time.sleep(0.01)
        one[b"\1\0\0\0" if isinstance(next(iter(one), b""), bytes) else 1] = 2
        (element,) = json.loads(cli("map", "dump", "name", named.name, "--json").out)
        assert element["formatted"] == {"key": 1, "value": 2}


def test_the_emulators_objects_have_the_same_fields(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KBPF_BACKEND", "emulator")
    with kbpf.load_program(USER, backend="emulator") as program:
        told = json.loads(cli("prog", "show", "id", str(program.id), "--json").out)
        assert {name: told[name] for name in ("type", "name", "gpl_compatible", "jited", "map_ids")} == {
            "type": "xdp",
            "name": USER.name,
            "gpl_compatible": True,
            "jited": False,
            "map_ids": [program.maps[0].id],
        }
        assert "not jited" in cli("prog", "show", "id", str(program.id)).out
        assert [
            one["disasm"] for one in json.loads(cli("prog", "dump", "xlated", "id", str(program.id), "--json").out)
        ] == [
            f"(18) r1 = map[id:{program.maps[0].id}]",
            "(bf) r2 = r10",
            "(07) r2 += -4",
            "(62) *(u32 *)(r2 +0) = 7",
            "(85) call bpf_map_update_elem#2",
            "(b7) r0 = 0",
            "(95) exit",
        ]
        assert cli("prog", "dump", "jited", "id", str(program.id)).status == 1
