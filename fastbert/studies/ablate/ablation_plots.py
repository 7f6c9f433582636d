"""The drawings of an ablation's report, as PNG: a measure against steps, FLOPs and minutes, and fractions of cost."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastbert.studies.ablate.analysis import Curve, Measure, VariantComparison
from fastbert.studies.ablate.options import UNITS
from fastbert.studies.shared.plots import panels_of, save, style_axes

LABELS = {"steps": "steps", "flops": "FLOPs", "minutes": "minutes of training"}


def plot_curves(path: Path, measure: Measure, floor: float | None) -> None:
    """A panel for each unit: every seed a thin line, the median at each point a thick one, the baseline's final median
    dotted, and `floor`, the unigram entropy for a loss in nats, dashed."""
    figure, panels = panels_of(len(UNITS), 4.2)
    first = next(iter(measure.curves))
    for panel, unit in zip(panels, UNITS, strict=True):
        for number, (name, curves) in enumerate(measure.curves.items()):
            for curve in curves.values():
                line = [(getattr(point, unit), point.value) for point in curve]
                panel.plot(*zip(*line, strict=True), ".-", color=f"C{number}", alpha=0.3, linewidth=0.8, markersize=4)
            if curves:
                line = median_curve(list(curves.values()), unit)
                panel.plot(*zip(*line, strict=True), "o-", color=f"C{number}", markersize=4, label=name)
        finals = measure.finals(first).values()
        panel.axhline(statistics.median(finals), color="0.35", linestyle=":", linewidth=1)
        if floor is not None:
            panel.axhline(floor, color="0.6", linestyle="--", linewidth=1)
        panel.set_xlim(left=0)
        panel.set_xlabel(LABELS[unit], fontsize=9)
        style_axes(panel, "both")
    panels[0].set_ylabel(measure.name, fontsize=9)
    panels[0].legend(frameon=False, fontsize=8)
    save(figure, path)


def median_curve(curves: Sequence[Curve], unit: str) -> list[tuple[float, float]]:
    """(Median cost, median value) at each point that any seed has."""
    places = sorted({point.steps for curve in curves for point in curve})
    found = [[point for curve in curves for point in curve if point.steps == steps] for steps in places]
    return [
        (statistics.median(getattr(p, unit) for p in points), statistics.median(p.value for p in points))
        for points in found
    ]


def plot_fractions(path: Path, measures: Mapping[str, Sequence[VariantComparison]]) -> None:
    """A panel for each measure: for each variant the fraction of the baseline's steps, FLOPs and minutes, every seed a
    point, the median a bar; hollow where it is undecided. Seeds that have not reached it are counted in words."""
    figure, panels = panels_of(len(measures), 4.2)
    for panel, (title, rows) in zip(panels, measures.items(), strict=True):
        _plot_fractions(panel, rows)
        panel.set_title(title, loc="left", fontsize=10, fontweight="bold")
    figure.legend(*_unit_legend(), frameon=False, fontsize=8, ncols=len(UNITS), loc="outside lower center")
    save(figure, path)


def _plot_fractions(panel: Any, rows: Sequence[VariantComparison]) -> None:
    for place, row in enumerate(rows):
        for number, unit in enumerate(UNITS):
            height = place + 0.22 * (number - 1)
            values = row.fractions[unit].values if row.fractions else ()
            values = [100 * value for value in values if math.isfinite(value)]
            fill = f"C{number}" if row.decided else "none"
            panel.plot(values, [height] * len(values), "o", color=f"C{number}", markerfacecolor=fill, markersize=4)
            if row.fractions and math.isfinite(middle := 100 * row.fractions[unit].median):
                panel.vlines(middle, height - 0.09, height + 0.09, color=f"C{number}", linewidth=2)
        missed = sum(map(math.isinf, row.fractions["steps"].values)) if row.fractions else 0
        if missed:
            text = f"not reached: {missed} of {len(row.seeds)} seeds"
            height = place if missed == len(row.seeds) else place - 0.36
            style = {"fontsize": 7, "color": "0.35", "verticalalignment": "center"}
            panel.text(0.02, height, text, **style, transform=panel.get_yaxis_transform())
    panel.axvline(100, color="0.35", linestyle=":", linewidth=1)
    panel.set_yticks(range(len(rows)), [row.variant for row in rows], fontsize=8)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.set_xlim(left=0)
    panel.set_xlabel("% of the baseline's cost", fontsize=9)
    style_axes(panel, "x")


def _unit_legend() -> tuple[list[Any], list[str]]:
    from matplotlib.lines import Line2D

    marks = [Line2D([], [], marker="o", linestyle="", color=f"C{number}", markersize=4) for number in range(len(UNITS))]
    return marks, [LABELS[unit] for unit in UNITS]
