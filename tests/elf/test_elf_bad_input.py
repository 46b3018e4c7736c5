"""Whatever is wrong with an object, it is an ObjectError that names the place."""

from __future__ import annotations

import random
import struct
import subprocess
from pathlib import Path

import pytest
from elf_builder import CALL, EXIT, FUNC, LD_MAP, NOTYPE, OBJECT, Object

from kbpf.elf import read_object
from kbpf.errors import ObjectError

ROOT = Path(__file__).resolve().parents[2]
SOCKEX1 = (ROOT / "kbpf" / "objects" / "sockex1.bpf.o").read_bytes()
SOCKEX2 = (ROOT / "kbpf" / "objects" / "sockex2.bpf.o").read_bytes()


def plain() -> Object:
    made = Object()
    made.program("socket", "count", EXIT)
    return made


def refused(data: bytes, *words: str) -> None:
    with pytest.raises(ObjectError) as caught:
        read_object(data)
    for word in words:
        assert word in str(caught.value)


def test_the_plain_object_is_fine():
    assert list(read_object(plain().build()).programs) == ["count"]


class TestFile:
    def test_nothing_at_all(self):
        refused(b"", "not an ELF file")

    def test_text(self):
        refused(b"int main() {}", "not an ELF file")

    def test_another_machine(self):
        made = plain()
        made.machine = 62
        refused(made.build(), "EM_X86_64", "not for eBPF")

    def test_an_executable(self):
        made = plain()
        made.type = 2
        refused(made.build(), "relocatable")

    def test_the_other_byte_order(self):
        made = plain()
        made.ident = b"\x7fELF\x02\x02\x01"
        refused(made.build(), "big-endian")

    def test_32_bits(self):
        made = plain()
        made.ident = b"\x7fELF\x01\x01\x01"
        refused(made.build(), "32-bit")

    def test_a_path_is_named(self, tmp_path):
        path = tmp_path / "broken.o"
        path.write_bytes(SOCKEX1[:1000])
        with pytest.raises(ObjectError, match=r"broken\.o"):
            read_object(path)

    def test_a_missing_file_is_an_oserror(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            read_object(tmp_path / "none.o")


class TestLicense:
    def test_missing(self):
        made = Object(license=None)
        made.program("socket", "count", EXIT)
        refused(made.build(), "license", "missing")

    def test_empty(self):
        made = Object(license=b"\0")
        made.program("socket", "count", EXIT)
        refused(made.build(), "section license")


class TestPrograms:
    def test_section_that_names_no_type(self):
        made = Object()
        made.program("mystery", "count", EXIT)
        refused(made.build(), "section mystery")

    def test_static_program(self):
        made = Object()
        index = made.section("socket", EXIT, code=True)
        made.symbol("hidden", index, 0, len(EXIT), FUNC, local=True)
        refused(made.build(), "socket", "'hidden'", "static")

    def test_code_without_a_function(self):
        made = Object()
        made.section("socket", EXIT, code=True)
        refused(made.build(), "section socket")

    def test_half_an_instruction(self):
        made = Object()
        made.program("socket", "count", EXIT + b"\0\0\0\0")
        refused(made.build(), "section socket", "20 bytes")


class TestRelocations:
    def with_load(self) -> tuple[Object, int]:
        made = Object()
        return made, made.program("socket", "count", LD_MAP + EXIT)

    def test_undefined_symbol(self):
        made, program = self.with_load()
        made.relocate(program, 0, made.symbol("elsewhere", 0), 1)
        refused(made.build(), "section socket", "'elsewhere'", "not defined")

    def test_symbol_that_is_no_map(self):
        made, program = self.with_load()
        other = made.section("unrelated", bytes(8))
        made.relocate(program, 0, made.symbol("thing", other, 0, 8, OBJECT), 1)
        refused(made.build(), "section socket", "'thing'", "unrelated")

    def test_symbol_index_out_of_range(self):
        made, program = self.with_load()
        made.relocate(program, 0, 99, 1)
        refused(made.build(), ".relsocket", "symbol 99")

    def test_unknown_type(self):
        made, program = self.with_load()
        maps = made.section("maps", struct.pack("<5I", 1, 4, 8, 1, 0))
        made.relocate(program, 0, made.symbol("m", maps, 0, 20, OBJECT), 7)
        refused(made.build(), "section socket", "type 7", "'m'")

    def test_place_outside_the_code(self):
        made, program = self.with_load()
        made.relocate(program, 4096, 1, 1)
        refused(made.build(), "section socket", "4096")

    def test_place_that_is_no_load(self):
        made, program = self.with_load()
        maps = made.section("maps", struct.pack("<5I", 1, 4, 8, 1, 0))
        made.relocate(program, 16, made.symbol("m", maps, 0, 20, OBJECT), 1)
        refused(made.build(), "section socket", "instruction 2")

    def test_data_beyond_its_section(self):
        made = Object()
        program = made.program("socket", "count", LD_MAP[:4] + struct.pack("<I", 64) + LD_MAP[8:] + EXIT)
        data = made.section(".data", bytes(8))
        made.relocate(program, 0, made.symbol("x", data, 0, 8, OBJECT), 1)
        refused(made.build(), "section socket", "byte 64 of .data")

    def test_call_of_what_is_missing(self):
        made = Object()
        program = made.program("socket", "count", CALL + EXIT)
        made.relocate(program, 0, made.symbol("gone", 0, type=NOTYPE), 10)
        refused(made.build(), "section socket", "'gone'")

    def test_call_into_the_middle_of_a_function(self):
        made = Object()
        made.program("socket", "count", CALL[:4] + struct.pack("<i", 1) + EXIT)
        refused(made.build(), "section socket", "no function begins")

    def test_pointers_in_data(self):
        made = plain()
        data = made.section(".data", bytes(8))
        made.relocate(data, 0, made.symbol("count2", 2), 2)
        refused(made.build(), "section .data", "'count2'")


class TestMaps:
    def test_maps_without_btf(self):
        made = plain()
        maps = made.section(".maps", bytes(32))
        made.symbol("m", maps, 0, 32, OBJECT)
        refused(made.build(), "section .maps", "BTF")

    def test_unknown_type(self):
        made = plain()
        maps = made.section("maps", struct.pack("<5I", 4711, 4, 8, 1, 0))
        made.symbol("m", maps, 0, 20, OBJECT)
        refused(made.build(), "section maps", "'m'", "4711")


@pytest.mark.requires("clang")
class TestUnsupported:
    """What the compiler makes and this reader does not do is refused by name."""

    def compiled(self, tmp_path, text: str) -> bytes:
        source, target = tmp_path / "x.bpf.c", tmp_path / "x.bpf.o"
        source.write_text('#include "kbpf.bpf.h"\n' + text)
        command = ["clang", "-target", "bpf", "-O2", "-g", "-I", ROOT / "c", "-c", source, "-o", target]
        subprocess.run(command, check=True)
        return target.read_bytes()

    def test_core_relocations(self, tmp_path):
        text = """
            struct task { int pid; } __attribute__((preserve_access_index));
            SEC("socket") int count(struct task *task) { return task->pid; }
        """
        refused(self.compiled(tmp_path, text), "section socket", "'count'", "CO-RE")

    def test_kernel_symbols(self, tmp_path):
        text = """
            extern const int jiffies SEC(".ksyms");
            SEC("socket") int count(void *context) { return (long)&jiffies; }
        """
        refused(self.compiled(tmp_path, text.replace(", used", "")), "section socket", "'jiffies'")

    def test_initial_contents_of_maps(self, tmp_path):
        text = """
            struct inner { __uint(type, 2); __type(key, __u32); __type(value, __u64); __uint(max_entries, 4); };
            struct inner one SEC(".maps");
            struct { __uint(type, 12); __uint(max_entries, 2); struct inner *values[2]; } outer SEC(".maps") = {
                .values = { &one },
            };
            SEC("socket") int count(void *context) { return 0; }
        """
        refused(self.compiled(tmp_path, text), "section .maps", "'one'")

    def test_function_pointers_in_data(self, tmp_path):
        text = """
            __attribute__((noinline)) int one(void) { return 1; }
            int (*volatile table[1])(void) = { one };
            SEC("socket") int count(void *context) { return (long)table[0]; }
        """
        refused(self.compiled(tmp_path, text), "section .data", "'one'")

    def test_unknown_member_of_a_map(self, tmp_path):
        text = """
            struct { __uint(type, 2); __uint(colour, 3); } m SEC(".maps");
            SEC("socket") int count(void *context) { return 0; }
        """
        refused(self.compiled(tmp_path, text), "section .maps", "'m'", "'colour'")


@pytest.mark.parametrize("original", [SOCKEX1, SOCKEX2], ids=["sockex1", "sockex2"])
class TestDamage:
    """Reading damaged objects gives specs or an ObjectError, nothing else, and soon."""

    def survive(self, data: bytes) -> bool:
        try:
            read_object(data)
        except ObjectError as error:
            assert str(error)
            return False
        return True

    def test_cut_short_anywhere(self, original):
        for length in range(0, len(original), 97):
            assert not self.survive(original[:length])

    def test_single_bits(self, original):
        rng = random.Random(1)
        for _ in range(150):
            data = bytearray(original)
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            self.survive(bytes(data))

    def test_headers_and_tables(self, original):
        """Where a flip hurts most: the file's header, the section headers, BTF."""
        rng = random.Random(2)
        headers = struct.unpack_from("<Q", original, 40)[0]
        btf = original.index(b"\x9f\xeb\x01\x00")
        for _ in range(300):
            data = bytearray(original)
            for _ in range(rng.randrange(1, 4)):
                place = rng.choice((rng.randrange(64), rng.randrange(headers, len(data)), btf + rng.randrange(600)))
                data[place] = rng.choice((0, 0xFF, rng.randrange(256)))
            self.survive(bytes(data))

    def test_pieces_zeroed_and_moved(self, original):
        rng = random.Random(3)
        for _ in range(100):
            data = bytearray(original)
            start, length, target = rng.randrange(len(data)), rng.randrange(200), rng.randrange(len(data))
            data[target : target + length] = data[start : start + length] if rng.random() < 0.5 else bytes(length)
            self.survive(bytes(data))
