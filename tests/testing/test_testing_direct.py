"""Random programs of all types, over helpers, maps and packets, give the same on the kernel and in the emulator."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from kbpf.emulator import helpers, maps, test_runs
from kbpf.testing import compared_elsewhere, coverage, fuzz, generate_direct
from kbpf.testing.compared_elsewhere import Elsewhere
from kbpf.testing.differ import assert_same
from kbpf.testing.generate_maps import MAPS
from kbpf.uapi.structs import STRUCTS

pytestmark = pytest.mark.requires("kernel")

TESTS = Path(__file__).resolve().parent.parent

_IPV6 = bytes(12) + b"\x86\xdd" + bytes(range(100, 160))


@pytest.mark.requires("netns")
def test_programs_agree() -> None:
    report = fuzz.run_cases("direct", "test", range(4000))
    assert report.differences == []
    assert report.share > 0.99


@pytest.mark.parametrize("type", helpers.ALLOWED)
def test_every_helper_that_a_type_reaches_is_called_or_compared_elsewhere(type: str) -> None:
    """One that is in no table: `kbpf.testing.generate_direct` says how to enter it."""
    elsewhere = {name for name in generate_direct.reachable(type) if compared_elsewhere.where(name, type)}
    # What others call in random programs does the same here.
    others = generate_direct.TYPES if type in compared_elsewhere.TYPES else ()
    called = generate_direct.generated(type).union(*map(generate_direct.generated, others))
    assert generate_direct.reachable(type) - called - elsewhere == set()


def test_every_type_of_program_and_map_is_run_or_compared_elsewhere() -> None:
    assert helpers.ALLOWED.keys() - compared_elsewhere.TYPES.keys() == set(generate_direct.TYPES)
    assert test_runs.RUNNERS.keys() >= set(generate_direct.TYPES)
    made = {spec.type for make in MAPS.values() for spec in [make(Random(1))]}
    assert maps.KINDS.keys() - compared_elsewhere.MAPS.keys() == made


def test_what_is_compared_elsewhere_is_there_and_compared() -> None:
    """No line of the tables has outlived what it speaks of, and the tests that they name exist."""
    reachable = {name for type in helpers.ALLOWED for name in generate_direct.reachable(type)}
    assert {name.rpartition(" ")[2] for name in compared_elsewhere.HELPERS} <= reachable
    assert compared_elsewhere.TYPES.keys() <= helpers.ALLOWED.keys()
    assert compared_elsewhere.MAPS.keys() <= maps.KINDS.keys()
    tables: list[dict[str, Elsewhere]] = [compared_elsewhere.HELPERS, compared_elsewhere.TYPES, compared_elsewhere.MAPS]
    for line in (line for table in tables for line in table.values()):
        file, _, function = line.test.partition("::")
        assert f"def {function}(" in (TESTS / file).read_text(), line


def test_a_full_run_must_cover_helpers_maps_and_the_packet() -> None:
    need = coverage.required_direct()
    assert need >= {"xdp call xdp_adjust_head", "sk_lookup call loop", "map queue", "tail call taken", "stx dw packet"}


def _calling(*calls: tuple[int, ...]) -> list[tuple[int, int, int, int, int]]:
    """A program that makes calls with the context and numbers as arguments, and ends with the last result."""
    out = [(0xBF, 6, 1, 0, 0)]
    for helper, *arguments in calls:
        out += [(0xBF, 1, 6, 0, 0), *((0xB7, register, 0, 0, value) for register, value in enumerate(arguments, 2))]
        out += [(0x85, 0, 0, 0, helper)]
    return [*out, (0x95, 0, 0, 0, 0)]


def test_an_unset_transport_header_moves_with_the_others() -> None:
    """IPv6 to IPv4, 100 bytes at the front: the buffer moves, and cutting is allowed down to a header never set."""
    for length in (14, 15, 16, 34):
        assert_same(program=_calling((31, 8, 0), (43, 100, 0), (38, length, 0)), runs=[(_IPV6, b"")], type="sched_act")


def test_bytes_that_were_cut_off_come_back_before_a_new_header() -> None:
    assert_same(program=_calling((38, 34, 0), (50, 14, 0, 2)), runs=[(_IPV6, b"")], type="sched_cls")


def test_congestion_is_marked_behind_a_tag() -> None:
    ipv4 = bytes(12) + b"\x08\x00\x45\x01" + bytes(30)
    assert_same(program=_calling((18, 0xA888, 5), (18, 0, 0), (97,)), runs=[(ipv4, b"")], type="sched_act")


@pytest.mark.parametrize("given", (0, 1, 2, 4, 8, 16, 31))
def test_a_tunnels_key_comes_back_with_its_ends_exchanged(given: int) -> None:
    key = [0x01020304, 0x05060708, 0x090A0B0C, 0x0D0E0F10, 0x11121314, 0x1516, 0x171819 if given & 1 else 0]
    key += [0x21222324, 0x25262728, 0x292A2B2C, 0x2D2E2F30]
    for asked in (0, 1, 16, 17):
        for word in range(0, 44, 4):
            program = [(0xBF, 6, 1, 0, 0), *((0x62, 10, 0, 4 * n - 48, value) for n, value in enumerate(key))]
            for helper, flags in ((21, given), (20, asked)):
                program += [
                    (0xBF, 1, 6, 0, 0), (0xBF, 2, 10, 0, 0), (0x07, 2, 0, 0, -48), (0xB7, 3, 0, 0, 44),
                    (0xB7, 4, 0, 0, flags), (0x85, 0, 0, 0, helper), (0x63, 6, 0, 48 if helper == 21 else 52, 0),
                ]  # fmt: skip
                if helper == 21 and asked != 16:
                    # Options, too.
                    program += [
                        (0xBF, 1, 6, 0, 0), (0xBF, 2, 10, 0, 0), (0x07, 2, 0, 0, -48), (0xB7, 3, 0, 0, 8),
                        (0x85, 0, 0, 0, 30), (0x63, 6, 0, 56, 0),
                    ]  # fmt: skip
            program += [(0x61, 0, 10, word - 48, 0), (0x95, 0, 0, 0, 0)]
            assert_same(program=program, runs=[(_IPV6, bytes(192))], type="sched_cls")


@pytest.mark.parametrize("size", (54, 100, 130, 300, 1000, 2000, 3600))
@pytest.mark.parametrize("call", [(43, 100, 0), (43, 14, 0), (43, 200, 0), (50, 40, 1, 1), (50, 24, 0, 1)])
def test_a_packet_that_moves_too_often_finds_no_memory(call: tuple[int, ...], size: int) -> None:
    """Each time that a packet is moved for more headroom Linux gives it twice the memory."""
    program = [(0xBF, 6, 1, 0, 0), (0xB7, 7, 0, 0, 0)]
    for _ in range(80):
        arguments = [(0xB7, register, 0, 0, value) for register, value in enumerate(call[1:], 2)]
        one = [(0xBF, 1, 6, 0, 0), *arguments, (0x85, 0, 0, 0, call[0])]
        # How often it went well, and what it said then.
        program += [*one, (0x15, 0, 0, 3, 0), (0x67, 7, 0, 0, 16), (0x1F, 7, 0, 0, 0), (0x05, 0, 0, 0x7777, 0)]
        program.append((0x07, 7, 0, 0, 1))
    end = len(program)
    program = [(*i[:3], end - pc - 1, i[4]) if i[3] == 0x7777 else i for pc, i in enumerate(program)]
    program += [(0xBF, 0, 7, 0, 0), (0x95, 0, 0, 0, 0)]
    frame = bytes(12) + b"\x86\xdd" + bytes(size - 14)
    assert_same(program=program, runs=[(frame, b"")], type="sched_cls")


def test_segments_of_a_packet_whose_protocol_was_changed_have_a_kind() -> None:
    """Without one a copy of the packet would not be sent."""
    frame, context = bytes(12) + b"\x86\xdd" + bytes(60), bytearray(192)
    context[STRUCTS["__sk_buff"].fields["gso_size"].offset] = 9
    for index in (1, 0x7FFF):
        for changed in ((), (31, 8, 0)):
            program = _calling(*([changed] if changed else []), (13, index, 1))
            assert_same(program=program, runs=[(frame, bytes(context))], type="sched_act")
