"""Progress on a terminal and elsewhere, with the seconds between lines shortened."""

import io
import re
import time
from collections.abc import Callable

import pytest

from fastbert import progress as module
from fastbert.progress import Progress, progress
from fastbert.streams import echo


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that `fastbert.progress` reads: an element to change."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def wait_for(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("total", "unit", "before", "done", "seconds", "expected"),
    [
        (4_000_000, "B", 0, 1_000_000, 10, "25% of 4.0 MB, 100.0 kB/s, 0:30 left"),
        (0, "B", 0, 2_000_000_000, 10, "2.0 GB, 200.0 MB/s"),
        (1000, "steps", 0, 1, 36, "0% of 1,000 steps, 36.0 s/step, 9:59:24 left"),
        (1000, "steps", 500, 600, 10, "60% of 1,000 steps, 10 steps/s, 0:40 left"),
        (1000, "steps", 500, 500, 3, "50% of 1,000 steps"),
        (0, "tokens", 0, 0, 65, "1:05"),
    ],
    ids=["bytes", "unknown total", "first step", "resumed", "resumed, before the first update", "alive"],
)
def test_text_has_rate_and_time_left(
    clock: list[float], total: int, unit: str, before: int, done: int, seconds: float, expected: str
) -> None:
    work = Progress("label", total, unit, before)
    clock[0] = seconds
    if done > before:
        work.update(done)
    assert work.text(clock[0]) == expected


def test_rate_follows_the_last_updates_and_time_left_counts_down(clock: list[float]) -> None:
    work = Progress("label", 10_000, "steps", 0)
    for step in range(1, 201):
        clock[0] += 10 if step <= 100 else 1  # ten times as fast from step 100
        work.update(step, status=f"loss {step}")
    assert work.text(clock[0]) == "2% of 10,000 steps, 1 steps/s, 2:43:20 left  loss 200"
    assert "2:43:10 left" in work.text(clock[0] + 10)


def test_plain_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.01)
    monkeypatch.setattr(module, "DELAY", 0)
    with progress("reading", 4_000_000, done=1_000_000) as work:
        wait_for(lambda: "reading: 25% of 4.0 MB\n" in shown_so_far(capsys))
        work.update(2_000_000)
        wait_for(lambda: "reading: 50% of 4.0 MB, " in shown_so_far(capsys))
    assert capsys.readouterr().err.endswith("reading: done in 0:00\n")


def shown_so_far(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


def test_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A nested bar disappears when its work ends, and messages appear above the bars."""
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(module, "DELAY", 0)
    monkeypatch.setattr(module, "SECONDS_BETWEEN_FRAMES", 0.01)
    with progress("training", 8, "steps", done=2) as outer:
        wait_for(lambda: "25% of 8 steps" in terminal.getvalue())
        with progress("validating", 4, "batches") as inner:
            inner.update(1)
            wait_for(lambda: "validating" in terminal.getvalue())
            echo("a message")
        outer.update(8, status="loss 3.5")
    *_, last = terminal.getvalue().split("training")
    assert "100% of 8 steps" in last and "loss 3.5" in last and "validating" not in last
    assert f"training {'━' * 6} " in terminal.getvalue() and "━" * 24 in last
    assert "a message\n" in terminal.getvalue()


@pytest.mark.parametrize("total", [0, 8])
def test_bar_of_an_unknown_total_disappears(monkeypatch: pytest.MonkeyPatch, total: int) -> None:
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(module, "DELAY", 0)
    with progress("reading", total):
        wait_for(lambda: "reading" in terminal.getvalue())
        *_, cursor = re.findall(r"\x1b\[\?25[lh]", terminal.getvalue())
        assert cursor.endswith("h")  # shown, also after a kill
    assert terminal.getvalue().endswith("\x1b[1A\x1b[2K") is (total == 0)


def test_short_work_shows_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    with progress("reading", 100) as work:
        work.update(100)
    monkeypatch.setattr("sys.stderr", terminal)
    with progress("reading", 100) as work:
        work.update(100)
    assert capsys.readouterr().err == terminal.getvalue() == ""
