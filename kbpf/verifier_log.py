"""What the verifier's log says of a refusal: the reason, the instruction, its source line, the registers.

The log is text for people and no uapi: it changes from one kernel to the next, and a kernel cuts it where it does not
fit (at its start since Linux 6.4, at its end before). So whatever is not found is None or empty, and nothing raises.
Read are the formats since 4.x, at log levels 1 and 2, and the report that Linux 7.3 adds (``Verification failed:``
with ``Reason:``, ``At:``, ``Suggestion:``). Sources: kernel/bpf/verifier.c and log.c, ``print_verifier_state``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple


class LogInstruction(NamedTuple):
    """An instruction that was refused: its index in the program, and the verifier's text of it, empty if unknown."""

    pc: int
    text: str = ""

    def __str__(self) -> str:
        return f"instruction {self.pc}" + (f": {self.text}" if self.text else "")


class SourceLine(NamedTuple):
    """A line of the source, as the compiler noted it (``clang -g``); file and number where the log has them (6.9)."""

    text: str
    file: str = ""
    line: int = 0

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.file else ""
        return f"{where}: {self.text}" if where and self.text else where or self.text


class LogReport(NamedTuple):
    """The end of a log, read. `registers` maps ``"R0"`` and ``"fp-8"`` to what the verifier knew of them last."""

    reason: str = ""
    suggestion: str = ""
    instruction: LogInstruction | None = None
    source_line: SourceLine | None = None
    registers: dict[str, str] = {}  # noqa: RUF012 - never written to
    #: The kernel ran out of room, and what the verifier said last is missing.
    cut: bool = False


_INSTRUCTION = re.compile(r"(\d+): (\([0-9a-f]{2}\) .*)")
# ``4: R1=ctx() R10=fp0`` or ``from 2 to 4: R1=...`` or, without a number, the states of caller and callee.
_STATE = re.compile(r"(?:(?:from \d+ to )?\d+:|) *((?:frame\d+: ?)?(?:R\d+|fp-\d+)(?:_[a-zA-Z]+)?=.*)")
# A conditional jump's line goes on with the state of where it leads.
_JOINED = re.compile(r" \d+: ((?:frame\d+: ?)?R\d+(?:_[a-zA-Z]+)?=.*)")
# Or with what is wrong of that place, followed by the two states that are the same.
_LOOP = re.compile(r" (infinite loop detected at insn \d+)$")
_LOOP_STATE = re.compile(r"cur state: *(.*)")
_SOURCE = re.compile(r"; (.*?)(?: @ ([^ ]+):(\d+))?$")
_PLACE = re.compile(r"\binsn (\d+)")
_REGISTER = re.compile(r"(R\d+|fp-\d+)(?:_[a-zA-Z]+)?=")
# What may stand between an instruction and the reason, or behind the reason.
_NOISE = re.compile(
    r"processed \d+ insns|verification time|stack depth|mark_precise:|propagating |func#\d+ @|Live regs before insn"
    r"|from \d+ to \d+: safe|\d+: safe|caller:|callee:|returning from callee:|to caller at \d+:|last_idx |parent |regs="
    r"|max_states_per_insn | +\d+: [0-9.]{10} \(|old state:"
)
# These are found when all paths have been followed, and are of no one instruction unless that is a call.
_OF_THE_WHOLE = ("combined stack size", "the call stack of ")
# The report's headings, at the start of a line.
_HEADING = re.compile(r"(Reason|At|Causal path|Suggestion):(.*)")
_REPORTED = re.compile(r"^Verification failed: *(.*)", re.MULTILINE)
_REPORT_CUT = re.compile(r"^Reason:$", re.MULTILINE)
_REPORT_SOURCE = re.compile(r"([^\s:@()]+\.[A-Za-z]+):(\d+)")
_REPORT_CODE = re.compile(r"(?:>+ *)?(\d+) \| *(.*)")


def read_log(log: str) -> LogReport:
    """Read the end of a log; see `LogReport`."""
    reported = _REPORTED.search(log) or _REPORT_CUT.search(log)
    before, report = (log[: reported.start()], log[reported.start() :]) if reported else (log, "")
    found = _read_steps(before, ended="\nprocessed " in "\n" + log)
    return _read_report(report, found) if report else found


def _read_steps(log: str, ended: bool) -> LogReport:
    """The instructions that the verifier followed, until the last."""
    instruction: LogInstruction | None = None
    source: SourceLine | None = None
    last_source: SourceLine | None = None
    registers: dict[str, str] = {}
    said: list[str] = []
    calling = False
    for line in log.splitlines():
        step = _INSTRUCTION.match(line)
        state = None if step else _STATE.fullmatch(line)
        note = _SOURCE.match(line)
        if step:
            if calling:
                for name in ("R1", "R2", "R3", "R4", "R5"):
                    registers.pop(name, None)
            instruction, source, said = LogInstruction(int(step[1]), step[2].strip()), last_source, []
            text = instruction.text
            joined, loop = _JOINED.search(text), _LOOP.search(text)
            if loop:
                said, text = [loop[1]], text[: loop.start()]
            elif joined:
                registers = _known(joined[1], registers)
                text = text[: joined.start()]
            elif " ; " in text:
                text, _, changed = text.partition(" ; ")
                # What comes in is known before the instruction is; only what it changes is new.
                registers |= dict(_states(changed))
            instruction = instruction._replace(text=text.rstrip())
            # A helper that was called leaves nothing in the registers that it took; a callback has its own.
            calling = text.startswith("(85) call") and not joined
        elif state:
            registers, said, calling = _known(state[1], registers), [], False
        elif alike := _LOOP_STATE.match(line):
            registers = _known(alike[1], registers)
        elif note:
            last_source = SourceLine(note[1].strip(), note[2] or "", int(note[3] or 0))
        elif line.strip() and not _NOISE.match(line):
            said.append(line.rstrip())
    cut = not ended and instruction is not None and not (said and log.endswith("\n"))
    reason = "\n".join(said)
    place = _PLACE.search(reason)
    if place and (instruction is None or instruction.pc != int(place[1])):
        instruction, source = LogInstruction(int(place[1])), last_source if instruction is None else None
    elif (reason.startswith(_OF_THE_WHOLE) and not calling) or (not reason and ended):
        instruction, source, registers = None, None, {}
    return LogReport(reason, "", instruction, source, registers, cut)


def _read_report(report: str, found: LogReport) -> LogReport:
    """Linux 7.3's report, which says more than the line before it."""
    title, sections = "", dict[str, list[str]]()
    heading = ""
    for line in report.splitlines():
        start, named = _REPORTED.match(line), _HEADING.match(line)
        if start:
            title = start[1].strip()
        elif named:
            heading = named[1]
            sections[heading] = [named[2].strip()] if named[2].strip() else []
        elif line.startswith("processed "):
            break
        elif line.strip() and heading:
            sections[heading].append(line.strip())
    reason = "\n".join([*([title] if title else []), " ".join(sections.get("Reason", []))]).strip()
    at = sections.get("At", [])
    place = next((match for match in map(_PLACE.search, at) if match), None)
    instruction, source = found.instruction, found.source_line
    if place and (instruction is None or instruction.pc != int(place[1])):
        instruction, source = LogInstruction(int(place[1])), None
    for line in at:
        code, file = _REPORT_CODE.match(line), _REPORT_SOURCE.search(line)
        if code and instruction and line.startswith(">") and not instruction.text and code[2].startswith("("):
            instruction = instruction._replace(text=code[2].strip())
        elif code and source and not line.startswith(">") and int(code[1]) == source.line and not source.text:
            source = source._replace(text=code[2].strip())
        elif file and source is None:
            source = SourceLine("", file[1], int(file[2]))
    suggestion = " ".join(sections.get("Suggestion", []))
    return found._replace(
        reason=reason or found.reason, suggestion=suggestion, instruction=instruction, source_line=source, cut=False
    )


def _known(state: str, before: dict[str, str]) -> dict[str, str]:
    """What is known once a state is printed: in whole, always with the frame pointer, or only as far as it changed."""
    new = dict(_states(state))
    return new if "R10" in new else before | new


def _states(text: str) -> Iterator[tuple[str, str]]:
    """The ``R1=scalar(umax=7,var_off=(0x0; 0x7)) fp-8=mmmm????`` of a state, by name: spaces may be in brackets."""
    at = 0
    while named := _REGISTER.search(text, at):
        end, depth = named.end(), 0
        while end < len(text) and (depth or text[end] != " "):
            depth += (text[end] == "(") - (text[end] == ")")
            end += 1
        yield named[1], text[named.end() : end]
        at = end
