"""bpf_spin_lock and bpf_spin_unlock (Linux 5.1).

One program runs at a time, so there is nobody to wait for: what remains is that a lock is given back, and that no two
are held. User space sees a lock as zeroes.
"""

from __future__ import annotations

from kbpf.emulator.interpreter import HelperFunction, Run
from kbpf.errors import EmulationFault


def spin_lock(run: Run, lock: int, *_: int) -> int:
    run.check_writable(lock, 4)
    if run.lock:
        raise EmulationFault("a program may hold only one lock", address=lock)
    run.lock = lock
    return 0


def spin_unlock(run: Run, lock: int, *_: int) -> int:
    if not run.lock or run.lock != lock:
        raise EmulationFault("this lock is not held", address=lock)
    run.lock = 0
    return 0


HELPERS: dict[str, HelperFunction] = {"spin_lock": spin_lock, "spin_unlock": spin_unlock}
