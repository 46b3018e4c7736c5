"""bpf_perf_event_read (Linux 4.3) and bpf_perf_event_read_value (4.15): what a counter of a perf event array says."""

from __future__ import annotations

import errno
import struct

from kbpf.emulator.helpers.maps import map_at
from kbpf.emulator.interpreter import HelperFunction, Run
from kbpf.emulator.maps.perf import PerfEventArray
from kbpf.emulator.memory import M32, M64
from kbpf.errors import EmulationFault

#: struct bpf_perf_event_value
_VALUE = struct.Struct("=QQQ")


def _array(run: Run, map: int) -> PerfEventArray:
    found = map_at(run, map)
    if not isinstance(found, PerfEventArray):
        raise EmulationFault(f"a {found.type} map has no counters", address=map)
    return found


def perf_event_read(run: Run, map: int, flags: int, *_: int) -> int:
    """The counter itself: values near the top cannot be told from errors, in Linux too."""
    try:
        return _array(run, map).counted(flags).counter
    except OSError as error:
        return -(error.errno or 0)


def perf_event_read_value(run: Run, map: int, flags: int, to: int, size: int, _: int) -> int:
    """Where it fails, the memory is zeroes."""
    array, size = _array(run, map), size & M32
    run.check_writable(to, size)
    try:
        reading = None if size != _VALUE.size else array.counted(flags)
    except OSError as error:
        run.write(to, bytes(size))
        return -(error.errno or 0)
    run.write(to, bytes(size) if reading is None else _VALUE.pack(*(word & M64 for word in reading)))
    return -errno.EINVAL if reading is None else 0


HELPERS: dict[str, HelperFunction] = {
    "perf_event_read": perf_event_read,
    "perf_event_read_value": perf_event_read_value,
}
