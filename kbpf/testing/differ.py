"""The kernel and the emulator, run side by side over the same cases, and where they differ.

A case is all that a run needs, as data; what a backend makes of it is an `Outcome`, which is plain data too. A
difference is made small (`shrink`) and printed as a test that can be kept.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from random import Random
from typing import TypeAlias

from kbpf.backend import Backend, LoadRefused
from kbpf.errors import EmulationFault
from kbpf.isa import cbpf, ebpf
from kbpf.specs import MapSpec, ProgramSpec
from kbpf.testing import carriers, generate_classic, generate_packets, shrink
from kbpf.testing.carriers import Carrier
from kbpf.testing.case_maps import CaseMap
from kbpf.testing.generate_ebpf import EbpfCase


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
    return _smaller_packets(case, fails)


def _smaller_packets(case: ClassicCase, fails: Callable[[ClassicCase], bool]) -> ClassicCase:
    least = 0 if case.carrier == "unix" else 14
    # A datagram's lengths would have to fit.
    for index in range(len(case.packets) if case.carrier != "udp" else 0):

        def with_packet(data: bytes, case: ClassicCase = case, index: int = index) -> ClassicCase:
            return replace(case, packets=(*case.packets[:index], data, *case.packets[index + 1 :]))

        def packet_fails(data: bytes, make: Callable[[bytes], ClassicCase] = with_packet) -> bool:
            return len(data) >= least and fails(make(data))

        case = with_packet(shrink.shorter(case.packets[index], packet_fails))
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


@dataclass(frozen=True)
class EbpfOutcome:
    """What runs of a program gave, each (value, data, context) or an errno, and its maps afterwards.

    A program that was refused has only `refused`, the errno, and what the verifier said.
    """

    runs: tuple[tuple[int, bytes, bytes] | int | str, ...] = ()
    maps: tuple[dict[bytes, bytes], ...] = ()
    refused: int = 0
    log: str = ""


_BY_DESCRIPTOR = {ebpf.PSEUDO_MAP_IDX: ebpf.PSEUDO_MAP_FD, ebpf.PSEUDO_MAP_IDX_VALUE: ebpf.PSEUDO_MAP_VALUE}


@contextmanager
def one_processor() -> Iterator[None]:
    """Stay on one processor, the same for the kernel and the emulator, since per-CPU values depend on it."""
    from kbpf.emulator.environment import environment

    before, emulated = os.sched_getaffinity(0), environment.cpu
    cpu = sorted(before)[os.getpid() % len(before)]
    os.sched_setaffinity(0, {cpu})
    environment.cpu = cpu
    try:
        yield
    finally:
        environment.cpu = emulated
        os.sched_setaffinity(0, before)


def run_ebpf(backend: Backend, case: EbpfCase, loaded: Callable[[int], object] | None = None) -> EbpfOutcome:
    """Create the maps, load the program, run it over all of the case's packets, read the maps.

    `loaded` is called with the program's descriptor before the runs.
    """
    spec = case.spec
    with ExitStack() as stack:
        maps = [CaseMap(backend, wanted, stack) for wanted in spec.maps]
        if case.by_descriptor:
            named = [
                i._replace(src=_BY_DESCRIPTOR[i.src], imm=maps[i.imm].fd)
                if i.opcode == ebpf.LD_IMM64 and i.src in _BY_DESCRIPTOR
                else i
                for i in spec.instructions
            ]
            spec = replace(spec, instructions=tuple(named))
        try:
            program = backend.program_load(spec, [made.fd for made in maps])
        except LoadRefused as error:
            return EbpfOutcome(refused=error.errno or 0, log=error.log)
        stack.callback(backend.close, program)
        if loaded is not None:
            loaded(program)
        for made in maps:
            made.loaded(program)
        runs = tuple(_run(backend, program, data, context) for data, context in case.runs)
        return EbpfOutcome(runs, tuple(made.contents() for made in maps))


def last_words(log: str) -> str:
    """What the verifier refused a program for, without numbers."""
    lines = [
        line for line in log.splitlines() if line and not line.startswith(("processed ", "verification time", "  "))
    ]
    return re.sub(r"-?\d+", "N", lines[-1]) if lines else ""


def _run(backend: Backend, program: int, data: bytes, context: bytes) -> tuple[int, bytes, bytes] | int | str:
    try:
        ran = backend.program_run(program, data, context)
    except OSError as error:
        return error.errno or 0
    except EmulationFault as fault:
        return str(fault)
    return ran.value, ran.data, ran.context


def shrink_ebpf(kernel: Backend, emulated: Backend, case: EbpfCase) -> EbpfCase:
    """The smallest case that still differs."""

    def fails(trial: EbpfCase) -> bool:
        truth = run_ebpf(kernel, trial)
        if truth.refused or run_ebpf(emulated, trial) == truth:
            return False
        # Where an address has come into it, it is another one when the maps are others.
        with ExitStack() as stack:
            for spec in trial.spec.maps:
                CaseMap(kernel, spec, stack)
            return run_ebpf(kernel, trial) == truth

    def program_fails(program: Sequence[ebpf.Instruction]) -> bool:
        return fails(with_program(program))

    def with_program(program: Sequence[ebpf.Instruction]) -> EbpfCase:
        info = shrink.moved_functions(case.spec.func_info, program)
        return replace(case, spec=replace(case.spec, instructions=tuple(program), func_info=info))

    case = replace(case, runs=tuple(shrink.fewer(case.runs, lambda runs: fails(replace(case, runs=tuple(runs))))))
    case = with_program(shrink.blank(case.spec.instructions, shrink.EBPF_NOP, program_fails, shrink.fills_stack))
    case = with_program(shrink.drop(case.spec.instructions, shrink.without_ebpf, program_fails, shrink.fills_stack))
    for index, (data, context) in enumerate(case.runs):

        def with_run(data: bytes, context: bytes, case: EbpfCase = case, index: int = index) -> EbpfCase:
            return replace(case, runs=(*case.runs[:index], (data, context), *case.runs[index + 1 :]))

        needed = b"" if fails(with_run(data, b"")) else context

        def data_fails(data: bytes, make: Callable[..., EbpfCase] = with_run, context: bytes = needed) -> bool:
            return fails(make(data, context))

        case = with_run(shrink.shorter(data, data_fails), needed)
    return case


def _map_text(spec: MapSpec) -> str:
    """The call that makes the spec, without what is as by default."""
    given = ((f.name, getattr(spec, f.name), f.default) for f in fields(spec))
    return f"MapSpec({', '.join(f'{name}={value!r}' for name, value, default in given if value != default)})"


def assert_same(
    *,
    program: Iterable[Sequence[int]],
    maps: Sequence[MapSpec] = (),
    runs: Iterable[tuple[bytes, bytes]],
    by_descriptor: bool = False,
    type: str = "socket_filter",
    attach_type: str | int | None = None,
    btf: bytes = b"",
    func_info: bytes = b"",
) -> None:
    """Raise `AssertionError` where the kernel and the emulator differ over a program."""
    from kbpf.emulator.backend import EmulatorBackend
    from kbpf.kernel.backend import kernel_backend

    spec = ProgramSpec(
        type=type,
        expected_attach_type=attach_type,
        instructions=tuple(ebpf.Instruction(*i) for i in program),
        maps=tuple(maps),
        btf=btf,
        func_info=func_info,
    )
    case = EbpfCase(spec=spec, runs=tuple(runs), by_descriptor=by_descriptor)
    with one_processor():
        truth = run_ebpf(kernel_backend(), case)
        if truth.refused:
            raise AssertionError(f"the kernel refuses the program: {truth.log}")
        found = differences(truth, run_ebpf(EmulatorBackend(), case))
    if found:
        raise AssertionError("\n".join(found))


def ebpf_as_test(case: EbpfCase, name: str) -> str:
    """Source text of a test that compares both sides over the case."""
    lines = [f"def test_{name}() -> None:", "    assert_same(", "        program=["]
    lines += [
        f"            ({opcode:#04x}, {dst}, {src}, {off}, {imm}),"
        for opcode, dst, src, off, imm in case.spec.instructions
    ]
    lines += ["        ],", "        maps=["]
    lines += [f"            {_map_text(spec)}," for spec in case.spec.maps]
    lines += ["        ],", "        runs=["]
    lines += [
        f'            (bytes.fromhex("{data.hex()}"), bytes.fromhex("{context.hex()}")),' for data, context in case.runs
    ]
    lines += ["        ],", f"        by_descriptor={case.by_descriptor},"]
    if case.spec.type != "socket_filter":
        lines += [f"        type={case.spec.type!r},", f"        attach_type={case.spec.expected_attach_type!r},"]
    if case.spec.func_info:
        lines += [f"        btf={case.spec.btf!r},", f"        func_info={case.spec.func_info!r},"]
    lines += ["    )"]
    return "\n".join(lines)


def differences(kernel: EbpfOutcome, emulated: EbpfOutcome) -> list[str]:
    """What differs, a line each."""
    if emulated.refused:
        return [f"the emulator refuses it: errno {emulated.refused}, {emulated.log.strip()}"]
    lines = []
    for number, (truth, got) in enumerate(zip(kernel.runs, emulated.runs, strict=True)):
        if isinstance(truth, tuple) and isinstance(got, tuple):
            for name, a, b in zip(("value", "data", "context"), truth, got, strict=True):
                if a != b:
                    lines.append(f"run {number}: {name} is {_shown(a)}, emulated {_shown(b)}")
        elif truth != got:
            lines.append(f"run {number}: {_shown(truth)}, emulated {_shown(got)}")
    for number, (contents, made) in enumerate(zip(kernel.maps, emulated.maps, strict=True)):
        for key in sorted(contents.keys() | made.keys()):
            a_value, b_value = contents.get(key), made.get(key)
            if a_value != b_value:
                lines.append(f"map {number}[{key.hex()}] is {_shown(a_value)}, emulated {_shown(b_value)}")
    return lines


def _shown(value: object) -> str:
    if isinstance(value, int):
        return f"{value:#x}"
    return value.hex() if isinstance(value, bytes) else str(value)
