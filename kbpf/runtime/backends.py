"""Which backend carries things out.

``KBPF_BACKEND=auto|kernel|emulator`` in the environment, `use_backend`, and a ``backend=``
argument, the nearer one winning. ``auto`` probes what this process may do; it never tries and
falls back, so that root refused by lockdown gets an error and not an emulator.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Literal

from kbpf.errors import EmulationWarning

if TYPE_CHECKING:
    from kbpf.backend import Backend, BackendName

Choice = Literal["auto", "kernel", "emulator"]
_CHOICES = ("auto", "kernel", "emulator")

_chosen: ContextVar[Choice | None] = ContextVar("kbpf_backend", default=None)
_announced = False


def chosen() -> Choice:
    """What is in force here: `use_backend`, else ``KBPF_BACKEND``, else ``auto``.

    Raises `ValueError` for another word.
    """
    return _chosen.get() or _checked(os.environ.get("KBPF_BACKEND") or "auto", "KBPF_BACKEND")


def use_backend(name: Choice) -> AbstractContextManager[None]:
    """Choose the backend from here on, in this thread or task.

    Called, it holds until the next call; as a context manager it restores the earlier choice on leaving. Objects
    that exist already stay where they are. Raises `ValueError` for another name.
    """
    token = _chosen.set(_checked(name, "use_backend"))

    @contextmanager
    def restore() -> Iterator[None]:
        try:
            yield
        finally:
            _chosen.reset(token)

    return restore()


def get_backend(name: BackendName) -> Backend:
    """The one instance of a backend."""
    if name == "kernel":
        from kbpf.kernel.backend import kernel_backend

        return kernel_backend()
    from kbpf.emulator.backend import emulator_backend

    return emulator_backend()


def select(backend: str | None, *, program_type: str | None = None) -> Backend:
    """The backend for a new Program, Map or Collection.

    `backend` is the caller's argument. ``auto`` takes the kernel where this process may load
    `program_type` (or create maps, where that is None), and otherwise the emulator, with an `EmulationWarning` once.
    """
    choice = chosen() if backend is None else _checked(backend, "backend")
    if choice != "auto":
        return get_backend(choice)
    from kbpf.kernel.probes import may_use_bpf

    if may_use_bpf(program_type):
        return get_backend("kernel")
    _announce()
    return get_backend("emulator")


def select_for_socket(backend: str | None) -> Backend:
    """The backend for a filter on a socket of the operating system: real unless the emulator was asked for by name."""
    choice = chosen() if backend is None else _checked(backend, "backend")
    return get_backend("emulator" if choice == "emulator" else "kernel")


def _announce() -> None:
    global _announced
    if not _announced:
        _announced = True
        warnings.warn(
            "this process may not use the kernel's BPF: programs run in the emulator, unverified "
            "(KBPF_BACKEND=emulator says so on purpose; `kbpf doctor` says what is missing)",
            EmulationWarning,
            stacklevel=_depth_of_caller(),
        )


def _depth_of_caller() -> int:
    """How many frames above `_announce` the caller's code is: the first that is not kbpf's."""
    depth, frame = 2, sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "kbpf":
        depth, frame = depth + 1, frame.f_back
    return depth


def _checked(name: str, where: str) -> Choice:
    if name not in _CHOICES:
        raise ValueError(f"{where}: {name!r} is none of {', '.join(_CHOICES)}")
    return name  # type: ignore[return-value]
