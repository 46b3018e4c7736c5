"""Tracing and `syscall` programs: what they may call, their contexts, BPF_PROG_TEST_RUN, against the kernel."""

from __future__ import annotations

import errno

import pytest
from sides import Outcome, Side

from kbpf.emulator.events import run_event
from kbpf.errors import EmulationFault
from kbpf.isa import ebpf
from kbpf.isa.ebpf import Instruction, ld_imm64
from kbpf.specs import MapSpec, ProgramSpec
from kbpf.uapi import constants as uapi

pytestmark = pytest.mark.requires("kernel")

I = Instruction  # noqa: E741
EXIT = I(ebpf.JMP | ebpf.EXIT)
MOV_K, MOV_X = ebpf.ALU64 | ebpf.MOV, ebpf.ALU64 | ebpf.MOV | ebpf.X
ADD_K = ebpf.ALU64 | ebpf.ADD
ZERO = I(MOV_K)
CALL = ebpf.JMP | ebpf.CALL
LDX, STX = ebpf.LDX | ebpf.MEM, ebpf.STX | ebpf.MEM
SIZES = {1: ebpf.B, 2: ebpf.H, 4: ebpf.W, 8: ebpf.DW}
TYPES = ["tracepoint", "raw_tracepoint", "raw_tracepoint_writable", "perf_event", "kprobe", "syscall"]
MOST_HELPERS = 212
ON_CPU = uapi.BPF_F_TEST_RUN_ON_CPU
ARGUMENTS = b"".join((0x0101010101010101 * n).to_bytes(8, "little") for n in range(1, 13))


def spec(type: str, *program: Instruction, license: str = "GPL", flags: int | None = None) -> ProgramSpec:
    if flags is None:
        flags = uapi.BPF_F_SLEEPABLE if type == "syscall" else 0
    return ProgramSpec(type=type, instructions=program, license=license, flags=flags)


def refusal(side: Side, wanted: ProgramSpec, maps: tuple[int, ...] = ()) -> tuple[int, str]:
    """The errno of a load and its log; 0 where it loads."""
    try:
        fd = side.backend.program_load(wanted, maps)
    except OSError as error:
        return error.errno or -1, getattr(error, "log", "")
    side.backend.close(fd)
    return 0, ""


def why(log: str) -> str:
    """What of a call of a helper is refused."""
    for reason in ("invalid func", "cannot use helper", "GPL-restricted", "might sleep"):
        if reason in log:
            return reason
    return ""


@pytest.mark.parametrize("type", TYPES)
def test_each_helper_is_callable_as_in_the_kernel(kernel: Side, emulator: Side, type: str) -> None:
    for license in ("GPL", "Proprietary"):
        for id in range(1, MOST_HELPERS + 1):
            call = spec(type, I(CALL, imm=id), EXIT, license=license)
            assert why(refusal(emulator, call)[1]) == why(refusal(kernel, call)[1]), (id, license)


def test_sleepable_probes_call_what_may_sleep(kernel: Side, emulator: Side) -> None:
    for id in (148, 191):
        call = spec("kprobe", I(CALL, imm=id), EXIT, flags=uapi.BPF_F_SLEEPABLE)
        assert why(refusal(emulator, call)[1]) == why(refusal(kernel, call)[1]) == ""


@pytest.mark.parametrize("type", TYPES)
def test_flags_are_taken_as_by_the_kernel(kernel: Side, emulator: Side, type: str) -> None:
    for bit in range(10):
        wanted = spec(type, ZERO, EXIT, flags=1 << bit)
        assert refusal(emulator, wanted)[0] == refusal(kernel, wanted)[0], 1 << bit


def test_no_packet_loads(kernel: Side, emulator: Side) -> None:
    for type in TYPES:
        wanted = spec(type, I(MOV_X, 6, 1), I(ebpf.LD | ebpf.ABS | ebpf.W), EXIT)
        assert refusal(emulator, wanted)[0] == refusal(kernel, wanted)[0] == errno.EINVAL


def run(side: Side, type: str, *program: Instruction, context: bytes = b"", **how: int) -> Outcome:
    fd = side.backend.program_load(spec(type, *program), [])
    try:
        done = side.backend.program_run(fd, b"", context, **how)
    except OSError as error:
        return Outcome(refused=error.errno or -1)
    finally:
        side.backend.close(fd)
    return Outcome(value=done.value, context=done.context)


READS = [(size, at) for size in SIZES for at in (0, size, 8, 96 - size)]


@pytest.mark.parametrize(("size", "at"), READS)
def test_raw_tracepoints_read_arguments_in_any_size(kernel: Side, emulator: Side, size: int, at: int) -> None:
    program = [I(LDX | SIZES[size], 0, 1, at), EXIT]
    for given in (0, 8, 16, 95, 96, 97):
        outcome = run(kernel, "raw_tracepoint", *program, context=ARGUMENTS[:given].ljust(given, b"\xee"))
        assert run(emulator, "raw_tracepoint", *program, context=ARGUMENTS[:given].ljust(given, b"\xee")) == outcome
    assert not run(kernel, "raw_tracepoint", *program, context=ARGUMENTS).refused


#: Around where contexts begin and end, and where their parts meet.
PLACES = [*range(20), *range(84, 104), *range(156, 196), *range(8176, 8200)]


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("written", [False, True])
def test_contexts_are_reached_where_the_kernel_lets_programs(
    kernel: Side, emulator: Side, type: str, written: bool
) -> None:
    """What the kernel refuses to load faults when it runs."""
    for code in SIZES.values():
        for at in PLACES:
            access = I(STX | code, 1, 2, at) if written else I(LDX | code, 0, 1, at)
            wanted = spec(type, I(MOV_K, 2), access, ZERO, EXIT)
            fd = emulator.backend.program_load(wanted, [])
            try:
                if type == "syscall":
                    emulator.backend.program_run(fd, b"", bytes(9000))
                else:
                    run_event(emulator.backend.program(fd), bytes(9000))  # type: ignore[attr-defined]  # the emulator's
                reached = True
            except EmulationFault:
                reached = False
            emulator.backend.close(fd)
            assert reached == (not refusal(kernel, wanted)[0]), (at, code)


SPILL = I(STX | ebpf.DW, 10, 1, -8)
#: Ways to reach the context, and how far they do.
REACHES: dict[str, tuple[int, list[Instruction]]] = {
    "nothing": (0, [ZERO, EXIT]),
    "a copy": (24, [I(MOV_X, 6, 1), I(LDX | ebpf.DW, 0, 6, 16), EXIT]),
    "a copy that is overwritten": (8, [I(MOV_X, 6, 1), I(MOV_X, 6, 10), I(ebpf.ST | ebpf.MEM | ebpf.DW, 6, 0, -96),
                                       I(LDX | ebpf.DW, 7, 6, -96), I(LDX | ebpf.DW, 0, 1), EXIT]),
    "a spill": (64, [SPILL, I(LDX | ebpf.DW, 3, 10, -8), I(LDX | ebpf.DW, 0, 3, 56), EXIT]),
    "the longer branch": (32, [I(LDX | ebpf.DW, 0, 1), I(ebpf.JMP | ebpf.JEQ, 0, 0, 1, 5), I(LDX | ebpf.DW, 0, 1, 24),
                               I(LDX | ebpf.DW, 0, 1, 8), EXIT]),
    "a function": (80, [I(CALL, 0, ebpf.PSEUDO_CALL, 0, 1), EXIT, I(LDX | ebpf.DW, 0, 1, 72), EXIT]),
    "after a call": (48, [I(MOV_X, 6, 1), I(CALL, imm=5), I(LDX | ebpf.DW, 0, 6, 40), EXIT]),
    "a loop": (16, [I(MOV_X, 6, 1), I(MOV_K, 7, imm=3), I(LDX | ebpf.DW, 0, 6, 8), I(ADD_K, 7, imm=-1),
                    I(ebpf.JMP | ebpf.JNE, 7, 0, -3), EXIT]),
}  # fmt: skip


@pytest.mark.parametrize("name", REACHES)
@pytest.mark.parametrize("type", ["raw_tracepoint", "syscall"])
def test_a_context_that_is_too_short_is_refused(kernel: Side, emulator: Side, type: str, name: str) -> None:
    end, program = REACHES[name]
    for given in {max(end - 1, 0), end}:
        outcome = run(kernel, type, *program, context=ARGUMENTS[:given])
        assert outcome.refused == (errno.EINVAL if given < end else 0)
        assert run(emulator, type, *program, context=ARGUMENTS[:given]).refused == outcome.refused


def test_the_return_value_is_32_bits(kernel: Side, emulator: Side) -> None:
    for type in ("raw_tracepoint", "syscall"):
        program = [*ld_imm64(0, 0x1234_5678_9ABC_DEF0), EXIT]
        assert run(emulator, type, *program) == run(kernel, type, *program) == Outcome(value=0x9ABC_DEF0)


def test_raw_tracepoints_run_on_a_processor_of_choice(kernel: Side, emulator: Side) -> None:
    program = [I(CALL, imm=8), EXIT]
    for cpu in (0, 1, 2, 99, -1, (1 << 31) - 1):
        outcome = run(kernel, "raw_tracepoint", *program, flags=ON_CPU, cpu=cpu)
        assert run(emulator, "raw_tracepoint", *program, flags=ON_CPU, cpu=cpu) == outcome, cpu
        assert outcome.refused or outcome.value == cpu


def test_what_other_runs_have_is_refused(kernel: Side, emulator: Side) -> None:
    for type in ("raw_tracepoint", "syscall"):
        for how in ({"repeat": 2}, {"data": bytes(14)}):
            errors = []
            for side in (kernel, emulator):
                fd = side.backend.program_load(spec(type, ZERO, EXIT), [])
                with pytest.raises(OSError) as caught:
                    side.backend.program_run(fd, how.get("data", b""), b"", how.get("repeat", 1))
                side.backend.close(fd)
                errors.append(caught.value.errno)
            assert errors == [errno.EINVAL] * 2
    assert run(emulator, "syscall", ZERO, EXIT, flags=ON_CPU) == run(kernel, "syscall", ZERO, EXIT, flags=ON_CPU)


def test_others_have_no_test_run(kernel: Side, emulator: Side) -> None:
    for type in ("tracepoint", "raw_tracepoint_writable", "perf_event", "kprobe"):
        for context in (b"", bytes(8)):
            outcome = run(kernel, type, ZERO, EXIT, context=context)
            assert run(emulator, type, ZERO, EXIT, context=context) == outcome == Outcome(refused=524)
        assert (
            run(emulator, type, ZERO, EXIT, flags=ON_CPU)
            == run(kernel, type, ZERO, EXIT, flags=ON_CPU)
            == Outcome(refused=524)
        )


def test_syscall_programs_read_and_write_their_context(kernel: Side, emulator: Side) -> None:
    for size, code in SIZES.items():
        for at in range(0, 16, size):
            program = [
                I(LDX | code, 0, 1, at),
                I(MOV_K, 2, imm=-2),
                I(STX | code, 1, 2, at),
                I(ebpf.ST | ebpf.MEM | code, 1, 0, 16 + at, 77),
                EXIT,
            ]
            outcome = run(kernel, "syscall", *program, context=ARGUMENTS[:40])
            assert run(emulator, "syscall", *program, context=ARGUMENTS[:40]) == outcome
            assert outcome.context != ARGUMENTS[:40]
    for length in (0, 65535, 65536):
        outcome = run(kernel, "syscall", ZERO, EXIT, context=bytes(length))
        assert run(emulator, "syscall", ZERO, EXIT, context=bytes(length)) == outcome


MAPS = {
    "array": (4, 8, 4),
    "hash": (4, 8, 4),
    "percpu_array": (4, 8, 4),
    "lru_hash": (4, 8, 4),
    "queue": (0, 8, 4),
    "ringbuf": (0, 0, 4096),
    "stack_trace": (4, 8, 4),
    "perf_event_array": (4, 4, 4),
    "prog_array": (4, 4, 4),
    "bloom_filter": (0, 8, 4),
}


@pytest.mark.parametrize("name", MAPS)
def test_sleepable_programs_use_the_maps_that_the_kernel_lets_them(kernel: Side, emulator: Side, name: str) -> None:
    key_size, value_size, most = MAPS[name]
    refused = []
    for side in (kernel, emulator):
        wanted = MapSpec(name="m", type=name, key_size=key_size, value_size=value_size, max_entries=most)
        fd = side.backend.map_create(wanted)
        program = (*ld_imm64(1, fd, ebpf.PSEUDO_MAP_FD), ZERO, EXIT)
        refused.append([refusal(side, spec(type, *program))[0] for type in ("syscall", "kprobe")])
        refused.append([refusal(side, spec("kprobe", *program, flags=uapi.BPF_F_SLEEPABLE))[0]])
        side.backend.close(fd)
    assert refused[:2] == refused[2:]
