"""What random calls of helpers once found to differ between kernel and emulator, each as small as it could be made."""

from __future__ import annotations

import pytest

from kbpf.isa import ebpf
from kbpf.specs import MapSpec
from kbpf.testing.differ import assert_same
from kbpf.testing.generate_pieces import CONTEXT, EXIT, Piece, call, copy, load, move, put, stack, the_map

pytestmark = pytest.mark.requires("kernel")

FRAME = bytes(60)
PERF = MapSpec(type="perf_event_array", key_size=4, value_size=4, max_entries=2)


def both(type: str, *pieces: Piece, frame: bytes = FRAME, maps: tuple[MapSpec, ...] = ()) -> None:
    """Run the pieces on both sides; R0 is what they return, and all maps must be alike."""
    program = [*copy(CONTEXT, 1), *(i for piece in pieces for i in piece), EXIT]
    assert_same(program=program, runs=[(frame, b"")], type=type, maps=maps)


@pytest.mark.parametrize("helper", ("send_signal", "send_signal_thread"))
@pytest.mark.parametrize("number", (0, 65, -1))
def test_no_signal_and_numbers_that_are_none(helper: str, number: int) -> None:
    both("sched_cls", move(1, number), call(helper))


@pytest.mark.parametrize("helper", ("probe_read_user_str", "probe_read_kernel_str"))
@pytest.mark.parametrize("size", (1, 2))
def test_the_byte_that_becomes_the_nul_is_read_too(helper: str, size: int) -> None:
    both("sched_cls", put(-8, 0), stack(1, -8), move(2, size), move(3, 4096), call(helper))


@pytest.mark.parametrize("size", (1, 2, 8))
def test_text_that_is_cut_ends_in_a_nul(size: int) -> None:
    source = put(-8, 0x61616161)
    both("sched_cls", put(-16, -1), source, stack(1, -16), move(2, size), stack(3, -8), call("probe_read_kernel_str"))
    both(
        *("sched_cls", put(-16, -1), source, stack(1, -16), move(2, size), stack(3, -8), call("probe_read_kernel_str")),
        load(0, ebpf.FP, -16),
    )


@pytest.mark.parametrize("helper", ("probe_read", "probe_read_str"))
def test_the_stack_is_no_memory_of_user_space(helper: str) -> None:
    read = (put(-8, 0x6162), put(-16, -1), stack(1, -16), move(2, 8), stack(3, -8), call(helper))
    both("raw_tracepoint", *read, load(0, ebpf.FP, -16), frame=b"")


@pytest.mark.parametrize("length", (1, 60, 61, 5000, 5001))
def test_the_frame_of_an_xdp_program_follows_its_sample(length: int) -> None:
    """Also what does not lie in the first piece."""
    flags = [*ebpf.ld_imm64(3, length << 32 | 0xFFFFFFFF)]
    sample = (copy(1, CONTEXT), the_map(2, 0), flags, put(-8, 7), stack(4, -8), move(5, 8), call("perf_event_output"))
    for frame in (FRAME, bytes(range(250)) * 20):
        both("xdp", *sample, frame=frame, maps=(PERF,))


def test_programs_without_a_packet_put_none_behind_their_samples() -> None:
    flags = [*ebpf.ld_imm64(3, 1 << 32 | 0xFFFFFFFF)]
    sample = (copy(1, CONTEXT), the_map(2, 0), flags, put(-8, 7), stack(4, -8), move(5, 8), call("perf_event_output"))
    both("raw_tracepoint", *sample, frame=b"", maps=(PERF,))


@pytest.mark.parametrize("type", ("lwt_xmit", "sched_cls"))
@pytest.mark.parametrize("frame", (bytes(14), bytes(15)))
def test_a_copy_has_something_behind_its_link_header(type: str, frame: bytes) -> None:
    both(type, copy(1, CONTEXT), move(2, 1), move(3, 1), call("clone_redirect"), frame=frame)
