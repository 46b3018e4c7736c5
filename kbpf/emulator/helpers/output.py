"""Helpers that hand data to user space: ring buffers (Linux 5.8) and perf event arrays (4.4)."""

from __future__ import annotations

import errno

from kbpf.emulator.context import SkBuff
from kbpf.emulator.helpers.maps import map_at
from kbpf.emulator.interpreter import HelperFunction, Run
from kbpf.emulator.maps.perf import PerfEventArray
from kbpf.emulator.maps.ringbuf import Record, RingBuffer
from kbpf.emulator.memory import CONTEXT
from kbpf.emulator.xdp import XdpBuff
from kbpf.errors import EmulationFault
from kbpf.uapi import constants as uapi

_PERF_FLAGS = uapi.BPF_F_INDEX_MASK | uapi.BPF_F_CTXLEN_MASK


def ring_at(run: Run, address: int) -> RingBuffer:
    found = map_at(run, address)
    if not isinstance(found, RingBuffer):
        raise EmulationFault(f"a {found.type} map is no ring buffer")
    return found


def ringbuf_output(run: Run, ring: int, data: int, size: int, flags: int, _: int) -> int:
    found = ring_at(run, ring)
    try:
        found.output(run.read(data, size), flags)
    except OSError as error:
        return -(error.errno or 0)
    return 0


def ringbuf_reserve(run: Run, ring: int, size: int, flags: int, *_: int) -> int:
    found = ring_at(run, ring)
    record = None if flags else found.reserve(size)
    if record is None:
        return 0
    run.held = (*run.held, record)
    return record.region.address


def ringbuf_submit(run: Run, address: int, flags: int, *_: int) -> int:
    return commit_record(run, address, False, flags)


def ringbuf_discard(run: Run, address: int, flags: int, *_: int) -> int:
    return commit_record(run, address, True, flags)


def commit_record(run: Run, address: int, discard: bool, flags: int) -> int:
    """Submit or discard the record that a program has at an address."""
    record = run.owner(address)
    if not isinstance(record, Record):
        raise EmulationFault("this is no reserved record", address=address)
    record.ring.commit(record, discard, flags)
    run.held = tuple(held for held in run.held if held is not record)
    run.forget(record.region)
    return 0


def ringbuf_query(run: Run, ring: int, what: int, *_: int) -> int:
    return ring_at(run, ring).query(what)


def _packet(run: Run, length: int) -> bytes:
    """The first bytes of the packet, in whatever pieces it lies."""
    frame = run.context
    return frame.read(0, length) if isinstance(frame, XdpBuff) else bytes(run.packet.data[:length])


def perf_event_output(run: Run, context: int, map: int, flags: int, data: int, size: int) -> int:
    """The bits of BPF_F_CTXLEN_MASK say how many bytes of the packet follow the data, in programs that have one."""
    found = map_at(run, map)
    if context != CONTEXT << 32 or not isinstance(found, PerfEventArray):
        raise EmulationFault("bpf_perf_event_output takes the context and a perf event array")
    if flags & ~(_PERF_FLAGS if isinstance(run.context, (SkBuff, XdpBuff)) else uapi.BPF_F_INDEX_MASK):
        return -errno.EINVAL
    length = (flags & uapi.BPF_F_CTXLEN_MASK) >> 32
    packet = _packet(run, length) if length else b""
    if len(packet) < length:
        return -errno.EFAULT
    try:
        found.output(flags, run.read(data, size) + packet)
    except OSError as error:
        return -(error.errno or 0)
    return 0


HELPERS: dict[str, HelperFunction] = {
    "ringbuf_output": ringbuf_output,
    "ringbuf_reserve": ringbuf_reserve,
    "ringbuf_submit": ringbuf_submit,
    "ringbuf_discard": ringbuf_discard,
    "ringbuf_query": ringbuf_query,
    "perf_event_output": perf_event_output,
}
