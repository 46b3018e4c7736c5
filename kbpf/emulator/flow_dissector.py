"""Flow dissector programs: their context, and BPF_PROG_TEST_RUN (`bpf_prog_test_run_flow_dissector`).

The program reads the whole frame and fills ``struct bpf_flow_keys`` in, which is what comes out as data.
"""

from __future__ import annotations

import errno
import sys

from kbpf.emulator.interpreter import PACKET_ADDRESS, Run
from kbpf.emulator.maps.base import refused
from kbpf.emulator.memory import FLOW_KEYS
from kbpf.emulator.packet import Packet
from kbpf.emulator.program import Program
from kbpf.emulator.test_run import ETH_HLEN, decode, padded, timed
from kbpf.runs import RawRun, RunOptions
from kbpf.uapi.structs import STRUCTS

_CONTEXT = STRUCTS["__sk_buff"].fields
_KEYS = STRUCTS["bpf_flow_keys"]
#: A page.
_MOST_DATA = 4096


class FlowContext:
    """A `kbpf.emulator.interpreter.Context`: the frame, to be read, and the keys."""

    __slots__ = ("frame", "keys")

    def __init__(self, frame: bytes, flags: int = 0) -> None:
        self.frame = bytearray(frame)
        self.keys = bytearray(_KEYS.size)
        self._put("nhoff", ETH_HLEN)
        self._put("thoff", ETH_HLEN)
        # As it is stored in the frame.
        self._put("n_proto", int.from_bytes(frame[12:14], sys.byteorder))
        self._put("flags", flags)

    def show(self, run: Run) -> None:
        run.show(self.frame, writable=False)
        run.readable[FLOW_KEYS] = run.writable[FLOW_KEYS] = self.keys

    def load(self, offset: int, size: int) -> int | None:
        return {
            (_CONTEXT["data"].offset, 4): PACKET_ADDRESS,
            (_CONTEXT["data_end"].offset, 4): PACKET_ADDRESS + len(self.frame),
            (_CONTEXT["flow_keys"].offset, 8): FLOW_KEYS << 32,
        }.get((offset, size))

    def store(self, offset: int, size: int, value: int) -> bool:
        return False

    def clamp(self) -> None:
        """The headers' places, kept within the frame as the kernel does."""
        place = min(max(self._get("nhoff"), ETH_HLEN), len(self.frame))
        self._put("nhoff", place)
        self._put("thoff", min(max(self._get("thoff"), place), len(self.frame)))

    def _get(self, name: str) -> int:
        field = _KEYS.fields[name]
        return int.from_bytes(self.keys[field.offset : field.offset + field.size], sys.byteorder)

    def _put(self, name: str, value: int) -> None:
        field = _KEYS.fields[name]
        self.keys[field.offset : field.offset + field.size] = value.to_bytes(field.size, sys.byteorder)


def test_run(program: Program, data: bytes, context: bytes, options: RunOptions) -> RawRun:
    """Run as the command does; raises `OSError` with the kernel's errno, and `EmulationFault`."""
    if options.flags or options.cpu or options.batch_size:
        raise refused(errno.EINVAL)
    if not ETH_HLEN <= len(data) <= _MOST_DATA:
        raise refused(errno.EINVAL)
    flags = decode(context, _KEYS)["flags"]
    field = _KEYS.fields["flags"]
    given = padded(context, _KEYS)
    if any(given[: field.offset] + given[field.offset + field.size :]):
        raise refused(errno.EINVAL)
    flow = FlowContext(data, flags)

    def once() -> int:
        nonlocal flow
        flow = FlowContext(data, flags)
        value = program.execute(Packet(buffer=b""), b"", flow)
        flow.clamp()
        return value

    value, duration = timed(options.repeat, once)
    return RawRun(value, bytes(flow.keys), given if context else b"", duration)
