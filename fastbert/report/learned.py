"""Changes during a run, learned or forgotten: loss and accuracy of each validation split at its start and end."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fastbert.training.splits import NEW, named_splits, split_name

_COLUMNS = ("loss", "accuracy")


class Change(NamedTuple):
    """Change of a metric on a validation split during a run."""

    split: str
    metric: str
    """loss or accuracy."""
    step: int
    """Step of the first validation."""
    first: float
    last: float

    @property
    def meaning(self) -> str:
        """better or worse; empty if there is no change."""
        better = self.last < self.first if self.metric == "loss" else self.last > self.first
        return "" if self.last == self.first else "better" if better else "worse"

    def texts(self) -> tuple[str, str, str]:
        """First value, last value, and difference; accuracies in percent."""
        scale, digits, unit = (1, 3, "") if self.metric == "loss" else (100, 1, " %")
        difference = f"{scale * (self.last - self.first):+.{digits}f}"
        return f"{scale * self.first:.{digits}f}{unit}", f"{scale * self.last:.{digits}f}{unit}", difference


def changes(records: Sequence[Mapping[str, Any]]) -> list[Change]:
    """Changes between the first and the last validation of each split, if a run validated several."""
    others = named_splits(records)
    found = []
    for name in (NEW, *others) if others else ():
        for metric in _COLUMNS:
            values = [
                (record["step"], record[metric])
                for record in records
                if split_name(record["split"]) == name and record.get(metric) is not None
            ]
            if len(values) > 1:
                (step, first), (_, last) = values[0], values[-1]
                found.append(Change(name, metric, step, first, last))
    return found


def change_lines(found: Sequence[Change]) -> list[str]:
    """Lines of the summary at the end of a run."""
    if not found:
        return []
    head = ("", f"step {found[0].step}", "end", "change", "")
    rows = [head, *((f"{one.split}: {one.metric}", *one.texts(), one.meaning) for one in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *values, meaning in rows:
        cells = (value.rjust(width) for value, width in zip(values, widths[1:-1], strict=True))
        lines.append(f"  {name.ljust(widths[0])}  {'  '.join(cells)}  {meaning}".rstrip())
    return ["", "Learned and forgotten, on the held-out documents of each data", *lines]
