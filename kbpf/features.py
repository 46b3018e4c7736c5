"""What this kernel, or the emulator, has: map types, program types, helpers, attach types, link types.

    >>> import kbpf
    >>> kbpf.features.map_type("hash", backend="emulator").answer
    'yes'

Each answer is ``yes``, ``no``, ``not permitted`` or ``inconclusive``, with a reason, and is true only for a yes. Names
are bpftool's, those of `kbpf.uapi.enums`; another name is a `ValueError`. Asking makes the smallest map or program that
tells and lets it go. What is known for certain (yes and no) is asked once in a process, and again where the process's
capabilities, user namespace or seccomp filters have changed.
"""

from __future__ import annotations

from kbpf.backend import Answer, FeatureKind
from kbpf.runtime.backends import chosen, get_backend
from kbpf.uapi import enums

__all__ = ["Answer", "attach_type", "helper", "link_type", "map_type", "program_type", "survey"]

_NAMES = {
    "map_type": enums.MAP_TYPES,
    "program_type": enums.PROG_TYPES,
    "helper": enums.HELPERS,
    "attach_type": enums.ATTACH_TYPES,
    "link_type": enums.LINK_TYPES,
}
_known: dict[tuple[object, ...], Answer] = {}


def map_type(name: str, backend: str | None = None) -> Answer:
    """Whether maps of this type can be made: ``map_type("ringbuf")``.

    `backend` is ``kernel`` or ``emulator``; by default the one that was chosen, and the kernel where that is ``auto``.
    """
    return _ask("map_type", name, backend)


def program_type(name: str, backend: str | None = None) -> Answer:
    """Whether programs of this type can be loaded: ``program_type("xdp")``."""
    return _ask("program_type", name, backend)


def helper(program_type: str, name: str, backend: str | None = None) -> Answer:
    """Whether programs of a type may call a helper, which goes without its ``bpf_``: ``helper("xdp", "redirect_map")``.

    Asked for a program with a GPL-compatible licence. For types whose programs attach to a function of the kernel
    (tracing, lsm, ext, struct_ops) it depends on which, and the answer is inconclusive.
    """
    _check("program_type", program_type)
    return _ask("helper", name.removeprefix("bpf_"), backend, program_type)


def attach_type(name: str, backend: str | None = None) -> Answer:
    """Whether programs can be attached there: ``attach_type("tcx_ingress")``."""
    return _ask("attach_type", name, backend)


def link_type(name: str, backend: str | None = None) -> Answer:
    """Whether there are links of this type: ``link_type("tcx")``."""
    return _ask("link_type", name, backend)


def survey(backend: str | None = None) -> dict[str, dict[str, Answer]]:
    """All answers but those about helpers: by kind (``"map_type"``, ...), then by name."""
    kinds: tuple[FeatureKind, ...] = ("program_type", "map_type", "attach_type", "link_type")
    return {kind: {name: _ask(kind, name, backend) for name in _NAMES[kind] if name != "unspec"} for kind in kinds}


def _check(kind: FeatureKind, name: str) -> None:
    if name not in _NAMES[kind] or name == "unspec":
        raise ValueError(f"no {kind.replace('_', ' ')} is called {name!r}")


def _ask(kind: FeatureKind, name: str, backend: str | None, program_type: str = "") -> Answer:
    _check(kind, name)
    choice = backend or chosen()
    if choice == "emulator":
        return get_backend("emulator").feature(kind, name, program_type)
    if choice not in ("auto", "kernel"):
        raise ValueError(f"backend: {choice!r} is neither kernel nor emulator")
    from kbpf.kernel.probes import asker

    key = (asker(), kind, name, program_type)
    if key in _known:
        return _known[key]
    answer = get_backend("kernel").feature(kind, name, program_type)
    if answer.answer in ("yes", "no"):
        _known[key] = answer
    return answer
