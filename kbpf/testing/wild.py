"""Run programs that no verifier has accepted: each must end with a value, a fault or an errno, within its budget.

A crash takes the process along, and what never ends never returns: `kbpf.testing.fuzz` runs it in processes of its own,
and says so.
"""

from __future__ import annotations

import faulthandler
from contextlib import ExitStack
from random import Random
from typing import Any

from kbpf.emulator import events, helpers, test_runs
from kbpf.emulator.backend import EmulatorBackend
from kbpf.emulator.maps import KINDS
from kbpf.emulator.packet import Packet
from kbpf.errors import EmulationFault
from kbpf.specs import MapSpec
from kbpf.testing.btf_bytes import BtfBytes
from kbpf.testing.case_maps import CaseMap
from kbpf.testing.generate_maps import MAPS, RESULTS
from kbpf.testing.generate_wild import BUDGET, Wild, generate
from kbpf.uapi.constants import BPF_F_NO_PREALLOC

#: A program may run for so many seconds before the process says where it is, and ends. A thousandth is usual.
_PATIENCE = 120
#: Shapes of maps, of which each type takes one: sizes of key and value, entries, flags.
_SHAPES = (
    (4, 4, 2, 0),
    (4, 8, 2, 0),
    (8, 8, 2, BPF_F_NO_PREALLOC),
    (8, 8, 0, 0),
    (4, 8, 0, BPF_F_NO_PREALLOC),
    (0, 8, 2, 0),
    (0, 0, 4096, 0),
)


def one_of_each(backend: EmulatorBackend, stack: ExitStack) -> list[int]:
    """A map of each type that the emulator has, and one whose only value programs reach without a call."""
    btf = BtfBytes()
    described: dict[str, Any] = {"btf": btf.bytes(), "btf_key_type_id": btf.int, "btf_value_type_id": btf.u64}
    inner = backend.map_create(MapSpec(type="array", key_size=4, value_size=8, max_entries=1))
    stack.callback(backend.close, inner)
    made = [inner]
    for type in KINDS:
        for key_size, value_size, entries, flags in _SHAPES:
            spec = MapSpec(
                type=type,
                key_size=key_size,
                value_size=value_size,
                max_entries=entries,
                flags=flags,
                **({} if entries else described),
            )
            try:
                fd = backend.map_create(spec, inner if type.endswith("_of_maps") else None)
            except OSError:
                continue
            stack.callback(backend.close, fd)
            made.append(fd)
            break
    return made


class Runner:
    """Runs wild programs, with maps that all of them share."""

    def __init__(self, stack: ExitStack) -> None:
        self.backend = EmulatorBackend()
        self.fds = one_of_each(self.backend, stack)
        self._named = {name: CaseMap(self.backend, make(Random(name)), stack) for name, make in MAPS.items()}
        self._named[""] = CaseMap(self.backend, RESULTS, stack)
        # All programs in one are of a type.
        self._programs = {
            type: CaseMap(self.backend, MAPS["prog_array"](Random(type)), stack) for type in helpers.ALLOWED
        }
        stack.callback(faulthandler.cancel_dump_traceback_later)

    def case(self, seed: str, number: int) -> Wild:
        return generate(Random(f"{seed}/wild/{number}"), self.fds)

    def load(self, wild: Wild) -> int:
        """The program's descriptor; it finds itself in the program array. Raises `LoadRefused`."""
        programs = self._programs[wild.spec.type]
        maps = [programs if name == "prog_array" else self._named[name] for name in wild.maps]
        fd = self.backend.program_load(wild.spec, [made.fd for made in maps])
        self.backend.program(fd).budget = BUDGET
        programs.loaded(fd)
        return fd

    def run(self, fd: int, wild: Wild) -> tuple[Any, ...]:
        """How it ended: "value" with all that a run gives, "fault" with its instruction, text and address, or "errno".

        Raises what no program may raise.
        """
        program = self.backend.program(fd)
        faulthandler.dump_traceback_later(_PATIENCE, exit=True)
        try:
            if program.type in test_runs.RUNNERS:
                ran = self.backend.program_run(fd, wild.data, wild.context)
                return "value", ran.value, ran.data, ran.context
            event = events.run_event(program, packet=Packet(buffer=wild.data))
            return "value", event.value, event.context
        except EmulationFault as fault:
            if not fault.message or not 0 <= fault.pc < len(program.code.steps):
                raise AssertionError("a fault that does not say where or why") from fault
            return "fault", fault.pc, fault.message, fault.address
        except OSError as error:
            if not error.errno:
                raise
            return "errno", error.errno
