"""Dynamic pointers (Linux 5.19): memory whose bounds are known when the program runs; and what hands them out.

A dynptr is 16 bytes that programs do not look into: an address, a size, an offset. An address of 0 is the null dynptr,
which all helpers refuse.
"""

from __future__ import annotations

import errno
import struct

from kbpf.emulator.helpers.maps import map_at
from kbpf.emulator.helpers.output import commit_record, ring_at
from kbpf.emulator.interpreter import HelperFunction, Run
from kbpf.emulator.maps.ringbuf import UserRingBuffer
from kbpf.emulator.memory import M32, Region
from kbpf.errors import EmulationFault
from kbpf.uapi import constants as uapi

_DYNPTR = struct.Struct("=QII")
#: DYNPTR_MAX_SIZE: the upper bits of the size are flags in Linux.
_LONGEST = (1 << 24) - 1
#: BPF_MAX_USER_RINGBUF_SAMPLES
_MOST_SAMPLES = 128 << 10
_WAKEUPS = uapi.BPF_RB_NO_WAKEUP | uapi.BPF_RB_FORCE_WAKEUP


def _set(run: Run, pointer: int, address: int = 0, size: int = 0) -> None:
    run.write(pointer, _DYNPTR.pack(address, size, 0))


def _get(run: Run, pointer: int) -> tuple[int, int]:
    """Address and size of what a dynptr points to; address 0 for a null dynptr."""
    address, size, offset = _DYNPTR.unpack(run.read(pointer, _DYNPTR.size))
    return address and address + offset, size


def _outside(size: int, offset: int, length: int) -> bool:
    return length > size or offset > size - length


def dynptr_from_mem(run: Run, data: int, size: int, flags: int, pointer: int, _: int) -> int:
    failed = -errno.E2BIG if size > _LONGEST else -errno.EINVAL if flags else 0
    if failed:
        _set(run, pointer)
    else:
        run.check_writable(data, size)
        _set(run, pointer, data, size)
    return failed


def ringbuf_reserve_dynptr(run: Run, ring: int, size: int, flags: int, pointer: int, _: int) -> int:
    found, size = ring_at(run, ring), size & M32
    _set(run, pointer)
    if flags:
        return -errno.EINVAL
    if size > _LONGEST:
        return -errno.E2BIG
    record = found.reserve(size)
    if record is None:
        return -errno.EINVAL
    run.held = (*run.held, record)
    _set(run, pointer, record.region.address, size)
    return 0


def _commit(run: Run, pointer: int, discard: bool, flags: int) -> int:
    address, _ = _get(run, pointer)
    if address:
        commit_record(run, address, discard, flags)
        _set(run, pointer)
    return 0


def ringbuf_submit_dynptr(run: Run, pointer: int, flags: int, *_: int) -> int:
    return _commit(run, pointer, False, flags)


def ringbuf_discard_dynptr(run: Run, pointer: int, flags: int, *_: int) -> int:
    return _commit(run, pointer, True, flags)


def dynptr_read(run: Run, to: int, length: int, pointer: int, offset: int, flags: int) -> int:
    address, size = _get(run, pointer)
    if not address or flags:
        return -errno.EINVAL
    if _outside(size, offset, length):
        return -errno.E2BIG
    run.write(to, run.read(address + offset, length))
    return 0


def dynptr_write(run: Run, pointer: int, offset: int, start: int, length: int, flags: int) -> int:
    address, size = _get(run, pointer)
    if not address:
        return -errno.EINVAL
    if _outside(size, offset, length):
        return -errno.E2BIG
    if flags:
        return -errno.EINVAL
    run.write(address + offset, run.read(start, length))
    return 0


def dynptr_data(run: Run, pointer: int, offset: int, length: int, *_: int) -> int:
    address, size = _get(run, pointer)
    return 0 if not address or _outside(size, offset, length) else address + offset


def user_ringbuf_drain(run: Run, ring: int, callback: int, context: int, flags: int, _: int) -> int:
    """Call ``callback(dynptr, context)`` for each record until it returns other than 0; gives how many there were."""
    found = map_at(run, ring)
    if not isinstance(found, UserRingBuffer):
        raise EmulationFault(f"a {found.type} map is no ring buffer of user space")
    if flags & ~_WAKEUPS:
        return -errno.EINVAL
    before = found.consumed
    try:
        return _drain(run, found, callback, context)
    finally:
        # Those who wait for room are told.
        if flags & uapi.BPF_RB_FORCE_WAKEUP or (found.consumed != before and not flags & uapi.BPF_RB_NO_WAKEUP):
            found.notify()


def _drain(run: Run, found: UserRingBuffer, callback: int, context: int) -> int:
    samples = 0
    for _ in range(_MOST_SAMPLES):
        try:
            position, size = found.peek_record()
        except OSError as error:
            if error.errno == errno.EAGAIN:
                continue
            return samples if error.errno == errno.ENODATA else -(error.errno or 0)
        samples += 1
        data = Region(bytearray(found.data.read(position, size)))
        pointer = Region(bytearray(_DYNPTR.pack(data.address, size, 0)))
        stop = run.call(callback, pointer.address, context, 0, 0, 0)
        found.data.write(position, bytes(data.buffer))
        found.release(size)
        if stop:
            break
    return samples


HELPERS: dict[str, HelperFunction] = {
    "dynptr_from_mem": dynptr_from_mem,
    "dynptr_read": dynptr_read,
    "dynptr_write": dynptr_write,
    "dynptr_data": dynptr_data,
    "ringbuf_reserve_dynptr": ringbuf_reserve_dynptr,
    "ringbuf_submit_dynptr": ringbuf_submit_dynptr,
    "ringbuf_discard_dynptr": ringbuf_discard_dynptr,
    "user_ringbuf_drain": user_ringbuf_drain,
}
