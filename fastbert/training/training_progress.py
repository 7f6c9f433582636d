"""Progress of a training run: steps, time left and latest figures."""

import math
from collections.abc import Mapping

from fastbert.progress import Progress, duration

Column = float | int | str | bool | None


class TrainingProgress(Progress):
    """Steps done, time left and the figures of the last logged row.

    Args:
        total: number of planned steps.
        done: number of steps done before this session.
    """

    def __init__(self, total: int, done: int) -> None:
        super().__init__("training", total, "steps", done)
        self._columns: dict[str, Column] = {}
        self._row: Mapping[str, Column] = {}

    def advance(self, step: int, columns: Mapping[str, Column]) -> None:
        """Sets the number of steps done. `columns` that are not None are shown until a logged row contains them."""
        self._columns |= {name: value for name, value in columns.items() if value is not None}
        if step > self.done:
            self.update(step)

    def log(self, step: int, row: Mapping[str, Column]) -> None:
        """Advances to a logged row; its loss, lr, tokens_per_second and mfu (a fraction) are shown."""
        self._row = row
        self.advance(step, {})

    def text(self, now: float) -> str:
        """Line of text, for example "step 1200/3000  2:31 left  loss 5.432  lr 9.1e-04"."""
        left = self.seconds_left(now)
        time_left = f"first step {duration(now - self.begin)}" if left is None else f"{duration(left)} left"
        parts = (self.notice, f"step {self.done}/{self.total}", time_left, *_figures({**self._columns, **self._row}))
        return "  ".join(part for part in parts if part)


def _figures(columns: Mapping[str, Column]) -> list[str]:
    """`columns` as text, in a fixed order."""
    figures = []
    if "epoch" in columns:
        figures.append(f"epoch {columns['epoch']}")
    if "loss" in columns:
        figures.append(f"loss {_number(columns['loss']):.3f}")
    if "lr" in columns:
        figures.append(f"lr {_number(columns['lr']):.1e}")
    if "tokens_per_second" in columns:
        figures.append(f"{_thousands(_number(columns['tokens_per_second']))} tokens/s")
    if columns.get("mfu") is not None:
        figures.append(f"MFU {100 * columns['mfu']:.0f} %")
    return figures


def _number(value: Column) -> float:
    return math.nan if value is None else float(value)


def _thousands(value: float) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{letter}"
    return f"{value:.0f}"
