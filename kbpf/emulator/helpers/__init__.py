"""Helpers by id: which a program may call, and what they do.

`ALLOWED` says what the kernel lets a type of program call, `gpl_only` what it lets only GPL-compatible programs call
(measured on Linux 6.18). `FUNCTIONS` are those that the emulator has; a call of any other is refused when the program
is loaded.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping

from kbpf.emulator.checks import invalid
from kbpf.emulator.helpers import (
    callbacks,
    cgroup,
    checksum,
    choose_sock,
    dynptr,
    hooks,
    locks,
    lwt,
    maps,
    output,
    packet,
    percpu,
    perf,
    redirect,
    redirect_map,
    room,
    route,
    show,
    sk_msg,
    sk_skb,
    skb,
    sock,
    sock_map,
    sockopt,
    storage,
    syncookie,
    sysctl,
    system,
    tcp_options,
    text,
    timer,
    tracing,
    tunnel,
    xdp,
)
from kbpf.emulator.helpers.allowed import ALLOWED as ALLOWED
from kbpf.emulator.helpers.allowed import SLEEPING, allowed, gpl_only
from kbpf.emulator.interpreter import TAIL_CALL_HELPER, HelperFunction
from kbpf.errors import ENOTSUPP
from kbpf.uapi.enums import HELPERS, PROG_TYPES

#: Licences that the kernel takes for compatible (include/linux/license.h).
GPL_COMPATIBLE = frozenset(
    {"GPL", "GPL v2", "GPL and additional rights", "Dual BSD/GPL", "Dual MIT/GPL", "Dual MPL/GPL"}
)
_GET_FUNC_IP = HELPERS["get_func_ip"]
NAMES = {number: name for name, number in HELPERS.items()}
#: By bpftool's name; each takes the run and R1 to R5.
FUNCTIONS: dict[int, HelperFunction] = {
    HELPERS[name]: function
    for table in (
        callbacks.HELPERS,
        cgroup.HELPERS,
        dynptr.HELPERS,
        locks.HELPERS,
        lwt.HELPERS,
        maps.HELPERS,
        output.HELPERS,
        checksum.HELPERS,
        choose_sock.HELPERS,
        packet.HELPERS,
        percpu.HELPERS,
        perf.HELPERS,
        redirect.HELPERS,
        redirect_map.HELPERS,
        room.HELPERS,
        route.HELPERS,
        show.HELPERS,
        skb.HELPERS,
        storage.HELPERS,
        sock.HELPERS,
        sock_map.HELPERS,
        sockopt.HELPERS,
        sysctl.HELPERS,
        syncookie.HELPERS,
        system.HELPERS,
        tcp_options.HELPERS,
        text.HELPERS,
        timer.HELPERS,
        tracing.HELPERS,
        tunnel.HELPERS,
    )
    for name, function in table.items()
}
_HOOKS = {HELPERS[name]: function for name, function in hooks.HELPERS.items()}
#: Where a type's programs reach another function under the same number.
_OF_TYPE: dict[str, dict[int, HelperFunction]] = {
    "xdp": {HELPERS[name]: function for name, function in xdp.HELPERS.items()},
    "sk_msg": {HELPERS[name]: function for name, function in sk_msg.HELPERS.items()},
    "sk_skb": {HELPERS[name]: function for name, function in sk_skb.HELPERS.items()},
    "sk_lookup": {HELPERS[name]: function for name, function in choose_sock.LOOKUP.items()},
    **dict.fromkeys(("cgroup_device", "cgroup_sock_addr", "cgroup_sockopt", "cgroup_sysctl", "sock_ops"), _HOOKS),
    "cgroup_sock": _HOOKS | {HELPERS[name]: function for name, function in hooks.CGROUP_SOCK.items()},
    "sk_reuseport": {HELPERS[name]: function for name, function in hooks.REUSEPORT.items()},
    "flow_dissector": {HELPERS["skb_load_bytes"]: packet.flow_load_bytes},
    **{type: {HELPERS[name]: function for name, function in own.items()} for type, own in tracing.OF_TYPE.items()},
}


def functions(program_type: str) -> Mapping[int, HelperFunction]:
    """What programs of a type reach, by number."""
    return FUNCTIONS | _OF_TYPE.get(program_type, {})


def check(helper: int, program_type: str, attach_type: int, gpl: bool, sleepable: bool) -> None:
    """Raise `LoadRefused` if such a program may not call the helper, or the emulator does not have it."""
    if helper and helper not in NAMES:
        raise invalid(f"invalid func unknown#{helper}")
    name = f"bpf_{NAMES.get(helper, 'unspec')}#{helper}"
    if helper not in allowed(program_type, attach_type):
        raise invalid(f"program of this type cannot use helper {name}")
    if not gpl and helper in gpl_only(program_type):
        raise invalid("cannot call GPL-restricted function from non-GPL compatible program")
    if helper == _GET_FUNC_IP and program_type != "kprobe":
        raise invalid(f"func {name} not supported for program type {PROG_TYPES[program_type]}", ENOTSUPP)
    if helper in SLEEPING and not sleepable:
        raise invalid(f"helper call might sleep in a program that may not: {name}")
    if helper not in functions(program_type) and helper != TAIL_CALL_HELPER:
        raise invalid(f"the emulator does not have the helper {name} yet", errno.EOPNOTSUPP)
