"""Timing of repeated work on a machine with other load: a low quantile of several measurements, since other processes
can only make them longer."""

import hashlib
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from fastbert.errors import UserError
from fastbert.files import disk_errors

QUANTILE = 0.1
DISTURBED = 1.25  # ratio of the mean to the quantile
GROUP = 0.1  # shortest duration of a group of steps in seconds, on an idle machine
SAMPLE = 2**26  # largest number of bytes that are written to time a disk


class Timed(NamedTuple):
    """Measured time of the steps of one shape."""

    seconds: float
    """Seconds of a step on an otherwise idle machine."""
    count: int
    """Number of timed steps."""
    mean: float = 0.0
    """Mean over all steps, which is longer if other processes disturbed the timing."""

    @property
    def disturbed(self) -> bool:
        """True if other processes made the steps so much longer that it should be reported."""
        return self.mean > DISTURBED * self.seconds


def undisturbed(times: Sequence[float]) -> float:
    """The 10th percentile of `times`; the minimum of up to ten.

    It is right as long as at most nine tenths of the times are longer because of other processes. Unlike the minimum of
    many times it is not an extreme: if steps vary by 2 % by themselves, it is 3 % below the mean.
    """
    return sorted(times)[int(QUANTILE * (len(times) - 1))]


def time_in_groups(
    step: Callable[[], object],
    wait: Callable[[], object],
    seconds: float,
    *,
    least: int,
    most: int,
    stopped: Callable[[], bool] = lambda: False,
    shared: Callable[[float], float] = lambda duration: duration,
) -> Timed:
    """Measures the time of a step on consecutive groups of steps.

    All groups except the first have about the same number of steps (one if a step takes a tenth of a second). So there
    are more groups in periods without other load, when steps are fast, and waiting at the end of a group costs little.

    Args:
        step: performs a step.
        wait: waits for the device, at the end of a group.
        seconds: duration of the timing, exceeded only to reach `least`.
        least: minimum number of steps, unless they take more than twice the duration.
        most: maximum number of steps.
        stopped: ends the timing early.
        shared: maps a duration to that of the first of several processes that do these steps together, so that all do
            the same number.
    """
    times: list[float] = []
    count, size, spent = 0, 1, 0.0
    while not stopped() and count < most and (spent < seconds * (2 if count < least else 1) or not count):
        size = min(size, most - count)
        before = time.perf_counter()
        for _ in range(size):
            step()
        wait()
        duration = shared(time.perf_counter() - before)
        times.append(duration / size)
        count, spent = count + size, spent + duration
        fastest = min(times)
        size = max(size, math.ceil(min(GROUP, seconds / 20) / fastest) if fastest > 0 else most)
    if not times:
        return Timed(0.0, 0)
    return Timed(undisturbed(times), count, spent / count)


def repeat_in(
    seconds: float,
    work: Callable[[], object],
    most: int = 3,
    shared: Callable[[float], float] = lambda duration: duration,
) -> float:
    """Seconds of `work`, which is called up to `most` times as long as that fits into `seconds`, but at least once;
    `shared` as for `time_in_groups`."""
    times: list[float] = []
    while not times or (len(times) < most and sum(times) + min(times) < seconds):
        before = time.perf_counter()
        work()
        times.append(shared(time.perf_counter() - before))
    return undisturbed(times)


def writing_seconds(folder: Path, size: int) -> float:
    """Seconds to write, hash and flush `size` bytes to the disk of `folder`, as for a checkpoint. Timed with at most 64
    MiB in an unnamed file, so that even a killed process leaves no file.

    Raises:
        UserError: nothing can be written there.
    """
    sample = os.urandom(min(size, SAMPLE))
    before = time.perf_counter()
    try:
        with disk_errors(folder), tempfile.TemporaryFile(dir=folder) as file:
            file.write(sample)
            file.flush()
            hashlib.sha256(sample)
            os.fsync(file.fileno())
    except FileNotFoundError:
        raise UserError(f"nothing can be written to {folder}; choose another --out") from None
    return (time.perf_counter() - before) * size / max(1, len(sample))
