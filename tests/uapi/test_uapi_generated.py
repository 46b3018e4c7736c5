"""The generated tables are what the generator makes, and the generator's extract is what the kernel says."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kbpf.uapi import constants, enums, structs

ROOT = Path(__file__).resolve().parents[2]
VMLINUX = Path("/sys/kernel/btf/vmlinux")


def test_regenerating_changes_no_byte(tmp_path):
    subprocess.run([sys.executable, ROOT / "tools" / "generate_uapi.py", tmp_path], check=True)
    for name in ("enums.py", "structs.py", "constants.py"):
        assert (tmp_path / name).read_bytes() == (ROOT / "kbpf" / "uapi" / name).read_bytes(), name


def test_the_generator_runs_without_the_modules_it_writes(tmp_path):
    for folder in ("kbpf/elf", "kbpf/uapi", "tools/uapi"):
        (tmp_path / folder).mkdir(parents=True)
    needed = ("kbpf/errors.py", "kbpf/types.py", "kbpf/elf/__init__.py", "kbpf/elf/btf.py", "tools/generate_uapi.py")
    for path in needed:
        (tmp_path / path).write_bytes((ROOT / path).read_bytes())
    (tmp_path / "kbpf/__init__.py").write_text("import kbpf.uapi.enums\n")
    (tmp_path / "tools/uapi/vmlinux.btf").write_bytes((ROOT / "tools/uapi/vmlinux.btf").read_bytes())
    (tmp_path / "kbpf/uapi/constants.py").write_bytes((ROOT / "kbpf/uapi/constants.py").read_bytes())
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, tmp_path / "tools/generate_uapi.py"], check=True, env=environment, cwd=tmp_path)
    assert (tmp_path / "kbpf/uapi/enums.py").read_bytes() == (ROOT / "kbpf/uapi/enums.py").read_bytes()


def test_the_extract_is_what_the_kernel_it_names_says(tmp_path):
    release = (ROOT / "tools" / "uapi" / "release").read_text().strip()
    if os.uname().release != release or not VMLINUX.exists():
        pytest.skip(f"the extract is of Linux {release}")
    made = tmp_path / "extract.btf"
    subprocess.run([sys.executable, ROOT / "tools" / "extract_btf.py", VMLINUX, made], check=True)
    assert made.read_bytes() == (ROOT / "tools" / "uapi" / "vmlinux.btf").read_bytes()


@pytest.mark.parametrize(
    ("table", "name", "number"),
    [
        (enums.MAP_TYPES, "lpm_trie", 11),
        (enums.MAP_TYPES, "percpu_cgroup_storage", 21),
        (enums.PROG_TYPES, "socket_filter", 1),
        (enums.PROG_TYPES, "sk_lookup", 30),
        (enums.ATTACH_TYPES, "cgroup_inet_egress", 1),
        (enums.LINK_TYPES, "xdp", 6),
        (enums.COMMANDS, "prog_test_run", 10),
        (enums.COMMANDS, "prog_run", 10),
        (enums.HELPERS, "map_lookup_elem", 1),
        (enums.HELPERS, "skb_load_bytes_relative", 68),
    ],
)
def test_names_are_bpftools(table, name, number):
    assert table[name] == number


def test_every_command_has_its_attributes():
    assert enums.COMMANDS.keys() <= structs.ATTRS.keys()


def test_where_python_has_the_number_it_is_the_same():
    def differ(module, names):
        return [n for n in names if hasattr(module, n) and getattr(module, n) != getattr(constants, n)]

    names = [n for n in vars(constants) if n.isupper()]
    assert differ(socket, names) == []
    assert sum(hasattr(socket, n) for n in names) > 10


class TestStructures:
    def test_context_fields_lie_where_linux_bpf_h_says(self):
        fields = structs.STRUCTS["__sk_buff"].fields
        assert structs.STRUCTS["__sk_buff"].size == 192
        assert fields["protocol"] == (16, 4, 1, 0, 0)
        assert fields["cb"] == (48, 4, 5, 0, 0)
        assert fields["wire_len"].offset == 160

    def test_members_of_inner_structures_are_dotted_and_anonymous_ones_are_not(self):
        fields = structs.ATTRS["link_create"].fields
        assert fields["target_ifindex"].offset == fields["target_fd"].offset == 4
        assert fields["perf_event.bpf_cookie"] == (16, 8, 1, 0, 0)

    def test_bit_fields_say_where_their_bits_are(self):
        field = structs.STRUCTS["bpf_prog_info"].fields["gpl_compatible"]
        assert (field.bits, field.shift) == (1, 0)

    def test_no_field_lies_outside_its_structure(self):
        for table in (structs.STRUCTS, structs.ATTRS):
            for struct in table.values():
                for name, field in struct.fields.items():
                    assert field.offset + field.size * field.count <= struct.size, (struct.name, name)

    def test_the_union_has_room_for_every_command(self):
        assert max(struct.size for struct in structs.ATTRS.values()) <= structs.ATTR_SIZE
        assert structs.ATTR_SIZE % ctypes.sizeof(ctypes.c_uint64) == 0


def test_importing_the_tables_costs_no_more_than_a_few_milliseconds():
    code = (
        "import functools, sys, time, types, typing\n"
        "bare = types.ModuleType('kbpf'); bare.__path__ = [sys.argv[1]]; sys.modules['kbpf'] = bare\n"
        "start = time.process_time()\n"
        "import kbpf.uapi.constants, kbpf.uapi.enums, kbpf.uapi.structs\n"
        "print(time.process_time() - start)\n"
    )
    # Compiled once, as an installation does; then the best of five, and room for a busy machine: 4 ms were measured.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    runs = [
        subprocess.run(
            [sys.executable, "-c", code, ROOT / "kbpf"], check=True, capture_output=True, text=True, env=environment
        )
        for _ in range(6)
    ]
    assert min(float(run.stdout) for run in runs) < 0.010
