"""Programs on a device: how they are run, and what that makes of the packet (net/core/dev.c, drivers/net/veth.c)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kbpf.emulator import ethernet
from kbpf.emulator.context import SkBuff
from kbpf.emulator.engines import execute
from kbpf.emulator.interface import EmulatedInterface
from kbpf.emulator.links import Chain
from kbpf.emulator.packet import Packet
from kbpf.emulator.xdp import FRAME, HEADROOM, SHARED_INFO, XdpBuff

if TYPE_CHECKING:
    from kbpf.emulator.program import Program

TC_ACT_OK, TC_ACT_SHOT, TC_ACT_REDIRECT = 0, 2, 7
#: Go on with the next program, and behind the last one with the packet.
TC_ACT_UNSPEC = 0xFFFFFFFF
_VERDICTS = (TC_ACT_OK, TC_ACT_SHOT, TC_ACT_REDIRECT)


def run_traffic_control(chain: Chain, packet: Packet) -> int:
    """Run the programs of one direction until one has a verdict (`tcx_run`).

    Any number that is none ends the run, and lets the packet go on.
    """
    value = TC_ACT_UNSPEC
    for link in list(chain.links):
        program = link.program
        buff = SkBuff(packet, program.type)
        value = execute(program.code, program, packet, packet.data, context=buff)
        packet.cb = buff.words
        if value != TC_ACT_UNSPEC:
            break
    if value == TC_ACT_OK:
        packet.tc_index = packet.tc_classid
    return value if value in _VERDICTS else TC_ACT_UNSPEC


def run_xdp(
    program: Program, packet: Packet, device: EmulatedInterface, egress: int | None = None
) -> tuple[int, XdpBuff]:
    """Run an XDP program over a packet's bytes, which become what it leaves.

    `egress` is the index of the device where a devmap's program runs. Gives the action, and the context with where it
    redirected to.
    """
    before = packet.data
    room = max(FRAME, HEADROOM + len(before) + SHARED_INFO)
    buff = XdpBuff(before, room=room)
    buff.ingress_ifindex, buff.egress_ifindex, buff.queue = device.index, egress, max(packet.queue - 1, 0)
    action = execute(program.code, program, Packet(buffer=b""), b"", context=buff)
    packet.buffer = buff.whole()
    packet.metadata = packet.offset = packet.mac = buff.data - buff.meta
    packet.network = packet.mac + device.header
    packet.length += len(packet.buffer) - packet.offset - len(before)
    if _reclassified(before, packet.data, device):
        classify(device, packet)
    return action, buff


def _reclassified(before: bytes, after: bytes, device: EmulatedInterface) -> bool:
    """Whether the kernel looks at the link header again: another EtherType, or another kind of destination."""
    if not device.header:
        return False
    return (ethernet.ether_type(before), before[:6] == device.address, before[0] & 1) != (
        ethernet.ether_type(after),
        after[:6] == device.address,
        after[0] & 1,
    )


def classify(device: EmulatedInterface, packet: Packet, pkt_type: int | None = None) -> None:
    """Note down what a frame's link header says: protocol, and for whom it is if not `pkt_type` (`eth_type_trans`)."""
    frame = packet.data
    if not device.header:
        packet.protocol, packet.pkt_type = ethernet.ip_protocol(frame), pkt_type or ethernet.PACKET_HOST
        return
    packet.protocol = ethernet.received_protocol(frame)
    if pkt_type is None:
        broadcast = bytes(6) if device.loopback else ethernet.BROADCAST
        pkt_type = ethernet.packet_type(frame, device.address, broadcast)
    packet.pkt_type = pkt_type
