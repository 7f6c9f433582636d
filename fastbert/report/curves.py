"""Learning curves of runs: thinned series for a page, and the static plot of one run as SVG."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from fastbert.figures import panels_below_each_other
from fastbert.report.page import escape
from fastbert.report.runs import Run
from fastbert.training.logbook import smoothed
from fastbert.training.splits import named_splits, record_split

MOST_POINTS = 1500  # per curve
AXES = {"steps": "step", "tokens": "tokens", "flops": "training FLOPs", "minutes": "minutes of training"}
"""Quantity on the x axis -> its title."""
_TEXT, _LINE = "#010203", "#010204"  # replaced by the page's colors for light and dark
_COUNTED = {"step", "split", "loss", "tokens", "length"}  # columns of a validation that are not further metrics


@dataclass(frozen=True)
class Curve:
    """A thinned series."""

    x: dict[str, list[float]]
    """Axis -> position of each point."""
    y: list[float | None]
    """None: not finite."""
    mean: list[float | None] | None
    """Mean of the values that each point represents; None if no point was left out."""


def curve(run: Run, split: str, column: str, most: int = MOST_POINTS) -> Curve | None:
    """The curve of a column; None if the run has no finite value of it."""
    found = run.column(split, column)
    if not any(value is not None for _, value in found):
        return None
    steps, values = [step for step, _ in found], [value for _, value in found]
    keep, mean = thinned(values, most)
    at = np.array([steps[index] for index in keep], dtype=float)
    clock = run.clock
    x = {axis: _rounded(np.interp(at, clock["steps"], clock[axis])) for axis in AXES if axis != "steps"}
    return Curve({"steps": _rounded(at), **x}, [values[index] for index in keep], mean)


def thinned(values: Sequence[float | None], most: int) -> tuple[list[int], list[float | None] | None]:
    """Selects at most `most` of the values: the first, the last, and the extremes of equal sections between them.

    Returns:
        The selected indices, and for each the mean of its section; None for the means if all values are selected.
    """
    if len(values) <= most:
        return list(range(len(values))), None
    bounds = np.linspace(1, len(values) - 1, (most - 2) // 3 + 1).astype(int)
    keep, means = [0], [values[0]]
    for start, stop in pairwise(bounds.tolist()):
        finite = [index for index in range(start, stop) if values[index] is not None]
        lost = [index for index in range(start, stop) if values[index] is None][:1]  # shown as a gap
        extremes = {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)} if finite else set()
        mean = sum(values[index] for index in finite) / len(finite) if finite else None
        for index in sorted({*extremes, *lost}):
            keep.append(index)
            means.append(None if index in lost else mean)
    return [*keep, len(values) - 1], [*means, values[-1]]


def _rounded(values: np.ndarray) -> list[float]:
    """Seven significant digits, whole numbers as such: shorter in JSON."""
    return [int(value) if value.is_integer() else float(f"{value:.7g}") for value in values.tolist()]


def further_metrics(runs: Sequence[Run]) -> list[str]:
    """Further metrics that validations of the runs measured, such as accuracy."""
    found = (column for run in runs for record in run.records if record["split"] == "validation" for column in record)
    return [column for column in dict.fromkeys(found) if column not in _COUNTED]


def curves_svg(run: Run, baseline: float | None) -> str | None:
    """Plots the loss, its parts if there are any, otherwise the first further metric of validations (such as accuracy),
    and the learning rate of a run.

    Args:
        baseline: the unigram entropy, as a dotted line; None where the loss cannot be compared with it.

    Returns:
        HTML, as `svg_of`; None if there is no loss.

    Raises:
        ImportError: matplotlib is not installed.
    """
    train, validation = curve(run, "train", "loss", 600), curve(run, "validation", "loss", 600)
    if train is None and validation is None:
        return None
    others = {name: curve(run, record_split(name), "loss", 600) for name in named_splits(run.records)}
    others = {name: one for name, one in others.items() if one}
    names = further_metrics([run])
    names = [name for name in names if name.endswith("_loss")] or names[:1]
    further = [(name.replace("_", " "), curve(run, "validation", name, 600)) for name in names]
    further = [(title, one) for title, one in (*further, ("learning rate", curve(run, "train", "lr", 200))) if one]

    def plot(panels: Sequence[Any]) -> None:
        if train:
            finite = [point for point in run.column("train", "loss") if point[1] is not None]
            steps, losses = zip(*finite, strict=True)
            every = max(1, len(steps) // 300)
            panels[0].plot(train.x["steps"], _floats(train.y), color="C0", alpha=0.3, linewidth=0.8)
            panels[0].plot(steps[::every], smoothed(losses)[::every], color="C0", label="training (smoothed)")
        for number, (name, one) in enumerate(others.items()):
            label, x = f"validation of {name}", one.x["steps"]
            panels[0].plot(x, _floats(one.y), "s--", color=f"C{3 + number}", markersize=3.5, label=label)
        if validation:
            label = "validation of new" if others else "validation"
            panels[0].plot(validation.x["steps"], _floats(validation.y), "o-C1", markersize=3.5, label=label)
        if baseline is not None:
            panels[0].axhline(baseline, color=_TEXT, linestyle=":", label=f"unigram entropy {baseline:.2f}")
        for panel, (_, one) in zip(panels[1:], further, strict=True):
            panel.plot(one.x["steps"], _floats(one.y), "o-" if len(one.y) < 60 else "-", color="C2", markersize=3)

    return svg_of(plot, ["loss", *(title for title, _ in further)], "step")


def svg_of(plot: Callable[[Sequence[Any]], None], titles: Sequence[str], axis: str) -> str:
    """Plots panels below each other as an <svg> element in the colors of the page, equal to the byte for equal data.

    Args:
        plot: function of matplotlib's axes, one for each panel; the legend is in the first.
        titles: of the panels' y axes; the first panel is twice as high.
        axis: title of the x axis.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastbert", "font.family": "sans-serif"}):
        heights = [2.2, *(1 for _ in titles[1:])]
        figure, panels = panels_below_each_other(9.5, 1.8 + 1.6 * len(titles), heights, top=0.15)
        plot(panels)
        panels[0].legend(frameon=False, labelcolor=_TEXT)
        for panel, title in zip(panels, titles, strict=True):
            panel.set_ylabel(title, color=_TEXT, parse_math=False)
            panel.grid(color=_LINE, linewidth=0.7)
            panel.tick_params(colors=_TEXT, labelsize=9)
            panel.spines[:].set_color(_LINE)
        panels[-1].set_xlabel(axis, color=_TEXT)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(_TEXT, "var(--text)").replace(_LINE, "var(--line)")
    text = text.replace("<svg", f'<svg role="img" aria-label="{escape(titles[0])}"', 1)
    return f'<div class="scroll">{text}</div>'


def _floats(values: Sequence[float | None]) -> list[float]:
    """NaN, which is not plotted, for None."""
    return [float("nan") if value is None else value for value in values]
