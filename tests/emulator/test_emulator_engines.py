"""Which engine runs a program: native code when it is asked for, or has been earned, and llvmlite is there."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import kbpf
from kbpf.emulator import engines
from kbpf.emulator.backend import EmulatorBackend
from kbpf.isa import cbpf, ebpf
from kbpf.isa.ebpf import Instruction, ld_imm64
from kbpf.specs import MapSpec, ProgramSpec
from tests.emulator.sides import FRAME

I = Instruction  # noqa: E741
EXIT = I(ebpf.JMP | ebpf.EXIT)
MOV, ADD = ebpf.ALU64 | ebpf.MOV, ebpf.ALU64 | ebpf.ADD
ONE = ProgramSpec(instructions=(I(MOV, 0, 0, 0, 1), EXIT))
#: Keeps a packet whole.
ALL = (cbpf.Instruction(cbpf.RET | cbpf.K, 0, 0, 0xFFFF),)


@pytest.fixture
def without_llvmlite(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llvmlite" else real(name))
    engines._installed.cache_clear()
    yield
    engines._installed.cache_clear()


@pytest.mark.requires("llvmlite")
def test_auto_moves_up_while_a_program_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has counted goes on, and so does what it says."""
    monkeypatch.setattr(engines, "WORTH", 200)
    results = []
    for engine in ("interpreter", "auto"):
        backend = EmulatorBackend(engine)  # type: ignore[arg-type]
        array = backend.map_create(MapSpec(type="array", key_size=4, value_size=8, max_entries=1))
        mark = 8
        counts = (
            *(*ld_imm64(2, array, ebpf.PSEUDO_MAP_VALUE), I(ebpf.LDX | ebpf.MEM | ebpf.DW, 0, 2), I(ADD, 0, 0, 0, 3)),
            *(I(ebpf.STX | ebpf.MEM | ebpf.DW, 2, 0), I(ebpf.STX | ebpf.MEM | ebpf.W, 1, 0, mark), EXIT),
        )
        fd = backend.program_load(ProgramSpec(type="sched_cls", instructions=counts), [])
        runs = [backend.program_run(fd, FRAME, bytes(192))[:3] for _ in range(60)]
        results.append((runs, backend.map_lookup(array, bytes(4), 8)))
        assert (backend.program(fd).code.native is not None) == (engine == "auto")
    assert results[0] == results[1]
    assert results[0][0][-1][0] == 180


@pytest.mark.requires("llvmlite")
def test_a_long_program_earns_it_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes as much longer."""
    monkeypatch.setattr(engines, "WORTH", 10_000)
    backend = EmulatorBackend("auto")
    fd = backend.program_load(ProgramSpec(instructions=(*[I(MOV, 0, 0, 0, 1)] * 2000, EXIT)), [])
    for _ in range(40):
        backend.program_run(fd, FRAME, bytes(192))
    assert backend.program(fd).code.native is None
    for _ in range(40):
        backend.program_run(fd, FRAME, bytes(192))
    assert backend.program(fd).code.native is not None


@pytest.mark.requires("llvmlite")
def test_a_long_list_of_which_a_packet_meets_little_earns_it_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes as long as for others of its length, a run does not."""
    monkeypatch.setattr(engines, "WORTH", 2000)
    keep, drop = cbpf.Instruction(cbpf.RET | cbpf.K, 0, 0, 1), cbpf.Instruction(cbpf.RET | cbpf.K, 0, 0, 0)
    test = cbpf.Instruction(cbpf.JMP | cbpf.JEQ | cbpf.K, 0, 1, 7)
    straight = kbpf.Filter([cbpf.Instruction(cbpf.ALU | cbpf.ADD | cbpf.K, 0, 0, 1)] * 599 + [drop])
    short = kbpf.Filter([test, keep, drop] * 200)
    for filter, needed in ((straight, 10), (short, 136)):
        filter.match_all([bytes(60)] * (needed - 1))
        assert filter._native is None
        filter.match_all([bytes(60)] * 2 * needed)
        assert filter._native is not None


@pytest.mark.requires("llvmlite")
def test_what_native_code_does_not_take_stays_and_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tail call in a function."""
    from kbpf.emulator.jit import program as native

    asked = []
    real = native.supports
    monkeypatch.setattr(native, "supports", lambda code: asked.append(code) or real(code))
    backend = EmulatorBackend("jit")
    fd = backend.program_load(ONE, [])
    code = backend.program(fd).code
    monkeypatch.setattr(native.emit.Source, "supported", lambda _: False)
    assert [backend.program_run(fd, FRAME, bytes(192)).value for _ in range(3)] == [1, 1, 1]
    assert asked == [code]
    assert code.native is None


@pytest.mark.usefixtures("without_llvmlite")
def test_native_code_that_is_asked_for_needs_llvmlite() -> None:
    with pytest.raises(kbpf.MissingDependencyError, match=r"pip install 'kbpf\[jit\]'"):
        EmulatorBackend("jit").program_load(ONE, [])
    with pytest.raises(kbpf.MissingDependencyError, match=r"pip install 'kbpf\[jit\]'"):
        kbpf.load_program(ONE, backend="emulator", engine="jit")
    filter = kbpf.Filter(ALL)
    assert filter.run(FRAME) == len(FRAME)
    for run in (filter.run, lambda packet, engine: filter.match_all([packet], engine=engine)):
        with pytest.raises(kbpf.MissingDependencyError, match=r"pip install 'kbpf\[jit\]'"):
            run(FRAME, engine="jit")


@pytest.mark.usefixtures("without_llvmlite")
def test_auto_stays_without_llvmlite_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "WORTH", 10)
    backend, filter = EmulatorBackend("auto"), kbpf.Filter(ALL)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        fd = backend.program_load(ONE, [])
        assert [backend.program_run(fd, FRAME, bytes(192)).value for _ in range(20)] == [1] * 20
        assert [filter.run(FRAME) for _ in range(20)] == [len(FRAME)] * 20
        assert filter.match_all([FRAME] * 20) == b"\1" * 20
        assert list(backend.program_values(fd, [FRAME] * 20, bytes(192))) == [1] * 20
    assert [warning.category for warning in given] == [kbpf.EmulationWarning]
    assert "pip install 'kbpf[jit]'" in str(given[0].message)
    assert backend.program(fd).code.native is None


@pytest.mark.requires("llvmlite")
@pytest.mark.parametrize(("engine", "loaded"), [("auto", "False"), ("interpreter", "False"), ("jit", "True")])
def test_llvmlite_is_imported_when_it_is_needed(engine: str, loaded: str) -> None:
    script = """
import sys, kbpf
from kbpf.emulator.backend import EmulatorBackend
from kbpf.isa.ebpf import Instruction
from kbpf.specs import ProgramSpec
backend = EmulatorBackend(sys.argv[1])
fd = backend.program_load(ProgramSpec(instructions=(Instruction(0xB7, 0, 0, 0, 1), Instruction(0x95))), [])
kbpf.compile("ip")
assert "llvmlite" not in sys.modules
assert backend.program_run(fd, bytes(64), bytes(192)).value == 1
print("llvmlite" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script, engine], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (loaded, "")


@pytest.mark.parametrize("engine", ["auto", "interpreter"])
def test_captures_are_filtered_and_written_without_llvmlite(engine: str, tmp_path: Path) -> None:
    """Not only is none asked for: there is none."""
    script = """
import sys
sys.modules["llvmlite"] = None
import kbpf
from kbpf.pcapfile import PcapWriter, open_capture
engine, path, out = sys.argv[1:]
with PcapWriter(path) as writer:
    for number in range(100):
        writer.write(bytes([number]) * 60)
result = kbpf.run_capture("ether[0] & 1 = 1", path, write=out, engine=engine)
with open_capture(out) as capture:
    print(result.matched, sum(record.data[0] for record in capture))
"""
    command = [sys.executable, "-c", script, engine, str(tmp_path / "in"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"50 {sum(range(1, 100, 2))}\n", "")
