"""Objects become specs: sections, symbols, relocations, subprograms, BTF; and the kernel takes what comes of it."""

from __future__ import annotations

import os
import re
import struct
import subprocess
from pathlib import Path

import pytest
from elf_builder import CALL, EXIT, FUNC, LD_MAP, OBJECT, SECTION, Object

import kbpf
from kbpf import types
from kbpf.elf import btf, read_object
from kbpf.elf.file import read
from kbpf.elf.sections import SECTIONS, classify
from kbpf.isa import ebpf
from kbpf.kernel import syscall
from kbpf.kernel.attrs import command
from kbpf.runtime.backends import select
from kbpf.uapi.constants import BPF_F_MMAPABLE, BPF_F_RDONLY_PROG
from kbpf.uapi.enums import ATTACH_TYPES, PROG_TYPES

ROOT = Path(__file__).resolve().parents[2]
SOCKEX1 = ROOT / "kbpf" / "objects" / "sockex1.bpf.o"

SOURCE = r"""
#include "kbpf.bpf.h"

enum color { RED = 2, BLUE = 7 };
typedef struct {
	char name[4]; enum color color; unsigned low:3; int high:13; union { __u32 whole; __u8 part[4]; };
} thing;

struct { __uint(type, 1); __type(key, thing); __type(value, __u64); __uint(max_entries, 8); __uint(map_flags, 1);
         __uint(pinning, 1); } pinned SEC(".maps");
struct inner { __uint(type, 2); __type(key, __u32); __type(value, __u64); __uint(max_entries, 4); };
struct { __uint(type, 12); __uint(max_entries, 2); struct inner *values[]; } outer SEC(".maps");
struct { __uint(type, 3); __uint(max_entries, 2); int (*values[])(void *); } tails SEC(".maps");
struct { __uint(type, 4); __uint(key_size, 4); __uint(value_size, 4);
         __uint(max_entries, 2); } events SEC(".maps");
struct { __uint(type, 22); __uint(max_entries, 2); __type(value, __u64); } queue SEC(".maps");

const volatile __u32 scale = 3;
volatile __u32 base = 40;
static volatile __u64 calls;
/* The compiler moves these to .rodata.cst32, but BTF says .rodata. */
static const __u32 table[8] = {1, 2, 3, 4, 5, 6, 7, 8};
volatile __u16 other;

static long (*bpf_loop)(__u32 count, void *callback, void *context, __u64 flags) = (void *)181;

static __attribute__((noinline)) int step(__u32 index, __u32 *sum) { *sum += index; return 0; }
__attribute__((noinline)) int twice(int x) { calls++; return x * 2; }
static __attribute__((noinline)) int scaled(int x) { return twice(x) + scale; }

SEC("socket") int first(struct __sk_buff *skb) { other = 1; return scaled(base) - twice(20); }
SEC("socket") int second(struct __sk_buff *skb) { return scaled(1); }
SEC("socket") int constant(struct __sk_buff *skb) { return table[skb->len & 7]; }
SEC("socket/loop") int third(struct __sk_buff *skb)
{
	__u32 sum = 0;
	bpf_loop(5, step, &sum, 0);
	return sum;
}
SEC("tracepoint/syscalls/sys_enter_kill") int fourth(void *context)
{
	__u32 key = 0;
	bpf_map_lookup_elem(&outer, &key);
	bpf_map_lookup_elem(&tails, &key);
	return 0;
}
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elf")
    source = folder / "many.bpf.c"
    source.write_text(SOURCE)
    target = folder / "many.bpf.o"
    command = ["clang", "-target", "bpf", "-O2", "-g", "-I", ROOT / "c", "-c", source, "-o", target]
    subprocess.run(command, check=True)
    return target


def slots(spec):
    """(index, src, imm, next imm) of the 64-bit loads that refer to something."""
    code = spec.instructions
    return [(pc, i.src, i.imm, code[pc + 1].imm) for pc, i in enumerate(code) if i.opcode == ebpf.LD_IMM64 and i.src]


class TestShippedObject:
    def test_map_and_types(self):
        (name, spec), = read_object(SOCKEX1).maps.items()  # fmt: skip
        assert (name, spec.type, spec.key_size, spec.value_size, spec.max_entries) == ("bytes", "array", 4, 8, 256)
        assert spec.key_type == types.Int(name="unsigned int", size=4)
        assert spec.value_type == types.Int(name="unsigned long long", size=8)

    def test_program_refers_to_the_map_by_index(self):
        program = read_object(SOCKEX1).programs["count"]
        assert (program.type, program.license, program.section) == ("socket_filter", "Dual MIT/GPL", "socket")
        assert [slot[1:] for slot in slots(program)] == [(ebpf.PSEUDO_MAP_IDX, 0, 0)]
        assert [spec.name for spec in program.maps] == ["bytes"]

    def test_bytes_and_path_and_string_give_the_same(self):
        assert read_object(SOCKEX1.read_bytes()) == read_object(SOCKEX1) == read_object(str(SOCKEX1))

    @pytest.mark.parametrize("name", ["sockex1", "sockex2"])
    @pytest.mark.requires("kernel")
    def test_kernel_takes_it_with_its_btf(self, name):
        with kbpf.load(SOCKEX1.with_name(f"{name}.bpf.o"), backend="kernel") as loaded:
            (map,) = loaded.maps.values()
            info = select("kernel").map_info(map.fileno())
            assert info.btf_id
            assert info.btf_key_type_id
            assert info.btf_value_type_id


@pytest.mark.requires("clang")
class TestCompiled:
    def test_maps(self, compiled):
        maps = read_object(compiled).maps
        assert set(maps) == {".data", ".rodata", ".rodata.cst32", ".bss", "pinned", "outer", "tails", "events", "queue"}
        assert maps["pinned"].pinning == "by_name"
        assert maps["pinned"].flags == 1
        assert (maps["outer"].key_size, maps["outer"].value_size) == (4, 4)
        inner = maps["outer"].inner
        assert (inner.type, inner.name, inner.value_size, inner.max_entries) == ("array", "outer.inner", 8, 4)
        assert (maps["tails"].type, maps["tails"].value_size, maps["tails"].inner) == ("prog_array", 4, None)
        assert (maps["events"].type, maps["events"].key_type) == ("perf_event_array", None)
        assert (maps["queue"].key_size, maps["queue"].value_size, maps["queue"].btf) == (0, 8, b"")

    def test_a_key_type_is_the_c_type(self, compiled):
        key = read_object(compiled).maps["pinned"].key_type
        assert isinstance(key, types.Struct)
        name, color, low, high, last = key.members
        assert name.type == types.Array(element=types.Int(name="char", size=1, signed=True, char=True), count=4)
        assert isinstance(color.type, types.Enum)
        assert color.type.values == (("RED", 2), ("BLUE", 7))
        assert [(m.name, m.bit_offset, m.bit_size) for m in (low, high)] == [("low", 64, 3), ("high", 67, 13)]
        assert not last.name
        assert isinstance(last.type, types.Struct)
        assert last.type.union

    def test_data_sections_are_arrays_of_one_element(self, compiled):
        maps = read_object(compiled).maps
        rodata, data, bss = maps[".rodata"], maps[".data"], maps[".bss"]
        assert (rodata.name, rodata.frozen, rodata.flags) == ("many.rodata", True, BPF_F_MMAPABLE | BPF_F_RDONLY_PROG)
        assert rodata.contents == ((bytes(4), struct.pack("=I", 3)),)
        assert (data.name, data.frozen, data.flags) == ("many.data", False, BPF_F_MMAPABLE)
        assert data.contents == ((bytes(4), struct.pack("=I", 40)),)
        assert (bss.name, bss.contents) == ("many.bss", ())
        assert isinstance(bss.value_type, types.Struct)
        assert {m.name: m.type.size for m in bss.value_type.members} == {"calls": 8, "other": 2}

    def test_subprograms_are_appended_once_to_each_program_that_calls_them(self, compiled):
        programs = read_object(compiled).programs
        first, second = programs["first"], programs["second"]
        exits = [sum(i.opcode == ebpf.JMP | ebpf.EXIT for i in p.instructions) for p in (first, second)]
        assert exits == [3, 3]
        assert len(first.func_info) == len(second.func_info) == 3 * 8
        offsets = [offset for offset, _ in struct.iter_unpack("=2I", first.func_info)]
        for pc, instruction in enumerate(first.instructions):
            if instruction.opcode == ebpf.JMP | ebpf.CALL and instruction.src == ebpf.PSEUDO_CALL:
                assert pc + instruction.imm + 1 in offsets
        lines = [line[0] for line in struct.iter_unpack("=4I", first.line_info)]
        assert lines == sorted(lines)
        assert set(offsets) <= set(lines)

    def test_section_names_tell_type_and_target(self, compiled):
        programs = read_object(compiled).programs
        assert (programs["third"].type, programs["third"].attach_to) == ("socket_filter", "loop")
        assert (programs["fourth"].type, programs["fourth"].attach_to) == ("tracepoint", "syscalls/sys_enter_kill")

    def test_function_pointers_point_to_the_appended_function(self, compiled):
        third = read_object(compiled).programs["third"]
        (slot,) = slots(third)
        assert slot[1] == ebpf.PSEUDO_FUNC
        assert slot[0] + slot[2] + 1 == struct.unpack_from("=I", third.func_info, 8)[0]

    @pytest.mark.parametrize(("name", "value"), [("first", 43), ("second", 5), ("third", 10), ("constant", 3)])
    @pytest.mark.requires("kernel")
    def test_the_kernel_runs_it(self, compiled, name, value):
        program = read_object(compiled).programs[name]
        with kbpf.load_program(program, backend="kernel") as loaded:
            assert loaded.run(bytes(64)).value == value

    @pytest.mark.parametrize("name", ["pinned", ".rodata", ".bss", ".data", "queue", "events", "tails"])
    @pytest.mark.requires("kernel")
    def test_the_kernel_takes_what_btf_says_of_the_map(self, compiled, name):
        spec = read_object(compiled).maps[name]
        kernel = select("kernel")
        fd = kernel.map_create(spec)
        info = kernel.map_info(fd)
        kernel.close(fd)
        assert (info.btf_key_type_id, info.btf_value_type_id) == (spec.btf_key_type_id, spec.btf_value_type_id)
        assert bool(info.btf_id) == bool(spec.btf)
        assert info.name == spec.name

    def test_a_variable_is_described_where_it_lies(self, compiled):
        maps = read_object(compiled).maps
        assert [member.name for member in maps[".rodata"].value_type.members] == ["scale"]
        assert maps[".rodata.cst32"].contents == ((bytes(4), struct.pack("=8I", *range(1, 9))),)
        assert maps[".rodata.cst32"].value_type is None

    @pytest.mark.parametrize("name", ["first", "second", "third", "fourth", "constant"])
    @pytest.mark.requires("kernel")
    def test_the_kernel_takes_the_btf_with_function_and_line_records(self, compiled, name):
        program = read_object(compiled).programs[name]
        assert program.btf
        assert program.func_info
        assert program.line_info
        blob = syscall.Buffer(program.btf)
        os.close(command("btf_load", btf=blob.address, btf_size=blob.size))

    @pytest.mark.requires("bpftool")
    def test_btf_reads_as_bpftool_reads_it(self, compiled):
        dump = subprocess.run(["bpftool", "btf", "dump", "file", compiled], check=True, capture_output=True, text=True)
        section = read(compiled.read_bytes()).section(".BTF")
        records = btf.Btf(section.data).records[1:]
        wanted = re.findall(r"^\[\d+\] (\w+) '(.*?)'", dump.stdout, re.MULTILINE)
        assert [record.name or "(anon)" for record in records] == [name for _, name in wanted]
        assert [record.kind for record in records] == [getattr(btf, kind) for kind, _ in wanted]


class TestOldMaps:
    def old(self, definition: bytes, count: int = 1):
        made = Object()
        maps = made.section("maps", definition)
        for index in range(count):
            made.symbol(f"map{index}", maps, index * (len(definition) // count), 0, OBJECT)
        program = made.program("socket", "count", LD_MAP + EXIT)
        made.relocate(program, 0, len(made.symbols) - 2, 1)
        return made

    @pytest.mark.parametrize("size", [16, 20, 24, 28, 36])
    def test_definitions_of_other_sizes_are_understood(self, size):
        definition = struct.pack("<5I", 1, 4, 8, 100, 1).ljust(size, b"\0")[:size]
        spec = read_object(self.old(definition).build())
        (map,) = spec.programs["count"].maps
        assert (map.type, map.key_size, map.value_size, map.max_entries) == ("hash", 4, 8, 100)
        assert map.flags == (1 if size >= 20 else 0)

    def test_two_maps(self):
        definition = struct.pack("<5I", 1, 4, 8, 100, 0) + struct.pack("<5I", 2, 4, 16, 7, 0)
        spec = read_object(self.old(definition, 2).build())
        assert list(spec.maps) == ["map0", "map1"]
        assert spec.programs["count"].maps == (spec.maps["map1"],)

    def test_fields_that_nobody_knows_are_refused(self):
        definition = struct.pack("<6I", 1, 4, 8, 100, 0, 5)
        with pytest.raises(kbpf.ObjectError, match=r"maps.*'map0'"):
            read_object(self.old(definition).build())


class TestCalls:
    def test_a_call_by_section_symbol_counts_from_its_start(self):
        made = Object()
        text = made.section(".text", EXIT + EXIT, code=True)
        made.symbol("one", text, 0, 16, FUNC, local=True)
        made.symbol("two", text, 16, 16, FUNC, local=True)
        section = made.symbol("", text, 0, 0, SECTION, local=True)
        program = made.program("socket", "count", CALL[:4] + struct.pack("<i", 1) + EXIT)
        made.relocate(program, 0, section, 10)
        code = read_object(made.build()).programs["count"].instructions
        assert len(code) == 3 + 2
        assert code[0].imm == 2

    def test_a_recursive_function_is_appended_once(self):
        made = Object()
        text = made.section(".text", CALL[:4] + struct.pack("<i", -1) + EXIT, code=True)
        function = made.symbol("again", text, 0, 24, FUNC)
        program = made.program("socket", "count", CALL[:4] + struct.pack("<i", -1) + EXIT)
        made.relocate(program, 0, function, 10)
        code = read_object(made.build()).programs["count"].instructions
        assert len(code) == 6
        assert (code[0].imm, code[3].imm) == (2, -1)


class TestSectionNames:
    @pytest.mark.parametrize(
        ("section", "type", "attach", "target"),
        [
            ("socket", "socket_filter", None, ""),
            ("socket1", "socket_filter", None, ""),
            ("xdp", "xdp", "xdp", ""),
            ("xdp.frags/devmap", "xdp", "xdp_devmap", ""),
            ("kprobe/do_exit", "kprobe", None, "do_exit"),
            ("raw_tp/sched_switch", "raw_tracepoint", None, "sched_switch"),
            ("cgroup/connect4", "cgroup_sock_addr", "cgroup_inet4_connect", ""),
            ("cgroup_skb/ingress", "cgroup_skb", "cgroup_inet_ingress", ""),
            ("sk_skb/stream_parser", "sk_skb", "sk_skb_stream_parser", ""),
            ("classifier/name", "sched_cls", None, "name"),
        ],
    )
    def test_known(self, section, type, attach, target):
        kind, found = classify(section)
        assert (kind.type, kind.attach, found) == (type, attach, target)

    def test_unknown_names_are_refused(self):
        with pytest.raises(kbpf.ObjectError, match="section nonsense/x"):
            classify("nonsense/x")

    def test_the_table_has_only_types_that_linux_has(self):
        for kind in SECTIONS.values():
            assert kind.type in PROG_TYPES
            assert kind.attach is None or kind.attach in ATTACH_TYPES
