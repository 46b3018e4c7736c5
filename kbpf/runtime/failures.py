"""The one translation of failure: an `OSError` of a backend becomes an error of kbpf's."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kbpf.backend import Backend, FeatureKind, LacksFeature, LoadRefused
from kbpf.errors import (
    ENOTSUPP,
    BpfError,
    KbpfError,
    NotSupportedError,
    PermissionDeniedError,
    VerifierError,
    errno_text,
)

#: How a kernel refuses what it does not know.
_UNKNOWN = (errno.EINVAL, errno.E2BIG)
_NOT_SUPPORTED = (errno.EOPNOTSUPP, ENOTSUPP, errno.ENOSYS, errno.ENOPROTOOPT)


@contextmanager
def doing(
    backend: Backend,
    what: str,
    *,
    operation: str,
    program_type: str = "",
    map_type: str = "",
    attach_type: str = "",
    socket: Any = None,
    hints: tuple[str, ...] = (),
) -> Iterator[None]:
    """Run a backend's method, translating what it raises.

    `what` is the attempt in a user's words (``load program "count" (socket_filter)``), `operation`
    the bpf(2) command or socket option, and `socket` the socket, for the explanation of a refusal. Types are those
    that the command is about: where this kernel does not have one, the error says so.
    """
    try:
        yield
    except KbpfError:
        raise
    except OSError as error:
        raise translate(
            error,
            backend,
            what,
            operation=operation,
            program_type=program_type,
            map_type=map_type,
            attach_type=attach_type,
            socket=socket,
            hints=hints,
        ) from None


def translate(
    error: OSError,
    backend: Backend,
    what: str,
    *,
    operation: str,
    program_type: str = "",
    map_type: str = "",
    attach_type: str = "",
    socket: Any = None,
    hints: tuple[str, ...] = (),
) -> BpfError:
    """The exception for an errno; see `doing`."""
    number = error.errno or 0
    log = error.log if isinstance(error, LoadRefused) else ""
    if number in (errno.EPERM, errno.EACCES, errno.ENOSYS) and (not log or _says_nothing(log)):
        reasons = backend.explain_denied(
            operation,
            number,
            program_type=program_type,
            map_type=map_type,
            socket=socket,
            path=os.fsdecode(error.filename or ""),
        )
        kind = NotSupportedError if number == errno.ENOSYS else PermissionDeniedError
        return kind(number, what, (*reasons, *hints))
    if isinstance(error, LacksFeature):
        return NotSupportedError(number, what, (error.strerror or "", *hints))
    if number in _UNKNOWN and not log:
        missing = _missing(backend, operation, program_type, map_type, attach_type)
        if missing:
            return NotSupportedError(number, what, (missing, *hints))
    if isinstance(error, LoadRefused):
        return VerifierError(number, what, log, (*error.hints, *hints))
    # A backend that knows more than the errno says it in words of its own.
    if error.strerror and error.strerror not in (errno_text(number), os.strerror(number)):
        hints = (error.strerror, *hints)
    if error.filename is not None:
        hints = (os.fsdecode(error.filename), *hints)
    if number in _NOT_SUPPORTED:
        return NotSupportedError(number, what, hints)
    return BpfError(number, what, hints)


def _missing(backend: Backend, operation: str, program_type: str, map_type: str, attach_type: str) -> str:
    """What there is not, of what a command was about; nothing where it is there, or nobody knows."""
    asked: dict[str, tuple[FeatureKind, str]] = {
        "map_create": ("map_type", map_type),
        "prog_load": ("program_type", program_type),
        "link_create": ("attach_type", attach_type),
        "prog_query": ("attach_type", attach_type),
    }
    kind, name = asked.get(operation, ("map_type", ""))
    if not name:
        return ""
    try:
        answer = backend.feature(kind, name)
    except ValueError:
        return ""  # No Linux has it, and what refused says so.
    since = f"; Linux has it since {answer.since}" if answer.since else ""
    return f"there is no {kind.replace('_', ' ')} {name} here{since}" if answer.answer == "no" else ""


def _says_nothing(log: str) -> bool:
    """The verifier's log has only its numbers: something else refused than what it looks at."""
    from kbpf.verifier_log import read_log

    found = read_log(log)
    return not found.reason and not found.cut
