"""bpf_redirect_map: redirect an XDP packet to what a map has at an index (Linux 4.14)."""

from __future__ import annotations

from kbpf.emulator.helpers.maps import map_at
from kbpf.emulator.interpreter import HelperFunction, Run
from kbpf.emulator.maps.redirect import RedirectMap
from kbpf.emulator.memory import M32, M64
from kbpf.emulator.xdp import XdpBuff
from kbpf.errors import EmulationFault
from kbpf.uapi.constants import BPF_F_BROADCAST

_ABORTED, _REDIRECT = 0, 4
#: The low bits of the flags: the action where there is no target.
_ACTIONS = 3


def redirect_map(run: Run, map: int, index: int, flags: int, *_: int) -> int:
    """Where to is kept in the context, as `redirected_by`."""
    found, buff = map_at(run, map), run.context
    if not isinstance(found, RedirectMap) or not isinstance(buff, XdpBuff):
        raise EmulationFault(f"an XDP packet cannot be redirected by a {found.type} map")
    if flags & M64 & ~(_ACTIONS | found.redirect_flags):
        return _ABORTED
    if not flags & BPF_F_BROADCAST and found.target(index & M32) is None:
        buff.redirect = buff.redirected_by = None
        return flags & _ACTIONS
    buff.redirect, buff.redirected_by = None, (found, index & M32, flags)
    return _REDIRECT


HELPERS: dict[str, HelperFunction] = {"redirect_map": redirect_map}
