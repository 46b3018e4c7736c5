"""One thread at a time changes how maps are built: programs and commands of several threads meet in the same maps.

The interpreter may turn to another thread between any two steps, where Linux takes a bucket's lock. There is one lock
for all maps, as the interpreter runs one thread at a time anyway. A fork waits for it, so that a child finds maps
whole and the lock free.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")

_LOCK = threading.RLock()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release)


def in_turn(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """A method that no other of these runs beside, in another thread."""

    @wraps(method)
    def alone(*args: _P.args, **named: _P.kwargs) -> _R:
        with _LOCK:
            return method(*args, **named)

    return alone
