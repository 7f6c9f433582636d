"""How long repeated work takes on a machine that does other work too: a low quantile of several times, because another
process only ever makes them longer."""

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from fastbert.errors import UserError
from fastbert.files import disk_errors

QUANTILE = 0.2
DISTURBED = 1.25  # ratio of the median to the quantile
GROUPS = 20  # of steps in a window
SAMPLE = 2**26  # bytes, at most, that are written to time a disk


class Timed(NamedTuple):
    """Steps of one shape."""

    seconds: float
    """Of one, while nothing else runs."""
    count: int
    """Steps timed."""
    half: float = 0.0
    """The median, which is longer where other work disturbed the timing."""

    @property
    def disturbed(self) -> bool:
        """Whether it is worth a remark."""
        return self.half > DISTURBED * self.seconds


def undisturbed(times: Sequence[float]) -> float:
    """The 20th percentile of `times`; of up to five the least.

    It holds while up to four fifths of the times are longer because of other processes, and is no lucky extreme where
    there are many.
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
) -> Timed:
    """The time of a step, from groups of steps that are timed one after the other.

    A group lasts about a 20th of the window, or one step: so a step's own variation and the wait at a group's end
    average out, while a disturbance spoils only the groups it falls into.

    Args:
        step: the work.
        wait: for the device, at the end of a group.
        seconds: the window, exceeded only to reach `least`.
        least: steps, unless they take more than twice the window.
        most: steps.
        stopped: ends it early.
    """
    times: list[float] = []
    count = 0
    begin = before = time.perf_counter()
    while not stopped() and count < most and (before - begin < seconds * (2 if count < least else 1) or not count):
        size, now = 0, before
        while not size or (now - before < seconds / GROUPS and count + size < most):
            step()
            size, now = size + 1, time.perf_counter()
        wait()
        now = time.perf_counter()
        times.append((now - before) / size)
        count, before = count + size, now
    if not times:
        return Timed(0.0, 0)
    return Timed(undisturbed(times), count, sorted(times)[len(times) // 2])


def repeat_in(seconds: float, work: Callable[[], object], most: int = 3) -> float:
    """The time of `work`, which is done once, and again up to `most` times while that fits into `seconds`."""
    times: list[float] = []
    begin = time.perf_counter()
    while not times or (len(times) < most and time.perf_counter() - begin + min(times) < seconds):
        before = time.perf_counter()
        work()
        times.append(time.perf_counter() - before)
    return undisturbed(times)


def writing_seconds(folder: Path, size: int) -> float:
    """Seconds to write, hash and flush `size` bytes to the disk of `folder`, as a checkpoint is; timed with at most
    64 MiB of them in a file that has no name, so that nothing is left even by a kill.

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
