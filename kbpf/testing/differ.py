"""The kernel and the emulator, run side by side over the same cases, and where they differ.

A case is all that a run needs, as data; what a backend makes of it is an `Outcome`, which is plain data too. A
difference is made small (`shrink`) and printed as a test that can be kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TypeAlias

from kbpf.isa import cbpf
from kbpf.testing import carriers, generate_classic, generate_packets, shrink
from kbpf.testing.carriers import Carrier


@dataclass(frozen=True, kw_only=True)
class ClassicCase:
    """A classic filter on a socket, and the packets that come to it."""

    carrier: str
    program: tuple[cbpf.Instruction, ...]
    packets: tuple[bytes, ...]


#: What a reader of the socket gets of each packet; None where the filter dropped it. An errno: the filter was refused.
ClassicOutcome: TypeAlias = "tuple[bytes | None, ...] | int"


def classic_case(rng: Random, carrier: str) -> ClassicCase:
    program = generate_classic.generate(rng)
    packets = [classic_packet(rng, carrier) for _ in range(rng.choice((2, 3)))]
    return ClassicCase(
        carrier=carrier, program=program, packets=(*packets, classic_packet(rng, carrier, generate_classic.LONG))
    )


def classic_packet(rng: Random, carrier: str, least: int = 0) -> bytes:
    """A packet for a carrier, with `least` bytes where it should be long."""
    if carrier == "unix":
        return rng.randbytes(least) if least else generate_packets.payload(rng)
    if carrier == "udp":
        return generate_packets.udp_frame(
            rng, mac=carriers.TAP_MAC, address=carriers.TAP_ADDRESS, port=carriers.UDP_PORT, size=least or None
        )
    return generate_packets.frame(rng, host_mac=carriers.TAP_MAC, vlan=True) + rng.randbytes(least)


def run_classic(where: Mapping[str, Carrier], case: ClassicCase) -> ClassicOutcome:
    """Carry the packets to the filter on one backend."""
    carrier = where[case.carrier]
    try:
        carrier.attach(cbpf.encode(case.program))
    except OSError as error:
        return error.errno or 0
    return tuple(carrier.deliver(packet) for packet in case.packets)


def shrink_classic(kernel: Mapping[str, Carrier], emulated: Mapping[str, Carrier], case: ClassicCase) -> ClassicCase:
    """The smallest case that still differs."""

    def fails(trial: ClassicCase) -> bool:
        truth = run_classic(kernel, trial)
        return not isinstance(truth, int) and run_classic(emulated, trial) != truth

    def program_fails(program: Sequence[cbpf.Instruction]) -> bool:
        return fails(replace(case, program=tuple(program)))

    case = replace(case, packets=tuple(shrink.fewer(case.packets, lambda p: fails(replace(case, packets=tuple(p))))))
    case = replace(case, program=tuple(shrink.blank(case.program, shrink.CLASSIC_NOP, program_fails)))
    case = replace(case, program=tuple(shrink.drop(case.program, shrink.without_classic, program_fails)))
    least = 0 if case.carrier == "unix" else 14
    for index, packet in enumerate(case.packets):

        def packet_fails(data: bytes, index: int = index) -> bool:
            if len(data) < least or case.carrier == "udp":
                return False
            return fails(replace(case, packets=(*case.packets[:index], data, *case.packets[index + 1 :])))

        small = shrink.shorter(packet, packet_fails)
        case = replace(case, packets=(*case.packets[:index], small, *case.packets[index + 1 :]))
    return case


def classic_as_test(case: ClassicCase, name: str, truth: ClassicOutcome) -> str:
    """Source text of a test that holds what the kernel does with the case."""
    lines = [f"def test_{name}(classic: Classic) -> None:", "    program = ["]
    lines += [f"        ({code:#06x}, {jt}, {jf}, {k:#x})," for code, jt, jf, k in case.program]
    lines += ["    ]"]
    packets = ", ".join(f'"{packet.hex()}"' for packet in case.packets)
    lines += [f"    packets = [bytes.fromhex(text) for text in ({packets},)]"]
    kept = truth if isinstance(truth, int) else [None if data is None else len(data) for data in truth]
    lines += [f'    assert classic("{case.carrier}", program, packets) == {kept}']
    return "\n".join(lines)
