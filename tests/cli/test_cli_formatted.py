"""What BTF says of keys and values, as ``kbpf map dump --json`` and bpftool write it."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import kbpf
from kbpf.cli.formatted import formatted
from kbpf.types import Array, Enum, Float, Int, Member, Struct

U8, U32 = Int(name="unsigned char", size=1), Int(name="unsigned int", size=4)
CHAR = Int(name="char", size=1, signed=True)
C = """
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
enum colour { RED = 1, BLUE = 2 };
struct in { __u8 x; __s16 y; };
struct place { __u32 class; __u16 port; };
struct record {
	__u32 a; char name[8]; enum colour colour; struct in in; _Bool b; __u64 array[2]; __u8 bytes[3];
	unsigned low:3; unsigned high:5; void *p; union { __u32 wide; __u16 narrow; }; struct in several[2]; __s64 negative;
};
struct {
	__uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 4); __type(key, struct place); __type(value, struct record);
} records SEC(".maps");
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY); __uint(max_entries, 1); __type(key, __u32); __type(value, struct in);
} each SEC(".maps");
int number = 5;
const volatile char text[4] = "abc";
SEC("socket") int program(struct __sk_buff *skb) { number += text[1]; return 0; }
char _license[] SEC("license") = "GPL";
"""


@pytest.mark.requires("kernel", "clang", "bpftool")
@pytest.mark.parametrize(
    "filling",
    [bytes(range(1, 97)), bytes(96), b"\0" * 4 + b"bash\0\0\0\0\2" + bytes(83)],
    ids=["numbers", "nothing", "text"],
)
def test_elements_mean_what_bpftool_says(cli, tmp_path: Path, filling: bytes) -> None:
    (tmp_path / "typed.bpf.c").write_text(C)
    include = next(iter(Path("/usr/include").glob("*-linux-gnu")), Path("/usr/include"))
    command = ["clang", "-g", "-O2", "--target=bpf", f"-I{include}", "-c", "typed.bpf.c", "-o", "typed.bpf.o"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    compared = 0
    with kbpf.load(tmp_path / "typed.bpf.o", backend="kernel") as collection:
        collection.maps["records"][bytes(8)] = filling[: collection.maps["records"].shape.value_size]
        for map in collection.maps.values():
            which = ("map", "dump", "id", str(map.id))
            done = subprocess.run(["bpftool", "-j", *which], capture_output=True, check=True)
            assert json.loads(cli(*which, "--json").out) == json.loads(done.stdout)
            compared += 1
    assert compared == 4


def test_what_bpftool_does_not_tell_apart() -> None:
    union = Struct(name="", size=4, members=(Member(name="all", type=U32),), union=True)
    two = Struct(name="two", size=8, members=(Member(name="", type=union), Member(name="", type=union, bit_offset=32)))
    assert formatted(two, struct.pack("=II", 1, 2)) == {"": {"all": 1}, "_1": {"all": 2}}
    assert formatted(Float(name="double", size=8), struct.pack("=d", 0.5)) == 0.5
    assert formatted(Int(name="__int128", size=16), (1 << 100).to_bytes(16, sys.byteorder)) == hex(1 << 100)


@pytest.mark.parametrize(
    ("type", "data", "expected"),
    [
        (Array(element=CHAR, count=4), b"ab\0\1", "ab"),
        (Array(element=CHAR, count=4), b"\0\0\0\0", ""),
        (Array(element=CHAR, count=2), b"ab", [97, 98]),
        (Array(element=CHAR, count=3), b"\x1f\0\0", [31, 0, 0]),
        (Array(element=U8, count=3), b"ab\0", [97, 98, 0]),
        (Enum(name="e", size=1, values=(("ONE", 1),)), b"\1", "ONE"),
        (Enum(name="e", size=1, values=(("ONE", 1),)), b"\2", 2),
        (Int(name="_Bool", size=1, boolean=True), b"\1", True),
    ],
)
def test_numbers_and_text(type: object, data: bytes, expected: object) -> None:
    assert formatted(type, data) == expected  # type: ignore[arg-type]
