"""Helpers that call back into the program: bpf_for_each_map_elem (Linux 5.13) and bpf_loop (5.17)."""

from __future__ import annotations

import errno

from kbpf.emulator.helpers.maps import map_at
from kbpf.emulator.interpreter import HelperFunction, Run
from kbpf.emulator.maps.array import Array
from kbpf.emulator.maps.hash import Hash
from kbpf.emulator.maps.of_maps import HashOfMaps
from kbpf.emulator.memory import M32, Region
from kbpf.errors import EmulationFault

#: BPF_MAX_LOOPS
_MOST_LOOPS = 8 << 20


def loop(run: Run, count: int, callback: int, context: int, flags: int, _: int) -> int:
    """Call ``callback(index, context)`` until it returns other than 0; gives the number of calls."""
    count &= M32
    if flags:
        return -errno.EINVAL
    if count > _MOST_LOOPS:
        # 32 bits of it: the verifier makes instructions of the call, where it knows the flags to be 0.
        return -errno.E2BIG & M32
    for index in range(count):
        if run.call(callback, index, context, 0, 0, 0):
            return index + 1
    return count


def for_each_map_elem(run: Run, map: int, callback: int, context: int, flags: int, _: int) -> int:
    """Call ``callback(map, key, value, context)`` until it returns other than 0; gives the number of calls.

    The elements are those at the start; the callback may delete the one it is called for.
    """
    found = map_at(run, map)
    if not isinstance(found, (Array, Hash)) or isinstance(found, HashOfMaps):
        raise EmulationFault(f"a {found.type} map has no elements to go through")
    if flags:
        return -errno.EINVAL
    key = bytearray(found.key_size)
    region = Region(key, writable=False)
    calls = 0
    for key[:] in found.all_keys():
        value = found.place(bytes(key))
        if value:
            calls += 1
            if run.call(callback, map, region.address, value, context, 0):
                break
    return calls


HELPERS: dict[str, HelperFunction] = {"loop": loop, "for_each_map_elem": for_each_map_elem}
