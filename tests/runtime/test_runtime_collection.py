"""What comes of a whole object on a backend, and that nothing of it stays after an error."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

import kbpf
from kbpf.backend import BackendName
from kbpf.emulator.backend import EmulatorBackend
from kbpf.runtime import collection as collections
from kbpf.runtime.backends import get_backend

RETURN_SEVEN = b"\xb7\0\0\0\x07\0\0\0\x95\0\0\0\0\0\0\0"
PINNED = kbpf.MapSpec(type="hash", key_size=4, value_size=8, max_entries=10, name="kbpf_test_pin", pinning="by_name")

EVENTS = kbpf.MapSpec(type="perf_event_array", key_size=4, value_size=4, name="kbpf_test_events", pinning="by_name")


@pytest.fixture
def pins(backend: BackendName, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of pins of the test's own."""
    folder = Path("/sys/fs/bpf") / f"kbpf-test-{os.getpid()}"
    if backend == "kernel":
        folder.mkdir()
    monkeypatch.setattr(collections, "PIN_FOLDER", str(folder))
    yield folder
    for name in (PINNED.name, EVENTS.name):
        with suppress(FileNotFoundError):
            get_backend(backend).unpin(f"{folder}/{name}")
    if backend == "kernel":
        folder.rmdir()


def test_a_pinned_map_is_shared(backend: str, pins: Path) -> None:
    spec = kbpf.CollectionSpec(maps={"shared": PINNED})
    with kbpf.load(spec, backend=backend) as one, kbpf.load(spec, backend=backend) as two:
        one.maps["shared"][5] = 6
        assert two.maps["shared"][5] == (6).to_bytes(8, "little")


@pytest.mark.parametrize("changed", [{"type": "lru_hash"}, {"value_size": 4}, {"max_entries": 9}, {"flags": 1}])
def test_another_map_that_is_pinned_there_is_refused(backend: str, pins: Path, changed: dict[str, int]) -> None:
    other = replace(PINNED, **changed)
    with kbpf.load(kbpf.CollectionSpec(maps={"shared": PINNED}), backend=backend) as first:
        with pytest.raises(kbpf.BpfError, match=r"it is hash of 4/8 bytes, 10 entries, flags 0x0\n") as refused:
            kbpf.load(kbpf.CollectionSpec(maps={"shared": other}), backend=backend)
        assert refused.value.errno == errno.EINVAL
        assert first.maps["shared"].snapshot() == {}


def test_a_pinned_map_without_a_size_is_reused(backend: str, pins: Path) -> None:
    spec = kbpf.CollectionSpec(maps={"events": EVENTS})
    with kbpf.load(spec, backend=backend) as one, kbpf.load(spec, backend=backend) as two:
        assert one.maps["events"].id == two.maps["events"].id


def test_a_program_pinned_there_is_no_map(backend: str, pins: Path) -> None:
    program = kbpf.ProgramSpec(instructions=RETURN_SEVEN)
    with kbpf.load_program(program, backend=backend) as loaded:
        loaded.pin(f"{pins}/{PINNED.name}")
        with pytest.raises(kbpf.BpfError) as refused:
            kbpf.load(kbpf.CollectionSpec(maps={"shared": PINNED}), backend=backend)
        assert refused.value.errno == errno.EINVAL


def test_a_map_that_the_collection_does_not_have_is_named(backend: str) -> None:
    program = kbpf.ProgramSpec(instructions=RETURN_SEVEN, maps=(replace(PINNED, name="elsewhere"),))
    with pytest.raises(ValueError, match="elsewhere"):
        kbpf.load(kbpf.CollectionSpec(programs={"count": program}), backend=backend)


def test_all_programs_of_a_collection_are_run_by_the_engine_that_is_asked_for() -> None:
    source = Path(kbpf.__file__).with_name("objects") / "sockex1.bpf.o"
    with pytest.raises(ValueError, match="engine: 'fast' is none of auto, interpreter, jit"):
        kbpf.load(source, backend="emulator", engine="fast")  # type: ignore[arg-type]
    with kbpf.load(source, backend="emulator", engine="interpreter") as collection:
        backend = collection.programs["count"]._backend
        assert isinstance(backend, EmulatorBackend)
        assert backend.program(collection.programs["count"].fileno()).code.engine == "interpreter"
