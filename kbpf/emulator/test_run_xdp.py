"""BPF_PROG_TEST_RUN for XDP programs (`bpf_prog_test_run_xdp`, net/bpf/test_run.c).

The data are a whole frame, with metadata before it where the context says so; what has no room in the first piece goes
into fragments.
"""

from __future__ import annotations

import errno
import sys
import time

from kbpf.emulator import network
from kbpf.emulator.datapath import backlog
from kbpf.emulator.helpers.xdp import is_metadata_length
from kbpf.emulator.interface import EmulatedInterface
from kbpf.emulator.maps.base import refused
from kbpf.emulator.packet import Packet
from kbpf.emulator.program import Program
from kbpf.emulator.test_run import ETH_HLEN, decode, timed
from kbpf.emulator.xdp import FRAME, HEADROOM, RESERVED, SHARED_INFO, XdpBuff
from kbpf.runs import RawRun, RunOptions
from kbpf.uapi.constants import BPF_F_TEST_XDP_LIVE_FRAMES
from kbpf.uapi.enums import ATTACH_TYPES
from kbpf.uapi.structs import STRUCTS

_LAYOUT = STRUCTS["xdp_md"]
_LOOPBACK = 1
#: MAX_SKB_FRAGS.
_MOST_FRAGMENTS = 17
#: TEST_XDP_MAX_BATCH.
_MOST_BATCH = 256
#: What Linux keeps in a page beside a live frame, and how many pages it takes at once.
_PAGE_HEAD, _POOL = 112, 64
#: Programs in values of devmaps and cpumaps.
_OF_MAPS = (ATTACH_TYPES["xdp_devmap"], ATTACH_TYPES["xdp_cpumap"])


def run(program: Program, data: bytes, context: bytes, options: RunOptions) -> RawRun:
    """Run as the command does; raises `OSError` with the kernel's errno, and `EmulationFault`."""
    live = options.flags & BPF_F_TEST_XDP_LIVE_FRAMES
    if program.attach_type in _OF_MAPS or options.flags & ~BPF_F_TEST_XDP_LIVE_FRAMES:
        raise refused(errno.EINVAL)
    if options.batch_size > (_MOST_BATCH if live else 0):
        raise refused(errno.E2BIG if live else errno.EINVAL)
    fields = decode(context, _LAYOUT)
    metadata, first = 0, len(data)
    if context:
        metadata, first = fields["data"], fields["data_end"]
        if fields["data_meta"] or not metadata <= first <= len(data):
            raise refused(errno.EINVAL)
        if not is_metadata_length(metadata) or metadata > HEADROOM - RESERVED:
            raise refused(errno.EINVAL)
    most = FRAME - (HEADROOM - metadata) - SHARED_INFO - (_PAGE_HEAD if live else 0)
    first = min(first, most)
    if (live and len(data) > first) or len(data) - metadata < ETH_HLEN:
        raise refused(errno.EINVAL)
    device = _device(fields)
    if live:
        return _run_live(program, data, metadata, device, options)
    rest = data[first:]
    fragments = [bytearray(rest[at : at + FRAME]) for at in range(0, len(rest), FRAME)]
    if len(fragments) > _MOST_FRAGMENTS:
        raise refused(errno.ENOMEM)
    buff = XdpBuff(data[:first], metadata=metadata, fragments=fragments)
    buff.ingress_ifindex = device.index
    packet = Packet(buffer=b"")
    value, duration = timed(options.repeat, lambda: program.execute(packet, b"", buff))
    out = b""
    if context:
        words = {**fields, "data": buff.data - buff.meta, "data_end": buff.end - buff.meta}
        out = b"".join(words[name].to_bytes(4, sys.byteorder) for name in _LAYOUT.fields)
    return RawRun(value, buff.whole(), out, duration)


def _run_live(program: Program, data: bytes, metadata: int, device: EmulatedInterface, options: RunOptions) -> RawRun:
    """What programs decide on frames is carried out, a batch at a time. Frames come again with what was written there.

    Linux takes them from a pool of pages, and puts back only where they start and end. Which of them comes again when
    is as with its own size of a batch.
    """
    path = network.current().path
    count, start = max(options.repeat, 1), time.perf_counter_ns()
    pool: list[XdpBuff] = []
    for first in range(0, count, options.batch_size or _POOL):
        with backlog.event():
            passed = []
            for number in range(first, min(first + (options.batch_size or _POOL), count)):
                if number < _POOL:
                    pool.append(XdpBuff(data, metadata=metadata, room=FRAME - _PAGE_HEAD))
                    pool[-1].ingress_ifindex = device.index
                buff = pool[number % _POOL]
                buff.meta, buff.data, buff.end = HEADROOM - metadata, HEADROOM, HEADROOM - metadata + len(data)
                buff.redirect = buff.redirected_by = None
                action = program.execute(Packet(buffer=b""), b"", buff)
                passed.append(path.carry_out(device, buff, action))
            for packet in passed:
                if packet is not None:
                    path.enter(device, packet)
    return RawRun(0, b"", b"", (time.perf_counter_ns() - start) // count)


def _device(fields: dict[str, int]) -> EmulatedInterface:
    """The interface that the frame came in by, loopback where none is said; each has one queue."""
    index = fields["ingress_ifindex"]
    if fields["egress_ifindex"] or (fields["rx_queue_index"] and not index):
        raise refused(errno.EINVAL)
    device = network.current().by_index(index or _LOOPBACK)
    if device is None:
        raise refused(errno.ENODEV)
    if fields["rx_queue_index"]:
        raise refused(errno.EINVAL)
    return device
