"""The one family of errors.

Every exception that kbpf raises on purpose is a `KbpfError`, and also the builtin
that a Python programmer would catch: `OSError` for what the kernel (or the
emulator in its place) refused, `ValueError` for text, bytes and objects that are
wrong in themselves. A missing map key is a plain `KeyError`.
"""

from __future__ import annotations

import errno as _errno
import os
from collections.abc import Sequence

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

    ``str()`` is short: what was loaded and the verifier's last words. `log` is everything it said.
    """

    def __init__(self, errno: int, doing: str, log: str = "", hints: Sequence[str] = ()) -> None:
        super().__init__(errno, doing, hints)
        self.log = log

    def __str__(self) -> str:
        said = [
            line for line in self.log.splitlines() if line and not line.startswith(("processed ", "verification time"))
        ]
        head = super().__str__()
        return head if not said else "\n  ".join([head, *said[-3:]])

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
