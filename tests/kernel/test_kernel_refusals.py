"""Programs that the running kernel refuses, one for each kind of message, and what the error then says."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import kbpf
from kbpf.backend import LoadRefused
from kbpf.isa import ebpf
from kbpf.kernel import programs
from kbpf.kernel.backend import KernelBackend
from kbpf.specs import MapSpec, ProgramSpec
from kbpf.testing.requirements import available
from kbpf.verifier_log import SourceLine, read_log

pytestmark = pytest.mark.requires("kernel")

EXIT = (0x95, 0, 0, 0, 0)
ZERO = (0xB7, 0, 0, 0, 0)
HASH = MapSpec(type="hash", key_size=4, value_size=8, max_entries=2)
MAP = ((0x18, 1, ebpf.PSEUDO_MAP_IDX, 0, 0), (0, 0, 0, 0, 0))
LOOKUP = ((0x62, 10, 0, -4, 0), (0xBF, 2, 10, 0, 0), (0x07, 2, 0, 0, -4), *MAP, (0x85, 0, 0, 0, 1))


def call(helper: int) -> tuple[int, ...]:
    return (0x85, 0, 0, 0, helper)


# What: type, instructions, a pattern in the reason (what Linux 6.1 says differently is its second half), the
# instruction's index (None: the verifier names none), and registers that it must have told of.
REFUSED: dict[str, tuple[str, tuple[tuple[int, ...], ...], str, int | None, dict[str, str]]] = {
    "unreadable register": ("socket_filter", (EXIT,), "R0 !read_ok", 0, {"R1": "ctx()"}),
    "scalar as pointer": (
        "socket_filter",
        (ZERO, (0x71, 2, 0, 0, 0), EXIT),
        "invalid mem access 'scalar'",
        1,
        {"R0": "0"},
    ),
    "stack out of bounds": ("socket_filter", ((0x71, 0, 10, 8, 0), EXIT), "invalid read from stack", 0, {"R10": "fp0"}),
    "stack write": ("socket_filter", ((0x7A, 10, 0, -520, 1), ZERO, EXIT), "invalid write to stack", 0, {"R10": "fp0"}),
    "misaligned stack": ("socket_filter", ((0x7A, 10, 0, -7, 1), ZERO, EXIT), "misaligned", 0, {"R10": "fp0"}),
    "frame pointer written": (
        "socket_filter",
        ((0xB7, 10, 0, 0, 0), ZERO, EXIT),
        "frame pointer is read only",
        None,
        {},
    ),
    "context": ("socket_filter", ((0x61, 0, 1, 4000, 0), EXIT), "invalid bpf_context access", 0, {"R1": "ctx()"}),
    "context written": ("socket_filter", (ZERO, (0x63, 1, 0, 0, 0), EXIT), "invalid bpf_context access", 1, {}),
    "packet": (
        "xdp",
        ((0x61, 2, 1, 0, 0), (0x61, 0, 2, 0, 0), EXIT),
        "invalid access to packet",
        1,
        {"R2": "pkt(r=0)"},
    ),
    "unknown helper": ("socket_filter", (call(9999), EXIT), "invalid func unknown#9999", 0, {}),
    "helper of others": (
        "socket_filter",
        (call(51), EXIT),
        "(cannot use helper|unknown func) bpf_redirect_map#51",
        0,
        {},
    ),
    "helper's argument": (
        "socket_filter",
        (ZERO, (0xBF, 1, 0, 0, 0), call(1), EXIT),
        "R1 type=scalar expected=map_ptr",
        2,
        {"R1": "0"},
    ),
    "null not checked": ("socket_filter", (*LOOKUP, (0x79, 0, 0, 0, 0), EXIT), "map_value_or_null", 6, {"R10": "fp0"}),
    "map value": (
        "socket_filter",
        (*LOOKUP, (0x15, 0, 0, 1, 0), (0x79, 0, 0, 8, 0), EXIT),
        "invalid access to map value, value_size=8 off=8 size=8",
        7,
        {},
    ),
    "clobbered": (
        "socket_filter",
        ((0xBF, 6, 1, 0, 0), call(7), (0xBF, 0, 1, 0, 0), EXIT),
        "R1 !read_ok",
        2,
        {"R6": "ctx()"},
    ),
    "return value": (
        "cgroup_skb",
        ((0xB7, 0, 0, 0, 5), EXIT),
        r"R0 has (smin=5 smax=5|value \(0x5; 0x0\))",
        1,
        {"R0": "5"},
    ),
    "division by zero": ("socket_filter", (ZERO, (0x37, 0, 0, 0, 0), EXIT), "div by zero", 1, {"R0": "0"}),
    "shift": ("socket_filter", (ZERO, (0x67, 0, 0, 0, 64), EXIT), "invalid shift 64", 1, {"R0": "0"}),
    "pointer arithmetic": (
        "socket_filter",
        ((0xBF, 2, 1, 0, 0), (0x2F, 2, 1, 0, 0), ZERO, EXIT),
        "pointer",
        1,
        {"R2": "ctx()"},
    ),
    "jump to itself": ("socket_filter", (ZERO, (0x05, 0, 0, -1, 0), EXIT), "unreachable insn 2", 2, {}),
    "endless": ("socket_filter", (ZERO, (0x15, 0, 0, -1, 0), EXIT), "infinite loop detected", 1, {}),
    # Every state is like the one before, which is said behind the jump, in its line.
    "counting for ever": (
        "socket_filter",
        (
            *(ZERO, (0x63, 10, 0, -4, 0), (0x18, 1, 0, 0, 0xFFFFFFFF), (0, 0, 0, 0, 0), (0x61, 2, 10, -4, 0)),
            *((0x07, 2, 0, 0, 1), (0x63, 10, 2, -4, 0), (0x61, 2, 10, -4, 0), (0x5D, 2, 1, -5, 0), EXIT),
        ),
        "infinite loop detected at insn 4",
        4,
        {"R10": "fp0"},
    ),
    "calls too deep": (
        "socket_filter",
        (*((0x85, 0, 1, 0, 1), EXIT) * 9, ZERO, EXIT),
        "call stack of 9 frames",
        14,
        {},
    ),
    "stacks too large": (
        "socket_filter",
        ((0x7A, 10, 0, -264, 1), (0x85, 0, 1, 0, 1), EXIT, (0x7A, 10, 0, -264, 1), ZERO, EXIT),
        "combined stack size of 2 calls is (544|576)",
        None,
        {},
    ),
    "jump out": ("socket_filter", ((0x05, 0, 0, 100, 0), EXIT), "jump out of range from insn 0 to 101", 0, {}),
    "unreachable": ("socket_filter", (ZERO, EXIT, ZERO, EXIT), "unreachable insn 2", 2, {}),
    "no exit": ("socket_filter", (ZERO,), "last insn is not an exit or jmp", None, {}),
    "opcode": ("socket_filter", ((0xFF, 0, 0, 0, 0), EXIT), "unknown opcode ff", 0, {}),
    "wide load cut": ("socket_filter", (ZERO, (0x18, 1, 0, 0, 5), EXIT), "invalid bpf_ld_imm64 insn", 1, {}),
    "call out": ("socket_filter", (ZERO, (0x85, 0, 1, 0, 7), EXIT), "call to invalid destination", 1, {}),
    "reserved field": ("socket_filter", ((0xB7, 0, 0, 3, 0), EXIT), "reserved field", None, {}),
    "atomic on the context": ("socket_filter", (ZERO, (0xDB, 1, 0, 0, 0), EXIT), "BPF_ATOMIC", 1, {"R1": "ctx()"}),
    "packet load without context": ("socket_filter", ((0x30, 0, 0, 0, 0), EXIT), "R6", 0, {}),
    "tail call": (
        "socket_filter",
        (ZERO, (0xBF, 3, 0, 0, 0), (0xBF, 2, 0, 0, 0), call(12), ZERO, EXIT),
        "R2 type=scalar expected=map_ptr",
        3,
        {},
    ),
    "callee's stack": (
        "socket_filter",
        ((0x85, 0, 1, 0, 1), EXIT, (0x71, 0, 10, 16, 0), EXIT),
        "invalid read from stack",
        2,
        {"R10": "fp0"},
    ),
}


def spec(what: str) -> ProgramSpec:
    type, instructions, *_ = REFUSED[what]
    return ProgramSpec(
        type=type, name="refused", instructions=instructions, maps=(HASH,) if MAP[0] in instructions else ()
    )


@pytest.mark.parametrize("what", REFUSED)
def test_the_error_says_which_instruction_and_why(what: str) -> None:
    _, instructions, reason, index, registers = REFUSED[what]
    with pytest.raises(kbpf.VerifierError) as caught:
        kbpf.load_program(spec(what), backend="kernel")
    error = caught.value
    assert error.log and error.reason and re.search(reason, error.reason)
    assert error.reason.splitlines()[0] in str(error)
    assert len(str(error).splitlines()) <= 12
    if index is not None:
        assert error.instruction is not None and error.instruction.pc == index
        assert error.instruction.text.startswith(f"({instructions[index][0]:02x}) ")
        assert f"at instruction {index}: " in str(error)
    # Older verifiers tell of what is 0, too: ctx(off=0,imm=0).
    told = {name: re.sub(r"\b(off|imm)=0,|,?\b(off|imm)=0\b", "", text) for name, text in error.registers.items()}
    assert registers.items() <= told.items()


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("level", [2, 4])
def test_other_log_levels_say_the_same(what: str, level: int, kernel: KernelBackend) -> None:
    maps = [kernel.map_create(made) for made in spec(what).maps]
    try:
        reports = []
        for log_level in (1, level):
            with pytest.raises(LoadRefused) as caught:
                kernel.program_load(spec(what), maps, log_level=log_level)
            reports.append(read_log(caught.value.log))
    finally:
        for fd in maps:
            kernel.close(fd)
    usual, other = reports
    assert other.reason == usual.reason
    if level == 2:
        assert other.instruction == usual.instruction
        assert other.registers.keys() == usual.registers.keys()
        # Older verifiers tell of fewer instructions' registers where they are asked for less.
        assert other.registers == usual.registers or not available("linux-6.18")


def test_a_long_log_is_kept_whole_and_asked_for_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    load = programs.command_with_token
    monkeypatch.setattr(
        programs, "command_with_token", lambda *args, **named: loads.append(named) or load(*args, **named)
    )
    code = (*[ZERO] * 20_000, (0x71, 2, 0, 0, 0), EXIT)
    with pytest.raises(kbpf.VerifierError) as caught:
        kbpf.load_program(ProgramSpec(type="socket_filter", instructions=code), backend="kernel")
    assert len(caught.value.log) > 1 << 19
    assert re.match(r"0: R1=ctx\((off=0,imm=0)?\) R10=fp0\n", caught.value.log)
    assert caught.value.instruction is not None and caught.value.instruction.pc == 20_000
    assert len(loads) == 3


C = """
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4);
	__type(key, int);
	__type(value, long);
} counts SEC(".maps");

SEC("socket") int count(struct __sk_buff *skb)
{
	int key = skb->protocol;
	long *value = bpf_map_lookup_elem(&counts, &key);

	return *value;
}
char _license[] SEC("license") = "GPL";
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refused")
    (folder / "count.bpf.c").write_text(C)
    include = next(iter(Path("/usr/include").glob("*-linux-gnu")), Path("/usr/include"))
    command = ["clang", "-g", "-O2", "--target=bpf", f"-I{include}", "-c", "count.bpf.c", "-o", "count.bpf.o"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder / "count.bpf.o"


@pytest.mark.requires("clang")
def test_the_source_line_is_shown(compiled: Path) -> None:
    line = 1 + C.splitlines().index("\treturn *value;")
    with pytest.raises(kbpf.VerifierError) as caught:
        kbpf.load(compiled, backend="kernel")
    assert caught.value.source_line == SourceLine("return *value;", "count.bpf.c", line)
    assert f"count.bpf.c:{line}: return *value;" in str(caught.value)
    assert "R0=map_value_or_null(" in str(caught.value)


@pytest.mark.requires("clang")
def test_the_programs_own_line_info_serves_where_the_log_has_none(compiled: Path) -> None:
    from kbpf.elf import read_object
    from kbpf.runtime.refused import locate

    program = read_object(compiled).programs["count"]
    with pytest.raises(kbpf.VerifierError) as caught:
        kbpf.load(compiled, backend="kernel")
    shown = caught.value
    assert shown.instruction is not None
    cut = kbpf.VerifierError(13, "load", shown.log[shown.log.index(f"\n{shown.instruction.pc}: (") + 1 :])
    assert cut.source_line is None
    locate(cut, program)
    assert cut.source_line == shown.source_line
