"""Reading the verifier's logs: recorded ones of Linux 6.18, cut ones, the reports that Linux 7.3 adds."""

from __future__ import annotations

import pickle

import pytest

from kbpf.errors import VerifierError
from kbpf.verifier_log import LogInstruction, SourceLine, read_log

BRANCH = """\
0: R1=ctx() R10=fp0
0: (61) r2 = *(u32 *)(r1 +0)          ; R1=ctx() R2=scalar(smin=0,smax=umax=0xffffffff,var_off=(0x0; 0xffffffff))
1: (b7) r3 = 0                        ; R3=0
2: (55) if r2 != 0x5 goto pc+1 4: R1=ctx() R2=scalar(smin=0,smax=umax=0xffffffff,var_off=(0x0; 0xffffffff)) R3=0 R10=fp0
4: (7b) *(u64 *)(r10 -8) = r3         ; R3=0 R10=fp0 fp-8=0
5: (bf) r4 = r10                      ; R4=fp0 R10=fp0
6: (0f) r4 += r2                      ; R2=scalar() R4=fp(smin=0,smax=umax=0xffffffff,var_off=(0x0; 0xffffffff))
7: (71) r0 = *(u8 *)(r4 -8)
invalid unbounded variable-offset read from stack R4
processed 13 insns (limit 1000000) max_states_per_insn 0 total_states 1 peak_states 1 mark_read 0
"""
SOURCE = """\
0: R1=ctx() R10=fp0
; int key = skb->protocol; @ a.bpf.c:11
0: (61) r1 = *(u32 *)(r1 +16)         ; R1=scalar(smin=0,smax=umax=0xffffffff,var_off=(0x0; 0xffffffff))
1: (63) *(u32 *)(r10 -4) = r1         ; R1=scalar(smin=0,smax=umax=0xffffffff) R10=fp0 fp-8=mmmm????
2: (bf) r2 = r10                      ; R2=fp0 R10=fp0
;  @ a.bpf.c:0
3: (07) r2 += -4                      ; R2=fp-4
; long *value = bpf_map_lookup_elem(&counts, &key); @ a.bpf.c:12
4: (18) r1 = 0xffff88816402a400       ; R1=map_ptr(map=counts,ks=4,vs=8)
6: (85) call bpf_map_lookup_elem#1    ; R0=map_value_or_null(id=1,map=counts,ks=4,vs=8)
; return *value; @ a.bpf.c:16
7: (79) r0 = *(u64 *)(r0 +0)
R0 invalid mem access 'map_value_or_null'
processed 7 insns (limit 1000000) max_states_per_insn 0 total_states 0 peak_states 0 mark_read 0
"""
LOOP = """\
5: (07) r2 += 1                       ; R2=scalar(smin=umin=1,smax=umax=0x100000000,var_off=(0x0; 0x1ffffffff))
8: (5d) if r2 != r1 goto pc-5 infinite loop detected at insn 4
cur state: R1=0xffffffff R2=scalar(smax=umax=0xfffffffe) R10=fp0 fp-8=mmmm????
old state: R1=0xffffffff R2=scalar(smax=umax=0xffffffff) R10=fp0 fp-8=mmmm????
processed 18 insns (limit 1000000) max_states_per_insn 0 total_states 1 peak_states 1 mark_read 0
"""
CALLBACK = """\
11: (b7) r4 = 0                       ; R4=0
12: (85) call bpf_loop#181 15: frame1: R1=scalar() R2=fp[0]-16 R10=fp0 cb
; static long cb(__u64 i, void *c){ __u64 *p=c; return p[100]; } @ callback.bpf.c:2
15: (79) r0 = *(u64 *)(r2 +800)
invalid read from stack R2 off=784 size=8
processed 14 insns (limit 1000000) max_states_per_insn 0 total_states 1 peak_states 1 mark_read 0
"""
LEVEL_2 = """\
func#0 @0
Live regs before insn:
      0: .1........ (bf) r6 = r1
      1: .......... (b7) r0 = 1
      2: 0......... (71) r2 = *(u8 *)(r0 +0)
      3: 0......... (95) exit
0: R1=ctx() R10=fp0
0: (bf) r6 = r1                       ; R1=ctx() R6=ctx()
1: (b7) r0 = 1                        ; R0=1
2: (71) r2 = *(u8 *)(r0 +0)
R0 invalid mem access 'scalar'
processed 3 insns (limit 1000000) max_states_per_insn 0 total_states 0 peak_states 0 mark_read 0
"""
CALL = """\
0: R1=ctx() R10=fp0
0: (85) call pc+1
caller:
 R10=fp0
callee:
 frame1: R1=ctx() R10=fp0
2: frame1: R1=ctx() R10=fp0
2: (71) r0 = *(u8 *)(r10 +16)
invalid read from stack R10 off=16 size=1
processed 2 insns (limit 1000000) max_states_per_insn 0 total_states 0 peak_states 0 mark_read 0
"""
# What the kernels of another day say: 5.4 names registers otherwise, and source lines without their place.
OLD = """\
0: R1=ctx(id=0,off=0,imm=0) R10=fp0
; return *value;
0: (b7) r0 = 1
1: R0_w=inv1 R1=ctx(id=0,off=0,imm=0) R10=fp0
1: (79) r0 = *(u64 *)(r0 +0)
R0 invalid mem access 'inv'
processed 2 insns (limit 1000000) max_states_per_insn 0 total_states 0 peak_states 0 mark_read 0
"""
REPORT = """\
0: R1=ctx() R10=fp0
0: (95) exit
R0 !read_ok

Verification failed: Register Type Safety: Unreadable register

Reason:
  R0 has never been initialized on this path, so the verifier
  cannot use it as an input.

At:
  insn 0
        | ^-- error: R0 is not readable
  Instruction context:
  >>> 0 | (95) exit

Causal path:
  no retained diagnostic events on this path

Suggestion:
  Initialize R0 on every path before this instruction.

processed 1 insns (limit 1000000) max_states_per_insn 0 total_states 0 peak_states 0 mark_read 0
"""


def test_the_last_instruction_its_reason_and_what_was_known() -> None:
    report = read_log(BRANCH)
    assert report.reason == "invalid unbounded variable-offset read from stack R4"
    assert report.instruction == LogInstruction(7, "(71) r0 = *(u8 *)(r4 -8)")
    assert report.registers == {
        "R1": "ctx()",
        "R2": "scalar()",
        "R3": "0",
        "R10": "fp0",
        "fp-8": "0",
        "R4": "fp(smin=0,smax=umax=0xffffffff,var_off=(0x0; 0xffffffff))",
    }
    assert report.source_line is None and not report.cut


def test_the_source_line() -> None:
    assert read_log(SOURCE).source_line == SourceLine("return *value;", "a.bpf.c", 16)


def test_a_helper_leaves_nothing_in_the_registers_that_it_took() -> None:
    assert read_log(SOURCE).registers == {
        "R0": "map_value_or_null(id=1,map=counts,ks=4,vs=8)",
        "R10": "fp0",
        "fp-8": "mmmm????",
    }


def test_registers_are_shown_also_where_nothing_names_one() -> None:
    log = "7: (b7) r6 = 3 ; R6=3 R10=fp0 fp-8=mmmm????\n8: (95) exit\nUnreleased reference id=2 alloc_insn=5\n"
    lines = str(VerifierError(22, "load", log)).splitlines()
    assert lines[-2:] == ["  R6=3", "  fp-8=mmmm????"]


def test_a_callback_has_what_it_is_called_with() -> None:
    assert read_log(CALLBACK).registers == {"R1": "scalar()", "R2": "fp[0]-16", "R10": "fp0"}


def test_a_loop_is_the_reason_and_not_the_states_that_are_alike() -> None:
    report = read_log(LOOP)
    assert report.reason == "infinite loop detected at insn 4"
    assert report.instruction is not None and report.instruction.pc == 4
    assert report.registers["R2"] == "scalar(smax=umax=0xfffffffe)"


def test_log_level_2() -> None:
    report = read_log(LEVEL_2)
    assert (report.reason, str(report.instruction)) == (
        "R0 invalid mem access 'scalar'",
        "instruction 2: (71) r2 = *(u8 *)(r0 +0)",
    )
    assert report.registers["R0"] == "1"


def test_the_registers_are_those_of_the_function_that_failed() -> None:
    report = read_log(CALL)
    assert report.instruction is not None and report.instruction.pc == 2
    assert report.registers == {"R1": "ctx()", "R10": "fp0"}


def test_older_kernels_name_states_otherwise() -> None:
    report = read_log(OLD)
    assert report.registers["R0"] == "inv1"
    assert report.source_line == SourceLine("return *value;")


def test_what_is_found_before_the_program_is_followed_names_its_instruction() -> None:
    report = read_log("unreachable insn 2\nprocessed 0 insns (limit 1000000) max_states_per_insn 0\n")
    assert (report.reason, report.instruction) == ("unreachable insn 2", LogInstruction(2))


def test_what_is_of_the_whole_program_names_no_instruction() -> None:
    log = CALL.replace("invalid read from stack R10 off=16 size=1", "combined stack size of 2 calls is 544. Too large")
    report = read_log(log)
    assert report.reason.startswith("combined stack size")
    assert (report.instruction, report.registers) == (None, {})


class TestReports:
    def test_reason_place_and_suggestion(self) -> None:
        report = read_log(REPORT)
        assert report.reason.splitlines() == [
            "Register Type Safety: Unreadable register",
            "R0 has never been initialized on this path, so the verifier cannot use it as an input.",
        ]
        assert report.suggestion == "Initialize R0 on every path before this instruction."
        assert report.instruction == LogInstruction(0, "(95) exit")
        assert report.registers == {"R1": "ctx()", "R10": "fp0"}

    def test_a_report_alone(self) -> None:
        report = read_log(REPORT[REPORT.index("Verification failed") :])
        assert report.instruction == LogInstruction(0, "(95) exit")
        assert report.suggestion.startswith("Initialize R0")

    def test_a_report_with_a_source_line(self) -> None:
        log = REPORT[REPORT.index("Verification failed") :].replace(
            "  insn 0\n", "  a.bpf.c:16 (insn 0)\n     16 | return *value;\n"
        )
        assert read_log(log).source_line == SourceLine("return *value;", "a.bpf.c", 16)

    @pytest.mark.parametrize("missing", ["Reason", "At", "Suggestion"])
    def test_a_part_that_is_missing(self, missing: str) -> None:
        report = read_log(REPORT.replace(f"{missing}:", "Elsewhere:"))
        assert report.reason.startswith("Register Type Safety")
        assert report.instruction == LogInstruction(0, "(95) exit")


class TestCut:
    @pytest.mark.parametrize("log", [BRANCH, SOURCE, LEVEL_2, CALL, OLD, REPORT])
    def test_anywhere_at_its_start(self, log: str) -> None:
        """The reason stands at the end, whatever is missing before it."""
        whole = read_log(log)
        last = log.index("Reason:") if log == REPORT else log.index(whole.reason)
        for at in range(last + 1):
            # A piece of the line before may stand before it.
            assert read_log(log[at:]).reason.endswith(whole.reason.splitlines()[-1])
        for at in range(last, len(log)):
            str(VerifierError(13, "load", log[at:]))

    @pytest.mark.parametrize("log", [BRANCH, SOURCE, LEVEL_2, CALL, OLD, REPORT])
    def test_anywhere_at_its_end(self, log: str) -> None:
        for at in range(len(log)):
            VerifierError(13, "load", log[:at]).__str__()
        shown = log[: log.index("\n", log.rindex(": ("))]
        assert read_log(shown).cut

    def test_is_said(self) -> None:
        error = VerifierError(13, "load", BRANCH[: BRANCH.index("7: (71)")])
        assert "the log is cut at its end" in str(error)
        assert error.instruction is not None and error.instruction.pc == 6


class TestError:
    def test_says_it_in_few_lines(self) -> None:
        assert str(VerifierError(13, 'load program "count" (socket_filter)', SOURCE, ("a hint",))).splitlines() == [
            'load program "count" (socket_filter): EACCES (Permission denied)',
            "  R0 invalid mem access 'map_value_or_null'",
            "  at instruction 7: (79) r0 = *(u64 *)(r0 +0)",
            "  a.bpf.c:16: return *value;",
            "  R0=map_value_or_null(id=1,map=counts,ks=4,vs=8)",
            "  a hint",
        ]

    def test_is_never_long(self) -> None:
        many = "\n".join(f"line {n} about r{n % 10} " + "x" * 500 for n in range(100))
        text = str(VerifierError(22, "load", BRANCH.replace("invalid unbounded", many), ["a hint"] * 50))
        assert len(text.splitlines()) <= 12
        assert max(map(len, text.splitlines())) <= 200

    def test_has_the_parts_and_the_whole(self) -> None:
        error = VerifierError(22, "load", REPORT)
        assert error.log == REPORT
        assert error.suggestion in str(error) and error.reason.splitlines()[0] in str(error)
        assert error.registers == {"R1": "ctx()", "R10": "fp0"}

    def test_the_programs_own_line_completes_what_the_log_has_of_one(self) -> None:
        line = SourceLine("return *value;", "count.bpf.c", 7)
        for log, expected in ((OLD, line), (SOURCE, SourceLine("return *value;", "a.bpf.c", 16))):
            error = VerifierError(13, "load", log)
            error.locate(error.instruction, line)
            assert error.source_line == expected
            error.locate(error.instruction, None)
            assert error.source_line == expected

    def test_survives_pickle(self) -> None:
        error = VerifierError(13, "load", SOURCE)
        for made in (error, pickle.loads(pickle.dumps(error))):
            assert (str(made), made.log, made.source_line) == (str(error), SOURCE, error.source_line)

    def test_without_a_log(self) -> None:
        error = VerifierError(22, "load")
        assert (str(error), error.reason, error.instruction, error.source_line, error.registers) == (
            "load: EINVAL (Invalid argument)",
            "",
            None,
            None,
            {},
        )
