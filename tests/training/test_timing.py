"""Times of steps while another process runs at times, measured by a clock that the test controls."""

import math
from random import Random

import pytest

from fastbert.errors import UserError
from fastbert.training import timing
from fastbert.training.timing import repeat_in, time_in_groups, undisturbed, writing_seconds


class Clock:
    """Clock that is advanced by the timed work."""

    def __init__(self, monkeypatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def test_the_quantile_is_low_and_not_an_extreme() -> None:
    assert undisturbed([3.0]) == 3.0 and undisturbed([5.0, 4.0, 3.0, 4.0, 5.0]) == 3.0
    assert undisturbed([float(value) for value in range(101)]) == 10.0


@pytest.mark.parametrize(("begin", "end"), [(0.0, 0.6), (0.15, 0.9), (0.0, 0.0)])
@pytest.mark.parametrize("step_time", [0.003, 0.1, 4.0])
def test_disturbing_most_of_the_window_changes_nothing(clock, begin, end, step_time) -> None:
    """Steps that vary by 4 % by themselves and take four times as long in part of the window."""
    random, start, waits = Random(0), clock.now, []

    def step() -> None:
        busy = begin <= (clock.now - start) / 30.0 < end
        clock.now += step_time * random.uniform(0.98, 1.02) * (4 if busy else 1)

    found = time_in_groups(step, lambda: waits.append(clock.now), 30.0, least=4, most=5000)
    assert found.seconds == pytest.approx(step_time, rel=0.025)
    assert found.disturbed == (end > 0.0)
    if step_time == 0.003:
        assert len(waits) < found.count / 15  # a wait for the device after each group, not after each step
    if end == 0.0:
        assert found.count == pytest.approx(30 / step_time, rel=0.1) or found.count == 5000


def test_windows_end(clock) -> None:
    def step() -> None:
        clock.now += 1.0

    assert time_in_groups(step, lambda: None, 0.1, least=4, most=9).count == 1  # four would take 40 times the window
    assert time_in_groups(step, lambda: None, 2.5, least=4, most=9).count == 4
    assert time_in_groups(step, lambda: None, 100.0, least=4, most=9).count == 9
    assert time_in_groups(lambda: None, lambda: None, 1.0, least=4, most=9).count == 9  # a clock that stands still
    assert time_in_groups(step, lambda: None, 9.0, least=4, most=9, stopped=lambda: True).count == 0


def test_repeated_work(clock) -> None:
    times = iter([5.0, 1.0, 1.5, 9.0])

    def work() -> None:
        clock.now += next(times)

    assert repeat_in(3.0, work) == 5.0  # once at least
    assert repeat_in(100.0, work) == 1.0  # of three


def test_bytes_are_written_where_the_checkpoints_will_be(tmp_path, monkeypatch) -> None:
    sizes = []
    real = timing.os.urandom
    monkeypatch.setattr(timing.os, "urandom", lambda size: sizes.append(size) or real(size))
    assert 0 < writing_seconds(tmp_path, 1000) < math.inf and writing_seconds(tmp_path, 0) == 0
    monkeypatch.setattr(timing, "SAMPLE", 2**10)
    assert writing_seconds(tmp_path, 2**30) > 0
    assert sizes == [1000, 0, 2**10] and list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="choose another"):
        writing_seconds(tmp_path / "nowhere", 10)
