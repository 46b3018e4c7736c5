"""Classic filters in the emulator: the ancillary words of linux/filter.h, and a prepared filter.

The words are those of `convert_bpf_extensions` in net/core/filter.c. A packet without a device
ends a filter that asks for the device's index or type, with A as the result.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kbpf.backend import Engine
from kbpf.emulator import engines
from kbpf.emulator.context import SkBuff
from kbpf.emulator.dissect import payload_offset
from kbpf.emulator.environment import environment
from kbpf.emulator.interpreter import BUDGET, AncillaryFunction, Code, Run, Subject, link
from kbpf.emulator.packet import Packet
from kbpf.emulator.semantics import State, Step
from kbpf.isa import cbpf
from kbpf.isa.translate import REG_A, REG_X, starts, to_ebpf

if TYPE_CHECKING:
    from kbpf.emulator.jit.batch import NativeBatch, Start

_ATTRIBUTE = struct.Struct("=HH")
#: NLA_TYPE_MASK (linux/netlink.h): the upper two bits of a type are flags.
_TYPE_MASK = 0x3FFF


def _find_attribute(data: bytes, start: int, end: int, wanted: int) -> int:
    """Where the netlink attribute of that type lies between `start` and `end`, or 0."""
    while end - start >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data, start)
        if not _ATTRIBUTE.size <= length <= end - start:
            break
        if kind & _TYPE_MASK == wanted:
            return start
        start += length + 3 & ~3
    return 0


def _attribute(run: Run, state: State) -> int:
    data, start = run.packet.data, state[REG_A] & 0xFFFFFFFF
    if start > len(data) - _ATTRIBUTE.size:
        return 0
    return _find_attribute(data, start, len(data), state[REG_X] & 0xFFFFFFFF)


def _nested_attribute(run: Run, state: State) -> int:
    data, start = run.packet.data, state[REG_A] & 0xFFFFFFFF
    if start > len(data) - _ATTRIBUTE.size:
        return 0
    length = _ATTRIBUTE.unpack_from(data, start)[0]
    if length > len(data) - start:
        return 0
    return _find_attribute(data, start + _ATTRIBUTE.size, start + length, state[REG_X] & 0xFFFFFFFF)


def _vlan_proto(run: Run, state: State) -> int:
    packet = run.packet
    return 0 if packet.vlan_tci is None else packet.vlan_proto


_LOADS: dict[str, AncillaryFunction] = {
    "protocol": lambda run, state: run.packet.protocol,
    "pkttype": lambda run, state: run.packet.pkt_type,
    "ifindex": lambda run, state: run.packet.ifindex,
    "nlattr": _attribute,
    "nlattr_nest": _nested_attribute,
    "mark": lambda run, state: run.packet.mark,
    "queue": lambda run, state: run.packet.queue,
    "hatype": lambda run, state: None if run.packet.ifindex is None else run.packet.hatype,
    "rxhash": lambda run, state: run.packet.hash,
    "cpu": lambda run, state: environment.cpu,
    "vlan_tag": lambda run, state: run.packet.vlan_tci or 0,
    "vlan_tag_present": lambda run, state: int(run.packet.vlan_tci is not None),
    "pay_offset": lambda run, state: payload_offset(run.packet),
    "random": lambda run, state: environment.random32(),
    "vlan_tpid": _vlan_proto,
}
ANCILLARY_LOADS = {offset: _LOADS[word.name] for offset, word in cbpf.ANCILLARY.items() if word.name in _LOADS}


class ClassicProgram:
    """A classic filter, ready to run. Raises `kbpf.FilterError` if the kernel would not take it.

    `network` and `mac` are for `run`: where in its data the network and the link header start, for loads relative to
    them. With `loops` jumps may go back, as those of filters for captures may; the budget ends what does not end.
    """

    budget = BUDGET

    def __init__(
        self,
        instructions: Sequence[cbpf.Instruction],
        *,
        network: int | None = None,
        mac: int | None = None,
        loops: bool = False,
        engine: Engine = "auto",
    ) -> None:
        self.network = network
        self.mac = mac
        self._instructions = instructions
        self._loops = loops
        self._code = link(to_ebpf(instructions, loops=loops), ancillary=ANCILLARY_LOADS)
        engines.check(engine)
        self._code.engine = engine

    def run(self, data: bytes, length: int) -> int:
        """The filter's return value for a packet of `length` bytes of which `data` are at hand."""
        return engines.execute(self._code, self, None, data, length)

    def run_packet(self, packet: Packet) -> int:
        """The filter's return value for a packet with all its metadata."""
        return engines.execute(self._code, self, packet, packet.data)

    def native(self, start: Start, subject: Subject) -> NativeBatch | None:
        """The filter in native code, for packets in which offset 0 is at `start`; None where it must stay here.

        `subject` makes packets of bytes, for what native code asks about them.
        """
        return engines.batch_of(self._code, subject, start, self.network, self.mac)

    @staticmethod
    def check(engine: Engine) -> None:
        """Raise `MissingDependencyError` if native code is asked for, and cannot be made."""
        engines.check(engine)

    def has_earned(self, runs: int = 0) -> bool:
        """Whether compiling it is worth the while, after what has run and with so many `runs` that are to come."""
        return engines.has_earned(self._code, runs)

    def path(self, packet: Packet) -> tuple[int, tuple[int, ...]]:
        """The return value, and the indices of the instructions that ran, in order."""
        taken: list[int] = []
        steps = list(self._code.steps)
        for pc, at in enumerate(starts(self._instructions, loops=self._loops)):
            steps[at] = _recorded(steps[at], pc, taken)
        code = Code(steps, self._code.functions, self._code.frames)
        return Run(self, code, packet, packet.data).execute(), tuple(taken)

    def packet(self, data: bytes, length: int) -> Packet:
        protocol = 0
        if self.mac is not None and self.network:
            protocol = int.from_bytes(data[self.network - 2 : self.network], "big")
        elif self.network is not None and len(data) > self.network:
            protocol = {4: 0x0800, 6: 0x86DD}.get(data[self.network] >> 4, 0)
        return Packet(buffer=data, length=length, network=self.network, mac=self.mac, protocol=protocol)

    def context(self, packet: Packet) -> SkBuff:
        return SkBuff(packet)


def _recorded(step: Step, pc: int, taken: list[int]) -> Step:
    def recorded(r: State) -> int:
        taken.append(pc)
        return step(r)

    return recorded
