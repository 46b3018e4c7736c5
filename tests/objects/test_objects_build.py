"""The committed objects are what their sources compile to."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from kbpf.elf import read_object
from kbpf.elf.file import read

ROOT = Path(__file__).resolve().parents[2]
OBJECTS = sorted((ROOT / "kbpf" / "objects").glob("*.bpf.o"))


def compiler(path: Path) -> str:
    """The compiler's name and version, as the object records it."""
    section = read(path.read_bytes()).section(".comment")
    assert section is not None
    return section.data.rstrip(b"\0").decode()


def test_every_source_has_its_object():
    assert [p.name.removesuffix(".o") for p in OBJECTS] == [
        p.name.removesuffix(".c") for p in sorted((ROOT / "c").glob("*.bpf.c"))
    ]


PROGRAMS = {
    "events.bpf.o": [("watch", "socket_filter")],
    "gate.bpf.o": [("gate", "xdp"), ("forward", "sched_cls")],
    "sockex1.bpf.o": [("count", "socket_filter")],
    "sockex2.bpf.o": [("count", "socket_filter")],
}


@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.name)
class TestObject:
    def test_names_its_compiler(self, path):
        assert re.search(r"\d+\.\d+", compiler(path))

    def test_has_its_programs_under_a_licence_that_lets_them_call_all_helpers(self, path):
        programs = read_object(path).programs.values()
        assert [(program.name, program.type) for program in programs] == PROGRAMS[path.name]
        assert {program.license for program in programs} == {"Dual MIT/GPL"}

    def test_has_btf_but_no_debugging_sections(self, path):
        names = [section.name for section in read(path.read_bytes()).sections]
        assert ".BTF" in names
        assert not any("debug" in name for name in names)

    def test_names_no_folder_of_the_machine_that_made_it(self, path):
        assert str(ROOT).encode() not in path.read_bytes()

    @pytest.mark.requires("clang")
    def test_a_rebuild_in_another_folder_gives_the_same(self, path, tmp_path):
        for source in (ROOT / "c").iterdir():
            (tmp_path / source.name).write_bytes(source.read_bytes())
        out = tmp_path / "out"
        out.mkdir()
        subprocess.run(["make", "-s", "-C", tmp_path, "objects", f"OUT={out}"], check=True)
        made = out / path.name
        if compiler(made) == compiler(path):
            assert made.read_bytes() == path.read_bytes()
        else:
            ours, theirs = read_object(made), read_object(path)
            assert [m.value_type for m in ours.maps.values()] == [m.value_type for m in theirs.maps.values()]
            assert ours.programs.keys() == theirs.programs.keys()
