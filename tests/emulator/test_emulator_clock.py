"""What is due happens in order, when the clock says so and somebody looks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kbpf.emulator import ManualClock, environment
from kbpf.emulator.clock import run_due, timeline


@pytest.fixture
def clock() -> Iterator[ManualClock]:
    before = environment.clock
    clock = environment.clock = ManualClock(100)
    yield clock
    environment.clock = before
    timeline.clear()


def test_each_event_finds_the_clock_at_its_own_time(clock: ManualClock) -> None:
    seen: list[tuple[str, int]] = []
    timeline.at(300, lambda: seen.append(("late", clock())))
    timeline.at(200, lambda: seen.append(("early", clock())))
    timeline.at(200, lambda: seen.append(("second", clock())))
    clock.advance(50)
    assert seen == []
    clock.advance(1000)
    assert seen == [("early", 200), ("second", 200), ("late", 300)]
    assert clock() == 1150


def test_an_event_may_bring_another_within_the_same_step(clock: ManualClock) -> None:
    seen: list[int] = []
    timeline.at(200, lambda: timeline.at(250, lambda: seen.append(clock())))
    clock.advance(200)
    assert seen == [250]


def test_a_cancelled_event_does_not_happen(clock: ManualClock) -> None:
    seen: list[int] = []
    event = timeline.at(200, lambda: seen.append(1))
    assert event.cancel()
    assert not event.cancel()
    assert timeline.next_due() is None
    clock.advance(500)
    assert seen == []


def test_cancelled_events_are_not_kept(clock: ManualClock) -> None:
    for _ in range(10000):
        timeline.at(200, int).cancel()
    assert len(timeline._events) < 5000


def test_looking_does_what_is_due_by_now_and_no_more(clock: ManualClock) -> None:
    seen: list[str] = []
    timeline.at(90, lambda: seen.append("past"))
    timeline.at(101, lambda: seen.append("future"))
    run_due()
    assert seen == ["past"]
    assert timeline.next_due() == 101


def test_time_does_not_go_back(clock: ManualClock) -> None:
    with pytest.raises(ValueError, match="does not go back"):
        clock.advance(-1)
