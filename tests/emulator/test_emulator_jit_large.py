"""Large programs are compiled once, without LLVM's passes, to code that gives what the interpreter gives."""

from __future__ import annotations

from random import Random

import pytest

import kbpf
from kbpf.emulator.backend import EmulatorBackend
from kbpf.emulator.classic import ClassicProgram
from kbpf.emulator.jit import batch, emit, engine, program, testrun
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction as I
from kbpf.specs import ProgramSpec
from kbpf.testing import carriers, differ, generate_direct, generate_ebpf
from kbpf.testing.generate_packets import frame

pytestmark = pytest.mark.requires("llvmlite")


def listed(count: int) -> kbpf.Filter:
    """A filter of about four times `count` instructions, most of them jumps."""
    tests = (f"tcp port {n}" if n % 2 else f"host 10.0.{n % 256}.{n // 8}" for n in range(count))
    return kbpf.compile(" or ".join(tests))


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """How long the text is that is compiled meanwhile, each time, and whether it is large."""
    found: list[tuple[int, bool]] = []

    class Noted(engine.Compiled):
        def __init__(self, text: str, vectors: bool = False, large: bool = False) -> None:
            found.append((len(text), large))
            super().__init__(text, vectors, large)

    for module in (batch, program, testrun):
        monkeypatch.setattr(module, "Compiled", Noted)
    return found


@pytest.fixture
def all_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small programs are compiled as large ones are."""
    monkeypatch.setattr(emit, "_MANY_JUMPS", -1)


def test_a_list_of_a_thousand_is_compiled_once(texts: list[tuple[int, bool]]) -> None:
    filter, rng = listed(1000), Random("large")
    packets = [frame(rng, vlan=True) for _ in range(300)]
    offsets = [0]
    for packet in packets:
        offsets.append(offsets[-1] + len(packet))
    expected = bytes(filter.run(packet, engine="interpreter") > 0 for packet in packets)
    assert 0 < sum(expected) < 300
    assert bytes(filter.run(packet, engine="jit") > 0 for packet in packets) == expected
    assert filter.match_all(packets, engine="jit") == expected
    assert filter.match_all(kbpf.Packets(b"".join(packets), offsets), engine="jit") == expected
    (first, large), *others = texts
    assert large and first > 100_000
    assert len(others) == 2
    assert all(size < 20_000 and not large for size, large in others)


def test_a_usual_filter_is_compiled_with_all_passes(texts: list[tuple[int, bool]]) -> None:
    for filter in (kbpf.compile("tcp dst port 80 and not host 192.0.2.1"), listed(30)):
        filter.match_all([bytes(60)], engine="jit")
    assert len(texts) == 4
    assert not any(large for _, large in texts)


@pytest.mark.usefixtures("all_large")
@pytest.mark.parametrize("name", carriers.NAMES)
def test_classic_filters_agree(name: str) -> None:
    with (
        carriers.emulated(lambda program: ClassicProgram(program, engine="interpreter")) as interpreted,
        carriers.emulated(lambda program: ClassicProgram(program, engine="jit")) as native,
    ):
        for number in range(40):
            case = differ.classic_case(Random(f"large/{number}"), name)
            assert differ.run_classic(native, case) == differ.run_classic(interpreted, case), number


@pytest.mark.usefixtures("all_large")
def test_programs_agree() -> None:
    interpreter, native = EmulatorBackend("interpreter"), EmulatorBackend("jit")
    with differ.one_processor():
        for number in range(60):
            rng = Random(f"large/{number}")
            case = generate_direct.generate(rng, "sched_cls") if number % 2 else generate_ebpf.generate(rng)
            assert differ.run_ebpf(native, case) == differ.run_ebpf(interpreter, case), number


@pytest.mark.usefixtures("all_large")
def test_runs_over_many_packets_agree(texts: list[tuple[int, bool]]) -> None:
    length, byte = I(ebpf.LDX | ebpf.MEM | ebpf.W, 7, 1), I(ebpf.LD | ebpf.ABS | ebpf.B, 0, 0, 0, 9)
    times = I(ebpf.ALU64 | ebpf.MUL | ebpf.X, 0, 7)
    exit = I(ebpf.JMP | ebpf.EXIT)
    spec = ProgramSpec(instructions=(I(ebpf.ALU64 | ebpf.MOV | ebpf.X, 6, 1), length, byte, times, exit))
    rng, results = Random("runs"), []
    packets = [frame(rng) for _ in range(100)]
    for name in ("interpreter", "jit"):
        with kbpf.load_program(spec, backend="emulator", engine=name) as program:  # type: ignore[arg-type]
            results.append(list(program.run_all(packets)))
    assert results[0] == results[1]
    assert len(set(results[0])) > 10
    assert [large for _, large in texts] == [True, False]
