"""Replacements for slow or rare parts of the machine in tests: steps of pretraining that are
watched or stopped, a clock, a disk that is nearly full."""

import shutil
from collections import namedtuple
from collections.abc import Callable

import pytest

from fastbert.pretraining import build, loop

Step = Callable[[loop.Trainer, int], object]


def nothing(trainer: loop.Trainer, step: int) -> None:
    """Before or after a step."""


def around_steps(monkeypatch: pytest.MonkeyPatch, before: Step = nothing, after: Step = nothing) -> None:
    """Calls `before` and `after` each step of a pretraining, with the trainer and the step's number from 0."""
    real = loop.Trainer.train_step

    def stepping(self: loop.Trainer, step: int) -> None:
        before(self, step)
        real(self, step)
        after(self, step)

    monkeypatch.setattr(loop.Trainer, "train_step", stepping)


def stop_before(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ends a pretraining as Ctrl-C does, right before a step."""

    def stop(trainer: loop.Trainer, number: int) -> None:
        if number == step:
            raise KeyboardInterrupt

    around_steps(monkeypatch, stop)


def stopped_clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of `time.perf_counter`, one number that the test moves; the speed of the machine, which could not be
    measured by it, is 1 GFLOP/s."""
    now = [0.0]
    monkeypatch.setattr(build, "peak_flops", lambda *given: (1e9, "a test"))
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    return now


def free_space(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Every disk has this many bytes left."""
    usage = namedtuple("Usage", "total used free")(2 * size, size, size)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
