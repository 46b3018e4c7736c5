"""The one family of errors.

Every exception that kbpf raises on purpose is a `KbpfError`, and also the builtin
that a Python programmer would catch: `OSError` for what the kernel (or the
emulator in its place) refused, `ValueError` for text, bytes and objects that are
wrong in themselves. A missing map key is a plain `KeyError`.
"""

from __future__ import annotations

import errno as _errno
import os
import re as _re
from collections.abc import Sequence
from functools import cached_property

TYPE_CHECKING = False  # What type checkers take for true; importing it from typing costs more than all the rest.
if TYPE_CHECKING:
    from kbpf.verifier_log import LogInstruction, LogReport, SourceLine

#: The kernel-internal ENOTSUPP, which escapes to user space from bpf(2) and has no name in `errno`.
ENOTSUPP = 524


def errno_name(number: int) -> str:
    """The symbolic name of an errno: ``"EPERM"``, ``"ENOTSUPP"`` for 524, else the number."""
    if number == ENOTSUPP:
        return "ENOTSUPP"
    if number == _errno.EOPNOTSUPP:
        return "EOPNOTSUPP"  # What Linux means, where Python prefers ENOTSUP, the same number.
    return _errno.errorcode.get(number, str(number))


def errno_text(number: int) -> str:
    """What the C library says about an errno, with a text for 524 which it does not know."""
    if number == ENOTSUPP:
        return "Operation is not supported"
    return os.strerror(number)


class KbpfError(Exception):
    """Base of all that kbpf raises on purpose."""


class EmulationWarning(UserWarning):
    """Given once when ``auto`` chose the emulator because this process may not use the kernel's BPF."""


class BpfError(KbpfError, OSError):
    """The backend refused an operation.

    `doing` says what was attempted and on what, `hints` say why and what to do.
    `errno` is the kernel's; the emulator gives the same one.
    """

    def __init__(self, errno: int, doing: str, hints: Sequence[str] = ()) -> None:
        super().__init__(errno, errno_text(errno))
        self.doing = doing
        self.hints = tuple(hints)

    def __str__(self) -> str:
        number = self.errno or 0
        lines = [f"{self.doing}: {errno_name(number)} ({errno_text(number)})"]
        return "\n  ".join([*lines, *self.hints])

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.errno, self.doing, self.hints), self.__dict__)


class PermissionDeniedError(BpfError, PermissionError):
    """EPERM or EACCES, with the actual reason (capability, sysctl, lockdown, lock, seccomp)."""


class NotSupportedError(BpfError):
    """The kernel does not know this operation here (EOPNOTSUPP, ENOTSUPP, ENOSYS)."""


class MapFullError(BpfError):
    """The map has no room for another element (E2BIG; ENOSPC from an LPM trie)."""


class VerifierError(BpfError):
    """A program was refused when it was loaded.

    ``str()`` is short, twelve lines at most: what was loaded, the verifier's reason, the instruction with its source
    line, and the registers that it is about, as they were last. `log` is everything that the verifier said; of more
    than 16 MiB, the last. What it does not say is None or empty.
    """

    def __init__(self, errno: int, doing: str, log: str = "", hints: Sequence[str] = ()) -> None:
        super().__init__(errno, doing, hints)
        self.log = log

    @cached_property
    def _report(self) -> LogReport:
        from kbpf.verifier_log import read_log

        return read_log(self.log)

    @property
    def reason(self) -> str:
        """Why, in the verifier's words: a line or more."""
        return self._report.reason

    @property
    def suggestion(self) -> str:
        """What to do about it, from kernels that say so (Linux 7.3)."""
        return self._report.suggestion

    @property
    def instruction(self) -> LogInstruction | None:
        """The instruction that was refused: its index ``pc``, and the verifier's ``text`` of it."""
        return self._report.instruction

    @property
    def source_line(self) -> SourceLine | None:
        """The line of the source that it was compiled from (``clang -g``): ``text``, ``file``, ``line``."""
        return self._report.source_line

    @property
    def registers(self) -> dict[str, str]:
        """What the verifier knew last, by ``"R0"`` or, for the stack, ``"fp-8"``: ``"scalar(umax=255)"``."""
        return dict(self._report.registers)

    def locate(self, instruction: LogInstruction | None, source_line: SourceLine | None) -> None:
        """Add what the log does not say, by who knows the program."""
        found = self._report
        if found.instruction is None or not found.instruction.text:
            found = found._replace(instruction=instruction or found.instruction)
        # Before Linux 6.10 the log has no file and number.
        told = found.source_line if found.source_line and found.source_line.file else source_line or found.source_line
        self._report = found._replace(source_line=told)

    def __str__(self) -> str:
        found = self._report
        first, *hints = super().__str__().splitlines()
        lines = found.reason.splitlines()[:3]
        if found.cut:
            lines.append("the log is cut at its end, where the reason would be; the last that it shows:")
        if found.instruction:
            lines.append(f"at {found.instruction}")
        if found.source_line:
            lines.append(str(found.source_line))
        if found.suggestion:
            hints.insert(0, found.suggestion)
        # The registers that the instruction and the reason speak of tell the most; without any, all that are known.
        spoken = found.reason + (found.instruction.text if found.instruction else "")
        named = {"R" + number for number in _re.findall(r"\b[rRw](\d+)", spoken)}
        known = [(name, f"{name}={state}") for name, state in found.registers.items()]
        known.sort(key=lambda state: state[0].startswith("fp"))
        told = [text for name, text in known if name in named] or [text for name, text in known if text != "R10=fp0"]
        room = max(11 - len(lines) - len(hints), 0)
        shown = [first, *("  " + line.strip() for line in [*lines, *told[: min(room, 4)], *hints])]
        return "\n".join(line if len(line) <= 200 else line[:197] + "..." for line in shown[:12])

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.errno, self.doing, self.log, self.hints), self.__dict__)


class FilterError(KbpfError, ValueError):
    """A filter is wrong: it cannot be answered on this link or socket, or its instructions are invalid."""


class FilterSyntaxError(FilterError):
    """An expression does not parse.

    `expression` is the text, `position` the 0-based offset of the offending token in it,
    `message` what was expected. ``str()`` adds the line and a caret below the token.
    """

    def __init__(self, message: str, expression: str, position: int) -> None:
        super().__init__(message, expression, position)
        self.message = message
        self.expression = expression
        self.position = position

    def __str__(self) -> str:
        # Long or multi-line text is shown as one window around the token.
        start = max(0, self.position - 60)
        window = "".join(c if c.isprintable() else " " for c in self.expression[start : self.position + 40])
        return f"{self.message}\n  {window}\n  {' ' * (self.position - start)}^"


class ObjectError(KbpfError, ValueError):
    """An object file is not what it should be; the message names the section and the symbol."""


class EmulationFault(KbpfError, RuntimeError):
    """A program did in the emulator what the kernel's verifier would never have let it do.

    `pc` is the index of the instruction, `address` the emulated address where one was involved.
    """

    def __init__(self, message: str, pc: int = -1, address: int | None = None) -> None:
        super().__init__(message, pc, address)
        self.message = message
        self.pc = pc
        self.address = address

    def __str__(self) -> str:
        where = f" at instruction {self.pc}" if self.pc >= 0 else ""
        target = f" (address {self.address:#x})" if self.address is not None else ""
        return f"{self.message}{where}{target}"


class MissingDependencyError(KbpfError, ImportError):
    """An optional part is not installed; the message names the command that installs it."""
