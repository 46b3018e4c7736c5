"""Helpers by id: which a program may call, and what they do.

`ALLOWED` says what the kernel lets a type of program call, `GPL_ONLY` what it lets only GPL-compatible programs call
(measured on Linux 6.18). `FUNCTIONS` are those that the emulator has; a call of any other is refused when the program
is loaded.
"""

from __future__ import annotations

import errno

from kbpf.emulator.checks import invalid
from kbpf.emulator.helpers import callbacks, locks, maps, output, packet, system
from kbpf.emulator.interpreter import TAIL_CALL_HELPER, HelperFunction
from kbpf.uapi.enums import HELPERS


def _ids(text: str) -> frozenset[int]:
    """The numbers of ``"1-3,5"``."""
    ranges = (part.partition("-") for part in text.split(","))
    return frozenset(n for first, _, last in ranges for n in range(int(first), int(last or first) + 1))


ALLOWED: dict[str, frozenset[int]] = {
    "socket_filter": _ids(
        "1-3,5-8,12,14-17,22,25,26,35,37,42,46,47,55,68,80,87-89,93,94,105,106,109,112-115,117,118,120,122,123,125,"
        "130-134,136-141,148,149,153,154,156-158,160,164,165,169-172,175-178,180-182,191,194-203,208-211"
    ),
}
GPL_ONLY = _ids("6,22,25,35,55,112-115,158,165,169-172,175-177,191")
#: Licences that the kernel takes for compatible (include/linux/license.h).
GPL_COMPATIBLE = frozenset(
    {"GPL", "GPL v2", "GPL and additional rights", "Dual BSD/GPL", "Dual MIT/GPL", "Dual MPL/GPL"}
)
NAMES = {number: name for name, number in HELPERS.items()}
#: By bpftool's name; each takes the run and R1 to R5.
FUNCTIONS: dict[int, HelperFunction] = {
    HELPERS[name]: function
    for table in (callbacks.HELPERS, locks.HELPERS, maps.HELPERS, output.HELPERS, packet.HELPERS, system.HELPERS)
    for name, function in table.items()
}


def check(helper: int, program_type: str, gpl: bool) -> None:
    """Raise `LoadRefused` if such a program may not call the helper, or the emulator does not have it."""
    if helper <= 0 or helper not in NAMES:
        raise invalid(f"invalid func unknown#{helper}")
    name = f"bpf_{NAMES[helper]}#{helper}"
    if helper not in ALLOWED[program_type]:
        raise invalid(f"program of this type cannot use helper {name}")
    if helper in GPL_ONLY and not gpl:
        raise invalid("cannot call GPL-restricted function from non-GPL compatible program")
    if helper not in FUNCTIONS and helper != TAIL_CALL_HELPER:
        raise invalid(f"the emulator does not have the helper {name} yet", errno.EOPNOTSUPP)
