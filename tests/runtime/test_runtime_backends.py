"""The choice of backend: what decides, where it holds, and how it is announced."""

from __future__ import annotations

import asyncio
import threading
import warnings
from pathlib import Path

import pytest

import kbpf
from kbpf.kernel import probes
from kbpf.runtime import backends

MAP = kbpf.MapSpec(type="array", key_size=4, value_size=4, max_entries=1)
RETURN_SEVEN = kbpf.ProgramSpec(instructions=b"\xb7\0\0\0\x07\0\0\0\x95\0\0\0\0\0\0\0")


@pytest.fixture
def powerless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that may not use the kernel's BPF, and was not told so yet."""
    monkeypatch.delenv("KBPF_BACKEND", raising=False)
    monkeypatch.setattr(backends, "_announced", False)
    monkeypatch.setattr(probes, "may_use_bpf", lambda program_type=None: False)


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KBPF_BACKEND", "emulator")
    assert backends.chosen() == "emulator"
    with kbpf.use_backend("kernel"):
        assert backends.chosen() == "kernel"
    monkeypatch.setenv("KBPF_BACKEND", "emulated")
    with pytest.raises(ValueError, match="KBPF_BACKEND: 'emulated' is none of auto, kernel, emulator"):
        backends.chosen()


def test_a_choice_holds_in_its_thread_and_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KBPF_BACKEND", raising=False)
    seen: dict[str, str] = {}

    async def chooses() -> None:
        kbpf.use_backend("kernel")
        seen["task"] = backends.chosen()

    async def tasks() -> None:
        await asyncio.create_task(chooses())
        seen["beside it"] = backends.chosen()

    with kbpf.use_backend("emulator"):
        thread = threading.Thread(target=lambda: seen.update(thread=backends.chosen()))
        thread.start()
        thread.join()
        asyncio.run(tasks())
        with kbpf.use_backend("auto"):
            seen["within"] = backends.chosen()
        seen["after"] = backends.chosen()
    assert seen == {"thread": "auto", "task": "kernel", "beside it": "emulator", "within": "auto", "after": "emulator"}
    assert backends.chosen() == "auto"


def test_emulation_is_announced_once_where_it_was_asked_for(powerless: None) -> None:
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always", kbpf.EmulationWarning)
        with kbpf.load(Path(kbpf.__file__).with_name("objects") / "sockex1.bpf.o") as loaded:
            assert loaded.backend == "emulator"
        with kbpf.Map.create(MAP) as map:
            assert map.backend == "emulator"
    assert [(warning.category, warning.filename) for warning in given] == [(kbpf.EmulationWarning, __file__)]


def test_emulation_that_was_asked_for_is_not_announced(powerless: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", kbpf.EmulationWarning)
        kbpf.Map.create(MAP, backend="emulator").close()


@pytest.mark.requires("kernel")
def test_objects_of_two_backends_do_not_mix() -> None:
    with kbpf.Map.create(MAP, backend="emulator") as map, pytest.raises(ValueError, match="emulator's"):
        kbpf.load_program(kbpf.ProgramSpec(instructions=RETURN_SEVEN.instructions, maps=(MAP,)), [map], "kernel")
    with (
        kbpf.packet_socket("lo", backend="emulator") as socket,
        kbpf.load_program(RETURN_SEVEN, backend="kernel") as program,
        pytest.raises(ValueError, match="kernel's"),
    ):
        program.attach(socket)


@pytest.mark.requires("kernel")
def test_auto_raises_where_the_kernel_refuses_one_who_may() -> None:
    refused = kbpf.ProgramSpec(instructions=b"\x95" + bytes(7))
    with kbpf.use_backend("auto"), pytest.raises(kbpf.VerifierError):
        kbpf.load_program(refused)
